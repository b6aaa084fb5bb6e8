//! The rules for CRI mounts, one test a rule.

use super::*;
use pinion_cri_proto::v1::ImageSpec;

fn pod() -> PodPaths {
    PodPaths {
        hosts: Some("/pod/hosts".into()),
        hostname: Some("/pod/hostname".into()),
        resolv_conf: Some("/pod/resolv.conf".into()),
        shm: Some("/pod/shm".into()),
        ..Default::default()
    }
}

fn mount(container: &str, host: &str) -> v1::Mount {
    v1::Mount { container_path: container.into(), host_path: host.into(), ..Default::default() }
}

struct Case {
    paths: HostPaths,
    host: HostFacts,
    privileged: bool,
}

impl Case {
    fn new() -> Self {
        let mut paths = HostPaths::default();
        for (path, propagation) in [
            ("/private", Propagation::Private),
            ("/slave", Propagation::Slave),
            ("/shared", Propagation::Shared),
        ] {
            paths.mounts.insert(path.into(), MountSource::Present(propagation));
        }
        paths.image_volumes.insert("/models".into(), "/volumes/1".into());
        let host = HostFacts { recursive_read_only: true, ..Default::default() };
        Self { paths, host, privileged: false }
    }

    fn run(&self, asked: &[v1::Mount]) -> Result<Mounts, SpecError> {
        let pod = pod();
        let context = Context {
            pod: &pod,
            host: &self.host,
            paths: &self.paths,
            privileged: self.privileged,
            readonly_rootfs: false,
            bind_sysfs: false,
        };
        mounts(asked, context)
    }

    fn options(&self, asked: v1::Mount) -> Vec<String> {
        let destination = PathBuf::from(&asked.container_path);
        let mounts = self.run(&[asked]).unwrap();
        let found = mounts.list.iter().find(|mount| *mount.destination() == destination);
        found.unwrap().options().clone().unwrap()
    }
}

fn places(mounts: &Mounts) -> Vec<&str> {
    mounts.list.iter().map(|mount| mount.destination().to_str().unwrap()).collect()
}

#[test]
fn defaults_come_first_and_the_rest_by_depth() {
    let asked = [mount("/a/b/c", "/private"), mount("/a", "/private"), mount("/a/b", "/private")];
    let mounts = Case::new().run(&asked).unwrap();
    assert_eq!(
        places(&mounts),
        [
            "/proc",
            "/dev",
            "/dev/pts",
            "/dev/mqueue",
            "/sys",
            "/sys/fs/cgroup",
            "/a",
            "/a/b",
            "/etc/hostname",
            "/etc/hosts",
            "/etc/resolv.conf",
            "/dev/shm",
            "/a/b/c",
        ]
    );
    assert!(mounts.missing_sources.is_empty() && mounts.rootfs_propagation.is_none());
}

#[test]
fn cri_mounts_replace_defaults_and_pod_files() {
    let case = Case::new();
    let asked = [mount("/etc/hosts", "/private"), mount("/sys/", "/private")];
    let mounts = case.run(&asked).unwrap();
    assert_eq!(places(&mounts).iter().filter(|place| **place == "/etc/hosts").count(), 1);
    let sys = mounts.list.iter().find(|mount| mount.destination() == Path::new("/sys")).unwrap();
    assert_eq!(sys.typ().as_deref(), Some("bind"));
    let mounts = case.run(&[mount("/dev", "/private")]).unwrap();
    assert!(!places(&mounts).contains(&"/dev/pts"));
    assert!(places(&mounts).contains(&"/dev/shm"), "the pod's shm still belongs there");
}

#[test]
fn missing_sources_are_reported_for_creation() {
    let mounts = Case::new().run(&[mount("/data", "/not/there")]).unwrap();
    assert_eq!(mounts.missing_sources, [PathBuf::from("/not/there")]);
}

#[test]
fn propagation_needs_a_source_that_takes_part() {
    let case = Case::new();
    let with = |host: &str, propagation: MountPropagation| {
        let mut asked = mount("/data", host);
        asked.propagation = propagation.into();
        case.run(&[asked]).map(|mounts| mounts.rootfs_propagation)
    };
    use MountPropagation::{PropagationBidirectional as Both, PropagationHostToContainer as Down};
    assert_eq!(with("/shared", Both).unwrap(), Some("rshared"));
    assert_eq!(with("/slave", Down).unwrap(), Some("rslave"));
    assert_eq!(with("/shared", Down).unwrap(), Some("rslave"));
    for (host, wanted) in [("/slave", Both), ("/private", Both), ("/private", Down)] {
        assert_eq!(with(host, wanted).unwrap_err().field, "mounts[0].propagation");
    }
}

#[test]
fn access_is_written_as_options() {
    let case = Case::new();
    let mut asked = mount("/data", "/private");
    assert_eq!(case.options(asked.clone()), ["rbind", "rprivate", "rw"]);
    asked.mount_options = vec!["noexec".into(), "nosuid".into()];
    asked.readonly = true;
    assert_eq!(case.options(asked.clone()), ["rbind", "rprivate", "ro", "noexec", "nosuid"]);
    asked.recursive_read_only = true;
    assert_eq!(case.options(asked), ["rbind", "rprivate", "rro", "noexec", "nosuid"]);
}

#[test]
fn recursive_read_only_is_refused_where_it_would_not_hold() {
    let mut case = Case::new();
    let mut asked = mount("/data", "/shared");
    asked.recursive_read_only = true;
    let error = |case: &Case, asked: &v1::Mount| {
        case.run(std::slice::from_ref(asked)).unwrap_err().to_string()
    };
    assert!(error(&case, &asked).contains("writable"));
    asked.readonly = true;
    asked.propagation = MountPropagation::PropagationHostToContainer.into();
    assert!(error(&case, &asked).contains("private propagation"));
    asked.propagation = MountPropagation::PropagationPrivate.into();
    case.host.recursive_read_only = false;
    assert!(error(&case, &asked).contains("mount_setattr"));
}

#[test]
fn image_volumes_are_read_only_binds_of_what_the_server_mounted() {
    let case = Case::new();
    let mut asked = mount("/models", "");
    asked.image = Some(ImageSpec { image: "model:1".into(), ..Default::default() });
    assert_eq!(case.run(&[asked.clone()]).unwrap_err().field, "mounts[0].readonly");
    asked.readonly = true;
    assert_eq!(case.options(asked.clone()), ["rbind", "rprivate", "ro"]);
    let mut part = mount("/data", "/private");
    part.image_sub_path = "etc".into();
    assert_eq!(case.run(&[part]).unwrap_err().field, "mounts[0].image_sub_path");
    asked.container_path = "/other".into();
    assert_eq!(case.run(&[asked.clone()]).unwrap_err().field, "mounts[0].image");
    asked.host_path = "/private".into();
    assert_eq!(case.run(&[asked]).unwrap_err().field, "mounts[0].host_path");
}

#[test]
fn paths_and_options_that_make_no_sense_are_refused() {
    let case = Case::new();
    for (container, host, field) in [
        ("data", "/private", "container_path"),
        ("", "/private", "container_path"),
        ("/", "/private", "container_path"),
        ("/..", "/private", "container_path"),
        ("/a\0b", "/private", "container_path"),
        ("/data", "", "host_path"),
        ("/data", "relative", "host_path"),
    ] {
        let error = case.run(&[mount(container, host)]).unwrap_err();
        assert_eq!(error.field, format!("mounts[0].{field}"), "{container:?} {host:?}");
    }
    let mut asked = mount("/data", "/private");
    asked.mount_options = vec!["lowerdir=/etc".into()];
    assert_eq!(case.run(&[asked]).unwrap_err().field, "mounts[0].mount_options");
    let mut asked = mount("/data", "/private");
    asked.propagation = 17;
    assert_eq!(case.run(&[asked]).unwrap_err().field, "mounts[0].propagation");
}

#[test]
fn privileged_containers_write_sysfs_and_cgroups() {
    let mut case = Case::new();
    case.privileged = true;
    let mounts = case.run(&[]).unwrap();
    for place in ["/sys", "/sys/fs/cgroup"] {
        let found = mounts.list.iter().find(|mount| mount.destination() == Path::new(place));
        let options = found.unwrap().options().clone().unwrap();
        assert!(options.contains(&"rw".to_owned()) && !options.contains(&"ro".to_owned()));
    }
}
