//! The arithmetic behind the benchmark's figures.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

#[path = "../benches/versus/statistics.rs"]
mod statistics;

use statistics::{Spread, quantile, spread};

#[test]
fn the_median_is_the_middle_of_any_order() {
    for (samples, median) in [
        (vec![3.0], 3.0),
        (vec![5.0, 1.0, 3.0], 3.0),
        (vec![4.0, 1.0, 3.0, 2.0], 2.5),
        (vec![1.0, 1.0, 1.0, 100.0, 100.0], 1.0),
    ] {
        assert_eq!(spread(&samples).unwrap().median, median, "{samples:?}");
    }
    assert_eq!(spread(&[2.0, 9.0, 4.0]), Some(Spread { median: 4.0, least: 2.0, greatest: 9.0 }));
    assert_eq!(spread(&[]), None);
}

#[test]
fn quantiles_are_samples_by_nearest_rank() {
    let sorted: Vec<f64> = (1..=1000).map(f64::from).collect();
    for (share, value) in [(0.0, 1.0), (0.5, 500.0), (0.99, 990.0), (0.999, 999.0), (1.0, 1000.0)] {
        assert_eq!(quantile(&sorted, share), Some(value), "{share}");
    }
    assert_eq!(quantile(&[7.0], 0.999), Some(7.0));
    assert_eq!(quantile(&[], 0.5), None);
}
