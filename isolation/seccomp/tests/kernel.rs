//! Filters in a real kernel: each case runs in a process of its own, which loads the filter
//! and tries one call.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a panic is the report

use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};

use oci_spec::runtime::LinuxSeccomp;

/// A case: name, profile, and the errno (positive) or signal (negative) the call ends in.
const CASES: [(&str, &str, i32); 8] = [
    ("allowed", r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#, 0),
    (
        "errno",
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],
            "action":"SCMP_ACT_ERRNO","errnoRet":77}]}"#,
        77,
    ),
    (
        "kill",
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],
            "action":"SCMP_ACT_KILL_PROCESS"}]}"#,
        -libc::SIGSYS,
    ),
    (
        "trap",
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],
            "action":"SCMP_ACT_TRAP"}]}"#,
        -libc::SIGSYS,
    ),
    (
        "log",
        r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_LOG",
            "SECCOMP_FILTER_FLAG_TSYNC"],"syscalls":[{"names":["mkdir","mkdirat"],
            "action":"SCMP_ACT_LOG"}]}"#,
        0,
    ),
    (
        "argument-matches",
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["socket"],
            "action":"SCMP_ACT_ERRNO","errnoRet":97,"args":[
            {"index":0,"value":1,"op":"SCMP_CMP_EQ"}]}]}"#,
        97,
    ),
    (
        "argument-differs",
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["socket"],
            "action":"SCMP_ACT_ERRNO","errnoRet":97,"args":[
            {"index":0,"value":2,"op":"SCMP_CMP_EQ"}]}]}"#,
        0,
    ),
    (
        "notify",
        r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/run/agent.sock",
            "flags":["SECCOMP_FILTER_FLAG_TSYNC","SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],
            "syscalls":[{"names":["reboot"],"action":"SCMP_ACT_NOTIFY"}]}"#,
        0,
    ),
];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some("in-the-filter") {
        return child(&arguments.next().unwrap());
    }
    let mut failed = false;
    for (name, _, expected) in CASES {
        let program = std::env::current_exe().unwrap();
        let status = Command::new(program).args(["in-the-filter", name]).status().unwrap();
        let actual = status.signal().map_or_else(|| status.code().unwrap(), |signal| -signal);
        println!("kernel case {name}: {actual}, expected {expected}");
        failed |= actual != expected;
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Loads the filter of one case and exits with the errno of the call it is about.
fn child(case: &str) -> ExitCode {
    let (_, json, _) = CASES.iter().find(|(name, ..)| *name == case).unwrap();
    let profile: LinuxSeccomp = serde_json::from_str(json).unwrap();
    let program = pinion_seccomp::compile(&profile).unwrap();
    let listener = pinion_sys::seccomp::load(&program.instructions, program.flags).unwrap();
    assert_eq!(listener.is_some(), program.notifies());
    let outcome = if case.starts_with("argument") {
        UnixDatagram::unbound().map(drop)
    } else {
        // The directory exists, so an allowed call changes nothing.
        std::fs::create_dir("/").or_else(|error| match error.kind() {
            ErrorKind::AlreadyExists => Ok(()),
            _ => Err(error),
        })
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(error.raw_os_error().unwrap_or(255) as u8),
    }
}
