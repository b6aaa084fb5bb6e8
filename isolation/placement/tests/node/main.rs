//! Placement on a real kernel, as root: cgroup v2 with remote partitions and two NUMA nodes
//! (the virtual node), or whatever this machine has, whose honest refusal is then checked.
//!
//! A binary without the standard harness: tests change the whole machine, so they run one by
//! one; and the binary calls itself (`hold`) to have a process that keeps huge pages.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test binary")]

mod hugepages;
mod partitions;
mod tree;
mod v1;

use std::panic::catch_unwind;
use std::process::ExitCode;

use pinion_placement::Host;

type Test = (&'static str, fn());

macro_rules! tests {
    ($($module:ident::$name:ident),* $(,)?) => { &[$((stringify!($name), $module::$name)),*] };
}

const ON_V2: &[Test] = tests![
    partitions::a_container_deep_in_the_tree_gets_an_isolated_partition,
    partitions::two_containers_share_ancestors_and_leave_independently,
    partitions::rewrites_of_the_cpu_list_by_others_do_not_end_exclusivity,
    partitions::growing_and_moving_keep_the_neighbour_and_trim_the_ancestors,
    partitions::an_ancestor_overwritten_by_somebody_is_noticed_and_healed,
    partitions::an_emptied_ancestor_does_not_keep_cpus_isolated_for_nobody,
    partitions::a_sibling_that_takes_the_cpus_is_noticed_named_and_healed,
    partitions::half_a_core_is_refused_until_its_sibling_is_offline,
    partitions::quotas_are_lifted_and_come_back,
    partitions::sets_that_cannot_be_are_refused_and_leave_no_trace,
    partitions::a_container_below_the_root_gets_a_local_partition,
    partitions::a_root_partition_keeps_its_scheduling_domain,
    hugepages::granted_pages_are_proven_on_their_node_and_released,
    hugepages::pages_in_use_are_not_proven_again,
    hugepages::the_second_claimant_of_a_node_is_refused_and_the_first_unharmed,
    hugepages::limits_that_would_kill_the_container_fail_the_proof,
    hugepages::reservations_of_neighbours_are_seen_although_pages_look_free,
    hugepages::a_neighbour_that_took_the_node_first_is_a_refusal,
    hugepages::a_node_outside_the_memory_nodes_is_refused,
    hugepages::the_ledger_tells_granted_pages_from_strangers,
    hugepages::a_strict_container_without_its_pages_keeps_no_partition,
];

const ON_V1: &[Test] = tests![
    v1::a_lenient_request_starts_degraded_and_says_why,
    v1::a_strict_request_is_refused_with_a_code,
    v1::huge_pages_that_do_not_exist_are_refused,
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).is_some_and(|verb| verb == "hold") {
        hugepages::hold(&arguments[2..]);
        return ExitCode::SUCCESS;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("these tests change the machine and need root");
        return ExitCode::FAILURE;
    }
    let host = Host::detect().unwrap();
    let tests = if host.v2_with_cpuset().is_some() {
        tree::prepare(&host);
        ON_V2
    } else {
        println!("not possible here: the cpuset controller is on cgroup v1, so no partitions");
        ON_V1
    };
    let wanted = arguments.get(1).filter(|argument| !argument.starts_with('-'));
    let chosen = |(name, _): &&Test| wanted.is_none_or(|wanted| name.contains(wanted.as_str()));
    let (mut run, mut failed) = (0, 0);
    for (name, test) in tests.iter().filter(chosen) {
        run += 1;
        let outcome = catch_unwind(test);
        println!("test {name} ... {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        failed += u32::from(outcome.is_err());
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!("{run} tests on Linux {}, {failed} failed", host.kernel.release);
    println!("test result: {verdict}. {} passed; {failed} failed", run - failed);
    if failed == 0 && run > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
