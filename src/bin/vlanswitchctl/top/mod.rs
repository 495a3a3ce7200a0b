//! `top`: ports and their rates on the full screen, renewed each second.
//!
//! `state` is what is shown and what keys do to it; it knows no terminal. `view`
//! draws it; it changes nothing. Here are the terminal, the connection and the clock:
//! a thread reads the switch's answers, this one the keys. Whatever ends the view,
//! a panic included, the terminal is given back as it was.

mod state;
mod view;

use crate::context::{Context, Failure, Outcome};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use state::State;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::Duration;
use vlanswitchd::control::api::{Request, Stats, StatsReply};
use vlanswitchd::control::client::{Client, ClientError};

/// Between two readings, in milliseconds: what `state` takes for one step of the
/// last minute.
const INTERVAL: u64 = 1000;
/// A switch silent for so long is in trouble, and what is shown is not true any more.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for a key before looking for news.
const TICK: Duration = Duration::from_millis(50);

type News = Result<Stats, ClientError>;

pub fn run(context: &Context) -> Outcome {
    if context.json || !context.terminal {
        let advice = "top draws on a terminal; use `stats --watch`, with --json for programs";
        return Err(Failure::Arguments(advice.to_owned()));
    }
    let signals = signals().map_err(|errno| Failure::Message(format!("signals: {errno}")))?;
    let mut client = context.connect()?;
    client.start(&Request::GetStats { interval: Some(INTERVAL) })?;
    // The first answer before the screen changes: errors are easier to read there.
    let first: StatsReply = client.next(Some(PATIENCE))?.read()?;
    let mut state = State::new(first.stats);
    let (sender, news) = sync_channel(4);
    // Not joined: it may be in the middle of waiting, and ends with the process.
    thread::spawn(move || read(client, &sender));
    let mut terminal = ratatui::try_init().map_err(|error| on_terminal(&error))?;
    let result = show(&mut terminal, &mut state, &news, &signals);
    ratatui::restore();
    result.map(|()| ExitCode::SUCCESS)
}

/// What would end us with the terminal as it is now.
fn signals() -> nix::Result<SignalFd> {
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
        mask.add(signal);
    }
    mask.thread_block()?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

fn read(mut client: Client, sender: &SyncSender<News>) {
    loop {
        let news = client
            .next(Some(PATIENCE))
            .and_then(|reply| reply.read::<StatsReply>())
            .map(|reply| reply.stats);
        let last = news.is_err();
        if sender.send(news).is_err() || last {
            return;
        }
    }
}

fn show(
    terminal: &mut DefaultTerminal,
    state: &mut State,
    news: &Receiver<News>,
    signals: &SignalFd,
) -> Result<(), Failure> {
    let mut changed = true;
    loop {
        if changed {
            terminal.draw(|frame| view::draw(frame, state)).map_err(|error| on_terminal(&error))?;
            changed = false;
        }
        if event::poll(TICK).map_err(|error| on_terminal(&error))? {
            let event = event::read().map_err(|error| on_terminal(&error))?;
            if let Event::Key(key) = event
                && key.kind != KeyEventKind::Release
                && state.key(key) == ControlFlow::Break(())
            {
                return Ok(());
            }
            changed = true;
        }
        match news.try_recv() {
            Ok(stats) => {
                state.update(stats?);
                changed = true;
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return Err(ClientError::Closed.into()),
        }
        if matches!(signals.read_signal(), Ok(Some(_))) {
            return Ok(());
        }
    }
}

fn on_terminal(error: &std::io::Error) -> Failure {
    Failure::Message(format!("terminal: {error}"))
}

#[cfg(test)]
mod tests;
