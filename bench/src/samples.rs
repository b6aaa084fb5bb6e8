//! Order statistics of measured values.

use serde::Serialize;

/// What is reported of one series.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Summary {
    /// The smallest value.
    pub(crate) min: f64,
    /// Half of the values are below.
    pub(crate) median: f64,
    /// 95 % of the values are at or below (nearest rank).
    pub(crate) p95: f64,
    /// How many values there are.
    pub(crate) count: usize,
}

impl Summary {
    /// `None` of no values.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let (first, last) = (*sorted.first()?, sorted.len() - 1);
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        let rank = (sorted.len() * 95).div_ceil(100).saturating_sub(1);
        Some(Self { min: first, median, p95: sorted[rank.min(last)], count: sorted.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ranks_are_those_of_the_textbook() {
        let odd = Summary::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((odd.min, odd.median, odd.p95), (1.0, 2.0, 3.0));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        let summary = Summary::of(&hundred).unwrap();
        assert_eq!((summary.median, summary.p95), (50.5, 95.0));
        assert_eq!(Summary::of(&[]), None);
    }
}
