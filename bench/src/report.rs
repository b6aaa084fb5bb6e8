//! Results: by measure and peer, as a table for people and as JSON.

use std::fmt;

use serde::Serialize;

use crate::samples::Summary;

/// A whole comparison.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// What was compared.
    pub(crate) title: String,
    /// The peers, the one others are compared with first.
    pub(crate) peers: Vec<String>,
    /// One line per measure.
    pub(crate) rows: Vec<Row>,
}

/// One measure.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    /// Groups rows, such as the configuration.
    pub(crate) group: String,
    /// What was measured.
    pub(crate) measure: String,
    /// `ms`, `KiB` or `calls`.
    pub(crate) unit: &'static str,
    /// One per peer, in the report's order.
    pub(crate) values: Vec<Option<Summary>>,
}

impl Row {
    /// How much larger a peer's median is than the first peer's.
    pub(crate) fn ratio(&self, peer: usize) -> Option<f64> {
        let own = self.values.first()?.as_ref()?.median;
        let other = self.values.get(peer)?.as_ref()?.median;
        (own > 0.0).then_some(other / own)
    }
}

/// Collects values in the order they come.
#[derive(Debug)]
pub(crate) struct Collector {
    title: String,
    peers: Vec<String>,
    series: Vec<Series>,
}

#[derive(Debug)]
struct Series {
    group: String,
    measure: String,
    unit: &'static str,
    values: Vec<Vec<f64>>,
}

impl Collector {
    pub(crate) fn new(title: String, peers: Vec<String>) -> Self {
        Self { title, peers, series: Vec::new() }
    }

    /// Adds one value of a peer.
    pub(crate) fn add(
        &mut self,
        group: &str,
        measure: &str,
        unit: &'static str,
        peer: usize,
        value: f64,
    ) {
        let known = self.series.iter().position(|series| {
            series.group == group && series.measure == measure && series.unit == unit
        });
        let index = known.unwrap_or_else(|| {
            self.series.push(Series {
                group: group.to_owned(),
                measure: measure.to_owned(),
                unit,
                values: vec![Vec::new(); self.peers.len()],
            });
            self.series.len() - 1
        });
        self.series[index].values[peer].push(value);
    }

    pub(crate) fn report(self) -> Report {
        let rows = self.series.into_iter().map(|series| Row {
            values: series.values.iter().map(|values| Summary::of(values)).collect(),
            group: series.group,
            measure: series.measure,
            unit: series.unit,
        });
        Report { title: self.title, rows: rows.collect(), peers: self.peers }
    }
}

impl fmt::Display for Report {
    /// A Markdown table: min/median/p95 per peer, then the others' medians relative to the
    /// first peer's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.title)?;
        write!(f, "| | |")?;
        for peer in &self.peers {
            write!(f, " {peer} min/**median**/p95 |")?;
        }
        for peer in self.peers.iter().skip(1) {
            write!(f, " {peer} ÷ {} |", self.peers[0])?;
        }
        writeln!(f)?;
        let columns = 2 + self.peers.len() + self.peers.len().saturating_sub(1);
        writeln!(f, "|{}", "---|".repeat(columns))?;
        for row in &self.rows {
            write!(f, "| {} | {}, {} |", row.group, row.measure, row.unit)?;
            for value in &row.values {
                match value {
                    Some(summary) => {
                        let digits = usize::from(row.unit == "ms");
                        write!(
                            f,
                            " {:.digits$}/**{:.digits$}**/{:.digits$} |",
                            summary.min, summary.median, summary.p95
                        )?;
                    }
                    None => write!(f, " – |")?,
                }
            }
            for peer in 1..self.peers.len() {
                match row.ratio(peer) {
                    Some(ratio) => write!(f, " {ratio:.2} |")?,
                    None => write!(f, " – |")?,
                }
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_every_peer_and_the_ratio_to_the_first() {
        let mut collector = Collector::new("t".into(), vec!["a".into(), "b".into()]);
        collector.add("plain", "create", "ms", 0, 2.0);
        collector.add("plain", "create", "ms", 1, 5.0);
        collector.add("plain", "memory", "KiB", 0, 1000.0);
        let text = collector.report().to_string();
        assert!(
            text.contains("| plain | create, ms | 2.0/**2.0**/2.0 | 5.0/**5.0**/5.0 | 2.50 |"),
            "{text}"
        );
        assert!(text.contains("| plain | memory, KiB | 1000/**1000**/1000 | – | – |"), "{text}");
    }
}
