//! Pinned namespaces on the real kernel.

use pinion_network::namespaces::{self, Kind, Setup};
use std::path::{Path, PathBuf};

use crate::support::{ip, output, within};

fn identity(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap())
}

#[test]
fn namespaces_are_new_configured_and_outlive_their_thread() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("ns");
    let setup = Setup {
        hostname: Some("pod-x".to_owned()),
        sysctls: vec![
            ("net/ipv4/ip_unprivileged_port_start".into(), "0".to_owned()),
            ("kernel/shm_rmid_forced".into(), "1".to_owned()),
        ],
    };
    namespaces::create(&Kind::ALL, &dir, &setup).unwrap();
    for kind in Kind::ALL {
        let pin = dir.join(kind.name());
        assert!(namespaces::is_pinned(&pin));
        assert_ne!(identity(&pin), identity(Path::new(&format!("/proc/self/ns/{kind}"))));
    }
    let net = dir.join("net");
    let lo = ip(&net, &["-br", "addr", "show", "lo"]);
    assert!(lo.contains("127.0.0.1/8"), "lo is up with its address: {lo}");
    let port = within(&net, || {
        std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap()
    });
    assert_eq!(port.trim(), "0");
    assert_eq!(within(&dir.join("uts"), || output("hostname", &[])).trim(), "pod-x");
    let forced = |ns: &Path| {
        within(ns, || std::fs::read_to_string("/proc/sys/kernel/shm_rmid_forced").unwrap())
    };
    assert_eq!(forced(&dir.join("ipc")).trim(), "1");
    assert_eq!(std::fs::read_to_string("/proc/sys/kernel/shm_rmid_forced").unwrap().trim(), "0");

    namespaces::remove(&dir).unwrap();
    namespaces::remove(&dir).unwrap();
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    assert!(!mounted_below(root.path()));
}

fn mounted_below(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.contains(path.to_str().unwrap())
}

#[test]
fn a_refused_sysctl_is_named_and_nothing_stays_behind() {
    let root = tempfile::tempdir().unwrap();
    for (path, value) in [
        ("net/ipv4/no_such_key", "1"),
        ("net/ipv4/ip_forward", "not a number"),
        ("net/../kernel/core_pattern", "x"),
        ("../sysrq-trigger", "h"),
        ("/proc/sys/kernel/core_pattern", "x"),
    ] {
        let dir = root.path().join("ns");
        let setup =
            Setup { hostname: None, sysctls: vec![(PathBuf::from(path), value.to_owned())] };
        let error = namespaces::create(&[Kind::Net], &dir, &setup).unwrap_err();
        assert!(error.to_string().contains(path), "{error}");
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0, "{path}");
    }
    assert!(!mounted_below(root.path()));
}

#[test]
fn another_pod_s_pin_is_never_taken_over() {
    let root = tempfile::tempdir().unwrap();
    namespaces::create(&[Kind::Net], root.path(), &Setup::default()).unwrap();
    let before = identity(&root.path().join("net"));
    let error = namespaces::create(&Kind::ALL, root.path(), &Setup::default()).unwrap_err();
    assert!(error.to_string().contains("/net"), "{error}");
    assert_eq!(identity(&root.path().join("net")), before);
    assert!(!root.path().join("ipc").exists());
    namespaces::remove(root.path()).unwrap();
}

#[test]
fn pins_of_many_pods_are_made_at_once() {
    let root = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for number in 0..20 {
            let dir = root.path().join(number.to_string());
            scope.spawn(move || namespaces::create(&Kind::ALL, &dir, &Setup::default()).unwrap());
        }
    });
    let mut seen: Vec<_> =
        (0..20).map(|number| identity(&root.path().join(number.to_string()).join("net"))).collect();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 20);
    for number in 0..20 {
        namespaces::remove(&root.path().join(number.to_string())).unwrap();
    }
    assert!(!mounted_below(root.path()));
}

#[test]
fn what_is_no_namespace_does_not_pass_for_one() {
    let file = tempfile::NamedTempFile::new().unwrap();
    assert!(!namespaces::is_pinned(file.path()));
    assert!(!namespaces::is_pinned(Path::new("/proc/self/ns/none")));
    assert!(namespaces::is_pinned(Path::new("/proc/self/ns/net")));
}
