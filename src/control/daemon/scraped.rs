//! The metrics as last rendered. With a thousand ports they are 3 MB and take tens of
//! milliseconds, in which this thread does nothing else: so readers that come one
//! after the other are given the same text for a while.

use std::time::{Duration, Instant};

/// A text is given again for this many times as long as it took to render: so no more
/// than a thirtieth of this thread's time goes there, whoever reads how often.
const WORTH: u32 = 30;
/// It is never older than this.
const OLDEST: Duration = Duration::from_secs(1);

/// A text and until when it is given again.
#[derive(Debug, Default)]
pub struct Scraped {
    text: String,
    until: Option<Instant>,
}

impl Scraped {
    /// The text, if it is young enough.
    pub fn text(&self, now: Instant) -> Option<&str> {
        self.until.is_some_and(|until| now < until).then_some(self.text.as_str())
    }

    /// Keeps what was rendered between these two moments, as long as it is worth it.
    pub fn keep(&mut self, text: String, began: Instant, ended: Instant) -> &str {
        let worth = ended.saturating_duration_since(began).saturating_mul(WORTH);
        // Its numbers are those of the beginning.
        self.until = began.checked_add(worth.min(OLDEST));
        self.text = text;
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_quick_is_rendered_anew_and_nothing_gets_old() {
        let began = Instant::now();
        let after = |micros| began + Duration::from_micros(micros);
        let mut scraped = Scraped::default();
        assert_eq!(scraped.text(began), None);
        assert_eq!(scraped.keep("quick".to_owned(), began, after(100)), "quick");
        assert_eq!(scraped.text(after(2_999)), Some("quick"));
        assert_eq!(scraped.text(after(3_000)), None);
        assert_eq!(scraped.keep("slow".to_owned(), began, after(300_000)), "slow");
        assert_eq!(scraped.text(after(999_999)), Some("slow"));
        assert_eq!(scraped.text(after(1_000_000)), None);
    }
}
