//! Devices against a real kernel: nodes proven openable, CDI edits made, PCI functions handed
//! over by VFIO and given back. Runs in a node booted with devices.
//!
//! | case | what the kernel shows |
//! |---|---|
//! | CPUs, 1 GiB pages and a virtual function of one node | the function maps the pages for DMA |
//! | a function of the other node | nothing is made |
//! | the server and the container are killed | driver, interface name and MAC as before |

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pinion_cri_proto::v1::{HugepageLimit, LinuxContainerResources};
use pinion_device::{Function, functions};

use crate::assets::Assets;
use crate::command;
use crate::cri::{Container, Cri, Pod};
use crate::error::{During, Error, Result, ensure};
use crate::image::catalogue;
use crate::leaks::{self, Snapshot};
use crate::pinned::{self, STRICT};
use crate::server::{Kind, Scratch};
use crate::site::Site;
use crate::{evidence, isolation};

const EXCLUSIVE: (&str, &str) = ("cpu.pinion.dev/exclusive", "true");
const VFIO: &str = "device.pinion.dev/vfio";
/// Intel 82576 and its virtual function, which QEMU's igb is.
const PF: &str = "8086:10c9";
const VF: &str = "8086:10ca";
const GIB: u64 = 1 << 30;
const CLEANUP: Duration = Duration::from_secs(20);

type Case = (&'static str, fn(&mut Site) -> Result<()>);

const CASES: [Case; 8] = [
    ("a node is openable as allowed, and only so", node_rules),
    ("a CDI device brings its environment, node, mount and hook", cdi_edits),
    ("bad CDI files and unknown CDI devices are named", cdi_errors),
    ("CPUs, 1 GiB pages and a virtual function of one NUMA node are aligned", aligned),
    ("a virtual function of another NUMA node is refused with the numbers", wrong_node),
    ("functions of the host, of others and not listed are refused", not_to_give),
    ("kill -9 of server and container: the driver comes back", killed),
    ("the five application categories, alone and all at once", categories),
];

/// Prepares the node's functions and runs every case.
pub(crate) fn run(assets: &Assets) -> Result<()> {
    make_functions()?;
    let scratch = Scratch::new()?;
    for dir in ["config.d", "cdi"] {
        let path = scratch.path(dir);
        fs::create_dir_all(&path).during(|| format!("create {}", path.display()))?;
    }
    let text = format!(
        "[device]\ncdi_dirs = [{:?}]\nvfio_allow = [{VF:?}]\n",
        scratch.path("cdi").display().to_string()
    );
    let path = scratch.path("config.d/devices.toml");
    fs::write(&path, text).during(|| format!("write {}", path.display()))?;
    let mut site = Site::over(assets, Kind::Piniond, scratch)?;
    {
        let cri = site.connect()?;
        site.warm_up(&cri)?;
    }
    let before = (Snapshot::take(), identities()?);
    let mut failed = 0;
    for (name, case) in CASES {
        match case(&mut site).and_then(|()| clean(&site, &before)) {
            Ok(()) => println!("ok      {name}"),
            Err(error) => {
                println!("FAILED  {name}: {}", error.chain());
                println!("{}", site.server.log_tail(12));
                failed += 1;
                let _ = clean(&site, &before);
            }
        }
    }
    println!("{} passed, {failed} failed", CASES.len() - failed);
    ensure(failed == 0, || format!("{failed} device cases failed"))
}

/// Loads the drivers and makes three virtual functions on each node's NIC.
fn make_functions() -> Result<()> {
    for module in ["vfio-pci", "vfio_iommu_type1", "igb", "igbvf"] {
        command::run(Command::new("modprobe").arg(module))?;
    }
    for function in by_id(PF)? {
        let path = format!("/sys/bus/pci/devices/{}/sriov_numvfs", function.address);
        fs::write(&path, "3").during(|| format!("write 3 to {path}"))?;
    }
    let vfs = by_id(VF)?;
    ensure(vfs.len() == 6, || format!("not possible here: {} virtual functions", vfs.len()))?;
    let ready = || vfs.iter().all(|vf| interface(vf).is_some());
    for _ in 0..100 {
        if ready() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err(Error::check("the virtual functions have no interfaces"))
}

fn by_id(id: &str) -> Result<Vec<Function>> {
    let all = functions(Path::new("/")).map_err(|error| Error::check(error.to_string()))?;
    Ok(all.into_iter().filter(|function| function.id == id).collect())
}

/// Name and MAC of a function's interface.
fn interface(function: &Function) -> Option<(String, String)> {
    let net = format!("/sys/bus/pci/devices/{}/net", function.address);
    let name = fs::read_dir(&net).ok()?.flatten().next()?.file_name().into_string().ok()?;
    let mac = fs::read_to_string(format!("{net}/{name}/address")).ok()?;
    Some((name, mac.trim().to_owned()))
}

/// Address, driver, override and interface of every function.
fn identities() -> Result<Vec<String>> {
    let line = |function: Function| {
        format!(
            "{} {:?} {:?} {:?}",
            function.address,
            function.driver,
            function.driver_override,
            interface(&function)
        )
    };
    let all = functions(Path::new("/")).map_err(|error| Error::check(error.to_string()))?;
    Ok(all.into_iter().map(line).collect())
}

fn clean(site: &Site, before: &(Snapshot, Vec<String>)) -> Result<()> {
    site.connect()?.remove_all()?;
    pinned::remove_kubelet_cgroups();
    leaks::nothing_since(&before.0, CLEANUP)?;
    let now = identities()?;
    ensure(now == before.1, || format!("functions differ: {now:#?}, were {:#?}", before.1))
}

/// A virtual function of a NUMA node.
fn vf_of(node: u32, index: usize) -> Result<Function> {
    let vfs = by_id(VF)?;
    let mut here = vfs.into_iter().filter(|vf| vf.numa == Some(node));
    here.nth(index).ok_or_else(|| Error::check(format!("node {node} has no virtual function")))
}

/// Two exclusive CPUs and two 1 GiB pages of node 1.
fn resources(core: usize, pages: u64) -> Result<LinuxContainerResources> {
    let cpus = pinned::whole_core(&evidence::topology()?, 1, core)?;
    let limit = HugepageLimit { page_size: "1GB".into(), limit: pages * GIB };
    Ok(LinuxContainerResources {
        cpuset_cpus: cpus.to_string(),
        cpuset_mems: "1".into(),
        cpu_shares: 1024 * i64::try_from(cpus.len()).unwrap_or(1),
        cpu_period: 100_000,
        memory_limit_in_bytes: 256 << 20,
        hugepage_limits: if pages == 0 { Vec::new() } else { vec![limit] },
        ..Default::default()
    })
}

fn strict_pod(site: &Site, name: &str, functions: &[&Function]) -> Result<Pod> {
    let mut pod = pinned::kubelet_pod(site, name, "")?;
    pod.handler = STRICT.into();
    pod.annotations = vec![EXCLUSIVE];
    if !functions.is_empty() {
        let list: Vec<String> = functions.iter().map(|f| f.address.to_string()).collect();
        pod.annotations.push((VFIO, list.join(",").leak()));
    }
    Ok(pod)
}

fn driver_container(pages: u64) -> Result<Container> {
    let count = pages.to_string();
    let command = ["pinion-workload", "vfio", "1G", &count, "hold"];
    let mut container = Container::new("main", catalogue::WORKLOAD, &command);
    container.resources = Some(resources(0, pages)?);
    Ok(container)
}

fn start_driver(site: &Site, cri: &Cri, name: &str, vf: &Function) -> Result<(String, String)> {
    let pod = strict_pod(site, name, &[vf])?;
    let container = driver_container(2)?;
    let pod_id = cri.run_pod(&pod)?;
    let id = cri.launch(&pod_id, &pod, &container)?;
    let log = pinned::wait_for_line(site, cri, (&pod, &container, &id), "dma ")?;
    Ok((id, log))
}

fn check_driver(vf: &Function, log: &str) -> Result<()> {
    let link = format!("/sys/bus/pci/devices/{}/driver", vf.address);
    let driver = fs::read_link(&link).during(|| format!("read {link}"))?;
    ensure(driver.ends_with("vfio-pci"), || format!("its driver is {}", driver.display()))?;
    for wanted in
        [format!("function {}", vf.address), "id 8086:10ca".into(), "dma 2147483648".into()]
    {
        ensure(log.contains(&wanted), || format!("the workload does not say {wanted:?}: {log}"))?;
    }
    ensure(log.contains(" N1=2 ") && log.contains("kernelpagesize_kB=1048576"), || {
        format!("its pages are not two of 1 GiB on node 1: {log}")
    })
}

fn aligned(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let vf = vf_of(1, 0)?;
    let (id, log) = start_driver(site, &cri, "dataplane", &vf)?;
    check_driver(&vf, &log)?;
    let receipt = cri.receipt(&id)?;
    ensure(receipt["verdict"] == "aligned", || format!("the receipt says {receipt:#}"))?;
    let devices = isolation::term(&receipt, "devices")?;
    let group = format!("/dev/vfio/{}", vf.group.unwrap_or_default());
    let evidence = devices["evidence"][&group].as_str().unwrap_or_default();
    ensure(evidence.contains("openable") && evidence.contains("node 1"), || {
        format!("the evidence for {group} is {devices:#}")
    })
}

fn wrong_node(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let vf = vf_of(0, 0)?;
    let pod = strict_pod(site, "crossed", &[&vf])?;
    let text = isolation::refusal(&cri, &pod, &driver_container(1)?)?;
    for word in ["devices", vf.address.as_str(), "is on node 0", "node 1", "device-not-local"] {
        isolation::names(&text, word)?;
    }
    let driver = vf_of(0, 0)?.driver;
    ensure(driver.as_deref() == Some("igbvf"), || format!("its driver is {driver:?}"))
}

fn not_to_give(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let ask = |name: &str, function: &Function, word: &str| {
        let pod = strict_pod(site, name, &[function])?;
        isolation::names(&isolation::refusal(&cri, &pod, &driver_container(1)?)?, word)
    };
    let pf = by_id(PF)?.remove(0);
    ask("physical", &pf, "vfio_allow")?;
    let busy = vf_of(1, 1)?;
    let (name, _) = interface(&busy).ok_or_else(|| Error::check("it has no interface"))?;
    command::run(Command::new("ip").args(["link", "set", &name, "up"]))?;
    let outcome = ask("busy", &busy, &format!("{name} is up"));
    command::run(Command::new("ip").args(["link", "set", &name, "down"]))?;
    outcome?;
    let vf = vf_of(1, 0)?;
    start_driver(site, &cri, "owner", &vf)?;
    let mut pod = pinned::kubelet_pod(site, "thief", "burstable")?;
    pod.annotations.push((VFIO, vf.address.to_string().leak()));
    let thief = Container::new("main", catalogue::WORKLOAD, &["sleep", "60"]);
    isolation::names(&isolation::refusal(&cri, &pod, &thief)?, "device-in-use")
}

fn killed(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let vf = vf_of(1, 0)?;
    let (id, log) = start_driver(site, &cri, "doomed", &vf)?;
    check_driver(&vf, &log)?;
    drop(cri);
    let pid = leaks::process_with("pinion-workload vfio 1G 2 hold")
        .ok_or_else(|| Error::check("the container has no process"))?;
    site.server.kill()?;
    let target = nix::unistd::Pid::from_raw(pid.cast_signed());
    nix::sys::signal::kill(target, nix::sys::signal::Signal::SIGKILL)
        .map_err(|error| Error::check(format!("kill {pid}: {error}")))?;
    site.server.restart()?;
    let cri = site.connect()?;
    let status = cri.wait_exited(&id, Duration::from_secs(30))?;
    ensure(status.exit_code == 137, || format!("it ended with {}", status.exit_code))?;
    cri.remove_all()?;
    let now = vf_of(1, 0)?;
    let same = now.driver == vf.driver && now.interfaces == vf.interfaces;
    ensure(same && now.driver_override.is_none(), || format!("it is {now:?}, was {vf:?}"))?;
    // a creation that is interrupted after the bind: the next start undoes it
    let pod = strict_pod(site, "interrupted", &[&vf])?;
    let pod_id = cri.run_pod(&pod)?;
    let container = driver_container(2)?;
    let socket = site.server.socket.clone();
    let creation = std::thread::spawn(move || {
        Cri::connect(&socket).and_then(|cri| cri.create(&pod_id, &pod, &container))
    });
    let link = PathBuf::from(format!("/sys/bus/pci/devices/{}/driver", vf.address));
    for _ in 0..5000 {
        if fs::read_link(&link).is_ok_and(|driver| driver.ends_with("vfio-pci")) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    site.server.kill()?;
    drop(cri);
    let _outcome = creation.join();
    site.server.restart()?;
    let now = vf_of(1, 0)?;
    ensure(now.driver == vf.driver, || format!("after recovery it is {now:?}"))
}

fn node_rules(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let pod = site.pod("rules")?;
    let mut container = Container::new("main", catalogue::WORKLOAD, &["sleep", "600"]);
    container.devices = vec![("/dev/loop0".into(), "r".into())];
    let pod_id = cri.run_pod(&pod)?;
    let id = cri.launch(&pod_id, &pod, &container)?;
    let reading = cri.exec(&id, &["sh", "-c", "cat </dev/loop0"])?;
    ensure(reading.code == 0, || format!("reading ends with {}", reading.code))?;
    let writing = cri.exec(&id, &["sh", "-c", "(: >/dev/loop0) 2>&1"])?;
    ensure(writing.stdout.contains("Operation not permitted"), || {
        format!("opening it for writing ends with {:?}", writing.stdout)
    })?;
    let receipt = cri.receipt(&id)?;
    let term = isolation::term(&receipt, "devices")?;
    let said = term["evidence"]["/dev/loop0"].as_str().unwrap_or_default();
    ensure(said == "b 7:0 r, openable in the container's group", || format!("{term:#}"))
}

const VENDOR: &str = r#"cdiVersion: "1.0.0"
kind: vendor.example/card
devices:
- name: "0"
  containerEdits:
    env: [CARD=zero]
    deviceNodes:
    - {path: /dev/card0, hostPath: /dev/loop1, permissions: r}
containerEdits:
  env: [DRIVER=1.2]
  additionalGids: [4242]
  mounts:
  - {hostPath: @DIR@, containerPath: /opt/card, options: [ro, rbind]}
  hooks:
  - {hookName: createRuntime, path: /bin/sh, args: [sh, -c, "env >@DIR@/hook"]}
"#;

fn cdi_edits(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let dir = site.scratch.path("logs/card");
    fs::create_dir_all(&dir).during(|| format!("create {}", dir.display()))?;
    // after the server's start: files are taken up as they come
    let file = site.scratch.path("cdi/card.yaml");
    let text = VENDOR.replace("@DIR@", &dir.display().to_string());
    fs::write(&file, text).during(|| format!("write {}", file.display()))?;
    let pod = site.pod("card")?;
    let mut container = Container::new("main", catalogue::WORKLOAD, &["sleep", "600"]);
    container.cdi = vec!["vendor.example/card=0".into()];
    let pod_id = cri.run_pod(&pod)?;
    let id = cri.launch(&pod_id, &pod, &container)?;
    let script = "echo $CARD $DRIVER; id -G; ls -l /dev/card0; cat </dev/card0 && echo read; ls /opt/card; touch /opt/card/x || echo read-only";
    let said = cri.exec(&id, &["sh", "-c", script])?.stdout;
    for wanted in ["zero 1.2", "4242", "7,   1", "read\n", "hook", "read-only"] {
        ensure(said.contains(wanted), || format!("{wanted:?} is not in {said:?}"))?;
    }
    let hook = evidence::line(&dir.join("hook"))?;
    ensure(!hook.contains("CARD=") && !hook.contains("HOSTNAME="), || {
        format!("the hook saw {hook:?}")
    })?;
    let info = cri.info()?;
    ensure(info["cdi"]["devices"][0] == "vendor.example/card=0", || format!("{:#}", info["cdi"]))
}

fn cdi_errors(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let write = |name: &str, text: &str| {
        let path = site.scratch.path("cdi").join(name);
        fs::write(&path, text).during(|| format!("write {}", path.display()))
    };
    write("bad.json", "{")?;
    let hostile = VENDOR.replace("/dev/card0", "/etc/shadow").replace("card\n", "evil\n");
    let hostile = hostile.replace("@DIR@", "/opt");
    write("evil.yaml", &hostile)?;
    let pod = site.pod("errors")?;
    for (name, word) in [
        ("vendor.example/evil=0", "no file in"),
        ("vendor.example/card=9", "its kind has vendor.example/card=0"),
    ] {
        let mut container = Container::new("main", catalogue::WORKLOAD, &["sleep", "60"]);
        container.cdi = vec![name.into()];
        isolation::names(&isolation::refusal(&cri, &pod, &container)?, word)?;
    }
    let info = cri.info()?;
    let errors = info["cdi"]["errors"].to_string();
    for word in ["bad.json", "evil.yaml", "below /dev"] {
        ensure(errors.contains(word), || format!("{word:?} is not in {errors}"))?;
    }
    for name in ["bad.json", "evil.yaml"] {
        let _ = fs::remove_file(site.scratch.path("cdi").join(name));
    }
    Ok(())
}

/// An application category of the reference architecture's table 3-1.
struct Category {
    name: &'static str,
    /// NUMA node, and which of its cores.
    place: (u32, usize),
    /// 1 GiB pages.
    pages: u64,
    /// A virtual function of the node.
    function: Option<usize>,
    /// A CPU instruction that the application needs.
    instruction: Option<&'static str>,
}

const CATEGORIES: [Category; 5] = [
    Category { name: "cpus", place: (0, 1), pages: 0, function: None, instruction: None },
    Category { name: "instr", place: (0, 2), pages: 0, function: None, instruction: Some("avx2") },
    Category { name: "device", place: (1, 2), pages: 0, function: Some(1), instruction: None },
    Category { name: "dataplane", place: (1, 0), pages: 1, function: Some(0), instruction: None },
    Category {
        name: "dataplane-instr",
        place: (1, 1),
        pages: 1,
        function: Some(2),
        instruction: Some("avx2"),
    },
];

impl Category {
    /// Makes and starts the pod; its name and container.
    fn start(&self, site: &Site, cri: &Cri) -> Result<String> {
        let (node, core) = self.place;
        let function = self.function.map(|index| vf_of(node, index)).transpose()?;
        let functions: Vec<&Function> = function.iter().collect();
        let pod = strict_pod(site, self.name, &functions)?;
        let pages = self.pages.to_string();
        let mut command = match (&function, self.pages) {
            (Some(_), 0) => vec!["pinion-workload", "vfio", "2M", "4", "hold"],
            (Some(_), _) => vec!["pinion-workload", "vfio", "1G", &pages, "hold"],
            (None, _) => vec!["pinion-workload", "wait"],
        };
        command.push(self.name);
        let mut container = Container::new("main", catalogue::WORKLOAD, &command);
        let cpus = pinned::whole_core(&evidence::topology()?, node, core)?;
        let mut wanted = resources(0, self.pages)?;
        if self.pages == 0 && function.is_some() {
            wanted.hugepage_limits =
                vec![HugepageLimit { page_size: "2MB".into(), limit: 8 << 20 }];
        }
        wanted.cpuset_cpus = cpus.to_string();
        wanted.cpuset_mems = node.to_string();
        container.resources = Some(wanted);
        let pod_id = cri.run_pod(&pod)?;
        let id = cri.launch(&pod_id, &pod, &container)?;
        if function.is_some() {
            pinned::wait_for_line(site, cri, (&pod, &container, &id), "dma ")?;
        }
        Ok(id)
    }

    /// The receipt, and beside it the kernel's own files.
    fn check(&self, cri: &Cri, id: &str) -> Result<()> {
        let what = |text: String| format!("{}: {text}", self.name);
        let receipt = cri.receipt(id)?;
        ensure(receipt["verdict"] == "aligned", || what(format!("the receipt says {receipt:#}")))?;
        let process = leaks::process_ending(&format!(" {}", self.name));
        let pid = process.ok_or_else(|| Error::check(what("it has no process".into())))?;
        let cgroup = evidence::cgroup_of(pid)?;
        let (node, core) = self.place;
        let cpus = pinned::whole_core(&evidence::topology()?, node, core)?;
        for (file, wanted) in [
            ("cpuset.cpus.partition", "isolated".to_owned()),
            ("cpuset.cpus.effective", cpus.to_string()),
            ("cpuset.mems.effective", node.to_string()),
        ] {
            let found = evidence::line(&cgroup.join(file))?;
            ensure(found == wanted, || what(format!("{file} is {found:?}, not {wanted:?}")))?;
        }
        let domains = evidence::scheduling_domains()?;
        ensure(cpus.iter().all(|cpu| domains.get(&cpu) == Some(&0)), || {
            what(format!("its CPUs are load-balanced: {domains:?}"))
        })?;
        let Some(instruction) = self.instruction else { return Ok(()) };
        let seen = cri.exec(id, &["grep", "-c", &format!(" {instruction} "), "/proc/cpuinfo"])?;
        ensure(seen.code == 0, || what(format!("it does not see {instruction}")))
    }
}

fn categories(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    for category in &CATEGORIES {
        let id = category.start(site, &cri)?;
        category.check(&cri, &id)?;
        cri.remove_all()?;
        pinned::remove_kubelet_cgroups();
    }
    let mut running = Vec::new();
    for category in &CATEGORIES {
        running.push((category, category.start(site, &cri)?));
    }
    running.iter().try_for_each(|(category, id)| category.check(&cri, id))
}
