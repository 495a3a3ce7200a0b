//! A table for a terminal of 80 columns. What does not fit is not cut or wrapped, as
//! counters must be exact and easy to copy: the table is then written as records,
//! one line a cell.

use anstyle::{AnsiColor, Style};
use comfy_table::{CellAlignment, Table, presets};
use std::ops::Range;

/// How wide text for people may be.
pub const COLUMNS: usize = 80;
/// Blanks between two columns.
const GAP: u16 = 2;

/// What a cell says, for its colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// Nothing in particular.
    Plain,
    /// It works.
    Good,
    /// Something is missing.
    Doubtful,
    /// It does not work.
    Bad,
    /// Less important than the rest.
    Quiet,
}

impl Tone {
    /// The tone of a device's state.
    pub fn of_state(state: &str) -> Self {
        match state {
            "attached" | "up" => Self::Good,
            "no_carrier" | "down" => Self::Doubtful,
            "absent" => Self::Bad,
            _ => Self::Plain,
        }
    }

    /// The tone of a number of frames dropped.
    pub fn of_drops(frames: u64) -> Self {
        if frames == 0 { Self::Quiet } else { Self::Doubtful }
    }

    /// `text` in this tone's colour.
    pub fn paint(self, text: &str) -> String {
        let style = match self {
            Self::Plain => return text.to_owned(),
            Self::Good => AnsiColor::Green.on_default(),
            Self::Doubtful => AnsiColor::Yellow.on_default(),
            Self::Bad => AnsiColor::Red.on_default().bold(),
            Self::Quiet => Style::new().dimmed(),
        };
        format!("{style}{text}{style:#}")
    }
}

/// How many columns of a terminal a line takes.
pub fn columns_of(line: &str) -> usize {
    unicode_width::UnicodeWidthStr::width(line)
}

/// A table under construction.
#[derive(Debug)]
pub struct Sheet {
    header: Vec<String>,
    rows: Vec<Vec<(String, Tone)>>,
    numbers: Range<usize>,
}

impl Sheet {
    /// An empty table with these columns.
    pub fn new(header: &[&str]) -> Self {
        let header = header.iter().map(|name| (*name).to_owned()).collect();
        Self { header, rows: Vec::new(), numbers: 0..0 }
    }

    /// These columns hold numbers, to be aligned right.
    pub fn numbers(self, numbers: Range<usize>) -> Self {
        Self { numbers, ..self }
    }

    /// Adds a row. Control characters would reach the terminal: they are replaced.
    pub fn row(&mut self, cells: impl IntoIterator<Item = (String, Tone)>) {
        let cells = cells.into_iter().map(|(text, tone)| (printable(&text), tone));
        self.rows.push(cells.collect());
    }

    /// The table, lines ended; nothing if it has no rows.
    pub fn render(&self, colours: bool) -> String {
        if self.rows.is_empty() {
            return String::new();
        }
        let widths = self.widths();
        let gaps = usize::from(GAP) * widths.len().saturating_sub(1);
        if widths.iter().sum::<usize>() + gaps > COLUMNS {
            return self.records(colours);
        }
        let mut text = String::new();
        for (number, line) in self.table().lines().enumerate() {
            let row = number.checked_sub(1).and_then(|row| self.rows.get(row));
            match row {
                Some(row) if colours => text.push_str(&painted(line, row, &widths)),
                None if colours => text.push_str(&Tone::Quiet.paint(line.trim_end())),
                _ => text.push_str(line.trim_end()),
            }
            text.push('\n');
        }
        text
    }

    fn widths(&self) -> Vec<usize> {
        let mut widths: Vec<usize> = self.header.iter().map(|name| columns_of(name)).collect();
        for row in &self.rows {
            for (width, (text, _)) in widths.iter_mut().zip(row) {
                *width = columns_of(text).max(*width);
            }
        }
        widths
    }

    fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header(&self.header);
        for row in &self.rows {
            table.add_row(row.iter().map(|(text, _)| text));
        }
        for (number, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, GAP));
            if self.numbers.contains(&number) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.to_string()
    }

    fn records(&self, colours: bool) -> String {
        let widest = self.header.iter().map(|name| columns_of(name)).max().unwrap_or(0);
        let mut text = String::new();
        for row in &self.rows {
            for (name, (cell, tone)) in self.header.iter().zip(row) {
                let cell = if colours { tone.paint(cell) } else { cell.clone() };
                text.push_str(format!("{name:widest$}  {cell}").trim_end());
                text.push('\n');
            }
            text.push('\n');
        }
        text
    }
}

/// A table's line with its cells' colours. Bytes are columns in ASCII only; other
/// lines stay as they are.
fn painted(line: &str, row: &[(String, Tone)], widths: &[usize]) -> String {
    let mut text = String::new();
    let mut rest = line;
    for ((_, tone), width) in row.iter().zip(widths) {
        let Some((cell, after)) = rest.is_ascii().then(|| rest.split_at_checked(*width)).flatten()
        else {
            break;
        };
        let word = cell.trim();
        let (before, behind) = cell.split_once(word).unwrap_or((cell, ""));
        text.push_str(before);
        text.push_str(&if word.is_empty() { String::new() } else { tone.paint(word) });
        text.push_str(behind);
        let (gap, after) = after.split_at_checked(usize::from(GAP)).unwrap_or((after, ""));
        text.push_str(gap);
        rest = after;
    }
    text.push_str(rest);
    text.trim_end().to_owned()
}

/// `text` without what a terminal would obey.
pub fn printable(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { '\u{fffd}' } else { char }).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;

    fn sheet(name: &str, frames: u64) -> Sheet {
        let mut sheet = Sheet::new(&["port", "state", "frames", "dropped"]).numbers(2..4);
        sheet.row([
            (name.to_owned(), Tone::Plain),
            ("attached".to_owned(), Tone::Good),
            (frames.to_string(), Tone::Plain),
            ("0".to_owned(), Tone::Quiet),
        ]);
        sheet
    }

    #[test]
    fn columns_are_aligned() {
        let text = sheet("tap-web1", 1234567).render(false);
        let expected = "\
port      state      frames  dropped
tap-web1  attached  1234567        0
";
        assert_eq!(text, expected);
    }

    #[test]
    fn colours_add_nothing_but_colours() {
        let sheet = sheet("tap-web1", 5);
        let coloured = sheet.render(true);
        assert!(coloured.contains("\u{1b}[32mattached\u{1b}[0m"), "{coloured:?}");
        let mut plain = String::new();
        for part in coloured.split('\u{1b}') {
            plain.push_str(
                part.strip_prefix('[').map_or(part, |code| code.split_once('m').unwrap().1),
            );
        }
        assert_eq!(plain, sheet.render(false));
    }

    #[test]
    fn what_does_not_fit_becomes_records() {
        let text = sheet(&"x".repeat(60), u64::MAX).render(false);
        assert!(text.lines().all(|line| columns_of(line) <= COLUMNS), "{text}");
        assert!(text.contains("frames   18446744073709551615\n"), "{text}");
    }

    #[test]
    fn no_control_character_reaches_the_terminal() {
        let text = sheet("a\u{1b}[2J\nb", 1).render(false);
        assert_eq!(text.lines().count(), 2);
        assert!(text.chars().all(|char| char == '\n' || !char.is_control()), "{text:?}");
    }
}
