//! Draws what `top` shows.

use super::state::{Column, HISTORY, Row, Screen, State};
use crate::ports;
use crate::rates;
use crate::text::{bit_rate, percent, printable, scaled};
use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Cell, Paragraph, Row as TableRow, Table};
use vlanswitchd::control::report::Tone;

pub const KEYS: &str = "\
Keys
  up down j k      move                   s > <   sort by another column
  Page Up Down     move by ten lines      r       reverse the order
  g G Home End     first, last port       /       only names with this in them
  Enter            all about a port       p       stop and go on
  q                back, quit             ?       this page

Columns
  from guest       what the VM sends and we carry: frames and bits a second
  to guest         what it gets
  drops            frames lost a second, both ways; Enter says why
  ring             how full the port's receive buffer was in the last second;
                   from 100 % on frames are lost
  last minute      bits a second both ways, each line by its own highest

States
  attached         it works             no_carrier  up, but no VM has it open
  down             taken down           absent      there is no such device

Any key goes back.";

pub const HINTS: &str = " ? help  q quit  Enter details  s sort  r reverse  / filter  p pause";

/// Draws everything.
pub fn draw(frame: &mut Frame, state: &mut State) {
    let [head, body, foot] =
        Layout::vertical([Constraint::Length(3), Constraint::Min(0), Constraint::Length(1)])
            .areas(frame.area());
    frame.render_widget(header(state, head.width), head);
    match &state.screen {
        Screen::Help => frame.render_widget(Paragraph::new(KEYS), body),
        Screen::Details(name, line) => {
            let text = details(state, name);
            // Never past the end: the text would be gone, and `k` seem dead.
            let lines = u16::try_from(text.lines().count()).unwrap_or(u16::MAX);
            let line = (*line).min(lines.saturating_sub(body.height));
            frame.render_widget(Paragraph::new(text).scroll((line, 0)), body);
            if let Screen::Details(_, scrolled) = &mut state.screen {
                *scrolled = line;
            }
        }
        Screen::List | Screen::Filter => list(frame, state, body),
    }
    frame.render_widget(footer(state), foot);
}

fn header(state: &State, width: u16) -> Paragraph<'static> {
    let uplink = &state.stats.uplink;
    let rate = &state.rates.uplink;
    let attached = state.stats.ports.iter().filter(|port| port.state == "attached").count();
    let loads: Vec<String> =
        state.stats.workers.iter().map(|worker| percent(worker.load)).collect();
    let drops = rates::all_drops(&state.rates);
    let drops = Span::styled(format!("drops {}/s", scaled(drops)), drops_style(drops));
    let mut first = vec![
        "uplink ".into(),
        printable(&uplink.name).bold(),
        " ".into(),
        Span::styled(printable(&uplink.state), state_style(&uplink.state)),
        format!("   {attached} of {} ports attached   ", state.stats.ports.len()).into(),
        drops,
        format!("   load {}", loads.join(" ")).into(),
    ];
    if state.paused {
        first.insert(0, " PAUSED ".reversed());
    }
    let one_way = |frames, bits| format!("{} frames/s  {}", scaled(frames), bit_rate(bits));
    let second = format!(
        "received {}   sent {}",
        one_way(rate.from.frames, rate.from.bits),
        one_way(rate.to.frames, rate.to.bits)
    );
    let graph = usize::from(width).saturating_sub("last minute ".len()).min(HISTORY);
    let third = format!("last minute {}", sparkline(state.uplink_history(), graph));
    Paragraph::new(vec![Line::from(first), second.into(), third.into()])
}

fn footer(state: &State) -> Line<'static> {
    match state.screen {
        Screen::Filter => Line::from(format!(
            " ports with in their name: {}_   Enter keep  Esc all",
            state.filter
        ))
        .reversed(),
        Screen::List if !state.filter.is_empty() => {
            Line::from(format!(" only ports with '{}': Esc shows all ", state.filter)).reversed()
        }
        Screen::Details(..) => Line::from(" q back  j k scroll  p pause").dim(),
        Screen::List | Screen::Help => Line::from(HINTS).dim(),
    }
}

/// Widths of the columns but the last, which has the rest.
const WIDTHS: [u16; 9] = [15, 8, 10, 6, 5, 6, 5, 5, 5];

fn list(frame: &mut Frame, state: &mut State, area: Rect) {
    let used: u16 = WIDTHS.iter().map(|width| width + 1).sum();
    let graph = usize::from(area.width.saturating_sub(used)).min(HISTORY);
    let rows: Vec<TableRow> = state.rows().iter().map(|row| line(row, state, graph)).collect();
    if rows.is_empty() {
        let text = if state.filter.is_empty() { "no ports" } else { "no port has this name" };
        frame.render_widget(Paragraph::new(text), area);
        return;
    }
    let widths = WIDTHS.map(Constraint::Length).into_iter().chain([Constraint::Min(0)]);
    let table = Table::new(rows, widths)
        .header(table_header(state))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    frame.render_stateful_widget(table, area, &mut state.table);
}

fn table_header(state: &State) -> TableRow<'static> {
    let titles = [
        "\nport",
        "\nvlans",
        "\nstate",
        "from\nframes",
        "guest\nbit/s",
        "to\nframes",
        "guest\nbit/s",
        "\ndrops",
        "\nring",
    ];
    let cells = Column::ALL.iter().zip(titles).map(|(column, title)| {
        let sorted = *column == state.sort;
        let style = if sorted { Style::new().bold().underlined() } else { Style::new().dim() };
        Cell::from(Text::from(title).style(style).alignment(alignment(*column)))
    });
    let last = Cell::from(Text::from("last\nminute").dim());
    TableRow::new(cells.chain([last])).height(2)
}

fn alignment(column: Column) -> Alignment {
    match column {
        Column::Name | Column::Vlans | Column::State => Alignment::Left,
        _ => Alignment::Right,
    }
}

fn line(row: &Row, state: &State, graph: usize) -> TableRow<'static> {
    let Row { port, rate } = row;
    let number = |value: f64| Text::from(compact(value)).alignment(Alignment::Right);
    let drops = rate.drops();
    TableRow::new([
        Cell::from(printable(&port.name)),
        Cell::from(short(&port.vlans)),
        Cell::from(printable(&port.state)).style(state_style(&port.state)),
        Cell::from(number(rate.from.frames)),
        Cell::from(number(rate.from.bits)),
        Cell::from(number(rate.to.frames)),
        Cell::from(number(rate.to.bits)),
        Cell::from(number(drops)).style(drops_style(drops)),
        Cell::from(Text::from(percent(port.ring_peak)).alignment(Alignment::Right)),
        Cell::from(sparkline(state.history(&port.name), graph)),
    ])
}

/// Four characters at most.
fn compact(value: f64) -> String {
    scaled(value).replace(' ', "")
}

/// Eight at most.
fn short(vlans: &str) -> String {
    match vlans.get(..5) {
        Some(start) if vlans.len() > 8 => format!("{start}..."),
        _ => printable(vlans),
    }
}

fn details(state: &State, name: &str) -> String {
    let Some(Row { port, rate }) = state.port(name) else {
        return format!("{} is not there any more", printable(name));
    };
    let mut text = format!(
        "\nfrom guest  {:>6} frames/s  {:>10}  dropped {}/s\nto guest    {:>6} frames/s  {:>10}  dropped {}/s\n\
         last minute {}\n\n",
        scaled(rate.from.frames),
        bit_rate(rate.from.bits),
        scaled(rate.from.drops),
        scaled(rate.to.frames),
        bit_rate(rate.to.bits),
        scaled(rate.to.drops),
        sparkline(state.history(name), HISTORY)
    );
    text.push_str(&ports::describe(port, false));
    text
}

fn state_style(state: &str) -> Style {
    match Tone::of_state(state) {
        Tone::Good => Style::new().fg(Color::Green),
        Tone::Doubtful => Style::new().fg(Color::Yellow),
        Tone::Bad => Style::new().fg(Color::Red).bold(),
        Tone::Plain | Tone::Quiet => Style::new(),
    }
}

fn drops_style(drops: f64) -> Style {
    if drops > 0.0 { Style::new().fg(Color::Yellow) } else { Style::new() }
}

/// The last minute in so many characters, the present at the right. Steps that share
/// a character show the highest.
pub fn sparkline(history: impl Iterator<Item = f64>, width: usize) -> String {
    const LEVELS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    if width == 0 {
        return String::new();
    }
    let values: Vec<f64> = history.collect();
    let highest = values.iter().copied().fold(0.0, f64::max);
    let missing = HISTORY.saturating_sub(values.len());
    let mut columns = vec![None::<f64>; width];
    for (step, value) in values.into_iter().enumerate() {
        if let Some(column) = columns.get_mut((missing + step) * width / HISTORY) {
            *column = Some(column.unwrap_or(0.0).max(value));
        }
    }
    let level = |value: Option<f64>| match value {
        None => 0,
        Some(value) if highest > 0.0 => (value / highest * 7.0).round() as usize + 1,
        Some(_) => 1,
    };
    columns.into_iter().map(|value| LEVELS.get(level(value)).copied().unwrap_or('█')).collect()
}
