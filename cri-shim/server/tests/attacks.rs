//! What a hostile container, a hostile host user and a hostile log directory do not get.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use pinion_cri_proto::v1;
use support::{Client, Server, pod, shell};

/// Whether a user without any right can do this with a path, by the shell's own test.
fn stranger_can(what: &str, path: &Path) -> bool {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", &format!("{what} \"$0\" >/dev/null 2>&1")]).arg(path);
    shell.uid(65534).gid(65534).current_dir("/");
    shell.status().unwrap().success()
}

/// CVE-2020-15257, CVE-2021-41103, CVE-2024-25621: sockets and state are root's alone, whatever
/// umask the server was started with.
#[tokio::test]
async fn sockets_and_state_are_closed_to_other_users() {
    let umask = rustix::process::umask(rustix::fs::Mode::empty());
    let server = Server::start().await;
    rustix::process::umask(umask);
    // The way to it is open, or nothing would be shown.
    fs::set_permissions(server.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    assert!(stranger_can("ls", &server.path("")));
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let config = pod("closed");
    let id = client.run(&config).await.unwrap();
    client.launch(&id, &shell("c", "sleep 1000"), &config).await.unwrap();
    for name in ["root", "run"] {
        assert!(!stranger_can("ls", &server.path(name)), "{name} can be listed");
        assert!(!stranger_can("touch", &server.path(name).join("x")), "{name} can be written");
    }
    let mut sockets = 0;
    let mut pending = vec![server.path("run"), server.path("root")];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).unwrap().flatten() {
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            // Images and mounts have modes of their own, behind directories that are closed.
            if kind.is_dir() && !path.ends_with("rootfs") && !path.ends_with("snapshots") {
                pending.push(path);
            } else if std::os::unix::fs::FileTypeExt::is_socket(&kind) {
                sockets += 1;
                let mode = fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777;
                assert_eq!(mode & 0o007, 0, "{} has mode {mode:o}", path.display());
                assert!(!stranger_can("test -w", &path), "{}", path.display());
            }
        }
    }
    assert!(sockets >= 2, "only {sockets} sockets were found");
    let unix = fs::read_to_string("/proc/net/unix").unwrap();
    let own = server.path("").to_string_lossy().into_owned();
    let abstract_names = unix.lines().filter_map(|l| l.split(' ').next_back());
    let ours =
        |name: &&str| name.starts_with('@') && (name.contains(&own) || name.contains("pinion"));
    assert_eq!(abstract_names.filter(ours).collect::<Vec<_>>(), Vec::<&str>::new());
    client.remove_pod(&id).await.unwrap();
}

/// CVE-2022-1708, CVE-2022-31030: what an exec prints does not fill the server's memory.
#[tokio::test]
async fn the_output_of_an_exec_is_bounded() {
    let server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let config = pod("flood");
    let id = client.run(&config).await.unwrap();
    let c = client.launch(&id, &shell("c", "sleep 1000"), &config).await.unwrap();
    let flood = ["sh", "-c", "head -c 200000000 /dev/zero; echo done >&2; exit 3"];
    let out = client.exec(&c, &flood, 60).await.unwrap();
    assert!(out.stdout.len() <= 16 << 20, "{}", out.stdout.len());
    assert_eq!((out.exit_code, out.stderr.as_slice()), (3, b"done\n".as_slice()));
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 200 << 10, "the server had {peak} KiB");
    client.remove_pod(&id).await.unwrap();
}

/// CVE-2026-53489 and its class: a log file that is a link, planted where the log will be, is not
/// followed, neither at the start nor when the log is opened anew.
#[tokio::test]
async fn a_log_is_not_written_through_a_link() {
    let server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let logs = server.path("logs");
    fs::create_dir_all(&logs).unwrap();
    let sentinel = server.path("sentinel");
    fs::write(&sentinel, "kept\n").unwrap();
    symlink(&sentinel, logs.join("planted.log")).unwrap();
    let config =
        v1::PodSandboxConfig { log_directory: logs.to_string_lossy().into_owned(), ..pod("links") };
    let id = client.run(&config).await.unwrap();
    let loud = |name: &str, log: &str| v1::ContainerConfig {
        log_path: log.into(),
        ..shell(name, "while :; do echo attack; sleep 0.1; done")
    };
    // Refused, or the link replaced: either will do.
    let _ = client.launch(&id, &loud("a", "planted.log"), &config).await;
    let b = client.launch(&id, &loud("b", "later.log"), &config).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(400)).await;
    fs::remove_file(logs.join("later.log")).unwrap();
    symlink(&sentinel, logs.join("later.log")).unwrap();
    let reopen = v1::ReopenContainerLogRequest { container_id: b.clone() };
    let _ = client.0.reopen_container_log(reopen).await;
    tokio::time::sleep(std::time::Duration::from_millis(400)).await;
    assert_eq!(fs::read_to_string(&sentinel).unwrap(), "kept\n");
    for log in ["../outside.log", "/etc/outside.log", "a/../../outside.log"] {
        let error = client.create(&id, &loud("c", log), &config).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument, "{log}: {error}");
    }
    client.remove_pod(&id).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}
