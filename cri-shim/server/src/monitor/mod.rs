//! Pod monitors: starting one, and speaking its protocol.

mod client;
mod process;

pub(crate) use client::{Client, Notice, unexpected};
pub(crate) use process::{Invocation, end, pid, start};
