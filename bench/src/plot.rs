//! The medians as horizontal bars, one small chart per unit, in plain SVG.

use std::fmt::Write as _;

use crate::report::{Report, Row};

const WIDTH: f64 = 860.0;
const LABELS: f64 = 190.0;
const BAR: f64 = 13.0;
const GAP: f64 = 12.0;
const TOP: f64 = 62.0;

/// Distinguishable with every kind of colour vision (Okabe and Ito).
const COLOURS: [&str; 6] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"];

/// The whole report as one picture.
pub(crate) fn svg(report: &Report) -> String {
    let mut units: Vec<&str> = report.rows.iter().map(|row| row.unit).collect();
    units.dedup();
    units.sort_unstable();
    units.dedup();
    let mut body = String::new();
    let mut y = TOP;
    for unit in units.into_iter().rev() {
        let rows: Vec<&Row> = report.rows.iter().filter(|row| row.unit == unit).collect();
        y = chart(&mut body, report, &rows, y);
    }
    let mut out = String::new();
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"12\" y=\"22\" font-size=\"15\">{}</text>",
        escape(&report.title)
    );
    for (index, peer) in report.peers.iter().enumerate() {
        let x = 12.0 + index as f64 * 150.0;
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"34\" width=\"12\" height=\"12\" fill=\"{}\"/>\
             <text x=\"{}\" y=\"44\">{}</text>",
            COLOURS[index % COLOURS.len()],
            x + 18.0,
            escape(peer)
        );
    }
    out.push_str(&body);
    out.push_str("</svg>\n");
    out
}

/// Draws rows that share a unit, and so a scale; returns where the next chart may begin.
fn chart(out: &mut String, report: &Report, rows: &[&Row], top: f64) -> f64 {
    let medians = rows.iter().flat_map(|row| row.values.iter().flatten()).map(|s| s.median);
    let largest = medians.fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - LABELS - 90.0) / largest;
    let mut y = top;
    for row in rows {
        let height = BAR * report.peers.len() as f64;
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LABELS - 8.0,
            y + height / 2.0 + 4.0,
            escape(&format!("{} {}", row.group, row.measure))
        );
        for (index, summary) in row.values.iter().enumerate() {
            let Some(summary) = summary else {
                continue;
            };
            let width = (summary.median * scale).max(1.0);
            let bar = y + BAR * index as f64;
            let _ = writeln!(
                out,
                "<rect x=\"{LABELS}\" y=\"{bar:.1}\" width=\"{width:.1}\" height=\"{}\" \
                 fill=\"{}\"/><text x=\"{:.1}\" y=\"{:.1}\" font-size=\"10\">{:.1} {}</text>",
                BAR - 2.0,
                COLOURS[index % COLOURS.len()],
                LABELS + width + 4.0,
                bar + BAR - 4.0,
                summary.median,
                row.unit
            );
        }
        y += height + GAP;
    }
    y + GAP
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Collector;

    #[test]
    fn bars_are_proportional_and_text_is_escaped() {
        let mut collector = Collector::new("a < b".into(), vec!["a".into(), "b".into()]);
        collector.add("g", "m", "ms", 0, 1.0);
        collector.add("g", "m", "ms", 1, 2.0);
        let picture = svg(&collector.report());
        assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
        assert!(picture.contains("a &lt; b"));
        assert!(picture.contains("width=\"290.0\"") && picture.contains("width=\"580.0\""));
    }
}
