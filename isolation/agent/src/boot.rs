//! From the kernel's first process to a system that containers can be made on.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pinion_microvm::image::MODULES_DIR;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change, mount_move};

use crate::error::{Context, Error};

/// How long the channel's port may take to show up.
const PORT_LIMIT: Duration = Duration::from_secs(30);

/// Mounts, modules, and a root that a container runtime can pivot away from: the kernel's
/// first root is none.
pub(crate) fn prepare() -> Result<(), Error> {
    let nothing = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    attach("proc", "/proc", "proc", nothing, "")?;
    attach("sysfs", "/sys", "sysfs", nothing, "")?;
    attach("dev", "/dev", "devtmpfs", MountFlags::NOSUID, "mode=0755")?;
    load_modules()?;
    leave_first_root()?;
    for directory in ["/dev/pts", "/dev/shm", "/dev/mqueue", "/tmp", "/run/pinion/pod", "/etc"] {
        fs::create_dir_all(directory).context(|| format!("create {directory}"))?;
    }
    let pts = "newinstance,ptmxmode=0666,mode=0620,gid=5";
    attach("devpts", "/dev/pts", "devpts", MountFlags::NOSUID | MountFlags::NOEXEC, pts)?;
    attach("cgroup", "/sys/fs/cgroup", "cgroup2", nothing, "")?;
    enable_controllers()
}

fn attach(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> Result<(), Error> {
    let data = std::ffi::CString::new(options).unwrap_or_default();
    let mounted = mount(source, target, kind, flags, data.as_c_str());
    // A kernel may have mounted its devices by itself.
    match mounted {
        Err(Errno::BUSY) if kind == "devtmpfs" => Ok(()),
        other => other.context(|| format!("mount {kind} at {target} ({options})")),
    }
}

/// Loads the image's modules in the order it gives.
fn load_modules() -> Result<(), Error> {
    let order = format!("/{MODULES_DIR}/order");
    let list = fs::read_to_string(&order).context(|| format!("read {order}"))?;
    for path in list.lines() {
        let file = fs::File::open(path).context(|| format!("open {path}"))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            // Some are for processors this machine does not have.
            Err(Errno::NODEV) => {}
            Err(error) => return Err(error).context(|| format!("load module {path}")),
        }
    }
    Ok(())
}

/// Moves to a tmpfs with all that is needed later, and frees what the first root held.
fn leave_first_root() -> Result<(), Error> {
    attach("root", "/new", "tmpfs", MountFlags::empty(), "mode=0755,size=75%")?;
    for directory in ["bin", "dev", "proc", "sys", "run"] {
        let path = Path::new("/new").join(directory);
        fs::create_dir(&path).context(|| format!("create {}", path.display()))?;
    }
    fs::copy("/bin/pinion", "/new/bin/pinion").context(|| "copy /bin/pinion".into())?;
    for directory in ["dev", "proc", "sys"] {
        let (from, to) = (format!("/{directory}"), format!("/new/{directory}"));
        mount_move(&from, &to).context(|| format!("move {from} to {to}"))?;
    }
    drop(fs::remove_file("/init"));
    drop(fs::remove_file("/bin/pinion"));
    drop(fs::remove_dir_all(format!("/{MODULES_DIR}")));
    std::env::set_current_dir("/new").context(|| "enter /new".into())?;
    mount_move(".", "/").context(|| "move /new to /".into())?;
    rustix::process::chroot(".").context(|| "chroot".into())?;
    std::env::set_current_dir("/").context(|| "enter /".into())?;
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::SHARED)
        .context(|| "share mounts".into())
}

/// Lets groups below the root have every controller there is.
fn enable_controllers() -> Result<(), Error> {
    let root = Path::new("/sys/fs/cgroup");
    let list = fs::read_to_string(root.join("cgroup.controllers"))
        .context(|| "read cgroup.controllers".into())?;
    for controller in list.split_whitespace() {
        let file = root.join("cgroup.subtree_control");
        fs::write(&file, format!("+{controller}"))
            .context(|| format!("enable controller {controller}"))?;
    }
    Ok(())
}

/// Opens the port that leads to the host, non-blocking.
pub(crate) fn open_channel() -> Result<OwnedFd, Error> {
    let began = Instant::now();
    loop {
        if let Some(device) = find_port() {
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
            match open(&device, flags, Mode::empty()) {
                Ok(channel) => return Ok(channel),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error).context(|| format!("open {}", device.display())),
            }
        }
        if began.elapsed() > PORT_LIMIT {
            return Err(Error::Failed("the machine has no port named agent".into()));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn find_port() -> Option<PathBuf> {
    fs::read_dir("/sys/class/virtio-ports").ok()?.flatten().find_map(|entry| {
        let name = fs::read_to_string(entry.path().join("name")).ok()?;
        (name.trim() == "agent").then(|| Path::new("/dev").join(entry.file_name()))
    })
}

/// Switches the machine off. Only if even that fails does it return.
pub(crate) fn power_off() {
    use std::io::Write;
    if let Err(error) = rustix::system::reboot(rustix::system::RebootCommand::PowerOff) {
        drop(writeln!(io::stderr(), "pinion-agent: power off: {error}"));
    }
}
