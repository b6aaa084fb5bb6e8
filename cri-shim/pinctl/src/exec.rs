//! `pinctl exec`: a command, its output and its exit code.

use crate::connect::Node;
use crate::error::Error;
use crate::lookup;
use pinion_cri_proto::v1::ExecSyncRequest;
use std::io::Write as _;

/// Runs a command in a container; the answer is its exit code.
pub(crate) async fn run(
    node: &mut Node,
    id: &str,
    timeout: i64,
    command: Vec<String>,
) -> Result<u8, Error> {
    let container = lookup::container(node, id).await?;
    let action = format!("running {:?} in {}", command[0], crate::output::short(&container.id));
    let request = ExecSyncRequest { container_id: container.id, cmd: command, timeout };
    let answer = node.runtime.exec_sync(request).await.map_err(Error::call(action))?.into_inner();
    std::io::stdout().write_all(&answer.stdout).map_err(Error::Print)?;
    std::io::stderr().write_all(&answer.stderr).map_err(Error::Print)?;
    Ok(u8::try_from(answer.exit_code).unwrap_or(u8::MAX))
}
