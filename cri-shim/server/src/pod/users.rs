//! The users of a pod: the node's, or those of a user namespace of its own.
//!
//! Such a namespace is pinned beside the pod's others and owns them. Root inside is an
//! unprivileged id on the node: the pod's files belong to that id, and images are mounted with
//! their ids mapped.

use std::path::Path;

use pinion_cri_proto::v1::PodSandboxConfig;
use pinion_image::{IdMap, Images};
use pinion_network::namespaces::{self, Setup, owned};
use pinion_spec::pod::{IdRun, UserIds, user_namespace};

use super::create::spec_error;
use crate::error::{Error, Result};
use crate::node::Node;
use crate::record::Sandbox;

/// The ids of a pod that was let in; `None` if it has the node's.
pub(crate) fn of(sandbox: &Sandbox) -> Option<UserIds> {
    // Checked before there was a record.
    user_namespace(&sandbox.config).ok().flatten()
}

/// Checks what a pod asks for, and whether this node can give it.
pub(crate) fn check(node: &Node, config: &PodSandboxConfig) -> Result<Option<UserIds>> {
    let ids = user_namespace(config).map_err(spec_error)?;
    match (&ids, &node.no_user_namespaces) {
        (Some(_), Some(reason)) => Err(Error::precondition(format!(
            "linux.security_context.namespace_options.userns_options: \
             this node has no user namespaces for pods: {reason}"
        ))),
        _ => Ok(ids),
    }
}

/// User and group that root of the pod is on the node.
pub(crate) fn root(sandbox: &Sandbox) -> (u32, u32) {
    of(sandbox).map_or((0, 0), |ids| (ids.uids.first, ids.gids.first))
}

/// How images are mounted for the pod.
pub(crate) fn id_map(node: &Node, sandbox: &Sandbox) -> Option<IdMap> {
    let namespace = node.paths.pod(&sandbox.id).namespaces().join("user");
    of(sandbox).map(|ids| map(ids, &namespace))
}

fn map(ids: UserIds, namespace: &Path) -> IdMap {
    let run = |run: IdRun| (run.first, run.count);
    IdMap { namespace: namespace.to_path_buf(), uids: run(ids.uids), gids: run(ids.gids) }
}

/// The namespace as the network crate makes it.
pub(crate) fn to_be_made(ids: UserIds) -> owned::UserNamespace {
    let range =
        |run: IdRun| vec![owned::IdRange { inside: 0, outside: run.first, count: run.count }];
    owned::UserNamespace {
        uids: range(ids.uids),
        gids: range(ids.gids),
        // This very program, also after the file was replaced by a newer one.
        program: "/proc/self/exe".into(),
    }
}

/// Makes a user namespace and maps an empty image with it; why that is not possible. Blocks.
pub(crate) fn probe(images: &Images, run_dir: &Path) -> Option<String> {
    let run = IdRun { first: 65536, count: 65536 };
    let ids = UserIds { uids: run, gids: run };
    let directory = run_dir.join("probe");
    // Left by a server that ended in between.
    let _ = namespaces::remove(&directory);
    let tried = owned::create(&[], &directory, &Setup::default(), &to_be_made(ids))
        .map_err(|e| Error::from_foreign(crate::error::Kind::Internal, e))
        .and_then(|()| {
            images
                .check_id_maps(&map(ids, &directory.join("user")))
                .map_err(|e| Error::from_foreign(crate::error::Kind::Internal, e))
        });
    let _ = namespaces::remove(&directory);
    let _ = std::fs::remove_dir(&directory);
    tried.err().map(|error| error.chain())
}
