//! Seccomp, AppArmor, SELinux and the paths of `/proc` and `/sys` that are hidden.
//!
//! A profile that was asked for and cannot be applied is an error, never a warning: the
//! container would run less confined than its owner believes.

use crate::capabilities::CapabilitySets;
use crate::error::SpecError;
use crate::facts::HostFacts;
use crate::inputs::{Settings, UnsetSeccomp};
use crate::seccomp_default;
use oci_spec::runtime::LinuxSeccomp;
use pinion_cri_proto::v1::security_profile::ProfileType;
use pinion_cri_proto::v1::{LinuxContainerSecurityContext, SeLinuxOption, SecurityProfile};

const SECURITY: &str = "linux.security_context";

/// Name of the AppArmor profile `RuntimeDefault` stands for; see [`default_apparmor_profile`].
pub const DEFAULT_APPARMOR_PROFILE: &str = "pinion-default";

/// A profile as CRI means it, from the current field or its deprecated string.
enum Wanted<'a> {
    Unset,
    RuntimeDefault,
    Unconfined,
    Localhost(&'a str),
}

/// Reads `profile`, else the deprecated `path` (`runtime/default`, `unconfined`, `localhost/…`).
fn wanted<'a>(
    profile: Option<&'a SecurityProfile>,
    path: &'a str,
    field: &str,
) -> Result<Wanted<'a>, SpecError> {
    let Some(profile) = profile else {
        return match path {
            "" => Ok(Wanted::Unset),
            "runtime/default" | "docker/default" => Ok(Wanted::RuntimeDefault),
            "unconfined" => Ok(Wanted::Unconfined),
            other => other.strip_prefix("localhost/").map(Wanted::Localhost).ok_or_else(|| {
                SpecError::invalid(
                    format!("{SECURITY}.{field}"),
                    format!("{other:?} is no profile"),
                )
            }),
        };
    };
    let field = format!("{SECURITY}.{field}");
    let reference = profile.localhost_ref.trim_start_matches("localhost/");
    match ProfileType::try_from(profile.profile_type) {
        Ok(ProfileType::Localhost) if reference.is_empty() => {
            Err(SpecError::invalid(field, "Localhost without localhost_ref"))
        }
        Ok(ProfileType::Localhost) => Ok(Wanted::Localhost(reference)),
        Ok(_) if !reference.is_empty() => {
            let reason = format!("localhost_ref {reference:?} without profile_type Localhost");
            Err(SpecError::invalid(field, reason))
        }
        Ok(ProfileType::RuntimeDefault) => Ok(Wanted::RuntimeDefault),
        Ok(ProfileType::Unconfined) => Ok(Wanted::Unconfined),
        Err(_) => {
            let reason = format!("unknown profile_type {}", profile.profile_type);
            Err(SpecError::invalid(field, reason))
        }
    }
}

/// Path of the file a `Localhost` seccomp profile names, so that the server can read it.
pub fn localhost_seccomp_path(security: &LinuxContainerSecurityContext) -> Option<&str> {
    #[allow(deprecated, reason = "clients older than the SecurityProfile field still set it")]
    let path = &security.seccomp_profile_path;
    match wanted(security.seccomp.as_ref(), path, "seccomp") {
        Ok(Wanted::Localhost(path)) if !security.privileged => Some(path),
        _ => None,
    }
}

/// The seccomp filter; `None` = unconfined.
pub(crate) fn seccomp(
    security: &LinuxContainerSecurityContext,
    capabilities: &CapabilitySets,
    localhost: Option<&[u8]>,
    host: &HostFacts,
    settings: &Settings,
) -> Result<Option<LinuxSeccomp>, SpecError> {
    #[allow(deprecated, reason = "clients older than the SecurityProfile field still set it")]
    let path = &security.seccomp_profile_path;
    let field = format!("{SECURITY}.seccomp");
    let wanted = match wanted(security.seccomp.as_ref(), path, "seccomp")? {
        Wanted::Unset if settings.unset_seccomp == UnsetSeccomp::Unconfined => return Ok(None),
        Wanted::Unset => Wanted::RuntimeDefault,
        wanted => wanted,
    };
    if security.privileged || matches!(wanted, Wanted::Unconfined) {
        return Ok(None);
    }
    if !host.seccomp {
        return Err(SpecError::unavailable(field, "this kernel has no seccomp filters"));
    }
    match (wanted, localhost) {
        (Wanted::Localhost(path), None) => {
            Err(SpecError::unavailable(field, format!("profile {path:?} cannot be read")))
        }
        (Wanted::Localhost(path), Some(text)) => serde_json::from_slice(text)
            .map(Some)
            .map_err(|error| SpecError::invalid(field, format!("profile {path:?}: {error}"))),
        _ => seccomp_default::profile(&capabilities.held)
            .map(Some)
            .map_err(|error| SpecError::invalid(field, error.to_string())),
    }
}

/// The AppArmor profile of the process; `None` = unconfined.
pub(crate) fn apparmor(
    security: &LinuxContainerSecurityContext,
    host: &HostFacts,
    warnings: &mut Vec<String>,
) -> Result<Option<String>, SpecError> {
    #[allow(deprecated, reason = "clients older than the SecurityProfile field still set it")]
    let path = &security.apparmor_profile;
    let field = || format!("{SECURITY}.apparmor");
    let wanted = wanted(security.apparmor.as_ref(), path, "apparmor")?;
    let Some(apparmor) = &host.apparmor else {
        return match wanted {
            Wanted::Unset | Wanted::Unconfined => Ok(None),
            _ => Err(SpecError::unavailable(field(), "AppArmor is not enabled on this host")),
        };
    };
    let (name, explicit) = match wanted {
        Wanted::Unconfined => return Ok(None),
        Wanted::Unset | Wanted::RuntimeDefault if security.privileged => return Ok(None),
        Wanted::Unset => (DEFAULT_APPARMOR_PROFILE, false),
        Wanted::RuntimeDefault => (DEFAULT_APPARMOR_PROFILE, true),
        Wanted::Localhost(name) => (name, true),
    };
    if apparmor.profiles.contains(name) {
        return Ok(Some(name.to_owned()));
    }
    let reason = format!("AppArmor profile {name:?} is not loaded");
    if explicit {
        return Err(SpecError::unavailable(field(), reason));
    }
    warnings.push(format!("{}: {reason}; the container runs without one", field()));
    Ok(None)
}

/// Text of the default AppArmor profile, for apparmor_parser(8).
///
/// Files, network and capabilities are left to the other layers; what is denied are mounts,
/// writes to kernel controls and tracing of anything outside the profile.
pub fn default_apparmor_profile() -> String {
    format!(
        "#include <tunables/global>\n\
         profile {DEFAULT_APPARMOR_PROFILE} flags=(attach_disconnected,mediate_deleted) {{\n\
         \x20 #include <abstractions/base>\n\
         \x20 network,\n\
         \x20 capability,\n\
         \x20 file,\n\
         \x20 umount,\n\
         \x20 signal (receive) peer=unconfined,\n\
         \x20 signal (send,receive) peer={DEFAULT_APPARMOR_PROFILE},\n\
         \x20 ptrace (trace,read,tracedby,readby) peer={DEFAULT_APPARMOR_PROFILE},\n\
         \x20 deny mount,\n\
         \x20 deny @{{PROC}}/sys/kernel/{{?,??,[^s][^h][^m]**}} w,\n\
         \x20 deny @{{PROC}}/sysrq-trigger rwklx,\n\
         \x20 deny @{{PROC}}/kcore rwklx,\n\
         \x20 deny @{{PROC}}/mem rwklx,\n\
         \x20 deny @{{PROC}}/kmem rwklx,\n\
         \x20 deny /sys/[^f]*/** wklx,\n\
         \x20 deny /sys/f[^s]*/** wklx,\n\
         \x20 deny /sys/fs/[^c]*/** wklx,\n\
         \x20 deny /sys/fs/c[^g]*/** wklx,\n\
         \x20 deny /sys/firmware/** rwklx,\n\
         \x20 deny /sys/kernel/security/** rwklx,\n\
         }}\n"
    )
}

/// SELinux labels of the process and of its mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Labels {
    pub(crate) process: String,
    pub(crate) mount: String,
}

/// Labels from the container's options, filled up from the pod's; `None` where SELinux is off.
///
/// Without options on either the kernel's transition rules decide, so nothing is set.
pub(crate) fn selinux(
    container: Option<&SeLinuxOption>,
    pod: Option<&SeLinuxOption>,
    privileged: bool,
    host: &HostFacts,
) -> Result<Option<Labels>, SpecError> {
    let none = SeLinuxOption::default();
    let (container, pod) = (container.unwrap_or(&none), pod.unwrap_or(&none));
    if !host.selinux || (*container == none && *pod == none) {
        return Ok(None);
    }
    let pick = |own: &str, shared: &str, default: &str, member: &str| {
        let chosen = [own, shared, default].into_iter().find(|text| !text.is_empty());
        let chosen = chosen.unwrap_or_default();
        let odd = |c: char| !(c.is_ascii_alphanumeric() || "_-.,:".contains(c));
        if chosen.contains(odd) || (member != "level" && chosen.contains(':')) {
            let field = format!("{SECURITY}.selinux_options.{member}");
            return Err(SpecError::invalid(field, format!("{chosen:?} is no part of a label")));
        }
        Ok(chosen.to_owned())
    };
    let kind = if privileged { "spc_t" } else { "container_t" };
    let user = pick(&container.user, &pod.user, "system_u", "user")?;
    let role = pick(&container.role, &pod.role, "system_r", "role")?;
    let kind = pick(&container.r#type, &pod.r#type, kind, "type")?;
    let level = pick(&container.level, &pod.level, "s0", "level")?;
    Ok(Some(Labels {
        process: format!("{user}:{role}:{kind}:{level}"),
        mount: format!("{user}:object_r:container_file_t:{level}"),
    }))
}

/// Hidden when neither list was given: what leaks about or into the host.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Read-only when neither list was given.
const READ_ONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Masked and read-only paths: CRI's, nothing for privileged containers, the defaults when CRI
/// names none of either.
///
/// kubelet always names them, except for `procMount: Unmasked`, which needs a user namespace;
/// so two empty lists outside one mean a client that did not think of it.
pub(crate) fn paths(
    security: &LinuxContainerSecurityContext,
    user_namespace: bool,
) -> (Vec<String>, Vec<String>) {
    if security.privileged {
        return (Vec::new(), Vec::new());
    }
    let none = security.masked_paths.is_empty() && security.readonly_paths.is_empty();
    if none && !user_namespace {
        return (MASKED.map(str::to_owned).into(), READ_ONLY.map(str::to_owned).into());
    }
    (security.masked_paths.clone(), security.readonly_paths.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::AppArmor;

    fn profile(kind: ProfileType, reference: &str) -> Option<SecurityProfile> {
        Some(SecurityProfile { profile_type: kind.into(), localhost_ref: reference.to_owned() })
    }

    fn host() -> HostFacts {
        let profiles = ["pinion-default", "mine"].map(str::to_owned).into();
        HostFacts { seccomp: true, apparmor: Some(AppArmor { profiles }), ..Default::default() }
    }

    fn filter(
        security: &LinuxContainerSecurityContext,
        file: Option<&[u8]>,
    ) -> Result<Option<LinuxSeccomp>, SpecError> {
        let capabilities = CapabilitySets::default();
        seccomp(security, &capabilities, file, &host(), &Settings::default())
    }

    #[test]
    fn seccomp_follows_the_profile_type() {
        let mut security = LinuxContainerSecurityContext::default();
        assert_eq!(filter(&security, None).unwrap(), None, "unset means unconfined");
        security.seccomp = profile(ProfileType::RuntimeDefault, "");
        assert!(filter(&security, None).unwrap().is_some());
        security.seccomp = profile(ProfileType::Unconfined, "");
        assert_eq!(filter(&security, None).unwrap(), None);
        security.seccomp = profile(ProfileType::Localhost, "/p.json");
        assert_eq!(localhost_seccomp_path(&security), Some("/p.json"));
        let text = br#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"names":["chmod"],"action":"SCMP_ACT_ERRNO"}]}"#;
        assert!(filter(&security, Some(text)).unwrap().is_some());
        assert!(filter(&security, None).unwrap_err().reason.contains("/p.json"));
        assert!(filter(&security, Some(b"{")).unwrap_err().field.ends_with("seccomp"));
        security.privileged = true;
        assert_eq!(filter(&security, None).unwrap(), None);
    }

    #[test]
    fn unset_seccomp_can_be_made_the_default_profile() {
        let security = LinuxContainerSecurityContext::default();
        let settings =
            Settings { unset_seccomp: UnsetSeccomp::RuntimeDefault, ..Default::default() };
        let none = CapabilitySets::default();
        assert!(seccomp(&security, &none, None, &host(), &settings).unwrap().is_some());
    }

    #[test]
    fn a_profile_is_refused_where_the_kernel_has_no_filters() {
        let security = LinuxContainerSecurityContext {
            seccomp: profile(ProfileType::RuntimeDefault, ""),
            ..Default::default()
        };
        let none = CapabilitySets::default();
        let host = HostFacts::default();
        assert!(seccomp(&security, &none, None, &host, &Settings::default()).is_err());
    }

    #[test]
    fn contradictory_profiles_are_refused() {
        for odd in [
            profile(ProfileType::RuntimeDefault, "x"),
            profile(ProfileType::Localhost, ""),
            Some(SecurityProfile { profile_type: 7, localhost_ref: String::new() }),
        ] {
            let security = LinuxContainerSecurityContext { seccomp: odd, ..Default::default() };
            assert_eq!(
                filter(&security, None).unwrap_err().field,
                "linux.security_context.seccomp"
            );
        }
    }

    #[test]
    #[allow(deprecated)]
    fn deprecated_strings_still_count() {
        let mut security = LinuxContainerSecurityContext {
            seccomp_profile_path: "runtime/default".to_owned(),
            apparmor_profile: "localhost/mine".to_owned(),
            ..Default::default()
        };
        assert!(filter(&security, None).unwrap().is_some());
        let name = apparmor(&security, &host(), &mut Vec::new()).unwrap();
        assert_eq!(name.as_deref(), Some("mine"));
        security.seccomp_profile_path = "odd".to_owned();
        assert!(filter(&security, None).is_err());
    }

    #[test]
    fn apparmor_fails_closed_when_asked_and_warns_when_not() {
        let mut security = LinuxContainerSecurityContext::default();
        let mut warnings = Vec::new();
        let name = apparmor(&security, &host(), &mut warnings).unwrap();
        assert_eq!(name.as_deref(), Some("pinion-default"));
        let bare = HostFacts { apparmor: Some(AppArmor::default()), ..Default::default() };
        assert_eq!(apparmor(&security, &bare, &mut warnings).unwrap(), None);
        assert_eq!(warnings.len(), 1);
        security.apparmor = profile(ProfileType::RuntimeDefault, "");
        assert!(apparmor(&security, &bare, &mut warnings).is_err());
        security.apparmor = profile(ProfileType::Localhost, "unconfined_foo");
        assert!(apparmor(&security, &host(), &mut warnings).is_err());
        let off = HostFacts::default();
        assert!(apparmor(&security, &off, &mut warnings).is_err());
        security.apparmor = profile(ProfileType::Unconfined, "");
        assert_eq!(apparmor(&security, &off, &mut warnings).unwrap(), None);
    }

    #[test]
    fn selinux_labels_are_put_together_only_where_it_is_on() {
        let option = SeLinuxOption { level: "s0:c1,c2".to_owned(), ..Default::default() };
        let on = HostFacts { selinux: true, ..Default::default() };
        let labels = selinux(Some(&option), None, false, &on).unwrap().unwrap();
        assert_eq!(labels.process, "system_u:system_r:container_t:s0:c1,c2");
        assert_eq!(labels.mount, "system_u:object_r:container_file_t:s0:c1,c2");
        assert_eq!(selinux(None, Some(&option), false, &on).unwrap(), Some(labels));
        assert_eq!(selinux(Some(&option), None, false, &HostFacts::default()).unwrap(), None);
        let odd = SeLinuxOption { r#type: "a:b".to_owned(), ..Default::default() };
        assert!(selinux(Some(&odd), None, false, &on).is_err());
    }

    #[test]
    fn paths_are_the_client_s_or_the_defaults_or_none() {
        let mut security = LinuxContainerSecurityContext::default();
        assert_eq!(paths(&security, false).0.len(), MASKED.len());
        assert_eq!(paths(&security, true), (Vec::new(), Vec::new()));
        security.masked_paths = vec!["/bin/ls".to_owned()];
        assert_eq!(paths(&security, false), (vec!["/bin/ls".to_owned()], Vec::new()));
        security.privileged = true;
        assert_eq!(paths(&security, false), (Vec::new(), Vec::new()));
    }
}
