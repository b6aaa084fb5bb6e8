//! Mounting a stack of layers with overlayfs.
//!
//! First by the new mount API, one `lowerdir+` per layer (Linux 6.5), where no comma or colon
//! in a path can turn into an option; else by mount(2) with names relative to the layers' directory, which
//! are plain hexadecimal digits, from a thread that has a working directory of its own.
//!
//! For a pod with a user namespace the layers are mapped first ([`crate::id_map`]), so that
//! files of the image's root belong to the pod's root.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags,
        fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount,
        move_mount, unmount,
    },
};

use crate::{Error, error::Result};

/// Longest string fsconfig(2) takes, with its final NUL.
const MAX_FSCONFIG: usize = 256;

/// A stack to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stack {
    /// Holds the layers.
    pub(crate) layers_dir: PathBuf,
    /// Names below `layers_dir`, top first; at least one.
    pub(crate) lowers: Vec<String>,
    /// Where changes go; nothing can be changed without. There are two layers at least then.
    pub(crate) writable: Option<Writable>,
}

/// Where changes to a stack go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Writable {
    pub(crate) upper: PathBuf,
    pub(crate) work: PathBuf,
    /// Do not sync what is written.
    pub(crate) volatile: bool,
}

/// Options besides the directories: nothing in a layer may point elsewhere.
const OPTIONS: [(&str, &str); 3] =
    [("index", "off"), ("metacopy", "off"), ("redirect_dir", "nofollow")];

/// What holds for a stack that cannot be changed: it is data, and none of its set-user-id
/// programs or device nodes shall work for whoever it is shown to.
const READ_ONLY: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY
    .union(MountAttrFlags::MOUNT_ATTR_NOSUID)
    .union(MountAttrFlags::MOUNT_ATTR_NODEV);

/// Mounts the stack at `target`.
pub(crate) fn mount_stack(stack: &Stack, target: &Path) -> Result<()> {
    match by_new_api(stack, target) {
        Ok(()) => Ok(()),
        // The kernel knows the call, the option or the length only from some version on.
        Err((_, Errno::NOSYS | Errno::INVAL | Errno::NAMETOOLONG | Errno::PERM)) => {
            by_mount(stack, target)
        }
        Err((step, errno)) => Err(failed(target, step)(errno.into())),
    }
}

pub(crate) fn failed(target: &Path, step: String) -> impl FnOnce(io::Error) -> Error {
    let target = target.to_owned();
    move |source| Error::Mount { target, step, source }
}

fn by_new_api(stack: &Stack, target: &Path) -> Result<(), (String, Errno)> {
    place(&compose(stack)?, target)
}

/// Moves a detached mount to `target`.
pub(crate) fn place(mounted: impl AsFd, target: &Path) -> Result<(), (String, Errno)> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(mounted.as_fd(), "", CWD, target, flags)
        .map_err(|errno| ("move_mount".to_owned(), errno))
}

/// The stack as a mount that is nowhere yet.
pub(crate) fn compose(stack: &Stack) -> Result<OwnedFd, (String, Errno)> {
    let step = |what: &str| {
        let what = what.to_owned();
        move |errno| (what, errno)
    };
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(step("fsopen overlay"))?;
    let set = |key: &str, value: &Path| {
        if value.as_os_str().len() >= MAX_FSCONFIG {
            return Err((format!("fsconfig {key}"), Errno::NAMETOOLONG));
        }
        // Whether a backslash escapes depends on the option and the kernel; mount(2) is clear.
        if value.as_os_str().as_bytes().contains(&b'\\') {
            return Err((format!("fsconfig {key}"), Errno::INVAL));
        }
        fsconfig_set_string(context.as_fd(), key, value)
            .map_err(|errno| (format!("fsconfig {key}={}", value.display()), errno))
    };
    set("source", Path::new("overlay"))?;
    for lower in &stack.lowers {
        set("lowerdir+", &stack.layers_dir.join(lower))?;
    }
    for (key, value) in OPTIONS {
        set(key, Path::new(value))?;
    }
    let mut attributes = READ_ONLY;
    if let Some(writable) = &stack.writable {
        attributes = MountAttrFlags::empty();
        set("upperdir", &writable.upper)?;
        set("workdir", &writable.work)?;
        if writable.volatile {
            fsconfig_set_flag(context.as_fd(), "volatile").map_err(step("fsconfig volatile"))?;
        }
    }
    fsconfig_create(context.as_fd()).map_err(step("fsconfig create"))?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(step("fsmount"))
}

fn by_mount(stack: &Stack, target: &Path) -> Result<()> {
    // A fresh thread, because the working directory belongs to the whole process otherwise.
    let mounted = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("mount".to_owned());
        let spawned = thread.spawn_scoped(scope, || -> Result<(), (&str, io::Error)> {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)
                .map_err(|e| ("unshare CLONE_FS", e.into()))?;
            let dir = File::open(&stack.layers_dir).map_err(|e| ("open layers", e))?;
            rustix::process::fchdir(&dir).map_err(|e| ("fchdir layers", e.into()))?;
            try_mount(stack, target).map_err(|e| ("mount", e.into()))
        });
        spawned.map(|thread| thread.join())
    });
    match mounted {
        Ok(Ok(Ok(()))) => Ok(()),
        Ok(Ok(Err((step, source)))) => Err(failed(target, step.to_owned())(source)),
        Ok(Err(_panic)) => Err(Error::Abandoned { what: format!("mount {}", target.display()) }),
        Err(e) => Err(failed(target, "start a thread".to_owned())(e)),
    }
}

/// Options an older kernel does not know are left out, the least needed first.
fn try_mount(stack: &Stack, target: &Path) -> Result<(), Errno> {
    let mut result = Err(Errno::INVAL);
    let flags = match stack.writable {
        Some(_) => MountFlags::empty(),
        None => MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV,
    };
    let volatile = stack.writable.as_ref().is_some_and(|writable| writable.volatile);
    for (volatile, extra) in [(volatile, 3), (false, 3), (false, 1), (false, 0)] {
        let data = options(stack, volatile, &OPTIONS[..extra]);
        result = match nul_terminated(&data) {
            Some(data) => mount("overlay", target, "overlay", flags, data.as_c_str()),
            None => Err(Errno::INVAL),
        };
        if result != Err(Errno::INVAL) {
            break;
        }
    }
    result
}

fn nul_terminated(data: &[u8]) -> Option<std::ffi::CString> {
    std::ffi::CString::new(data).ok()
}

/// The option string of mount(2); lower directories are relative to the layers' directory.
fn options(stack: &Stack, volatile: bool, extra: &[(&str, &str)]) -> Vec<u8> {
    let mut data = format!("lowerdir={}", stack.lowers.join(":")).into_bytes();
    if let Some(Writable { upper, work, .. }) = &stack.writable {
        for (key, path) in [("upperdir", upper), ("workdir", work)] {
            data.extend_from_slice(format!(",{key}=").as_bytes());
            data.extend(escaped(path));
        }
    }
    for (key, value) in extra {
        data.extend_from_slice(format!(",{key}={value}").as_bytes());
    }
    if volatile {
        data.extend_from_slice(b",volatile");
    }
    data
}

/// Commas end an option, and the kernel takes a backslash before a character as that character.
fn escaped(path: &Path) -> Vec<u8> {
    let mut text = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        if matches!(byte, b'\\' | b',' | b':') {
            text.push(b'\\');
        }
        text.push(byte);
    }
    text
}

/// Whether something is mounted exactly at `target`.
pub(crate) fn is_mount_point(target: &Path) -> io::Result<bool> {
    use rustix::fs::{AtFlags, StatxAttributes, StatxFlags, statx};
    match statx(CWD, target, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS) {
        Ok(stat) => Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Detaches everything mounted at `target`; nothing mounted is fine.
pub(crate) fn unmount_all(target: &Path) -> Result<()> {
    let fail = |e: io::Error| Error::file("unmount", target)(e);
    while is_mount_point(target).map_err(fail)? {
        match unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => break,
            Err(e) => return Err(fail(e.into())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
