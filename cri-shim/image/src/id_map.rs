//! Stacks of layers whose ids are those of a user namespace.
//!
//! Layers are shared by all pods and stored with the image's own ids. overlayfs cannot map ids
//! itself, but it can stack mounts that do (Linux 5.19): the layers' directory is mounted once
//! more with the namespace's mapping, over itself, in a mount namespace of one thread. The
//! overlay made there keeps what it needs of that mount; the thread and its namespace end, so
//! that no mount is left behind whatever happens.

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, unshare};
use pinion_sys::mount::{MountAttributes, set_attributes};
use rustix::{
    fs::CWD,
    mount::{MountPropagationFlags, OpenTreeFlags, mount_change, open_tree},
};

use crate::{
    Error,
    error::Result,
    overlay::{Stack, compose as compose_stack, failed, place},
};

/// The id that stands for every id without a mapping (`/proc/sys/kernel/overflowuid`).
const OVERFLOW: u32 = 65534;

/// The ids of a user namespace: one run of user ids and one of group ids, each from 0 inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap {
    /// The namespace, as a file such as `/proc/<pid>/ns/user`.
    pub namespace: PathBuf,
    /// First user id on the host, and how many.
    pub uids: (u32, u32),
    /// First group id on the host, and how many.
    pub gids: (u32, u32),
}

impl IdMap {
    /// The user id on the host of one inside.
    pub(crate) fn uid(&self, inside: u32) -> u32 {
        outside(self.uids, inside)
    }

    /// The group id on the host of one inside.
    pub(crate) fn gid(&self, inside: u32) -> u32 {
        outside(self.gids, inside)
    }
}

fn outside((first, count): (u32, u32), inside: u32) -> u32 {
    if inside < count { first.saturating_add(inside) } else { OVERFLOW }
}

/// Mounts the stack at `target` with mapped layers.
pub(crate) fn mount(stack: &Stack, ids: &IdMap, target: &Path) -> Result<()> {
    let mounted = compose(stack, ids)?;
    place(&mounted, target).map_err(|(step, errno)| failed(target, step)(errno.into()))
}

/// The stack with mapped layers, as a mount that is nowhere yet.
pub(crate) fn compose(stack: &Stack, ids: &IdMap) -> Result<OwnedFd> {
    let namespace =
        File::open(&ids.namespace).map_err(Error::file("open the namespace", &ids.namespace))?;
    let joined = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("map-layers".to_owned());
        thread.spawn_scoped(scope, || apart(stack, &namespace)).map(|thread| thread.join())
    });
    match joined {
        Ok(Ok(mounted)) => mounted,
        Ok(Err(_panic)) => Err(Error::Abandoned { what: "mapping layers".to_owned() }),
        Err(e) => Err(failed(&stack.layers_dir, "start a thread".to_owned())(e)),
    }
}

/// Runs in the thread.
fn apart(stack: &Stack, namespace: &File) -> Result<OwnedFd> {
    let layers = &stack.layers_dir;
    let fail = |step: &str| {
        let step = format!("{step} (user namespaces need id-mapped mounts here)");
        move |error: std::io::Error| failed(layers, step)(error)
    };
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS)
        .map_err(|e| fail("unshare CLONE_NEWNS")(e.into()))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|e| fail("make the mounts private")(e.into()))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, layers, flags).map_err(|e| fail("open_tree")(e.into()))?;
    let mapping = MountAttributes { idmap: Some(namespace.as_fd()), ..Default::default() };
    set_attributes(tree.as_fd(), c"", false, &mapping).map_err(fail("mount_setattr idmap"))?;
    place(&tree, layers).map_err(|(step, e)| fail(&step)(e.into()))?;
    compose_stack(stack).map_err(|(step, e)| fail(&step)(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_beyond_the_mapping_are_nobody_s() {
        let map = IdMap { namespace: PathBuf::new(), uids: (1000, 10), gids: (5000, 3) };
        assert_eq!((map.uid(0), map.uid(9), map.uid(10)), (1000, 1009, OVERFLOW));
        assert_eq!((map.gid(2), map.gid(3)), (5002, OVERFLOW));
    }
}
