//! Containers that do not want to end, and monitors that do not answer.
//!
//! A process that waits for a file server which never answers does not die of SIGKILL: the one
//! here speaks just enough of the FUSE protocol (`linux/fuse.h`) to be asked.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pinion_cri_proto::v1;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Pid, Signal, kill_process};
use support::{Client, Server, pod, shell};
use tonic::Code;

fn monitor_pid(server: &Server, pod: &str) -> Pid {
    let file = server.path("run/pods").join(pod).join("monitor.pid");
    Pid::from_raw(fs::read_to_string(file).unwrap().trim().parse().unwrap()).unwrap()
}

/// The container's directory in the hierarchy that freezes, v2 or v1.
fn group_of(server: &Server, pod: &str, container: &str) -> PathBuf {
    let parent = server.cgroup.trim_start_matches('/');
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/freezer"];
    let group = |root| Path::new(root).join(parent).join(pod).join(container);
    roots.map(group).into_iter().find(|group| group.is_dir()).unwrap()
}

#[tokio::test]
async fn a_frozen_container_is_stopped() {
    let server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let config = pod("frozen");
    let id = client.run(&config).await.unwrap();
    let c = client.launch(&id, &shell("c", "sleep 1000"), &config).await.unwrap();
    let group = group_of(&server, &id, &c);
    match group.join("cgroup.freeze").exists() {
        true => fs::write(group.join("cgroup.freeze"), "1").unwrap(),
        false => fs::write(group.join("freezer.state"), "FROZEN").unwrap(),
    }
    let began = Instant::now();
    client.stop(&c, 1).await.unwrap();
    println!("stopped after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(15));
    assert_eq!(client.status(&c).await.unwrap().exit_code, 137);
    client.remove_pod(&id).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn a_stopped_monitor_is_continued_and_its_pod_lives_on() {
    let mut server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let config = pod("asleep");
    let id = client.run(&config).await.unwrap();
    let a = client.launch(&id, &shell("a", "sleep 1000"), &config).await.unwrap();
    let b = client.launch(&id, &shell("b", "sleep 1000"), &config).await.unwrap();
    let monitor = monitor_pid(&server, &id);
    kill_process(monitor, Signal::STOP).unwrap();
    client.stop(&a, 1).await.unwrap();
    assert_eq!(client.status(&a).await.unwrap().state(), v1::ContainerState::ContainerExited);
    assert_eq!(monitor_pid(&server, &id), monitor);
    assert_eq!(client.exec(&b, &["echo", "alive"], 10).await.unwrap().stdout, b"alive\n");

    // The same while nobody was there to notice.
    kill_process(monitor, Signal::STOP).unwrap();
    server.crash();
    server.spawn().await;
    let mut client = Client(server.runtime().await);
    let status = client.status(&b).await.unwrap();
    assert_eq!(status.state(), v1::ContainerState::ContainerRunning, "{}", status.reason);
    assert_eq!(client.exec(&b, &["echo", "alive"], 10).await.unwrap().stdout, b"alive\n");
    client.remove_pod(&id).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

/// A file system whose server takes every request and answers the first alone.
struct Silent {
    place: PathBuf,
}

impl Silent {
    fn mount(place: PathBuf) -> Self {
        fs::create_dir_all(&place).unwrap();
        let mut device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options =
            format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let options = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount("silent", &place, "fuse", MountFlags::empty(), Some(&*options))
            .unwrap();
        std::thread::spawn(move || {
            let mut request = vec![0; 1 << 20];
            while let Ok(n) = device.read(&mut request) {
                // struct fuse_in_header: length, opcode, unique; FUSE_INIT is 26.
                let word = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap());
                if n >= 16 && word(4) == 26 {
                    // struct fuse_out_header and struct fuse_init_out.
                    let mut answer = vec![0; 16 + 64];
                    answer[0..4].copy_from_slice(&80_u32.to_le_bytes());
                    answer[8..16].copy_from_slice(&request[8..16]);
                    answer[16..20].copy_from_slice(&7_u32.to_le_bytes());
                    answer[20..24].copy_from_slice(&31_u32.to_le_bytes());
                    answer[36..40].copy_from_slice(&4096_u32.to_le_bytes());
                    device.write_all(&answer).unwrap();
                }
            }
        });
        Self { place }
    }

    /// Ends it; whoever waits gets an error.
    fn abort(&self) {
        let flags = UnmountFlags::FORCE | UnmountFlags::DETACH;
        let _ = rustix::mount::unmount(&self.place, flags);
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        self.abort();
    }
}

/// A directory whose mounts reach the containers that have it; unmounted with this value.
struct Shared(PathBuf);

impl Shared {
    fn make(place: PathBuf) -> Self {
        fs::create_dir_all(&place).unwrap();
        rustix::mount::mount_bind(&place, &place).unwrap();
        rustix::mount::mount_change(&place, MountPropagationFlags::SHARED).unwrap();
        Self(place)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[tokio::test]
async fn what_does_not_die_is_named_and_holds_up_nobody_else() {
    let server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let config = pod("stuck");
    let id = client.run(&config).await.unwrap();
    let shared = Shared::make(server.path("shared"));
    let mut container = shell("c", "while ! [ -e /d/go ]; do sleep 0.1; done; cat /d/hang/file");
    container.mounts = vec![v1::Mount {
        container_path: "/d".into(),
        host_path: shared.0.to_string_lossy().into_owned(),
        propagation: v1::MountPropagation::PropagationHostToContainer.into(),
        ..Default::default()
    }];
    let c = client.launch(&id, &container, &config).await.unwrap();
    let silent = Silent::mount(shared.0.join("hang"));
    fs::write(shared.0.join("go"), "").unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;

    let mut other = Client(server.runtime().await);
    let (stuck, stopped) = (c.clone(), Instant::now());
    let stopping = tokio::spawn(async move { client.stop(&stuck, 0).await });
    let neighbour = pod("neighbour");
    let served = Instant::now();
    let second = other.run(&neighbour).await.unwrap();
    let d = other.launch(&second, &shell("d", "exit 3"), &neighbour).await.unwrap();
    assert_eq!(other.exited(&d).await.exit_code, 3);
    other.remove_pod(&second).await.unwrap();
    assert!(served.elapsed() < Duration::from_secs(10), "{:?}", served.elapsed());

    let refused = stopping.await.unwrap().unwrap_err();
    println!("after {:?}: {refused}", stopped.elapsed());
    assert_eq!(refused.code(), Code::DeadlineExceeded);
    for word in ["quarantine", "(cat) is in state D", "kernel stack", "fuse"] {
        assert!(refused.message().contains(word), "{word}: {}", refused.message());
    }
    let state = other.status(&c).await.unwrap().state();
    assert_eq!(state, v1::ContainerState::ContainerRunning);

    // Let go, it dies of the SIGKILL it has had, and all can be given back.
    silent.abort();
    other.stop(&c, 0).await.unwrap();
    assert_eq!(other.status(&c).await.unwrap().exit_code, 137);
    other.stop_pod(&id).await.unwrap();
    other.remove_pod(&id).await.unwrap();
    drop((silent, shared));
    assert_eq!(server.leftovers(), Vec::<String>::new());
}
