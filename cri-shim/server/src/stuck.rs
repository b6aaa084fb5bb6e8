//! Processes that do not die, in the kernel's words: state, wait channel and kernel stack.
//!
//! Read from `/proc/<pid>/task/<tid>/{stat,wchan,stack}`, see proc(5). A process waits as long as
//! any of its threads does, so each thread is looked at.

use std::fs;
use std::path::Path;

/// Threads that are described; the rest is counted.
const SHOWN: usize = 4;
/// Frames of a stack that are shown, the innermost ones.
const FRAMES: usize = 12;

/// One thread as the kernel shows it.
#[derive(Debug, PartialEq, Eq)]
struct Thread {
    id: i32,
    name: String,
    /// The letter of proc_pid_stat(5): `D` waits and cannot be interrupted.
    state: char,
    /// The kernel function it waits in; empty when it does not wait or the kernel does not say.
    channel: String,
    /// The kernel functions it is in, the innermost first.
    stack: Vec<String>,
}

/// What the threads of these processes wait for, for an error message; those that can be
/// interrupted last.
pub(crate) fn describe(pids: &[i32]) -> String {
    let mut threads: Vec<Thread> = pids.iter().flat_map(|pid| threads(*pid)).collect();
    if threads.is_empty() {
        return format!("processes {pids:?} are gone by now");
    }
    threads.sort_by_key(|thread| (thread.state != 'D', thread.id));
    let mut text: Vec<String> = threads.iter().take(SHOWN).map(Thread::describe).collect();
    if let more @ 1.. = threads.len().saturating_sub(SHOWN) {
        text.push(format!("and {more} more threads"));
    }
    text.join("; ")
}

fn threads(pid: i32) -> Vec<Thread> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    entries.flatten().filter_map(|entry| read(&entry.path())).collect()
}

fn read(task: &Path) -> Option<Thread> {
    let (id, name, state) = stat(&fs::read_to_string(task.join("stat")).ok()?)?;
    // Without the right to read it there is none.
    let text = |name: &str| fs::read_to_string(task.join(name)).unwrap_or_default();
    let channel = text("wchan");
    let channel = if channel == "0" { String::new() } else { channel };
    Some(Thread { id, name, state, channel, stack: stack(&text("stack")) })
}

/// Number, name and state; the name is in parentheses and may have any in it.
fn stat(line: &str) -> Option<(i32, String, char)> {
    let (head, tail) = line.rsplit_once(')')?;
    let (id, name) = head.split_once('(')?;
    // It is the process's to choose.
    let name = name.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    Some((id.trim().parse().ok()?, name, tail.trim_start().chars().next()?))
}

/// The functions of a stack as `[<0>] request_wait_answer+0x1b8/0x220` shows them.
fn stack(text: &str) -> Vec<String> {
    let function = |line: &str| {
        let frame = line.rsplit(' ').next()?;
        Some(frame.split('+').next().unwrap_or(frame).to_owned()).filter(|name| !name.is_empty())
    };
    text.lines().filter_map(function).take(FRAMES).collect()
}

impl Thread {
    fn describe(&self) -> String {
        let Self { id, name, state, channel, stack } = self;
        let mut text = format!("process {id} ({name}) is in state {state}");
        if !channel.is_empty() {
            text.push_str(&format!(", waiting in {channel}"));
        }
        if !stack.is_empty() {
            text.push_str(&format!(", kernel stack {}", stack.join(" < ")));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_hide_the_state() {
        let (id, name, state) = stat("71 (a) R (b) D 1 71 71 0").unwrap();
        assert_eq!((id, name.as_str(), state), (71, "a) R (b", 'D'));
        assert_eq!(stat("x"), None);
    }

    #[test]
    fn a_stack_is_told_innermost_first() {
        let text = "[<0>] request_wait_answer+0x1b8/0x220\n[<0>] fuse_simple_request+0x16/0x90\n";
        assert_eq!(stack(text), ["request_wait_answer", "fuse_simple_request"]);
        assert!(stack("").is_empty());
    }

    #[test]
    fn a_living_process_is_described_from_proc() {
        let own = i32::try_from(std::process::id()).unwrap();
        let text = describe(&[own]);
        assert!(text.contains("is in state "), "{text}");
        assert!(describe(&[i32::MAX]).contains("gone by now"));
    }
}
