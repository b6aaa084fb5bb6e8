//! Pod monitors: starting one, and speaking its protocol.

mod client;
mod process;

pub(crate) use client::{Answers, Client, Notice, unexpected};
pub(crate) use process::{Invocation, end, pid, start, wake};
