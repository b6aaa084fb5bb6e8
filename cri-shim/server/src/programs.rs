//! The programs the server runs: the OCI runtime and the monitor.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use oci_spec::runtime::LinuxResources;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::config::Config;
use crate::error::{Context, Error, Kind, Result};

/// Names and arguments of the programs.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    pub(crate) runtime: PathBuf,
    pub(crate) runtime_root: PathBuf,
    pub(crate) monitor: PathBuf,
    pub(crate) systemd_cgroup: bool,
}

impl Programs {
    /// Finds the programs: as configured, else beside this executable, else in `PATH`.
    pub(crate) fn find(
        config: &Config,
        runtime_root: PathBuf,
        systemd_cgroup: bool,
    ) -> Result<Self> {
        Ok(Self {
            runtime: find(&config.runtime.path, "pinion", "runtime.path")?,
            monitor: find(&config.runtime.monitor_path, "pinion-monitor", "runtime.monitor_path")?,
            runtime_root,
            systemd_cgroup,
        })
    }

    fn runtime(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.runtime);
        command.arg("--root").arg(&self.runtime_root);
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.arg(verb).kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::piped()).current_dir("/");
        command
    }

    /// `update --resources - ID`: new limits for a container.
    pub(crate) async fn update(&self, id: &str, resources: &LinuxResources) -> Result<()> {
        let what = || format!("update container {id}");
        let json = serde_json::to_vec(resources).context(what)?;
        let mut command = self.runtime("update");
        command.arg("--resources").arg("-").arg(id).stdin(Stdio::piped());
        let mut child = command.spawn().context(|| format!("start {}", self.runtime.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(&json).await.context(what)?;
        }
        let output = child.wait_with_output().await.context(what)?;
        finish(&output, what)
    }

    /// `checkpoint --leave-running ID`: CRIU's images of a container and its log.
    pub(crate) async fn checkpoint(&self, id: &str, images: &Path, work: &Path) -> Result<()> {
        let mut command = self.runtime("checkpoint");
        command.arg("--image-path").arg(images).arg("--work-path").arg(work);
        // Connections of the container stay its own; locks are noted with the files.
        command.args(["--leave-running", "--tcp-established", "--ext-unix-sk", "--file-locks"]);
        let output = command
            .arg(id)
            .output()
            .await
            .context(|| format!("start {}", self.runtime.display()))?;
        finish(&output, || format!("checkpoint container {id}"))
    }

    /// `delete --force ID`, for a container whose monitor is gone. One that the runtime does
    /// not know is deleted already.
    pub(crate) async fn delete(&self, id: &str) -> Result<()> {
        let known = self.runtime_root.join(id);
        if !known.exists() {
            return Ok(());
        }
        let mut command = self.runtime("delete");
        command.arg("--force").arg(id);
        let output =
            command.output().await.context(|| format!("start {}", self.runtime.display()))?;
        if !known.exists() {
            return Ok(());
        }
        finish(&output, || format!("delete container {id}"))
    }

    /// First line of `--version`, for `info`.
    pub(crate) async fn version(&self) -> Result<String> {
        let output = Command::new(&self.runtime)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .await
            .context(|| format!("start {}", self.runtime.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or_default().to_string())
    }
}

fn finish(output: &std::process::Output, what: impl FnOnce() -> String) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words = words.trim();
    let detail = if words.is_empty() { output.status.to_string() } else { words.to_string() };
    // The runtime's own words for a guarantee that cannot be given.
    let kind = if detail.contains("isolation refused: ") { Kind::Refused } else { Kind::Internal };
    Err(Error::new(kind, format!("{}: {detail}", what())))
}

/// A program: the one configured, or the first of that name beside this executable and in
/// `PATH`.
pub(crate) fn find(configured: &Path, name: &str, key: &str) -> Result<PathBuf> {
    if !configured.as_os_str().is_empty() {
        return if configured.is_file() {
            Ok(configured.to_path_buf())
        } else {
            Err(missing(format!("{key}: {} is not a file", configured.display())))
        };
    }
    let beside = env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_path_buf()));
    let path = env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(env::split_paths(&path))
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_absolute() && candidate.is_file())
        .ok_or_else(|| {
            missing(format!("{name} is neither beside this executable nor in PATH; set {key}"))
        })
}

fn missing(message: String) -> Error {
    Error::new(Kind::Precondition, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configured_program_must_exist() {
        let error = find(Path::new("/nonexistent/runc"), "pinion", "runtime.path").unwrap_err();
        assert!(error.to_string().contains("runtime.path"));
        assert_eq!(find(Path::new("/bin/sh"), "x", "k").unwrap(), Path::new("/bin/sh"));
    }

    #[test]
    fn a_program_found_nowhere_says_what_to_set() {
        let error = find(Path::new(""), "no-such-program", "runtime.path").unwrap_err();
        assert!(error.to_string().contains("set runtime.path"));
    }
}
