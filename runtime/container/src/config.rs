//! Reading `config.json`.
//!
//! The types are oci-spec's, but for the outermost two: its process brings a regular
//! expression engine into the binary to look at CPU lists, and nothing here needs the parts
//! for other platforms. oci-spec refuses some input that runc accepts: `null` for a list,
//! capabilities newer than the types. The file is therefore parsed strictly first and, only
//! if that fails, once more after such harmless differences have been filtered out.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Capability, Hooks, Linux, LinuxCapabilities, LinuxIOPriority, LinuxMemoryPolicy,
    LinuxPersonality, LinuxSchedulerPolicy, LinuxSeccomp, Mount, PosixRlimit, Root, User,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Why a configuration file was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not there.
    #[error("JSON specification file {} not found", .0.display())]
    Missing(PathBuf),
    /// Not readable.
    #[error("unable to read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not JSON, or not this JSON; the source names line and column.
    #[error("unable to parse {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
}

/// `config.json`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    /// The version of the specification it was written for.
    pub oci_version: String,
    /// The root file system.
    pub root: Option<Root>,
    /// Mounts, in order.
    pub mounts: Option<Vec<Mount>>,
    /// The first process.
    pub process: Option<Process>,
    /// Host name.
    pub hostname: Option<String>,
    /// NIS domain name.
    pub domainname: Option<String>,
    /// Hooks.
    pub hooks: Option<Hooks>,
    /// Annotations.
    pub annotations: Option<HashMap<String, String>>,
    /// The Linux part.
    pub linux: Option<Linux>,
    /// The part for virtual machines.
    pub vm: Option<crate::vm::Vm>,
}

/// `process` of `config.json`, and the file of `exec --process`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// Whether it has a terminal of its own.
    #[serde(default)]
    pub terminal: bool,
    /// The terminal's size.
    pub console_size: Option<oci_spec::runtime::Box>,
    /// Who it runs as.
    #[serde(default)]
    pub user: User,
    /// The program and its arguments.
    pub args: Option<Vec<String>>,
    /// Its environment.
    pub env: Option<Vec<String>>,
    /// Its working directory.
    pub cwd: PathBuf,
    /// Its capabilities.
    pub capabilities: Option<LinuxCapabilities>,
    /// Its resource limits.
    pub rlimits: Option<Vec<PosixRlimit>>,
    /// Whether it may gain privileges by executing files.
    #[serde(default)]
    pub no_new_privileges: bool,
    /// Its AppArmor profile.
    pub apparmor_profile: Option<String>,
    /// How eagerly the kernel kills it when memory runs out.
    pub oom_score_adj: Option<i32>,
    /// Its SELinux label.
    pub selinux_label: Option<String>,
    /// Its I/O priority.
    pub io_priority: Option<LinuxIOPriority>,
    /// Its scheduling policy.
    pub scheduler: Option<Scheduler>,
    /// The CPUs it runs on while and after it enters a container (`exec` only).
    #[serde(rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Option<CpuAffinity>,
}

/// `process.scheduler`. oci-spec's type has other names for two of the flags than the
/// specification.
#[derive(Clone, Debug, Deserialize)]
pub struct Scheduler {
    /// `SCHED_*`.
    pub policy: LinuxSchedulerPolicy,
    /// For `SCHED_OTHER` and `SCHED_BATCH`.
    pub nice: Option<i32>,
    /// For `SCHED_FIFO` and `SCHED_RR`.
    pub priority: Option<i32>,
    /// `SCHED_FLAG_*`.
    pub flags: Option<Vec<String>>,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub runtime: Option<u64>,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub deadline: Option<u64>,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub period: Option<u64>,
}

/// `process.execCPUAffinity`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct CpuAffinity {
    /// CPU list before the cgroup is joined.
    pub initial: Option<String>,
    /// CPU list afterwards.
    pub r#final: Option<String>,
}

/// A parsed file and what had to be left out of it.
#[derive(Debug)]
pub struct Parsed<T> {
    /// The value.
    pub value: T,
    /// Sentences for the log.
    pub warnings: Vec<String>,
}

/// The largest file that is read: config files of real nodes stay under 200 KiB.
const MAX_BYTES: u64 = 16 << 20;

/// Reads a bundle's `config.json`; also returns its bytes.
///
/// # Errors
/// See [`ConfigError`].
pub fn load_spec(path: &Path) -> Result<(Parsed<Spec>, Vec<u8>), ConfigError> {
    let bytes = read(path)?;
    Ok((parse(&bytes, path)?, bytes))
}

/// Reads the file of `exec --process`.
///
/// # Errors
/// See [`ConfigError`].
pub fn load_process(path: &Path) -> Result<Parsed<Process>, ConfigError> {
    parse(&read(path)?, path)
}

/// The part of the configuration that `exec` needs.
#[derive(Debug, Deserialize)]
pub struct ExecView {
    /// The defaults for the new process.
    pub process: Option<Process>,
    /// The Linux part.
    pub linux: Option<ExecLinuxView>,
}

/// See [`ExecView`].
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExecLinuxView {
    /// The filter every process of the container runs under.
    pub seccomp: Option<LinuxSeccomp>,
    /// The execution domain of every process.
    pub personality: Option<LinuxPersonality>,
    /// The NUMA policy of every process.
    pub memory_policy: Option<LinuxMemoryPolicy>,
}

/// Reads what `exec` needs of a saved `config.json`.
///
/// # Errors
/// See [`ConfigError`].
pub fn load_exec_view(path: &Path) -> Result<Parsed<ExecView>, ConfigError> {
    parse(&read(path)?, path)
}

fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
    use std::io::Read;
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => ConfigError::Missing(path.to_owned()),
        _ => ConfigError::Read { path: path.to_owned(), source },
    };
    let file = std::fs::File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let mut bytes = Vec::with_capacity(usize::try_from(size.min(MAX_BYTES)).unwrap_or(0) + 1);
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(failed(io::Error::from(io::ErrorKind::FileTooLarge)));
    }
    Ok(bytes)
}

fn parse<T: DeserializeOwned>(bytes: &[u8], path: &Path) -> Result<Parsed<T>, ConfigError> {
    let strict = match serde_json::from_slice(bytes) {
        Ok(value) => return Ok(Parsed { value, warnings: Vec::new() }),
        Err(error) => error,
    };
    let failed = |source| ConfigError::Parse { path: path.to_owned(), source };
    let mut document: Value = serde_json::from_slice(bytes).map_err(failed)?;
    let mut warnings = Vec::new();
    let changed = filter(&mut document, &mut warnings);
    // As text once more: reading a value tree would be a second copy of all this code.
    let filtered = serde_json::to_vec(&document).map_err(failed)?;
    match serde_json::from_slice(&filtered) {
        Ok(value) if changed => Ok(Parsed { value, warnings }),
        // The strict error knows the line in the file.
        _ => Err(failed(strict)),
    }
}

/// Removes nulls and unknown capabilities; true when anything was removed.
fn filter(value: &mut Value, warnings: &mut Vec<String>) -> bool {
    match value {
        Value::Object(map) => {
            let before = map.len();
            map.retain(|_, member| !member.is_null());
            let mut changed = map.len() != before;
            for (name, member) in map.iter_mut() {
                if name == "capabilities" {
                    changed |= filter_capabilities(member, warnings);
                }
                changed |= filter(member, warnings);
            }
            changed
        }
        Value::Array(items) => items.iter_mut().fold(false, |any, i| filter(i, warnings) | any),
        _ => false,
    }
}

fn filter_capabilities(sets: &mut Value, warnings: &mut Vec<String>) -> bool {
    let Value::Object(sets) = sets else { return false };
    let mut changed = false;
    for list in sets.values_mut().filter_map(Value::as_array_mut) {
        list.retain(|name| {
            let known = serde_json::from_value::<Capability>(name.clone()).is_ok();
            if !known {
                changed = true;
                let warning = format!("ignoring unknown or unavailable capability: {name}");
                if !warnings.contains(&warning) {
                    warnings.push(warning);
                }
            }
            known
        });
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_spec(text: &str) -> Result<Parsed<Spec>, ConfigError> {
        parse(text.as_bytes(), Path::new("config.json"))
    }

    #[test]
    fn nulls_and_unknown_capabilities_are_left_out_with_a_warning() {
        let parsed = parse_spec(
            r#"{"ociVersion":"1.0.2","process":{"args":["a"],"env":null,"cwd":"/",
                "user":{"uid":0,"gid":0,"additionalGids":null},
                "capabilities":{"bounding":["CAP_KILL","CAP_FOO"],"ambient":null}}}"#,
        )
        .unwrap();
        let process = parsed.value.process.unwrap();
        let capabilities = process.capabilities.unwrap();
        assert_eq!(capabilities.bounding().as_ref().unwrap().len(), 1);
        assert_eq!(parsed.warnings.len(), 1, "{:?}", parsed.warnings);
    }

    #[test]
    fn unknown_fields_are_ignored() {
        assert!(parse_spec(r#"{"ociVersion":"1.2.0","future":{"x":[1]}}"#).is_ok());
    }

    #[test]
    fn malformed_json_names_the_file_the_line_and_the_column() {
        let error = parse_spec("{\n \"ociVersion\": \"1.0.2\",\n oops }").unwrap_err();
        let text = crate::error::chain(&error);
        assert!(text.contains("config.json") && text.contains("line 3 column 2"), "{text}");
    }

    #[test]
    fn a_wrong_type_is_reported_where_it_stands() {
        let error = parse_spec("{\"ociVersion\":\"1\",\n\"hostname\":[]}").unwrap_err();
        assert!(crate::error::chain(&error).contains("line 2"));
    }
}
