//! What `top` draws, on a terminal in memory, and what its keys do.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use super::state::{Column, HISTORY, Screen, State};
use super::view;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use std::ops::ControlFlow;
use std::path::Path;
use vlanswitchd::control::api::{Flow, Port, Sent, Stats, Uplink, Worker};

fn port(name: &str, vlans: &str, state: &str) -> Port {
    Port {
        name: name.to_owned(),
        vlans: vlans.to_owned(),
        mode: "tunnel".to_owned(),
        map: format!("{vlans}={name}"),
        options: Default::default(),
        state: state.to_owned(),
        since: u64::MAX,
        ifindex: Some(7),
        mtu: Some(1500),
        datapath: "packet".to_owned(),
        datapath_reason: None,
        worker: Some(0),
        ring_peak: 0.5,
        from_guest: Flow::default(),
        to_guest: Flow::default(),
    }
}

/// Counters after so many seconds: tap-web1 sends a million frames each second,
/// tap-db gets more from step to step and loses some.
fn stats(second: u64) -> Stats {
    let mut ports = vec![
        port("tap-web1", "101", "attached"),
        port("tap-fw", "200-210,300", "no_carrier"),
        port("tap-db", "9", "absent"),
    ];
    ports[0].from_guest.out_frames = second * 1_000_000;
    ports[0].from_guest.out_bytes = second * 125_000_000;
    ports[2].to_guest.out_frames = second * second * 10;
    ports[2].to_guest.out_bytes = second * second * 1000;
    ports[2].to_guest.drops.insert("guest_queue_full".to_owned(), second * 12);
    let from_wire = Flow {
        out_frames: second * second * 10,
        out_bytes: second * second * 1000,
        ..Flow::default()
    };
    Stats {
        time: 1000 * second,
        uplink: Uplink {
            name: "eth0".to_owned(),
            state: "up".to_owned(),
            since: 0,
            ifindex: Some(2),
            mtu: Some(1500),
            mtu_needed: 1500,
            ring_peak: 0.0,
            from_wire,
            to_wire: Sent { out_frames: second * 1_000_000, out_bytes: second * 125_000_000 },
            unsent: 0,
        },
        ports,
        removed: None,
        unmapped: Vec::new(),
        workers: vec![Worker { load: 0.34, ..Worker::default() }],
    }
}

fn after(seconds: u64) -> State {
    let mut state = State::new(stats(0));
    (1..=seconds).for_each(|second| state.update(stats(second)));
    state
}

/// The screen's lines.
fn screen(state: &mut State, columns: u16, lines: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(columns, lines)).unwrap();
    terminal.draw(|frame| view::draw(frame, state)).unwrap();
    let buffer = terminal.backend().buffer();
    let line = |row: u16| -> String {
        (0..columns).map(|column| buffer[(column, row)].symbol().to_owned()).collect()
    };
    (0..lines).map(|row| line(row).trim_end().to_owned()).collect()
}

fn press(state: &mut State, keys: &str) {
    for char in keys.chars() {
        let code = match char {
            '\n' => KeyCode::Enter,
            '\u{1b}' => KeyCode::Esc,
            char => KeyCode::Char(char),
        };
        assert_eq!(state.key(code.into()), ControlFlow::Continue(()), "{char:?}");
    }
}

/// The ports in the order shown, and the one under the cursor.
fn order(state: &State) -> (Vec<String>, String) {
    let rows = state.rows();
    let names: Vec<String> = rows.iter().map(|row| row.port.name.clone()).collect();
    let cursor = names[state.table.selected().unwrap()].clone();
    (names, cursor)
}

/// Compares a screen with `tests/ctl/NAME.txt`.
fn snapshot(name: &str, lines: &[String]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ctl");
    let expected = snapbox::Data::read_from(&folder.join(name), None).raw();
    snapbox::assert_data_eq!(lines.join("\n") + "\n", expected);
}

#[test]
fn screens_of_80_columns_and_24_lines() {
    let mut state = after(70);
    snapshot("top-list.txt", &screen(&mut state, 80, 24));
    press(&mut state, "?");
    snapshot("top-help.txt", &screen(&mut state, 80, 24));
    press(&mut state, "q\n");
    snapshot("top-details.txt", &screen(&mut state, 80, 24));
}

#[test]
fn the_help_fits() {
    assert!(view::KEYS.lines().all(|line| line.chars().count() <= 80));
    assert!(view::KEYS.lines().count() <= 20);
}

#[test]
fn any_size_is_drawn() {
    for (columns, lines) in [(1, 1), (5, 3), (40, 10), (79, 24), (300, 100)] {
        let mut state = after(3);
        for keys in ["", "\n", "q?", "x/a"] {
            press(&mut state, keys);
            screen(&mut state, columns, lines);
        }
    }
}

#[test]
fn the_graph_shows_the_last_minute_and_the_highest_of_what_shares_a_place() {
    let mut one = vec![0.0; HISTORY];
    one[31] = 8.0;
    assert_eq!(view::sparkline(one.into_iter(), 6), "▁▁▁█▁▁");
    assert_eq!(view::sparkline([7.0, 3.5].into_iter(), 60).trim_start(), "█▅");
    assert_eq!(view::sparkline([7.0].into_iter(), 60).chars().count(), 60);
    assert_eq!(view::sparkline([1.0].into_iter(), 0), "");
}

#[test]
fn keys_sort_and_the_cursor_stays_with_its_port() {
    let mut state = after(3);
    assert_eq!(order(&state).0, ["tap-db", "tap-fw", "tap-web1"]);
    press(&mut state, "G");
    assert_eq!(order(&state).1, "tap-web1");
    press(&mut state, "s");
    assert_eq!(state.sort, Column::Vlans);
    let (names, cursor) = order(&state);
    assert_eq!(names, ["tap-db", "tap-web1", "tap-fw"], "by number");
    assert_eq!(cursor, "tap-web1");
    press(&mut state, "ss");
    assert_eq!(state.sort, Column::FromFrames);
    assert_eq!(order(&state).0[0], "tap-web1", "the largest first");
    press(&mut state, "r");
    assert_eq!(order(&state).0[2], "tap-web1");
    press(&mut state, "r<<<<");
    assert_eq!(state.sort, Column::Ring, "around the end");
    press(&mut state, "gjjjjk");
    assert_eq!(order(&state).1, order(&state).0[1]);
}

#[test]
fn a_filter_narrows_the_list() {
    let mut state = after(3);
    press(&mut state, "/web");
    assert!(screen(&mut state, 80, 24)[23].contains("web_"));
    press(&mut state, "\n");
    assert_eq!(order(&state), (vec!["tap-web1".to_owned()], "tap-web1".to_owned()));
    press(&mut state, "/xyz\n");
    assert!(state.rows().is_empty());
    assert!(screen(&mut state, 80, 24)[3].contains("no port has this name"));
    press(&mut state, "\n\u{1b}");
    assert_eq!(state.rows().len(), 3);
    assert_eq!(state.screen, Screen::List, "no details of no port");
}

#[test]
fn details_say_why_frames_are_lost() {
    let mut state = after(3);
    press(&mut state, "\n");
    let text = screen(&mut state, 80, 40).join("\n");
    assert!(text.contains("tap-db: VLAN 9"), "{text}");
    assert!(text.contains("guest_queue_full      36"), "{text}");
    assert!(text.contains("the guest does not read fast enough"), "{text}");
    press(&mut state, "jjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjj");
    let end = screen(&mut state, 80, 24);
    assert!(!end[22].is_empty(), "scrolled past the end: {end:?}");
    press(&mut state, "k");
    assert_ne!(screen(&mut state, 80, 24), end, "and back at once");
    let mut gone = stats(4);
    gone.ports.remove(2);
    state.update(gone);
    assert!(screen(&mut state, 80, 24).join("\n").contains("tap-db is not there any more"));
    press(&mut state, "q");
    assert_eq!(order(&state).0, ["tap-fw", "tap-web1"]);
}

#[test]
fn a_pause_holds_the_screen_and_not_the_history() {
    let mut state = after(3);
    press(&mut state, "p");
    let held = screen(&mut state, 80, 24);
    assert!(held[0].starts_with(" PAUSED "));
    state.update(stats(4));
    assert_eq!(screen(&mut state, 80, 24), held);
    press(&mut state, "p");
    state.update(stats(5));
    assert_eq!(state.history("tap-web1").count(), 5);
    // One second's rate, not the pause's.
    assert_eq!(state.rates.ports[0].from.frames, 1_000_000.0);
}

#[test]
fn q_and_control_c_quit() {
    let mut state = after(1);
    assert_eq!(state.key(KeyCode::Char('q').into()), ControlFlow::Break(()));
    press(&mut state, "/q");
    let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(state.key(interrupt), ControlFlow::Break(()));
}
