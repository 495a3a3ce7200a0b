//! What `top` shows, and what keys and news do to it.

use crate::rates::{self, Rate, Rates};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::widgets::TableState;
use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::ops::ControlFlow;
use vlanswitchd::control::api::{Port, Stats};

/// Readings kept: a minute of them.
pub const HISTORY: usize = 60;

/// The columns, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Column {
    Name,
    Vlans,
    State,
    FromFrames,
    FromBits,
    ToFrames,
    ToBits,
    Drops,
    Ring,
}

impl Column {
    pub const ALL: [Self; 9] = [
        Self::Name,
        Self::Vlans,
        Self::State,
        Self::FromFrames,
        Self::FromBits,
        Self::ToFrames,
        Self::ToBits,
        Self::Drops,
        Self::Ring,
    ];

    /// The column so many places further, around the end.
    fn step(self, by: usize) -> Self {
        let place = Self::ALL.iter().position(|column| *column == self).unwrap_or(0);
        Self::ALL.into_iter().cycle().nth(place + by).unwrap_or(self)
    }

    fn compare(self, a: &Row, b: &Row) -> Ordering {
        // Numbers: the largest first.
        let number = |value: fn(&Row) -> f64| value(b).total_cmp(&value(a));
        match self {
            Self::Name => a.port.name.cmp(&b.port.name),
            Self::Vlans => first_vlan(a.port).cmp(&first_vlan(b.port)),
            Self::State => a.port.state.cmp(&b.port.state),
            Self::FromFrames => number(|row| row.rate.from.frames),
            Self::FromBits => number(|row| row.rate.from.bits),
            Self::ToFrames => number(|row| row.rate.to.frames),
            Self::ToBits => number(|row| row.rate.to.bits),
            Self::Drops => number(|row| row.rate.drops()),
            Self::Ring => number(|row| row.port.ring_peak),
        }
    }
}

/// VLANs by number: `9` before `101`.
fn first_vlan(port: &Port) -> (u32, &str) {
    let digits = port.vlans.split(|char: char| !char.is_ascii_digit()).next();
    (digits.and_then(|digits| digits.parse().ok()).unwrap_or(u32::MAX), &port.vlans)
}

/// What the keys go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Screen {
    /// All ports.
    List,
    /// All ports, while a filter is typed.
    Filter,
    /// One port, and the first line shown.
    Details(String, u16),
    /// The keys.
    Help,
}

/// A line of the list.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    pub port: &'a Port,
    pub rate: Rate,
}

/// Everything that is shown.
#[derive(Debug)]
pub struct State {
    /// The last reading, and the rates up to it.
    pub stats: Stats,
    pub rates: Rates,
    /// Readings that came in a pause, for its end.
    waiting: VecDeque<Stats>,
    /// Bits a second, both ways, by port; the last reading last.
    history: HashMap<String, VecDeque<f64>>,
    /// The same of the uplink.
    uplink_history: VecDeque<f64>,
    pub screen: Screen,
    pub sort: Column,
    pub reverse: bool,
    pub filter: String,
    pub paused: bool,
    /// The port under the cursor, by name: it stays when lines move.
    selected: Option<String>,
    /// How far the list is scrolled; the view keeps the cursor in sight.
    pub table: TableState,
}

impl State {
    pub fn new(stats: Stats) -> Self {
        let mut state = Self {
            rates: rates::between(&stats, &stats),
            waiting: VecDeque::new(),
            stats,
            history: HashMap::new(),
            uplink_history: VecDeque::new(),
            screen: Screen::List,
            sort: Column::Name,
            reverse: false,
            filter: String::new(),
            paused: false,
            selected: None,
            table: TableState::default(),
        };
        state.select(0);
        state
    }

    /// A new reading.
    pub fn update(&mut self, stats: Stats) {
        if !self.paused {
            return self.show(stats);
        }
        // One more than the history: the first rate needs a reading before it.
        if self.waiting.len() > HISTORY {
            self.waiting.pop_front();
        }
        self.waiting.push_back(stats);
    }

    fn pause(&mut self) {
        self.paused = !self.paused;
        if !self.paused {
            for stats in std::mem::take(&mut self.waiting) {
                self.show(stats);
            }
        }
    }

    fn show(&mut self, stats: Stats) {
        let rates = rates::between(&self.stats, &stats);
        push(&mut self.uplink_history, rates.uplink);
        self.history.retain(|name, _| stats.ports.iter().any(|port| port.name == *name));
        for (port, rate) in stats.ports.iter().zip(&rates.ports) {
            push(self.history.entry(port.name.clone()).or_default(), *rate);
        }
        self.stats = stats;
        self.rates = rates;
        self.settle();
    }

    /// The lines of the list, filtered and sorted.
    pub fn rows(&self) -> Vec<Row<'_>> {
        let mut rows: Vec<Row> = self
            .stats
            .ports
            .iter()
            .zip(&self.rates.ports)
            .map(|(port, rate)| Row { port, rate: *rate })
            .filter(|row| row.port.name.contains(&self.filter))
            .collect();
        rows.sort_by(|a, b| {
            let order = self.sort.compare(a, b);
            // Equal lines keep their places, or they would dance.
            let order = if self.reverse { order.reverse() } else { order };
            order.then_with(|| a.port.name.cmp(&b.port.name))
        });
        rows
    }

    /// The last minute of a port.
    pub fn history(&self, port: &str) -> impl Iterator<Item = f64> {
        self.history.get(port).into_iter().flatten().copied()
    }

    /// The last minute of the uplink.
    pub fn uplink_history(&self) -> impl Iterator<Item = f64> {
        self.uplink_history.iter().copied()
    }

    /// The port of the details, if it is still there.
    pub fn port(&self, name: &str) -> Option<Row<'_>> {
        let mut ports = self.stats.ports.iter().zip(&self.rates.ports);
        let (port, rate) = ports.find(|(port, _)| port.name == name)?;
        Some(Row { port, rate: *rate })
    }

    /// A key; Break if it ends the view.
    pub fn key(&mut self, key: KeyEvent) -> ControlFlow<()> {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c') => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            };
        }
        match &mut self.screen {
            Screen::Filter => self.filter_key(key.code),
            Screen::Help => self.screen = Screen::List,
            Screen::Details(_, line) => match key.code {
                KeyCode::Up | KeyCode::Char('k') => *line = line.saturating_sub(1),
                KeyCode::Down | KeyCode::Char('j') => *line = line.saturating_add(1),
                KeyCode::Char('p') => self.pause(),
                KeyCode::Char('q') | KeyCode::Esc | KeyCode::Enter | KeyCode::Left => {
                    self.screen = Screen::List;
                }
                _ => {}
            },
            Screen::List => return self.list_key(key.code),
        }
        self.settle();
        ControlFlow::Continue(())
    }

    fn filter_key(&mut self, code: KeyCode) {
        match code {
            KeyCode::Enter => self.screen = Screen::List,
            KeyCode::Esc => {
                self.filter.clear();
                self.screen = Screen::List;
            }
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Char(char) => self.filter.push(char),
            _ => {}
        }
    }

    fn list_key(&mut self, code: KeyCode) -> ControlFlow<()> {
        const PAGE: usize = 10;
        let place = self.table.selected().unwrap_or(0);
        match code {
            KeyCode::Char('q') => return ControlFlow::Break(()),
            KeyCode::Up | KeyCode::Char('k') => self.select(place.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => self.select(place + 1),
            KeyCode::PageUp => self.select(place.saturating_sub(PAGE)),
            KeyCode::PageDown => self.select(place + PAGE),
            KeyCode::Home | KeyCode::Char('g') => self.select(0),
            KeyCode::End | KeyCode::Char('G') => self.select(usize::MAX),
            KeyCode::Char('s' | '>') => self.sort = self.sort.step(1),
            KeyCode::Char('<') => self.sort = self.sort.step(Column::ALL.len() - 1),
            KeyCode::Char('r') => self.reverse = !self.reverse,
            KeyCode::Char('p') => self.pause(),
            KeyCode::Char('/') => self.screen = Screen::Filter,
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => self.screen = Screen::Help,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Enter | KeyCode::Right => {
                if let Some(name) = self.selected.clone() {
                    self.screen = Screen::Details(name, 0);
                }
            }
            _ => {}
        }
        self.settle();
        ControlFlow::Continue(())
    }

    /// Puts the cursor on this line, or the last.
    fn select(&mut self, place: usize) {
        let rows = self.rows();
        let place = place.min(rows.len().saturating_sub(1));
        self.selected = rows.get(place).map(|row| row.port.name.clone());
        self.settle();
    }

    /// Finds the cursor's port again; if it is gone, the cursor stays where it was.
    fn settle(&mut self) {
        let rows = self.rows();
        let here = self.selected.as_ref();
        let place = rows.iter().position(|row| Some(&row.port.name) == here).or_else(|| {
            let last = rows.len().checked_sub(1)?;
            Some(self.table.selected().unwrap_or(0).min(last))
        });
        let selected = place.and_then(|place| rows.get(place)).map(|row| row.port.name.clone());
        self.selected = selected;
        self.table.select(place);
    }
}

fn push(history: &mut VecDeque<f64>, rate: Rate) {
    if history.len() == HISTORY {
        history.pop_front();
    }
    history.push_back(rate.from.bits + rate.to.bits);
}
