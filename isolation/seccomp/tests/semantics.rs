//! Compiled filters against a straightforward reading of the profile.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a panic is the report

mod support;

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator};
use pinion_seccomp::{Abi, Error, compile_for};
use proptest::prelude::*;
use support::{Call, run};

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL_PROCESS: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const FOREIGN_ARCH: u32 = 0x8000_0016; // s390x

fn errno(number: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | number as u32
}

fn profile(json: &str) -> LinuxSeccomp {
    serde_json::from_str(json).unwrap()
}

fn verdict(profile: &LinuxSeccomp, abi: Abi, name: &str, arguments: [u64; 6]) -> u32 {
    let program = compile_for(Abi::X86_64, profile).unwrap();
    let number = abi.number(name).unwrap();
    run(&program.instructions, &Call { arch: abi.audit_arch(), number, arguments }).0
}

fn raw(profile: &LinuxSeccomp, arch: u32, number: u32) -> u32 {
    let program = compile_for(Abi::X86_64, profile).unwrap();
    run(&program.instructions, &Call { arch, number, arguments: [0; 6] }).0
}

#[test]
fn actions_and_their_errno_values_are_those_of_the_profile() {
    let profile = profile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"names":["mkdir"],"action":"SCMP_ACT_ERRNO"},
            {"names":["rmdir"],"action":"SCMP_ACT_ERRNO","errnoRet":38},
            {"names":["mount"],"action":"SCMP_ACT_KILL"},
            {"names":["umount2"],"action":"SCMP_ACT_KILL_PROCESS"},
            {"names":["reboot"],"action":"SCMP_ACT_TRAP"},
            {"names":["swapon"],"action":"SCMP_ACT_TRACE","errnoRet":7},
            {"names":["swapoff"],"action":"SCMP_ACT_LOG"},
            {"names":["no_such_syscall"],"action":"SCMP_ACT_KILL"}]}"#,
    );
    let of = |name| verdict(&profile, Abi::X86_64, name, [0; 6]);
    assert_eq!(of("mkdir"), errno(1));
    assert_eq!(of("rmdir"), errno(38));
    assert_eq!(of("mount"), libc::SECCOMP_RET_KILL_THREAD);
    assert_eq!(of("umount2"), KILL_PROCESS);
    assert_eq!(of("reboot"), libc::SECCOMP_RET_TRAP);
    assert_eq!(of("swapon"), libc::SECCOMP_RET_TRACE | 7);
    assert_eq!(of("swapoff"), libc::SECCOMP_RET_LOG);
    assert_eq!(of("read"), ALLOW);
}

#[test]
fn a_foreign_architecture_is_killed_even_when_everything_is_allowed() {
    let profile = profile(r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#);
    assert_eq!(raw(&profile, FOREIGN_ARCH, 0), KILL_PROCESS);
    assert_eq!(raw(&profile, Abi::X86.audit_arch(), 3), KILL_PROCESS);
    assert_eq!(raw(&profile, Abi::X86_64.audit_arch(), 0), ALLOW);
}

#[test]
fn x32_is_killed_unless_listed_and_a_skipped_call_is_not_mistaken_for_it() {
    let without = profile(r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#);
    let with = profile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X32"],"syscalls":[
            {"names":["ioctl"],"action":"SCMP_ACT_ERRNO"}]}"#,
    );
    let arch = Abi::X86_64.audit_arch();
    assert_eq!(raw(&without, arch, 0x4000_0000), KILL_PROCESS);
    assert_eq!(raw(&without, arch, u32::MAX), ALLOW);
    assert_eq!(raw(&with, arch, 0x4000_0000), ALLOW);
    assert_eq!(raw(&with, arch, 0x4000_0202), errno(1));
    assert_eq!(raw(&with, arch, 16), errno(1));
}

#[test]
fn numbers_newer_than_the_profile_are_enosys_when_the_default_denies() {
    let listed = r#""architectures":["SCMP_ARCH_X86_64"],"syscalls":[
        {"names":["read","clone3"],"action":"SCMP_ACT_ALLOW"}]}"#;
    let arch = Abi::X86_64.audit_arch();
    let deny = profile(&format!(r#"{{"defaultAction":"SCMP_ACT_ERRNO",{listed}"#));
    assert_eq!(raw(&deny, arch, 436), errno(libc::ENOSYS));
    assert_eq!(raw(&deny, arch, 434), errno(libc::EPERM));
    assert_eq!(raw(&deny, arch, 435), ALLOW);
    let log = profile(&format!(r#"{{"defaultAction":"SCMP_ACT_LOG",{listed}"#));
    assert_eq!(raw(&log, arch, 436), libc::SECCOMP_RET_LOG);
    // The native architecture need not be listed, others must be.
    let unlisted = profile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
            {"names":["read","clone3"],"action":"SCMP_ACT_ALLOW"}]}"#,
    );
    assert_eq!(raw(&unlisted, arch, 436), errno(libc::ENOSYS));
    assert_eq!(raw(&unlisted, arch, 434), errno(libc::EPERM));
    assert_eq!(raw(&unlisted, Abi::X86.audit_arch(), 436), KILL_PROCESS);
}

#[test]
fn conditions_on_one_argument_are_alternatives_and_on_several_must_all_hold() {
    let profile = profile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
            {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[
                {"index":0,"value":0,"op":"SCMP_CMP_EQ"},
                {"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
            {"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[
                {"index":0,"value":1,"op":"SCMP_CMP_EQ"},
                {"index":1,"value":2,"op":"SCMP_CMP_NE"}]},
            {"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[
                {"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
    );
    let of =
        |name, first, second| verdict(&profile, Abi::X86_64, name, [first, second, 0, 0, 0, 0]);
    assert_eq!(of("personality", 0, 0), ALLOW);
    assert_eq!(of("personality", 8, 0), ALLOW);
    assert_eq!(of("personality", 4, 0), errno(1));
    assert_eq!(of("personality", 8 | 1 << 40, 0), errno(1));
    assert_eq!(of("socket", 1, 3), ALLOW);
    assert_eq!(of("socket", 1, 2), errno(1));
    assert_eq!(of("socket", 2, 3), errno(1));
    assert_eq!(of("clone", 0x0001_1200, 0), ALLOW);
    assert_eq!(of("clone", 0x1000_0000, 0), errno(1));
}

#[test]
fn a_rule_without_arguments_wins_whatever_the_order() {
    for order in [[0, 1], [1, 0]] {
        let rules = [
            r#"{"names":["socket"],"action":"SCMP_ACT_KILL","args":[
                {"index":0,"value":1,"op":"SCMP_CMP_EQ"}]}"#,
            r#"{"names":["socket"],"action":"SCMP_ACT_ALLOW"}"#,
        ];
        let profile = profile(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{},{}]}}"#,
            rules[order[0]], rules[order[1]]
        ));
        assert_eq!(verdict(&profile, Abi::X86_64, "socket", [1, 0, 0, 0, 0, 0]), ALLOW);
    }
}

#[test]
fn thirty_two_bit_callers_are_judged_by_the_low_half_of_their_arguments() {
    let profile = profile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],"syscalls":[
            {"names":["socket"],"action":"SCMP_ACT_ERRNO","args":[
                {"index":0,"value":40,"op":"SCMP_CMP_EQ"}]}]}"#,
    );
    let with_rubbish = [40 | 0xdead << 32, 0, 0, 0, 0, 0];
    assert_eq!(verdict(&profile, Abi::X86, "socket", with_rubbish), errno(1));
    assert_eq!(verdict(&profile, Abi::X86_64, "socket", with_rubbish), ALLOW);
}

#[test]
fn an_arm_node_gets_arm_numbers_and_ignores_x86_architectures() {
    let profile = profile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_AARCH64"],
            "syscalls":[{"names":["open","openat"],"action":"SCMP_ACT_ALLOW"}]}"#,
    );
    let program = compile_for(Abi::Aarch64, &profile).unwrap().instructions;
    let of = |abi: Abi, number| {
        run(&program, &Call { arch: abi.audit_arch(), number, arguments: [0; 6] }).0
    };
    assert_eq!(of(Abi::Aarch64, 56), ALLOW);
    assert_eq!(of(Abi::Aarch64, 2), errno(1));
    assert_eq!(of(Abi::X86_64, 2), KILL_PROCESS);
}

#[test]
fn flags_default_to_spec_allow_and_notify_asks_for_a_listener() {
    let flags = |json: &str| compile_for(Abi::X86_64, &profile(json)).unwrap().flags;
    assert_eq!(flags(r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#), 4);
    assert_eq!(flags(r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":[]}"#), 0);
    assert_eq!(
        flags(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_LOG",
                "SECCOMP_FILTER_FLAG_TSYNC","SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}"#
        ),
        1 | 2,
        "WAIT_KILLABLE_RECV without a listener is refused by the kernel"
    );
    let notify = profile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/run/agent.sock",
            "listenerMetadata":"who","flags":["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],
            "syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}]}"#,
    );
    let program = compile_for(Abi::X86_64, &notify).unwrap();
    assert!(program.notifies());
    assert_eq!(program.flags, 8 | 32);
    assert_eq!(program.listener_metadata.as_deref(), Some("who"));
}

#[test]
fn profiles_the_runtime_could_not_survive_are_refused() {
    let refused = |json: &str| compile_for(Abi::X86_64, &profile(json)).unwrap_err();
    assert!(matches!(
        refused(r#"{"defaultAction":"SCMP_ACT_NOTIFY","listenerPath":"/x"}"#),
        Error::NotifyByDefault
    ));
    assert!(matches!(
        refused(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x",
                "syscalls":[{"names":["read","write"],"action":"SCMP_ACT_NOTIFY"}]}"#
        ),
        Error::NotifyOnWrite
    ));
    assert!(matches!(
        refused(
            r#"{"defaultAction":"SCMP_ACT_ALLOW",
                "syscalls":[{"names":["read"],"action":"SCMP_ACT_NOTIFY"}]}"#
        ),
        Error::NotifyWithoutListener
    ));
    assert!(matches!(
        refused(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],
                "action":"SCMP_ACT_KILL","args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#
        ),
        Error::ArgumentIndex { index: 6, .. }
    ));
}

#[test]
fn a_profile_too_large_for_the_kernel_is_refused_with_its_size() {
    let rules: Vec<String> = (0..1200)
        .map(|value| {
            format!(
                r#"{{"names":["ioctl"],"action":"SCMP_ACT_ALLOW","args":[
                    {{"index":1,"value":{value},"op":"SCMP_CMP_EQ"}}]}}"#
            )
        })
        .collect();
    let json = format!(r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{}]}}"#, rules.join(","));
    let error = compile_for(Abi::X86_64, &profile(&json)).unwrap_err();
    assert!(matches!(error, Error::TooLong { instructions } if instructions > 4096));
}

/// What a runtime's default profile forbids; everything else is allowed.
const USUALLY_DENIED: &str = "acct add_key bpf clock_adjtime clock_settime create_module \
    delete_module finit_module get_kernel_syms get_mempolicy init_module io_uring_enter \
    io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load keyctl \
    lookup_dcookie mbind mount move_pages nfsservctl open_by_handle_at perf_event_open \
    pivot_root process_vm_readv process_vm_writev ptrace query_module quotactl reboot \
    request_key set_mempolicy setns settimeofday stime swapoff swapon sysfs _sysctl umount \
    umount2 unshare uselib userfaultfd ustat vm86 vm86old vmsplice fsopen fsconfig fsmount \
    fspick move_mount open_tree mount_setattr quotactl_fd";

#[test]
fn a_default_profile_for_three_abis_stays_small_and_shallow() {
    let denied: Vec<&str> = USUALLY_DENIED.split_whitespace().collect();
    let names: Vec<String> = (0..470)
        .filter_map(syscalls::x86_64::Sysno::new)
        .map(|call| call.name().to_owned())
        .chain((0..470).filter_map(syscalls::x86::Sysno::new).map(|call| call.name().to_owned()))
        .filter(|name| !denied.contains(&name.as_str()) && name != "clone" && name != "personality")
        .map(|name| format!("{name:?}"))
        .collect();
    let profile = profile(&format!(
        r#"{{"defaultAction":"SCMP_ACT_ERRNO","architectures":
            ["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],"syscalls":[
            {{"names":[{}],"action":"SCMP_ACT_ALLOW"}},
            {{"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[
                {{"index":0,"value":0,"op":"SCMP_CMP_EQ"}},
                {{"index":0,"value":8,"op":"SCMP_CMP_EQ"}},
                {{"index":0,"value":4294967295,"op":"SCMP_CMP_EQ"}}]}},
            {{"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[
                {{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}}]}}]}}"#,
        names.join(",")
    ));
    let program = compile_for(Abi::X86_64, &profile).unwrap().instructions;
    let longest = (0..600)
        .map(|number| {
            let call = Call { arch: Abi::X86_64.audit_arch(), number, arguments: [0; 6] };
            run(&program, &call).1
        })
        .max()
        .unwrap();
    println!("{} instructions, longest path {longest}", program.len());
    assert!(program.len() < 300, "{} instructions", program.len());
    assert!(longest <= 20, "longest path {longest}");
}

// The model: read the profile from top to bottom, once per call.

fn condition_holds(argument: &LinuxSeccompArg, narrow: bool, arguments: [u64; 6]) -> bool {
    let cut = |value: u64| if narrow { u64::from(value as u32) } else { value };
    let actual = cut(arguments[argument.index()]);
    let value = cut(argument.value());
    match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => actual != value,
        LinuxSeccompOperator::ScmpCmpLt => actual < value,
        LinuxSeccompOperator::ScmpCmpLe => actual <= value,
        LinuxSeccompOperator::ScmpCmpEq => actual == value,
        LinuxSeccompOperator::ScmpCmpGe => actual >= value,
        LinuxSeccompOperator::ScmpCmpGt => actual > value,
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            actual & value == cut(argument.value_two().unwrap_or(0)) & value
        }
    }
}

fn rule_holds(arguments: &[LinuxSeccompArg], narrow: bool, call: [u64; 6]) -> bool {
    let mut indices: Vec<usize> = arguments.iter().map(LinuxSeccompArg::index).collect();
    indices.sort_unstable();
    let repeated = indices.windows(2).any(|pair| pair[0] == pair[1]);
    let mut each = arguments.iter().map(|argument| condition_holds(argument, narrow, call));
    if repeated { each.any(|holds| holds) } else { each.all(|holds| holds) }
}

fn action_value(action: LinuxSeccompAction, errno_ret: Option<u32>) -> u32 {
    let data = errno_ret.unwrap_or(1);
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => 0,
        LinuxSeccompAction::ScmpActTrap => 0x0003_0000,
        LinuxSeccompAction::ScmpActErrno => 0x0005_0000 | data,
        LinuxSeccompAction::ScmpActTrace => 0x7ff0_0000 | data,
        LinuxSeccompAction::ScmpActAllow => 0x7fff_0000,
        LinuxSeccompAction::ScmpActKillProcess => 0x8000_0000,
        LinuxSeccompAction::ScmpActNotify => 0x7fc0_0000,
        LinuxSeccompAction::ScmpActLog => 0x7ffc_0000,
    }
}

fn model(profile: &LinuxSeccomp, abi: Abi, number: u32, call: [u64; 6]) -> u32 {
    let default = action_value(profile.default_action(), profile.default_errno_ret());
    let rules = profile.syscalls().as_deref().unwrap_or_default();
    let mut last = 0;
    let mut matching = Vec::new();
    for rule in rules {
        let numbers: Vec<u32> = rule.names().iter().filter_map(|name| abi.number(name)).collect();
        last = numbers.iter().copied().fold(last, u32::max);
        if numbers.contains(&number) && action_value(rule.action(), rule.errno_ret()) != default {
            matching.push(rule);
        }
    }
    let permissive = matches!(
        profile.default_action(),
        LinuxSeccompAction::ScmpActAllow
            | LinuxSeccompAction::ScmpActLog
            | LinuxSeccompAction::ScmpActTrace
    );
    if last != 0 && number > last && !permissive && profile.default_errno_ret() != Some(38) {
        return 0x0005_0000 | 38;
    }
    let bare = matching.iter().find(|rule| rule.args().as_deref().unwrap_or_default().is_empty());
    let narrow = abi != Abi::X86_64;
    let decided = bare.or_else(|| {
        matching.iter().find(|rule| rule_holds(rule.args().as_deref().unwrap(), narrow, call))
    });
    decided.map_or(default, |rule| action_value(rule.action(), rule.errno_ret()))
}

const NAMES: [&str; 24] = [
    "read",
    "write",
    "open",
    "close",
    "stat",
    "mmap",
    "ioctl",
    "socket",
    "clone",
    "execve",
    "kill",
    "mkdir",
    "personality",
    "prctl",
    "gettid",
    "futex",
    "openat",
    "clone3",
    "mseal",
    "statx",
    "bogus",
    "mount",
    "ptrace",
    "execveat",
];

fn small_or_wide() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0u64..4,
        2 => (0u64..4).prop_map(|value| value << 32),
        2 => (0u64..4, 0u64..4).prop_map(|(high, low)| high << 32 | low),
        1 => Just(u64::MAX),
        1 => Just(0xFFFF_FFFF),
    ]
}

fn actions() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "SCMP_ACT_ALLOW",
        "SCMP_ACT_ERRNO",
        "SCMP_ACT_KILL",
        "SCMP_ACT_KILL_PROCESS",
        "SCMP_ACT_TRAP",
        "SCMP_ACT_TRACE",
        "SCMP_ACT_LOG",
    ])
}

fn argument_json() -> impl Strategy<Value = serde_json::Value> {
    let operators = vec![
        "SCMP_CMP_NE",
        "SCMP_CMP_LT",
        "SCMP_CMP_LE",
        "SCMP_CMP_EQ",
        "SCMP_CMP_GE",
        "SCMP_CMP_GT",
        "SCMP_CMP_MASKED_EQ",
    ];
    (0usize..3, small_or_wide(), small_or_wide(), prop::sample::select(operators)).prop_map(
        |(index, value, second, operator)| {
            serde_json::json!({"index": index, "value": value, "valueTwo": second, "op": operator})
        },
    )
}

fn profile_json() -> impl Strategy<Value = serde_json::Value> {
    let rule = (
        prop::collection::vec(prop::sample::select(NAMES.to_vec()), 1..6),
        actions(),
        prop::option::of(0u32..40),
        prop::collection::vec(argument_json(), 0..4),
    )
        .prop_map(|(names, action, errno, arguments)| {
            serde_json::json!({
                "names": names, "action": action, "errnoRet": errno, "args": arguments})
        });
    (actions(), prop::option::of(0u32..40), prop::collection::vec(rule, 0..12)).prop_map(
        |(default, errno, rules)| {
            serde_json::json!({
                "defaultAction": default, "defaultErrnoRet": errno, "syscalls": rules,
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]})
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn the_filter_decides_every_call_as_the_profile_reads(
        json in profile_json(),
        calls in prop::collection::vec(
            (0usize..NAMES.len() + 2, prop::array::uniform6(small_or_wide())), 64),
    ) {
        let profile: LinuxSeccomp = serde_json::from_value(json).unwrap();
        let program = compile_for(Abi::X86_64, &profile).unwrap().instructions;
        for (name, arguments) in calls {
            for abi in [Abi::X86_64, Abi::X86, Abi::X32] {
                let number = match NAMES.get(name) {
                    Some(name) => match abi.number(name) {
                        Some(number) => number,
                        None => continue,
                    },
                    None if abi == Abi::X32 => 0x4000_0000 + 1000 + name as u32,
                    None => 1000 + name as u32,
                };
                let call = Call { arch: abi.audit_arch(), number, arguments };
                let (verdict, _) = run(&program, &call);
                prop_assert_eq!(
                    verdict, model(&profile, abi, number, arguments),
                    "{:?} number {:#x} arguments {:x?}", abi, number, arguments);
            }
        }
    }
}
