//! critest against a CRI server: every failed and skipped spec by name, then one line of
//! totals, and a verdict from the committed list of specs that pass.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::assets::Assets;
use crate::error::{During, Result, ensure};
use crate::image::catalogue;
use crate::node;
use crate::server::{Kind, Scratch, Server};
use crate::site::Site;
use crate::tools;

/// The specs that must pass, one name per line; `#` starts a comment.
const EXPECTED: &str = include_str!("../critest/expected-pass.txt");
/// The digest that critest pulls by; its content exists only in a registry far away.
const FOREIGN_DIGEST: &[u8] = b"9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf";

/// What to run.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Only specs whose name matches this regular expression.
    #[arg(long)]
    pub(crate) focus: Option<String>,
    /// Not the specs whose name matches.
    #[arg(long)]
    pub(crate) skip: Vec<String>,
    /// The server under test.
    #[arg(long, value_enum, default_value = "piniond")]
    pub(crate) server: Kind,
    /// The RuntimeClass handler to ask for.
    #[arg(long)]
    pub(crate) handler: Option<String>,
    /// Write the names of the specs that passed to this file.
    #[arg(long)]
    pub(crate) write_passed: Option<PathBuf>,
    /// Fail unless every spec that ran passed, whatever the committed list says; always so with
    /// our own server.
    #[arg(long)]
    pub(crate) all: bool,
    /// Keep critest's full output in this file.
    #[arg(long)]
    pub(crate) log: Option<PathBuf>,
    /// Stream over WebSocket instead of SPDY.
    #[arg(long)]
    pub(crate) websocket: bool,
    /// Run so many specs side by side.
    #[arg(long, value_name = "N")]
    pub(crate) parallel: Option<u32>,
}

/// One suite of ginkgo's JSON report.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Report {
    spec_reports: Vec<Spec>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_text: String,
    leaf_node_type: String,
    state: String,
    #[serde(default)]
    failure: Failure,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Failure {
    message: String,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
enum Outcome {
    Passed,
    Failed,
    Skipped,
    /// Not selected by focus or skip.
    Unselected,
}

impl Spec {
    fn name(&self) -> String {
        let parents = self.container_hierarchy_texts.iter().flatten();
        let words: Vec<&str> =
            parents.map(String::as_str).chain([self.leaf_node_text.as_str()]).collect();
        words.join(" ").trim_start_matches("[k8s.io] ").trim().to_owned()
    }

    fn outcome(&self) -> Outcome {
        match self.state.as_str() {
            "passed" => Outcome::Passed,
            "skipped" | "pending" if self.failure.message.is_empty() => Outcome::Unselected,
            "skipped" | "pending" => Outcome::Skipped,
            _ => Outcome::Failed,
        }
    }
}

impl Options {
    /// The same options for the harness inside the node; files go through the share.
    fn arguments(&self) -> Vec<String> {
        let mut words = vec!["pinion-tests".into(), "critest".into(), "host".into()];
        let mut add = |flag: &str, value: &str| words.extend([flag.into(), value.into()]);
        add("--server", self.server.name());
        if let Some(focus) = &self.focus {
            add("--focus", focus);
        }
        for skip in &self.skip {
            add("--skip", skip);
        }
        if let Some(handler) = &self.handler {
            add("--handler", handler);
        }
        if self.write_passed.is_some() {
            add("--write-passed", "/mnt/share/passed");
        }
        if self.log.is_some() {
            add("--log", "/mnt/share/critest.log");
        }
        if let Some(nodes) = self.parallel {
            words.extend(["--parallel".into(), nodes.to_string()]);
        }
        if self.websocket {
            words.push("--websocket".into());
        }
        if self.all {
            words.push("--all".into());
        }
        words
    }
}

/// Runs the whole suite inside a virtual node; its exit code.
pub(crate) fn run_in_node(assets: &Assets, options: &Options) -> Result<i32> {
    let share = tempfile::tempdir().during(|| "make a directory to share".into())?;
    let job = node::Job {
        command: options.arguments(),
        share: Some(share.path().into()),
        clients: true,
        deadline: Duration::from_secs(2 * 3600),
        ..node::Job::default()
    };
    let code = node::run(assets, &job)?;
    for (name, wanted) in [("passed", &options.write_passed), ("critest.log", &options.log)] {
        if let Some(to) = wanted {
            fs::copy(share.path().join(name), to)
                .during(|| format!("copy {name} from the node"))?;
        }
    }
    Ok(code)
}

/// Starts a registry and a server, and runs critest against them.
pub(crate) fn run(assets: &Assets, options: &Options) -> Result<()> {
    let site = Site::open(assets, options.server)?;
    let (server, scratch) = (&site.server, &site.scratch);
    let critest = adapted_critest(assets, scratch)?;
    if options.parallel.is_some() {
        // critest looks for it by name.
        let runner = assets.tool(&tools::GINKGO)?;
        let beside = scratch.path("ginkgo");
        std::os::unix::fs::symlink(&runner, &beside)
            .during(|| format!("link {}", beside.display()))?;
    }
    let log = options.log.clone().unwrap_or_else(|| scratch.path("critest.log"));
    let report = scratch.path("critest.json");
    let started = Instant::now();
    run_critest(&critest, server, options, &report, &log)?;
    let text = fs::read(&report).during(|| {
        format!("read critest's report; the server's log ends with\n{}\nread", server.log_tail(20))
    })?;
    let reports: Vec<Report> =
        serde_json::from_slice(&text).during(|| "decode critest's report".into())?;
    let verdict = judge(&reports, options);
    println!("critest took {:.0} s", started.elapsed().as_secs_f32());
    println!("{}", summary(&reports));
    verdict
}

/// critest with our image's digest in the place of one that cannot be had offline.
fn adapted_critest(assets: &Assets, scratch: &Scratch) -> Result<PathBuf> {
    let original = assets.tool(&tools::CRITEST)?;
    let digest = assets.digest(&format!("{}:latest", catalogue::DIGEST_IMAGE))?;
    let mut bytes = fs::read(&original).during(|| format!("read {}", original.display()))?;
    let ours = digest.trim_start_matches("sha256:").as_bytes();
    let starts: Vec<usize> = bytes
        .windows(FOREIGN_DIGEST.len())
        .enumerate()
        .filter_map(|(at, window)| (window == FOREIGN_DIGEST).then_some(at))
        .collect();
    for at in &starts {
        bytes[*at..*at + ours.len()].copy_from_slice(ours);
    }
    println!("critest: {} digest constant replaced by our image's", starts.len());
    let adapted = scratch.path("critest");
    fs::write(&adapted, bytes).during(|| format!("write {}", adapted.display()))?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&adapted, mode).during(|| format!("chmod {}", adapted.display()))?;
    Ok(adapted)
}

/// Runs critest, keeping its output in `log` and naming each spec as it ends.
fn run_critest(
    program: &Path,
    server: &Server,
    options: &Options,
    report: &Path,
    log: &Path,
) -> Result<()> {
    let mut critest = Command::new(program);
    critest
        .arg(format!("-runtime-endpoint={}", server.endpoint()))
        .arg(format!("-image-endpoint={}", server.endpoint()))
        .arg(format!("--ginkgo.json-report={}", report.display()))
        .args(["--ginkgo.no-color", "--ginkgo.timeout=3h", "--ginkgo.v"])
        .current_dir(report.parent().unwrap_or(Path::new("/")));
    if let Some(focus) = &options.focus {
        critest.arg(format!("--ginkgo.focus={focus}"));
    }
    for skip in &options.skip {
        critest.arg(format!("--ginkgo.skip={skip}"));
    }
    if let Some(handler) = &options.handler {
        critest.arg(format!("-runtime-handler={handler}"));
    }
    if let Some(socket) = &server.nri_socket {
        critest.arg(format!("-nri-socket={}", socket.display()));
    }
    if options.websocket {
        critest.args(["-websocket-exec", "-websocket-attach", "-websocket-portforward"]);
    }
    if let Some(nodes) = options.parallel {
        let own = program.parent().unwrap_or(Path::new("/")).to_path_buf();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths([own].into_iter().chain(std::env::split_paths(&path)));
        critest.arg(format!("-parallel={nodes}"));
        let path = path.map_err(std::io::Error::other);
        critest.env("PATH", path.during(|| "make a PATH for critest".into())?);
    }
    let mut kept = fs::File::create(log).during(|| format!("create {}", log.display()))?;
    let mut child = critest
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .during(|| "start critest".into())?;
    let mut name = Name::Unknown;
    for line in child.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines) {
        let line = line.during(|| "read critest's output".into())?;
        std::io::Write::write_all(&mut kept, format!("{line}\n").as_bytes())
            .during(|| format!("write {}", log.display()))?;
        if let Some(text) = name.see(&line) {
            println!("  {text}");
        }
    }
    child.wait().during(|| "wait for critest".into())?;
    Ok(())
}

/// Follows critest's output: a rule, the name of a spec, what it does, a mark with the time.
#[derive(Debug)]
enum Name {
    Unknown,
    Next,
    Known(String),
}

impl Name {
    /// Takes a line; what to print when the line ends a spec.
    fn see(&mut self, line: &str) -> Option<String> {
        if line.starts_with("-----") {
            *self = Name::Next;
        } else if matches!(self, Name::Next) && !line.trim().is_empty() {
            *self = Name::Known(line.trim().to_owned());
        } else if (line.starts_with('•') || line.starts_with("S ["))
            && let Name::Known(name) = std::mem::replace(self, Name::Unknown)
        {
            return Some(format!("{} {name}", line.trim()));
        }
        None
    }
}

fn specs(reports: &[Report]) -> impl Iterator<Item = (&Spec, Outcome)> {
    reports
        .iter()
        .flat_map(|report| &report.spec_reports)
        .filter(|spec| spec.leaf_node_type == "It")
        .map(|spec| (spec, spec.outcome()))
}

/// Names what did not pass and compares with the committed list.
fn judge(reports: &[Report], options: &Options) -> Result<()> {
    let mut named: BTreeMap<Outcome, BTreeSet<String>> = BTreeMap::new();
    for (spec, outcome) in specs(reports) {
        let reason = spec.failure.message.lines().next().unwrap_or_default();
        match outcome {
            Outcome::Failed => println!("FAILED  {}\n        {reason}", spec.name()),
            Outcome::Skipped => {
                let excuse = excuse(&spec.name()).unwrap_or("nothing excuses this");
                println!("skipped {}\n        {reason}\n        ({excuse})", spec.name());
            }
            Outcome::Passed | Outcome::Unselected => {}
        }
        named.entry(outcome).or_default().insert(spec.name());
    }
    let names = |outcome| named.get(&outcome).cloned().unwrap_or_default();
    if let Some(path) = &options.write_passed {
        let text: String = names(Outcome::Passed).iter().map(|name| format!("{name}\n")).collect();
        fs::write(path, text).during(|| format!("write {}", path.display()))?;
    }
    let setup_failed = reports
        .iter()
        .flat_map(|report| &report.spec_reports)
        .any(|spec| spec.leaf_node_type != "It" && spec.outcome() == Outcome::Failed);
    ensure(!setup_failed, || "critest could not set itself up".into())?;
    let mut unexcused = BTreeSet::new();
    for (spec, outcome) in specs(reports) {
        if outcome == Outcome::Skipped && excuse(&spec.name()).is_none() {
            unexcused.insert(spec.name());
        }
    }
    let failed = names(Outcome::Failed);
    ensure(!failed.is_empty() || named.contains_key(&Outcome::Passed), || {
        "critest ran no spec".into()
    })?;
    let mut broken = missed(&expected(), &named);
    if options.server == Kind::Piniond {
        broken.extend(unexcused);
        broken.extend(failed);
    } else if options.all {
        broken.extend(failed);
    }
    ensure(broken.is_empty(), || {
        let list: Vec<String> = broken.iter().map(|name| format!("\n  {name}")).collect();
        format!("{} specs that must pass did not:{}", broken.len(), list.concat())
    })
}

/// What this kernel lacks that a skipped spec needs; a skip without such a reason is a failure.
fn excuse(name: &str) -> Option<&'static str> {
    let reads =
        |path: &str, want: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == want);
    if name.starts_with("AppArmor ") && !reads("/sys/module/apparmor/parameters/enabled", "Y") {
        return Some("AppArmor is not enabled in this kernel");
    }
    if name.contains("SELinux") && !Path::new("/sys/fs/selinux/enforce").exists() {
        return Some("SELinux is not enabled in this kernel");
    }
    None
}

/// The expected specs that neither passed nor were left out on request. One that critest
/// does not know at all counts: a renamed spec must not go unnoticed.
fn missed(
    expected: &BTreeSet<&str>,
    named: &BTreeMap<Outcome, BTreeSet<String>>,
) -> BTreeSet<String> {
    let fine = [Outcome::Passed, Outcome::Unselected];
    let is_fine = |name: &str| {
        fine.iter().any(|outcome| named.get(outcome).is_some_and(|names| names.contains(name)))
    };
    expected.iter().filter(|name| !is_fine(name)).map(|name| (*name).to_owned()).collect()
}

fn expected() -> BTreeSet<&'static str> {
    let lines = EXPECTED.lines().map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

fn summary(reports: &[Report]) -> String {
    let count = |wanted| specs(reports).filter(|(_, outcome)| *outcome == wanted).count();
    format!(
        "{} passed, {} failed, {} skipped",
        count(Outcome::Passed),
        count(Outcome::Failed),
        count(Outcome::Skipped)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Vec<Report> {
        let text = r#"[{"SpecReports":[
          {"ContainerHierarchyTexts":["[k8s.io] Pod","basic"],"LeafNodeText":"runs","LeafNodeType":"It","State":"passed"},
          {"ContainerHierarchyTexts":null,"LeafNodeText":"x","LeafNodeType":"It","State":"failed","Failure":{"Message":"no"}},
          {"ContainerHierarchyTexts":null,"LeafNodeText":"y","LeafNodeType":"It","State":"skipped","Failure":{"Message":"why"}},
          {"ContainerHierarchyTexts":null,"LeafNodeText":"z","LeafNodeType":"It","State":"skipped"},
          {"ContainerHierarchyTexts":null,"LeafNodeText":"","LeafNodeType":"BeforeSuite","State":"passed"}]}]"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn specs_left_out_by_focus_are_not_counted_as_skipped() {
        assert_eq!(summary(&report()), "1 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn an_expected_spec_that_critest_does_not_know_is_missed() {
        let named = BTreeMap::from([
            (Outcome::Passed, BTreeSet::from(["a".to_owned()])),
            (Outcome::Unselected, BTreeSet::from(["b".to_owned()])),
            (Outcome::Skipped, BTreeSet::from(["c".to_owned()])),
        ]);
        let missed = missed(&BTreeSet::from(["a", "b", "c", "d"]), &named);
        assert_eq!(missed, BTreeSet::from(["c".to_owned(), "d".to_owned()]));
    }

    #[test]
    fn each_spec_is_named_when_it_ends() {
        let mut name = Name::Unknown;
        let said: Vec<String> = ["-----", "Pod runs", "STEP: x", "• [0.1 seconds]", "-----"]
            .iter()
            .filter_map(|line| name.see(line))
            .collect();
        assert_eq!(said, ["• [0.1 seconds] Pod runs"]);
    }

    #[test]
    fn names_are_those_of_the_committed_list() {
        assert_eq!(report()[0].spec_reports[0].name(), "Pod basic runs");
    }
}
