//! An adjustment laid over a configuration, and a configuration described.

use super::*;
use pinion_nri_proto::api::{
    Container, Hook, KeyValue, LinuxContainerAdjustment, LinuxDevice, LinuxMemoryPolicy,
    LinuxResources, MpolMode, OptionalInt, OptionalInt64, OptionalString,
};

fn spec() -> Value {
    json!({
        "process": { "args": ["sleep"], "env": ["PATH=/bin", "A=1"], "user": { "uid": 5, "gid": 6 } },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "linux": {
            "resources": {
                "cpu": { "shares": 100, "cpus": "2-3" },
                "memory": { "limit": 1024 },
                "devices": [{ "allow": false, "access": "rwm" }],
            },
            "namespaces": [{ "type": "mount" }],
            "cgroupsPath": "/pod/x",
        },
        "unknown": { "kept": true },
    })
}

fn linux(linux: LinuxContainerAdjustment) -> ContainerAdjustment {
    ContainerAdjustment { linux: Some(linux), ..Default::default() }
}

#[test]
fn a_plugin_sees_the_container_as_it_will_be() {
    let mut container = Container::default();
    describe(&spec(), &mut container);
    assert_eq!(container.args, ["sleep"]);
    assert_eq!(container.env, ["PATH=/bin", "A=1"]);
    assert_eq!(container.user.unwrap().uid, 5);
    let linux = container.linux.unwrap();
    let resources = linux.resources.unwrap();
    assert_eq!(resources.cpu.unwrap().cpus, "2-3");
    assert_eq!(resources.memory.unwrap().limit, Some(OptionalInt64 { value: 1024 }));
    assert_eq!(linux.cgroups_path, "/pod/x");
}

#[test]
fn adjustments_are_laid_over_and_nothing_else_changes() {
    let mut adjusted = spec();
    let pair = |key: &str, value: &str| KeyValue { key: key.into(), value: value.into() };
    let mount = |at: &str| Mount { destination: at.into(), ..Default::default() };
    let asked = ContainerAdjustment {
        env: vec![pair("A", "2"), pair("-PATH", ""), pair("B", "3")],
        mounts: vec![mount("-/proc"), mount("/new")],
        annotations: [("k".to_owned(), "v".to_owned())].into(),
        hooks: Some(Hooks {
            poststop: vec![Hook { path: "/h".into(), ..Default::default() }],
            ..Default::default()
        }),
        linux: Some(LinuxContainerAdjustment {
            devices: vec![LinuxDevice {
                path: "/dev/x".into(),
                r#type: "c".into(),
                major: 10,
                minor: 200,
                ..Default::default()
            }],
            oom_score_adj: Some(OptionalInt { value: 7 }),
            memory_policy: Some(LinuxMemoryPolicy {
                mode: MpolMode::MpolBind.into(),
                nodes: "1".into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    apply(&mut adjusted, &asked).unwrap();
    assert_eq!(adjusted["process"]["env"], json!(["A=2", "B=3"]));
    assert_eq!(adjusted["mounts"].as_array().unwrap().len(), 1);
    assert_eq!(adjusted["annotations"], json!({ "k": "v" }));
    assert_eq!(adjusted["hooks"]["poststop"][0]["path"], "/h");
    assert_eq!(adjusted["linux"]["resources"]["devices"][1]["minor"], 200);
    assert_eq!(adjusted["linux"]["memoryPolicy"]["mode"], "MPOL_BIND");
    assert_eq!(adjusted["process"]["oomScoreAdj"], 7);
    assert_eq!(adjusted["unknown"], spec()["unknown"]);
    assert_eq!(adjusted["linux"]["resources"]["cpu"], spec()["linux"]["resources"]["cpu"]);
    assert!(adjusted["linux"].get("sysctl").is_none());
}

#[test]
fn nothing_asked_is_nothing_changed() {
    let mut adjusted = spec();
    apply(&mut adjusted, &linux(LinuxContainerAdjustment::default())).unwrap();
    assert_eq!(adjusted["process"]["args"], spec()["process"]["args"]);
    assert_eq!(adjusted["linux"]["resources"], spec()["linux"]["resources"]);
}

#[test]
fn what_cannot_be_done_is_said() {
    let refused = |asked: &ContainerAdjustment| apply(&mut spec(), asked).unwrap_err().field;
    let device = |path: &str, kind: &str| {
        linux(LinuxContainerAdjustment {
            devices: vec![LinuxDevice {
                path: path.into(),
                r#type: kind.into(),
                ..Default::default()
            }],
            ..Default::default()
        })
    };
    assert_eq!(refused(&device("/etc/x", "c")), "linux.devices");
    assert_eq!(refused(&device("/dev/../etc/x", "c")), "linux.devices");
    assert_eq!(refused(&device("/dev/x", "q")), "linux.devices");
    let hook = Hook { path: "relative".into(), ..Default::default() };
    let hooks = Hooks { prestart: vec![hook], ..Default::default() };
    let asked = ContainerAdjustment { hooks: Some(hooks), ..Default::default() };
    assert_eq!(refused(&asked), "hooks.prestart");
    let reserved = [("dev.pinion.strict".to_owned(), "false".to_owned())].into();
    let asked = ContainerAdjustment { annotations: reserved, ..Default::default() };
    assert!(refused(&asked).starts_with("annotations"));
    let class = LinuxResources {
        rdt_class: Some(OptionalString { value: "gold".into() }),
        ..Default::default()
    };
    let asked = linux(LinuxContainerAdjustment { resources: Some(class), ..Default::default() });
    assert_eq!(refused(&asked), "linux.resources.rdt_class");
}
