//! Runs one plugin once.
//!
//! A plugin is a foreign program with root's rights, so it gets: an environment of nothing but
//! the CNI variables and a PATH, `/` as working directory, a process group of its own that is
//! killed whole at the deadline, and a limit on what is read from it.

use super::config;
use crate::error::NetworkError;
use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use serde_json::Value;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

/// What is read of standard output; results are a few kilobytes.
const MAX_OUTPUT: usize = 1 << 20;
/// What is kept of standard error, for the message.
const MAX_STDERR: usize = 4 << 10;
/// How long a pipe may stay open after the plugin has ended, when a child of it holds it.
const PIPE_GRACE: Duration = Duration::from_millis(500);
/// ETXTBSY while the binary is being replaced: how often and how far apart to try again.
const BUSY_RETRIES: u32 = 5;
const BUSY_PAUSE: Duration = Duration::from_millis(100);
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where plugins are and how long they may take.
#[derive(Debug, Clone)]
pub struct Executor {
    /// Plugin directories in order of preference; also `CNI_PATH`.
    pub bin_dirs: Vec<PathBuf>,
    /// Deadline of one call.
    pub timeout: Duration,
}

/// One call of one plugin.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// `type` of the configuration.
    pub plugin: &'a str,
    /// ADD, DEL, CHECK, STATUS, VERSION or GC.
    pub command: &'static str,
    /// `CNI_CONTAINERID`, `CNI_NETNS`, `CNI_IFNAME`, `CNI_ARGS`; empty ones are left out.
    pub variables: &'a [(&'static str, String)],
    /// Standard input.
    pub stdin: &'a Value,
}

/// What a plugin prints when it fails (CNI specification, section 5, Error).
#[derive(Deserialize)]
struct ErrorObject {
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

impl Executor {
    /// The plugin's binary: the first executable file of that name.
    pub fn find(&self, plugin: &str) -> Result<PathBuf, NetworkError> {
        let missing = || NetworkError::PluginMissing {
            plugin: plugin.to_owned(),
            dirs: self.bin_dirs.clone(),
        };
        config::check_type(plugin).map_err(|_reason| missing())?;
        let candidates = self.bin_dirs.iter().map(|dir| dir.join(plugin));
        candidates.into_iter().find(|path| is_executable(path)).ok_or_else(missing)
    }

    /// Calls a plugin; `Null` when it succeeded without printing anything.
    pub async fn call(&self, call: Call<'_>) -> Result<Value, NetworkError> {
        let path = self.find(call.plugin)?;
        let mut child = self.spawn(&path, &call).await?;
        let output = match timeout(self.timeout, converse(&mut child, call.stdin)).await {
            Ok(output) => output,
            Err(_elapsed) => {
                kill_group(&child);
                let _ = timeout(PIPE_GRACE, child.wait()).await;
                return Err(NetworkError::Timeout {
                    plugin: call.plugin.to_owned(),
                    command: call.command,
                    after: self.timeout,
                });
            }
        };
        let output = output.map_err(|source| {
            kill_group(&child);
            NetworkError::PluginStart { path: path.clone(), source }
        })?;
        judge(&call, &output)
    }

    async fn spawn(&self, path: &Path, call: &Call<'_>) -> Result<Child, NetworkError> {
        let mut command = Command::new(path);
        let dirs: Vec<_> = self.bin_dirs.iter().map(|dir| dir.to_string_lossy()).collect();
        command
            .env_clear()
            .env("PATH", PATH)
            .env("CNI_PATH", dirs.join(":"))
            .env("CNI_COMMAND", call.command)
            .envs(call.variables.iter().filter(|(_, value)| !value.is_empty()).cloned())
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut attempt = 0;
        loop {
            match command.spawn() {
                Err(error)
                    if error.kind() == io::ErrorKind::ExecutableFileBusy
                        && attempt < BUSY_RETRIES =>
                {
                    attempt += 1;
                    sleep(BUSY_PAUSE).await;
                }
                Err(source) => {
                    return Err(NetworkError::PluginStart { path: path.to_owned(), source });
                }
                Ok(child) => return Ok(child),
            }
        }
    }
}

fn is_executable(path: &Path) -> bool {
    std::fs::metadata(path)
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The group of a process that has not been waited for cannot belong to anyone else.
fn kill_group(child: &Child) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

struct Output {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// Writes the input, reads both outputs, waits; all at once, so that no pipe can fill up.
async fn converse(child: &mut Child, input: &Value) -> io::Result<Output> {
    let bytes = input.to_string();
    let stdin = child.stdin.take();
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let write = async move {
        if let Some(mut stdin) = stdin {
            // A plugin that does not read its input says so by its exit, not by EPIPE here.
            let _ = stdin.write_all(bytes.as_bytes()).await;
        }
    };
    let mut read_out = Capture::new(stdout, MAX_OUTPUT);
    let mut read_err = Capture::new(stderr, MAX_STDERR);
    let status = {
        let reads = async { tokio::join!(read_out.run(), read_err.run(), write) };
        let mut reads = std::pin::pin!(reads);
        let mut ended = None;
        tokio::select! {
            status = child.wait() => ended = Some(status?),
            _ = &mut reads => {}
        }
        match ended {
            Some(status) => {
                let _ = timeout(PIPE_GRACE, &mut reads).await;
                status
            }
            None => child.wait().await?,
        }
    };
    Ok(Output { status, stdout: read_out.bytes, stderr: read_err.bytes })
}

/// Keeps the first `limit` + 1 bytes of a stream and drops the rest unread into nowhere.
struct Capture<R> {
    stream: Option<R>,
    limit: usize,
    bytes: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Capture<R> {
    fn new(stream: Option<R>, limit: usize) -> Self {
        Self { stream, limit, bytes: Vec::new() }
    }

    async fn run(&mut self) {
        let Some(stream) = &mut self.stream else { return };
        let mut buffer = [0u8; 8192];
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            let room = (self.limit + 1).saturating_sub(self.bytes.len()).min(count);
            self.bytes.extend_from_slice(buffer.get(..room).unwrap_or_default());
        }
    }
}

/// Turns exit status and output into a result or an error naming the plugin.
fn judge(call: &Call<'_>, output: &Output) -> Result<Value, NetworkError> {
    let plugin = call.plugin.to_owned();
    let command = call.command;
    let said = excerpt(&output.stderr, MAX_STDERR);
    if !output.status.success() {
        if let Ok(error) = serde_json::from_slice::<ErrorObject>(&output.stdout) {
            let details = if error.details.is_empty() { said } else { error.details };
            let ErrorObject { code, msg: message, .. } = error;
            return Err(NetworkError::Plugin { plugin, command, code, message, details });
        }
        let code = output.status.code().and_then(|code| u32::try_from(code).ok()).unwrap_or(0);
        let printed = excerpt(&output.stdout, 256);
        let message = format!("{} without an error object {printed}", output.status);
        let message = message.trim_end().to_owned();
        return Err(NetworkError::Plugin { plugin, command, code, message, details: said });
    }
    if output.stdout.iter().all(u8::is_ascii_whitespace) {
        return Ok(Value::Null);
    }
    let bad = |reason| Err(NetworkError::BadOutput { plugin: plugin.clone(), command, reason });
    if output.stdout.len() > MAX_OUTPUT {
        return bad(format!("printed more than {MAX_OUTPUT} bytes"));
    }
    match serde_json::from_slice(&output.stdout) {
        Ok(value) => Ok(value),
        Err(error) => {
            let start = excerpt(&output.stdout, 128);
            bad(format!("printed no JSON ({error}): {start}"))
        }
    }
}

/// The beginning of a text of unknown content, on one line.
fn excerpt(bytes: &[u8], limit: usize) -> String {
    let text = String::from_utf8_lossy(bytes.get(..limit.min(bytes.len())).unwrap_or_default());
    let clean = text.trim().replace(|c: char| c.is_control(), " ");
    if bytes.len() > limit { format!("{clean}…") } else { clean }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::Instant;

    /// A directory with one plugin, a shell script.
    fn plugin(script: &str) -> (tempfile::TempDir, Executor) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fake");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let bin_dirs = vec![PathBuf::from("/no/such"), dir.path().to_owned()];
        (dir, Executor { bin_dirs, timeout: Duration::from_secs(20) })
    }

    async fn run(script: &str) -> Result<Value, NetworkError> {
        let (_dir, executor) = plugin(script);
        let stdin = json!({"cniVersion": "1.0.0"});
        let variables = [("CNI_CONTAINERID", "c1".to_owned()), ("CNI_NETNS", String::new())];
        let call = Call { plugin: "fake", command: "ADD", variables: &variables, stdin: &stdin };
        executor.call(call).await
    }

    async fn refusal(script: &str) -> String {
        run(script).await.unwrap_err().to_string()
    }

    #[tokio::test]
    async fn input_reaches_the_plugin_and_its_answer_comes_back() {
        assert_eq!(run("cat").await.unwrap(), json!({"cniVersion": "1.0.0"}));
        assert_eq!(run("cat >/dev/null").await.unwrap(), Value::Null);
    }

    #[tokio::test]
    async fn the_environment_holds_cni_variables_only() {
        let script = r#"env | cut -d= -f1 | sort | tr '\n' ' ' | sed 's/.*/"&"/'; pwd >&2"#;
        let names = run(script).await.unwrap();
        let names = names.as_str().unwrap().replace("_ ", "").replace("PWD ", "");
        assert_eq!(names.replace("SHLVL ", "").trim(), "CNI_COMMAND CNI_CONTAINERID CNI_PATH PATH");
    }

    #[tokio::test]
    async fn error_objects_and_plain_failures_are_told_apart() {
        let text = refusal(r#"echo '{"code":11,"msg":"try later","details":"d"}'; exit 1"#).await;
        assert_eq!(text, r#"CNI plugin "fake" ADD: try later (code 11): d"#);
        let text = refusal("echo broken pipe >&2; exit 3").await;
        assert!(text.contains("exit status: 3") && text.contains("broken pipe"), "{text}");
        let text = refusal("kill -9 $$").await;
        assert!(text.contains("signal: 9"), "{text}");
    }

    #[tokio::test]
    async fn garbage_and_floods_are_no_results() {
        let text = refusal("echo hello world").await;
        assert!(text.contains("printed no JSON") && text.contains("hello world"), "{text}");
        let text = refusal("head -c 3000000 /dev/zero | tr '\\0' '['").await;
        assert!(text.contains("more than"), "{text}");
        let noise = "head -c 3000000 /dev/zero | tr '\\0' x >&2; echo '{}'";
        assert_eq!(run(noise).await.unwrap(), json!({}), "stderr is drained, not stored");
    }

    #[tokio::test]
    async fn a_plugin_that_hangs_is_killed_with_its_children() {
        let (dir, mut executor) = plugin("sleep 300 & echo $! > $(dirname $0)/pid; wait");
        executor.timeout = Duration::from_millis(400);
        let stdin = json!({});
        let call = Call { plugin: "fake", command: "ADD", variables: &[], stdin: &stdin };
        let began = Instant::now();
        let error = executor.call(call).await.unwrap_err();
        assert!(matches!(error, NetworkError::Timeout { .. }), "{error}");
        assert!(began.elapsed() < Duration::from_secs(5));
        let pid = std::fs::read_to_string(dir.path().join("pid")).unwrap();
        sleep(Duration::from_millis(100)).await;
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        assert!(stat.is_err() || stat.unwrap().contains(") Z "), "the child was killed too");
    }

    #[tokio::test]
    async fn a_daemon_left_behind_does_not_hold_up_the_answer() {
        let began = Instant::now();
        let (dir, executor) = plugin("sleep 30 & echo $! > $(dirname $0)/pid; echo '{}'");
        let stdin = json!({});
        let call = Call { plugin: "fake", command: "ADD", variables: &[], stdin: &stdin };
        assert_eq!(executor.call(call).await.unwrap(), json!({}));
        assert!(began.elapsed() < Duration::from_secs(10));
        let pid = std::fs::read_to_string(dir.path().join("pid")).unwrap();
        let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }

    #[test]
    fn plugins_are_sought_by_plain_name_in_every_directory() {
        let (dir, executor) = plugin("true");
        assert_eq!(executor.find("fake").unwrap(), dir.path().join("fake"));
        for name in ["../fake", "", ".", "/bin/sh", "absent"] {
            let error = executor.find(name).unwrap_err();
            assert!(matches!(error, NetworkError::PluginMissing { .. }), "{name:?}");
        }
        let text = executor.find("absent").unwrap_err().to_string();
        assert!(text.contains("/no/such:"), "{text}");
    }
}
