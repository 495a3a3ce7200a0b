//! Medians, quantiles and paired ratios.
//!
//! Machines drift, so columns are compared within a round only: the ratio quoted is the median
//! of the rounds' ratios, not the ratio of the medians.

/// The value below which `share` (0..=1) of the sorted samples lie, by nearest rank.
pub fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1).min(last)).copied()
}

/// Median, least and greatest of some samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle sample, or the mean of the two in the middle.
    pub median: f64,
    /// The least sample.
    pub least: f64,
    /// The greatest sample.
    pub greatest: f64,
}

/// `None` without samples.
pub fn spread(samples: &[f64]) -> Option<Spread> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    let median = if sorted.len().is_multiple_of(2) {
        (upper + sorted.get(middle.checked_sub(1)?)?) / 2.0
    } else {
        upper
    };
    Some(Spread { median, least: *sorted.first()?, greatest: *sorted.last()? })
}
