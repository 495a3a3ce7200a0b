//! Words for people: numbers with units, times, lines of at most 80 columns.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};
use vlanswitchd::control::report::{COLUMNS, columns_of};

pub use vlanswitchd::control::report::printable;

/// A rate with three digits or less: `0`, `980`, `1.2 M`.
pub fn scaled(value: f64) -> String {
    let (value, prefix) = with_prefix(value);
    match prefix {
        "" => format!("{value:.0}"),
        _ if value < 9.95 => format!("{value:.1} {prefix}"),
        _ => format!("{value:.0} {prefix}"),
    }
}

/// Bits a second: `0 bit/s`, `3.4 Gbit/s`.
pub fn bit_rate(bits: f64) -> String {
    let text = scaled(bits);
    let blank = if text.contains(' ') { "" } else { " " };
    format!("{text}{blank}bit/s")
}

fn with_prefix(value: f64) -> (f64, &'static str) {
    let mut value = value.max(0.0);
    for prefix in ["", "k", "M", "G", "T"] {
        // 999.5 would be printed as 1000.
        if value < 999.5 {
            return (value, prefix);
        }
        value /= 1000.0;
    }
    // No wire is so fast: a counter jumped. Columns stay what they are.
    (value.min(999.0), "P")
}

/// A share, 0 to 1, in percent.
pub fn percent(share: f64) -> String {
    format!("{:.0} %", share.clamp(0.0, 1.0) * 100.0)
}

/// A length of time in its largest unit: `3 s`, `5 min`, `23 h`, `12 days`.
pub fn length(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86400),
    }
}

/// How long ago a time in milliseconds since 1970 is. Zero if it is to come: clocks
/// are set.
pub fn since(milliseconds: u64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    length(now.saturating_sub(Duration::from_millis(milliseconds)))
}

/// A time in milliseconds since 1970, in UTC.
pub fn utc(milliseconds: u64) -> String {
    // The end of what can be written, in the year 9999.
    const LAST: u64 = 253_402_300_799_999;
    let time = SystemTime::UNIX_EPOCH + Duration::from_millis(milliseconds.min(LAST));
    humantime::format_rfc3339_seconds(time).to_string()
}

/// `text` in lines of at most 80 columns, the first after `first`, the others as far
/// in if that is not far. Words are not broken, but for lists without blanks.
pub fn fold(first: &str, text: &str) -> String {
    const FAR: usize = 12;
    const NEAR: usize = 4;
    let start = columns_of(first);
    let indent = if start > FAR { NEAR } else { start };
    let mut folded = first.to_owned();
    let mut column = start;
    for word in printable(text).split_whitespace() {
        let long = columns_of(word) > COLUMNS - indent;
        let pieces = if long { word.split_inclusive(',').collect() } else { vec![word] };
        for (number, piece) in pieces.into_iter().enumerate() {
            let blank = usize::from(number == 0 && column > indent && column != start);
            let width = columns_of(piece);
            if column > indent && column + blank + width > COLUMNS {
                let _ = write!(folded, "\n{:indent$}", "");
                column = indent;
            } else if blank == 1 {
                folded.push(' ');
                column += 1;
            }
            folded.push_str(piece);
            column += width;
        }
    }
    folded.push('\n');
    folded
}

/// A message from elsewhere: lines stay, other control characters go.
pub fn printable_lines(text: &str) -> String {
    text.lines().map(printable).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_few_digits() {
        let cases = [
            (0.0, "0"),
            (0.4, "0"),
            (999.4, "999"),
            (999.5, "1.0 k"),
            (9949.0, "9.9 k"),
            (9951.0, "10 k"),
            (1_234_567.0, "1.2 M"),
            (123_456_789_012.0, "123 G"),
            (f64::MAX, "999 P"),
        ];
        for (value, text) in cases {
            assert_eq!(scaled(value), text);
        }
        assert_eq!(bit_rate(3.4e9), "3.4 Gbit/s");
        assert_eq!(bit_rate(12.0), "12 bit/s");
        assert_eq!(scaled(-1.0), "0");
    }

    #[test]
    fn times_are_in_one_unit() {
        let cases =
            [(59, "59 s"), (60, "1 min"), (3600, "1 h"), (172_799, "47 h"), (172_800, "2 days")];
        for (seconds, text) in cases {
            assert_eq!(length(Duration::from_secs(seconds)), text);
        }
        assert_eq!(since(u64::MAX), "0 s");
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(u64::MAX), "9999-12-31T23:59:59Z");
    }

    #[test]
    fn lines_are_folded_between_words() {
        let text = "word ".repeat(40);
        let folded = fold("  note: ", &text);
        assert!(folded.lines().all(|line| columns_of(line) <= COLUMNS), "{folded}");
        assert!(folded.lines().skip(1).all(|line| line.starts_with("        word")), "{folded}");
        assert_eq!(folded.split_whitespace().count(), 41);
        let map = "200-210,300=tap-fw,".repeat(8);
        let folded = fold("map       ", &map);
        assert!(folded.lines().all(|line| columns_of(line) <= COLUMNS), "{folded}");
        let joined: String = folded.split_whitespace().skip(1).collect();
        assert_eq!(joined, map);
        assert_eq!(fold("reason: ", "a b"), "reason: a b\n");
        assert_eq!(fold("a much longer word: ", "a b"), "a much longer word: a b\n");
    }
}
