//! Draws the machine for people: sockets, nodes, cores, threads, hugepage pools, owners.
//!
//! ```text
//! socket 1
//! ┌ node 1 ─────────────────────── 2.0 GiB, 1.0 GiB free ┐
//! │ ┌───────┐ ┌───────┐                                  │
//! │ │4 · 5 ·│ │6 A 7 A│                                  │
//! │ └───────┘ └───────┘                                  │
//! │ 2MB  AAAAAAAAAAAA▒▒▒░░░░░░░░░  128 pages, 49 free    │
//! └──────────────────────────────────────────────────────┘
//! ```
//!
//! A capital letter is an exclusive owner, a small one the only shared owner, `+` several,
//! `i` a CPU isolated at boot that nobody owns.

use std::fmt::Write as _;

use crate::{Cpu, CpuSet, Node, PageSize, Pool, Topology};

/// What one container (or anything else with a name) holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ownership {
    /// The name in the legend.
    pub name: String,
    /// The CPUs it may use.
    pub cpus: CpuSet,
    /// Whether the CPUs are its own.
    pub exclusive: bool,
    /// Huge pages granted to it: node, size, pages.
    pub hugepages: Vec<(u32, PageSize, u64)>,
}

/// How to draw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    /// Box-drawing characters, else plain ASCII.
    pub unicode: bool,
    /// ANSI colours for owners.
    pub colour: bool,
    /// Columns; at least 60 are used.
    pub width: usize,
}

impl Default for Style {
    fn default() -> Self {
        Self { unicode: true, colour: false, width: 78 }
    }
}

/// Draws in Unicode, without colours, 78 columns wide.
#[must_use]
pub fn render(topology: &Topology, owners: &[Ownership]) -> String {
    render_with(topology, owners, Style::default())
}

/// Draws in the given style.
#[must_use]
pub fn render_with(topology: &Topology, owners: &[Ownership], style: Style) -> String {
    let map = Map { topology, owners, style, glyphs: Glyphs::of(style.unicode) };
    map.draw()
}

struct Glyphs {
    top: [char; 2],
    bottom: [char; 2],
    across: char,
    down: char,
    shared: char,
    used: char,
    free: char,
    times: char,
}

impl Glyphs {
    fn of(unicode: bool) -> Self {
        if unicode {
            let (top, bottom) = (['┌', '┐'], ['└', '┘']);
            let (across, down, shared) = ('─', '│', '·');
            Self { top, bottom, across, down, shared, used: '▒', free: '░', times: '×' }
        } else {
            let corners = ['+', '+'];
            let (across, down, shared) = ('-', '|', '.');
            let (top, bottom) = (corners, corners);
            Self { top, bottom, across, down, shared, used: '#', free: '.', times: 'x' }
        }
    }
}

/// A line with its visible length, which colours do not change.
#[derive(Default)]
struct Line {
    text: String,
    columns: usize,
}

impl Line {
    fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.columns += text.chars().count();
    }

    fn repeat(&mut self, glyph: char, times: usize) {
        self.text.extend(std::iter::repeat_n(glyph, times));
        self.columns += times;
    }

    fn pad_to(&mut self, columns: usize) {
        self.repeat(' ', columns.saturating_sub(self.columns));
    }
}

const BAR: usize = 24;

struct Map<'a> {
    topology: &'a Topology,
    owners: &'a [Ownership],
    style: Style,
    glyphs: Glyphs,
}

impl Map<'_> {
    fn draw(&self) -> String {
        let mut out = self.summary();
        let mut drawn = Vec::new();
        for socket in self.topology.sockets() {
            let _infallible = write!(out, "\nsocket {socket}\n");
            for node in &self.topology.nodes {
                let here = |cpu: &&Cpu| cpu.socket == Some(socket) && cpu.node == node.id;
                let cpus: Vec<&Cpu> = self.topology.cpus.iter().filter(here).collect();
                if !cpus.is_empty() {
                    self.node(&mut out, node, &cpus, !drawn.contains(&node.id));
                    drawn.push(node.id);
                }
            }
        }
        for node in self.topology.nodes.iter().filter(|node| !drawn.contains(&node.id)) {
            out.push_str("\nmemory without CPUs\n");
            self.node(&mut out, node, &[], true);
        }
        self.legend(&mut out);
        out
    }

    fn summary(&self) -> String {
        let count = |count: usize, noun: &str| {
            format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
        };
        let cores = self.topology.cores();
        let threads = cores.iter().map(|core| core.len()).max().unwrap_or(1);
        let mut out = [
            count(self.topology.sockets().len(), "socket"),
            count(self.topology.nodes.len(), "node"),
            count(cores.len(), "core"),
            count(self.topology.online.len(), "CPU"),
        ]
        .join(", ");
        if threads > 1 {
            let _infallible = write!(out, " ({threads} threads per core)");
        }
        out.push('\n');
        for (name, set) in [
            ("offline", &self.topology.offline),
            ("isolated at boot", &self.topology.isolated),
            ("nohz_full", &self.topology.nohz_full),
        ] {
            if !set.is_empty() {
                let _infallible = writeln!(out, "{name}: CPUs {set}");
            }
        }
        out
    }

    fn width(&self) -> usize {
        self.style.width.max(60)
    }

    fn node(&self, out: &mut String, node: &Node, cpus: &[&Cpu], with_memory: bool) {
        let Glyphs { top, bottom, across, .. } = self.glyphs;
        let mut head = Line::default();
        head.push(&format!("{} node {} ", top[0], node.id));
        let memory = format!(" {}, {} free ", gib(node.memory.total), gib(node.memory.free));
        let memory = if with_memory { memory } else { String::new() };
        let rule = self.width().saturating_sub(head.columns + memory.chars().count() + 1);
        head.repeat(across, rule);
        head.push(&format!("{memory}{}", top[1]));
        out.push_str(&head.text);
        out.push('\n');
        self.cores(out, cpus);
        if with_memory {
            self.pools(out, node);
            if node.distances.len() > 1 {
                let far = node.distances.iter().filter(|(to, _)| **to != node.id);
                let far: Vec<String> = far.map(|(to, far)| format!("{to}:{far}")).collect();
                let mut line = Line::default();
                line.push(&format!("distance to node {}", far.join(" ")));
                self.boxed(out, line);
            }
        }
        let mut foot = Line::default();
        foot.repeat(bottom[0], 1);
        foot.repeat(across, self.width() - 2);
        foot.repeat(bottom[1], 1);
        out.push_str(&foot.text);
        out.push('\n');
    }

    fn boxed(&self, out: &mut String, mut line: Line) {
        let down = self.glyphs.down;
        line.pad_to(self.width() - 4);
        let _infallible = writeln!(out, "{down} {} {down}", line.text);
    }

    /// Boxes of threads, as many side by side as fit.
    fn cores(&self, out: &mut String, cpus: &[&Cpu]) {
        let Glyphs { top, bottom, across, down, .. } = self.glyphs;
        let leads = |cpu: &&&Cpu| cpu.siblings.first() == Some(cpu.id);
        let cores: Vec<&CpuSet> = cpus.iter().filter(leads).map(|cpu| &cpu.siblings).collect();
        let digits = self.topology.online.last().unwrap_or(0).to_string().len();
        let mark = 1 + self.owners.len().saturating_sub(1) / 26;
        let threads = cores.iter().map(|core| core.len()).max().unwrap_or(1);
        let inner = threads * (digits + mark + 2) - 1;
        let per_row = ((self.width() - 3) / (inner + 3)).max(1);
        for row in cores.chunks(per_row) {
            let [mut above, mut middle, mut below] = <[Line; 3]>::default();
            for (position, core) in row.iter().enumerate() {
                let gap = if position == 0 { "" } else { " " };
                for (line, corners) in [(&mut above, top), (&mut below, bottom)] {
                    line.push(gap);
                    line.repeat(corners[0], 1);
                    line.repeat(across, inner);
                    line.repeat(corners[1], 1);
                }
                middle.push(&format!("{gap}{down}"));
                let start = middle.columns;
                for (thread, id) in core.iter().enumerate() {
                    let gap = if thread == 0 { "" } else { " " };
                    middle.push(&format!("{gap}{id:>digits$} "));
                    self.mark(&mut middle, id, mark);
                }
                middle.pad_to(start + inner);
                middle.repeat(down, 1);
            }
            for line in [above, middle, below] {
                self.boxed(out, line);
            }
        }
    }

    fn mark(&self, line: &mut Line, id: u32, width: usize) {
        let holds = |owner: &&(usize, &Ownership)| owner.1.cpus.contains(id);
        let owners: Vec<_> = self.owners.iter().enumerate().collect();
        let holders: Vec<_> = owners.iter().filter(holds).collect();
        let exclusive = holders.iter().find(|(_, owner)| owner.exclusive);
        let (text, owner) = match (exclusive, holders.as_slice()) {
            (Some((index, _)), _) => (label(*index), Some(*index)),
            (None, [(index, _)]) => (label(*index).to_lowercase(), Some(*index)),
            (None, [_, _, ..]) => ("+".to_owned(), None),
            (None, []) if self.topology.isolated.contains(id) => ("i".to_owned(), None),
            (None, []) => (self.glyphs.shared.to_string(), None),
        };
        self.coloured(line, &format!("{text:<width$}"), owner);
    }

    fn coloured(&self, line: &mut Line, text: &str, owner: Option<usize>) {
        match owner.filter(|_| self.style.colour) {
            Some(owner) => {
                let _infallible = write!(line.text, "\x1b[1;3{}m", 1 + owner % 6);
                line.push(text);
                line.text.push_str("\x1b[0m");
            }
            None => line.push(text),
        }
    }

    fn pools(&self, out: &mut String, node: &Node) {
        for pool in &node.hugepages {
            let mut line = Line::default();
            line.push(&format!("{:<5}", pool.size.to_string()));
            if pool.total == 0 {
                line.push("no pages");
            } else {
                self.bar(&mut line, node.id, pool);
            }
            self.boxed(out, line);
        }
    }

    /// Grants first, then pages in use beyond them, then what is left.
    fn bar(&self, line: &mut Line, node: u32, pool: &Pool) {
        let mut parts = Vec::new();
        for (index, owner) in self.owners.iter().enumerate() {
            let mine = owner.hugepages.iter();
            let mine = mine.filter(|(on, size, _)| (*on, *size) == (node, pool.size));
            let pages: u64 = mine.map(|(_, _, pages)| pages).sum();
            if pages > 0 {
                parts.push((Some(index), pages));
            }
        }
        let granted: u64 = parts.iter().map(|(_, pages)| pages).sum();
        let in_use = pool.total.saturating_sub(pool.free);
        parts.push((None, in_use.saturating_sub(granted)));
        let (mut pages_before, mut cells_before) = (0u64, 0usize);
        for (owner, pages) in &parts {
            pages_before = pages_before.saturating_add(*pages).min(pool.total);
            let ends = (pages_before as u128 * BAR as u128 / u128::from(pool.total)) as usize;
            // Whoever has a page is seen.
            let ends = if *pages > 0 { ends.max(cells_before + 1) } else { ends }.min(BAR);
            let cells = ends.saturating_sub(cells_before);
            let glyph = owner.map_or(self.glyphs.used, |index| {
                label(index).chars().last().unwrap_or(self.glyphs.used)
            });
            self.coloured(line, &glyph.to_string().repeat(cells), *owner);
            cells_before += cells;
        }
        line.repeat(self.glyphs.free, BAR.saturating_sub(cells_before));
        let pages = if pool.total == 1 { "page" } else { "pages" };
        line.push(&format!("  {} {pages}, {} free", pool.total, pool.free));
        if granted > 0 {
            line.push(&format!(", {granted} granted"));
        }
        if pool.surplus > 0 {
            line.push(&format!(", {} surplus", pool.surplus));
        }
    }

    fn legend(&self, out: &mut String) {
        if !self.owners.is_empty() {
            out.push('\n');
        }
        let width = self.owners.iter().map(|owner| owner.name.chars().count()).max().unwrap_or(0);
        for (index, owner) in self.owners.iter().enumerate() {
            let mut line = Line::default();
            let letter = label(index);
            let letter = if owner.exclusive { letter } else { letter.to_lowercase() };
            self.coloured(&mut line, &letter, Some(index));
            line.push(&format!("  {:<width$}", owner.name));
            if !owner.cpus.is_empty() {
                let kind = if owner.exclusive { "exclusive" } else { "shared" };
                line.push(&format!("  CPUs {} {kind}", owner.cpus));
            }
            for (node, size, pages) in &owner.hugepages {
                line.push(&format!("  {pages} {} {size} on node {node}", self.glyphs.times));
            }
            out.push_str(line.text.trim_end());
            out.push('\n');
        }
    }
}

/// A, B, … Z, AA, AB, …
fn label(index: usize) -> String {
    let letter = char::from(b'A' + (index % 26) as u8);
    match index / 26 {
        0 => letter.to_string(),
        more => format!("{}{letter}", label(more - 1)),
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testtree::{four_sockets, numa_node, this_host};

    fn owners() -> Vec<Ownership> {
        let two_mb = "2MB".parse().unwrap();
        vec![
            Ownership {
                name: "upf/dpdk".to_owned(),
                cpus: "6-7".parse().unwrap(),
                exclusive: true,
                hugepages: vec![(1, two_mb, 64), (1, "1GB".parse().unwrap(), 1)],
            },
            Ownership {
                name: "web".to_owned(),
                cpus: "0-1".parse().unwrap(),
                exclusive: false,
                hugepages: vec![],
            },
        ]
    }

    #[test]
    fn the_map_of_a_two_node_machine_is_exact() {
        let topology = Topology::read_from(numa_node().root()).unwrap();
        let expected = "\
2 sockets, 2 nodes, 4 cores, 8 CPUs (2 threads per core)

socket 0
┌ node 0 ───────────────────────────────────────────── 2.0 GiB, 0.8 GiB free ┐
│ ┌───────┐ ┌───────┐                                                        │
│ │0 b 1 b│ │2 · 3 ·│                                                        │
│ └───────┘ └───────┘                                                        │
│ 2MB  ░░░░░░░░░░░░░░░░░░░░░░░░  128 pages, 128 free                         │
│ 1GB  no pages                                                              │
│ distance to node 1:21                                                      │
└────────────────────────────────────────────────────────────────────────────┘

socket 1
┌ node 1 ───────────────────────────────────────────── 2.0 GiB, 1.0 GiB free ┐
│ ┌───────┐ ┌───────┐                                                        │
│ │4 · 5 ·│ │6 A 7 A│                                                        │
│ └───────┘ └───────┘                                                        │
│ 2MB  AAAAAAAAAAAA░░░░░░░░░░░░  128 pages, 100 free, 64 granted             │
│ 1GB  AAAAAAAAAAAAAAAAAAAAAAAA  1 page, 1 free, 1 granted                   │
│ distance to node 0:21                                                      │
└────────────────────────────────────────────────────────────────────────────┘

A  upf/dpdk  CPUs 6-7 exclusive  64 × 2MB on node 1  1 × 1GB on node 1
b  web       CPUs 0-1 shared
";
        assert_eq!(render(&topology, &owners()), expected);
    }

    #[test]
    fn ascii_needs_no_special_font() {
        let topology = Topology::read_from(this_host().root()).unwrap();
        let style = Style { unicode: false, colour: false, width: 60 };
        let expected = "\
1 socket, 1 node, 2 cores, 2 CPUs

socket 0
+ node 0 --------------------------- 5.1 GiB, 3.5 GiB free +
| +---+ +---+                                              |
| |0 .| |1 .|                                              |
| +---+ +---+                                              |
| 2MB  no pages                                            |
| 1GB  no pages                                            |
+----------------------------------------------------------+
";
        assert_eq!(render_with(&topology, &[], style), expected);
        assert!(render_with(&topology, &owners(), style).is_ascii());
    }

    #[test]
    fn colours_change_no_column() {
        let topology = Topology::read_from(numa_node().root()).unwrap();
        let style = Style { colour: true, ..Style::default() };
        let coloured = render_with(&topology, &owners(), style);
        assert!(coloured.contains("\x1b[1;31mA\x1b[0m"));
        let mut plain = String::new();
        let mut rest = coloured.as_str();
        while let Some(at) = rest.find('\x1b') {
            plain.push_str(&rest[..at]);
            rest = &rest[at + rest[at..].find('m').unwrap() + 1..];
        }
        plain.push_str(rest);
        assert_eq!(plain, render(&topology, &owners()));
    }

    #[test]
    fn every_line_of_every_machine_is_as_wide_as_the_box() {
        for tree in [numa_node(), this_host(), four_sockets()] {
            let topology = Topology::read_from(tree.root()).unwrap();
            let map = render(&topology, &owners());
            let framed = map.lines().filter(|line| line.starts_with(['┌', '│', '└']));
            assert!(framed.clone().count() > 3);
            framed.for_each(|line| assert_eq!(line.chars().count(), 78, "{line}"));
        }
    }

    #[test]
    fn boot_isolated_cpus_and_pages_of_others_are_marked() {
        let topology = Topology::read_from(four_sockets().root()).unwrap();
        let map = render(&topology, &[]);
        assert!(map.contains("isolated at boot: CPUs 4-7\nnohz_full: CPUs 4-7\n"), "{map}");
        assert!(map.contains("│ 4 i│ │ 5 i│ │ 6 i│ │ 7 i│"), "{map}");
        let topology = Topology::read_from(numa_node().root()).unwrap();
        assert!(render(&topology, &[]).contains("▒▒▒▒▒░░░░░░░░░░░░░░░░░░░  128 pages, 100 free"));
    }

    #[test]
    fn labels_go_on_after_z() {
        let labels: Vec<String> = [0, 25, 26, 27, 52].map(label).to_vec();
        assert_eq!(labels, ["A", "Z", "AA", "AB", "BA"]);
    }
}
