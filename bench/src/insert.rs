//! The medians of a comparison, put between two marks of a Markdown file.

use std::fmt::Write as _;
use std::path::Path;

use crate::report::Report;

/// A table of the medians, without the rows that only the whole table needs, and links to the
/// table and the chart. Both paths are as seen from the file.
pub(crate) fn section(report: &Report, table: Option<&Path>, chart: Option<&Path>) -> String {
    let mut text = format!("{}; medians:\n\n| |", report.title);
    for peer in &report.peers {
        let _ = write!(text, " {peer} |");
    }
    let _ = writeln!(text, "\n|---|{}", "---:|".repeat(report.peers.len()));
    for row in report.rows.iter().filter(|row| row.unit != "calls") {
        let _ = write!(text, "| {}: {} |", row.group, row.measure);
        let digits = usize::from(row.unit == "ms");
        for value in &row.values {
            let _ = match value {
                Some(summary) => write!(text, " {:.digits$} {} |", summary.median, row.unit),
                None => write!(text, " – |"),
            };
        }
        text.push('\n');
    }
    let mut links = Vec::new();
    links.extend(table.map(|path| format!("[all figures]({})", path.display())));
    links.extend(chart.map(|path| format!("[chart]({})", path.display())));
    if !links.is_empty() {
        let _ = writeln!(text, "\n{}", links.join(" · "));
    }
    text
}

/// `text` with `section` between the marks of `name`, in place of what was there.
pub(crate) fn between_marks(text: &str, name: &str, section: &str) -> Result<String, String> {
    let (begin, end) =
        (format!("<!-- bench:{name}:begin -->"), format!("<!-- bench:{name}:end -->"));
    let (before, rest) = text.split_once(&begin).ok_or_else(|| format!("there is no {begin}"))?;
    let (_, after) = rest.split_once(&end).ok_or_else(|| format!("there is no {end}"))?;
    Ok(format!("{before}{begin}\n{section}{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Collector;

    fn report() -> Report {
        let mut collector = Collector::new("t".into(), vec!["a".into(), "b".into()]);
        collector.add("plain", "create", "ms", 0, 2.0);
        collector.add("plain", "create", "ms", 1, 5.0);
        collector.add("plain", "create calls", "calls", 0, 99.0);
        collector.report()
    }

    #[test]
    fn a_section_has_the_medians_and_links_to_what_was_written_only() {
        let text = section(&report(), Some(Path::new("r/t.md")), None);
        assert!(text.contains("| plain: create | 2.0 ms | 5.0 ms |\n"), "{text}");
        assert!(text.ends_with("\n[all figures](r/t.md)\n"), "{text}");
        assert!(!text.contains("calls") && !text.contains("chart"), "{text}");
    }

    #[test]
    fn only_the_text_between_the_marks_changes_however_often() {
        let file = "x\n<!-- bench:oci:begin -->\nold\n<!-- bench:oci:end -->\ny\n";
        let once = between_marks(file, "oci", "new\n").unwrap();
        assert_eq!(once, "x\n<!-- bench:oci:begin -->\nnew\n<!-- bench:oci:end -->\ny\n");
        assert_eq!(between_marks(&once, "oci", "new\n").unwrap(), once);
        assert!(between_marks(file, "cri", "").unwrap_err().contains("bench:cri:begin"));
    }
}
