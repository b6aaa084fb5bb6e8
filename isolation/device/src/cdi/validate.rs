//! What a CDI file may say. Pure.

use std::collections::BTreeSet;

use super::name::{is_device, is_kind};
use super::spec::{DeviceNode, Edits, Hook, IntelRdt, Mount, NetDevice, Spec, SpecError};

const VERSIONS: [(u32, u32, u32); 9] = [
    (0, 1, 0),
    (0, 2, 0),
    (0, 3, 0),
    (0, 4, 0),
    (0, 5, 0),
    (0, 6, 0),
    (0, 7, 0),
    (0, 8, 0),
    (1, 0, 0),
];
const NEWEST: (u32, u32, u32) = (1, 1, 0);
pub(super) const HOOKS: [&str; 6] =
    ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
const MOST_DEVICES: usize = 4096;
/// IFNAMSIZ without the end.
const LONGEST_INTERFACE: usize = 15;

fn value(place: impl Into<String>, reason: impl Into<String>) -> SpecError {
    SpecError::Value { place: place.into(), reason: reason.into() }
}

/// Checks every value, and that the version has all that is used.
pub(super) fn validate(spec: &Spec) -> Result<(), SpecError> {
    let version = version(&spec.cdi_version)?;
    let needs = minimum(spec);
    if needs > version {
        let (major, minor, patch) = needs;
        let reason =
            format!("it uses fields of {major}.{minor}.{patch}, but says {:?}", spec.cdi_version);
        return Err(value("cdiVersion", reason));
    }
    if !is_kind(&spec.kind) {
        return Err(value("kind", format!("{:?} is not vendor.com/class", spec.kind)));
    }
    if spec.devices.is_empty() || spec.devices.len() > MOST_DEVICES {
        let reason = format!("{} devices; 1 to {MOST_DEVICES} are possible", spec.devices.len());
        return Err(value("devices", reason));
    }
    let mut names = BTreeSet::new();
    for (index, device) in spec.devices.iter().enumerate() {
        let place = format!("devices[{index}]");
        if !is_device(&device.name) {
            let reason = format!("{:?} is no device name", device.name);
            return Err(value(format!("{place}.name"), reason));
        }
        if !names.insert(&device.name) {
            return Err(value(format!("{place}.name"), format!("{:?} twice", device.name)));
        }
        if device.container_edits.is_empty() {
            return Err(value(format!("{place}.containerEdits"), "a device without edits"));
        }
        edits(&device.container_edits, &format!("{place}.containerEdits"))?;
    }
    edits(&spec.container_edits, "containerEdits")
}

fn version(text: &str) -> Result<(u32, u32, u32), SpecError> {
    let mut numbers = text.strip_prefix('v').unwrap_or(text).splitn(3, '.').map(str::parse);
    let mut next = || numbers.next().and_then(Result::ok);
    let parsed =
        next().zip(next()).zip(next()).map(|((major, minor), patch)| (major, minor, patch));
    match parsed.filter(|version| VERSIONS.contains(version) || *version == NEWEST) {
        Some(version) => Ok(version),
        None => Err(value("cdiVersion", format!("{text:?} is not a version from 0.1.0 to 1.1.0"))),
    }
}

/// The first version with everything the file uses (table of released versions).
fn minimum(spec: &Spec) -> (u32, u32, u32) {
    let all = || {
        let devices = spec.devices.iter().map(|device| &device.container_edits);
        devices.chain([&spec.container_edits])
    };
    let rdt = || all().filter_map(|edits| edits.intel_rdt.as_ref());
    let annotated = |spec: &Spec| {
        !spec.annotations.is_empty() || spec.devices.iter().any(|d| !d.annotations.is_empty())
    };
    let digit = |name: &str| name.starts_with(|c: char| c.is_ascii_digit());
    if rdt().any(|rdt| !rdt.schemata.is_empty() || rdt.enable_monitoring)
        || all().any(|edits| !edits.net_devices.is_empty())
    {
        (1, 1, 0)
    } else if rdt().next().is_some() || all().any(|edits| !edits.additional_gids.is_empty()) {
        (0, 7, 0)
    } else if annotated(spec)
        || spec.kind.split_once('/').is_some_and(|(_, class)| class.contains('.'))
    {
        (0, 6, 0)
    } else if spec.devices.iter().any(|device| digit(&device.name))
        || all().flat_map(|edits| &edits.device_nodes).any(|node| !node.host_path.is_empty())
    {
        (0, 5, 0)
    } else if all().flat_map(|edits| &edits.mounts).any(|mount| !mount.r#type.is_empty()) {
        (0, 4, 0)
    } else {
        (0, 1, 0)
    }
}

fn edits(edits: &Edits, place: &str) -> Result<(), SpecError> {
    env(&edits.env, &format!("{place}.env"))?;
    for (index, node) in edits.device_nodes.iter().enumerate() {
        device_node(node, &format!("{place}.deviceNodes[{index}]"))?;
    }
    for (index, mount) in edits.mounts.iter().enumerate() {
        self::mount(mount, &format!("{place}.mounts[{index}]"))?;
    }
    for (index, hook) in edits.hooks.iter().enumerate() {
        self::hook(hook, &format!("{place}.hooks[{index}]"))?;
    }
    if let Some(rdt) = &edits.intel_rdt {
        intel_rdt(rdt, &format!("{place}.intelRdt"))?;
    }
    net_devices(&edits.net_devices, &format!("{place}.netDevices"))
}

fn env(env: &[String], place: &str) -> Result<(), SpecError> {
    let bad = |entry: &&String| {
        entry.contains('\0') || entry.split_once('=').is_none_or(|(name, _)| name.is_empty())
    };
    match env.iter().find(bad) {
        Some(entry) => Err(value(place, format!("{entry:?} is not NAME=value"))),
        None => Ok(()),
    }
}

/// An absolute path without detours.
fn path(path: &str, place: &str) -> Result<(), SpecError> {
    let odd = path.split('/').skip(1).any(|part| matches!(part, "." | ".."));
    if !path.starts_with('/') || path.contains('\0') || path.len() > 4095 || odd {
        let start: String = path.chars().take(64).collect();
        return Err(value(place, format!("{start:?} is not an absolute path without . and ..")));
    }
    Ok(())
}

/// Device nodes are made below /dev: elsewhere they would be hidden from who looks for them.
fn device_node(node: &DeviceNode, place: &str) -> Result<(), SpecError> {
    path(&node.path, &format!("{place}.path"))?;
    let below = node.path.strip_prefix("/dev/").unwrap_or_default();
    if below.is_empty() || below.split('/').any(str::is_empty) {
        let reason = format!("{:?} is not below /dev", node.path);
        return Err(value(format!("{place}.path"), reason));
    }
    if !node.host_path.is_empty() {
        path(&node.host_path, &format!("{place}.hostPath"))?;
    }
    if !["", "b", "c", "u", "p"].contains(&node.r#type.as_str()) {
        let reason = format!("{:?} is not b, c, u or p", node.r#type);
        return Err(value(format!("{place}.type"), reason));
    }
    for (name, number) in [("major", node.major), ("minor", node.minor)] {
        // MKDEV of the kernel: 12 and 20 bits
        let most = if name == "major" { 0xfff } else { 0xf_ffff };
        if !(0..=most).contains(&number) {
            return Err(value(format!("{place}.{name}"), format!("{number} is not 0 to {most}")));
        }
    }
    let permissions = node.permissions.as_str();
    if permissions != "none" && permissions.parse::<crate::Access>().is_err() {
        let reason = format!("{permissions:?} is not made of r, w and m");
        return Err(value(format!("{place}.permissions"), reason));
    }
    Ok(())
}

fn mount(mount: &Mount, place: &str) -> Result<(), SpecError> {
    let bind = mount.options.iter().any(|option| option == "bind" || option == "rbind");
    if mount.host_path.is_empty() {
        return Err(value(format!("{place}.hostPath"), "it is empty"));
    }
    // The source of a tmpfs or hugetlbfs is a name only.
    if bind || mount.r#type.is_empty() || mount.r#type == "bind" {
        path(&mount.host_path, &format!("{place}.hostPath"))?;
    }
    path(&mount.container_path, &format!("{place}.containerPath"))?;
    if mount.container_path.trim_end_matches('/').is_empty() {
        return Err(value(
            format!("{place}.containerPath"),
            "\"/\" is the root filesystem's place",
        ));
    }
    Ok(())
}

fn hook(hook: &Hook, place: &str) -> Result<(), SpecError> {
    if !HOOKS.contains(&hook.hook_name.as_str()) {
        let reason = format!("{:?} is none of {}", hook.hook_name, HOOKS.join(", "));
        return Err(value(format!("{place}.hookName"), reason));
    }
    path(&hook.path, &format!("{place}.path"))?;
    env(&hook.env, &format!("{place}.env"))?;
    if hook.timeout.is_some_and(|timeout| timeout <= 0) {
        return Err(value(format!("{place}.timeout"), "it must be greater than 0"));
    }
    Ok(())
}

/// The class of service becomes a directory of resctrl.
fn intel_rdt(rdt: &IntelRdt, place: &str) -> Result<(), SpecError> {
    let id = rdt.clos_id.as_str();
    let odd = matches!(id, "." | "..") || id.contains(['/', '\n', '\0']) || id.len() >= 4096;
    if odd && id != "/" {
        return Err(value(format!("{place}.closID"), format!("{id:?} is not a directory's name")));
    }
    Ok(())
}

fn net_devices(devices: &[NetDevice], place: &str) -> Result<(), SpecError> {
    let good = |name: &str| {
        (1..=LONGEST_INTERFACE).contains(&name.len())
            && !matches!(name, "." | "..")
            && !name.contains(|c: char| c.is_whitespace() || "/:\0".contains(c))
    };
    let mut seen = BTreeSet::new();
    for (index, device) in devices.iter().enumerate() {
        let NetDevice { host_interface_name: host, name } = device;
        for (field, text) in [("hostInterfaceName", host), ("name", name)] {
            if !good(text) {
                let reason = format!("{text:?} is no interface's name");
                return Err(value(format!("{place}[{index}].{field}"), reason));
            }
            if !seen.insert((field, text)) {
                return Err(value(format!("{place}[{index}].{field}"), format!("{text:?} twice")));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::spec::Format;
    use super::*;

    const GOOD: &str = r#"{
        "cdiVersion": "1.1.0", "kind": "vendor.com/net.x", "annotations": {"a": "b"},
        "devices": [{"name": "0", "containerEdits": {
            "env": ["A=b"],
            "deviceNodes": [{"path": "/dev/vfio/1", "hostPath": "/dev/vfio/11", "permissions": "rw"}],
            "netDevices": [{"hostInterfaceName": "eth1", "name": "net1"}]}}],
        "containerEdits": {
            "mounts": [{"hostPath": "/opt/x", "containerPath": "/opt/x", "options": ["ro", "bind"]}],
            "hooks": [{"hookName": "createRuntime", "path": "/bin/h", "args": ["h"], "timeout": 3}],
            "intelRdt": {"closID": "gold", "l3CacheSchema": "L3:0=f"},
            "additionalGids": [5, 0]}}"#;

    fn parse(text: &str) -> Result<Spec, SpecError> {
        Spec::parse(text, Format::Json)
    }

    #[test]
    fn a_file_with_everything_is_taken_in_both_encodings() {
        let spec = parse(GOOD).unwrap();
        let yaml = "cdiVersion: 1.0.0\nkind: vendor.com/net\ndevices:\n- name: vf\n  \
                    containerEdits:\n    env: [\"A=b\"]\n    deviceNodes:\n    - path: /dev/x\n      \
                    fileMode: 438\n";
        let yaml = Spec::parse(yaml, Format::Yaml).unwrap();
        assert_eq!(spec.devices[0].container_edits.device_nodes[0].host_path, "/dev/vfio/11");
        assert_eq!(yaml.devices[0].container_edits.device_nodes[0].file_mode, Some(0o666));
    }

    #[test]
    fn a_version_must_have_what_is_used() {
        for (version, uses, good) in [
            ("1.0.0", r#""netDevices": [{"hostInterfaceName": "a", "name": "b"}]"#, false),
            ("1.1.0", r#""netDevices": [{"hostInterfaceName": "a", "name": "b"}]"#, true),
            ("0.6.0", r#""additionalGids": [5]"#, false),
            ("0.7.0", r#""additionalGids": [5]"#, true),
            ("v0.4.0", r#""deviceNodes": [{"path": "/dev/a", "hostPath": "/dev/b"}]"#, false),
            ("v0.5.0", r#""deviceNodes": [{"path": "/dev/a", "hostPath": "/dev/b"}]"#, true),
            (
                "0.3.0",
                r#""mounts": [{"hostPath": "/a", "containerPath": "/b", "type": "bind"}]"#,
                false,
            ),
            ("0.3.0", r#""env": ["A=b"]"#, true),
            ("2.0.0", r#""env": ["A=b"]"#, false),
            ("1.0", r#""env": ["A=b"]"#, false),
        ] {
            let text = format!(
                r#"{{"cdiVersion": "{version}", "kind": "v/c", "devices": [{{"name": "d", "containerEdits": {{{uses}}}}}]}}"#
            );
            assert_eq!(parse(&text).is_ok(), good, "{version} {uses}");
        }
    }

    #[test]
    fn hostile_values_are_refused_with_their_place() {
        for (from, to, place) in [
            (r#""vendor.com/net.x""#, r#""../x""#, "kind"),
            (r#""name": "0""#, r#""name": "../x""#, "devices[0].name"),
            (r#""A=b""#, r#""A""#, "devices[0].containerEdits.env"),
            ("/dev/vfio/1\"", "/etc/shadow\"", "devices[0].containerEdits.deviceNodes[0].path"),
            ("/dev/vfio/1\"", "/dev/../etc/x\"", "devices[0].containerEdits.deviceNodes[0].path"),
            ("/dev/vfio/11", "relative", "devices[0].containerEdits.deviceNodes[0].hostPath"),
            (r#""rw""#, r#""rx""#, "devices[0].containerEdits.deviceNodes[0].permissions"),
            (r#""eth1""#, r#""a/b""#, "devices[0].containerEdits.netDevices[0].hostInterfaceName"),
            ("createRuntime", "atNoon", "containerEdits.hooks[0].hookName"),
            ("/bin/h", "h", "containerEdits.hooks[0].path"),
            (": 3", ": 0", "containerEdits.hooks[0].timeout"),
            ("gold", "../..", "containerEdits.intelRdt.closID"),
            (
                r#""containerPath": "/opt/x""#,
                r#""containerPath": "/""#,
                "containerEdits.mounts[0].containerPath",
            ),
            (
                r#""hostPath": "/opt/x""#,
                r#""hostPath": "/a/../b""#,
                "containerEdits.mounts[0].hostPath",
            ),
        ] {
            let text = GOOD.replacen(from, to, 1);
            assert_ne!(text, GOOD, "{from}");
            match parse(&text) {
                Err(SpecError::Value { place: found, .. }) => assert_eq!(found, place),
                other => panic!("{from} → {to}: {other:?}"),
            }
        }
        for text in ["", "null", "[]", r#"{"kind": 3}"#, &GOOD.replace("\"env\"", "\"environ\"")] {
            assert!(matches!(parse(text), Err(SpecError::Parse(_))), "{text}");
        }
    }

    #[test]
    fn a_yaml_bomb_is_an_error_and_not_a_feast() {
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x]\n");
        for n in 1..12 {
            let line = vec![format!("*a{}", n - 1); 9].join(",");
            bomb.push_str(&format!("a{n}: &a{n} [{line}]\n"));
        }
        let began = std::time::Instant::now();
        assert!(Spec::parse(&bomb, Format::Yaml).is_err());
        assert!(Spec::parse(&"[".repeat(500_000), Format::Yaml).is_err());
        assert!(Spec::parse(&"[".repeat(500_000), Format::Json).is_err());
        assert!(began.elapsed().as_secs() < 5);
    }
}
