//! Execution domain, clocks and NUMA policy: what every process of a container has.

use serde_json::json;

use crate::bundle::{Bundle, is_pinion, is_runc_since};

#[test]
fn the_execution_domain_is_that_of_the_container_and_of_exec() {
    if !is_runc_since(2) {
        return;
    }
    let mut bundle = Bundle::new("sleep 100");
    bundle.config["linux"]["personality"] = json!({ "domain": "LINUX32" });
    bundle.launch();
    assert_eq!(bundle.exec("uname -m").ok().trim(), "i686");
    let seen = std::fs::read_to_string(format!("/proc/{}/personality", bundle.pid())).unwrap();
    assert_eq!(seen.trim(), "00000008");
}

#[test]
fn flags_of_the_execution_domain_are_set_by_the_kernels_names() {
    if !is_pinion() {
        return;
    }
    let mut bundle = Bundle::new("sleep 100");
    bundle.config["linux"]["personality"] =
        json!({ "domain": "LINUX", "flags": ["ADDR_NO_RANDOMIZE"] });
    bundle.launch();
    let seen = std::fs::read_to_string(format!("/proc/{}/personality", bundle.pid())).unwrap();
    assert_eq!(seen.trim(), "00040000");
    let mut bundle = Bundle::new("true");
    bundle.config["linux"]["personality"] = json!({ "domain": "LINUX", "flags": ["NO_SUCH"] });
    bundle.run().fails_with("NO_SUCH");
}

#[test]
fn clocks_of_a_new_time_namespace_have_their_offsets() {
    if !is_runc_since(2) {
        return;
    }
    let mut bundle = Bundle::new("cut -d. -f1 /proc/uptime; cat /proc/self/timens_offsets");
    bundle.config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "time" }));
    bundle.config["linux"]["timeOffsets"] = json!({
        "boottime": { "secs": 10_000_000, "nanosecs": 5 }, "monotonic": { "secs": 777 },
    });
    let text = bundle.run().ok();
    let mut words = text.split_whitespace();
    assert!(words.next().unwrap().parse::<u64>().unwrap() > 10_000_000, "{text}");
    let rest: Vec<&str> = words.collect();
    assert_eq!(rest, ["monotonic", "777", "0", "boottime", "10000000", "5"]);
}

#[test]
fn exec_and_a_second_container_share_the_time_namespace() {
    if !is_runc_since(2) {
        return;
    }
    let mut bundle = Bundle::new("sleep 100");
    bundle.config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "time" }));
    bundle.config["linux"]["timeOffsets"] = json!({ "monotonic": { "secs": 4242, "nanosecs": 0 } });
    bundle.launch();
    let own = std::fs::read_link(format!("/proc/{}/ns/time", bundle.pid())).unwrap();
    let host = std::fs::read_link("/proc/self/ns/time").unwrap();
    assert_ne!(own, host);
    let seen = bundle.exec("readlink /proc/self/ns/time; cat /proc/self/timens_offsets").ok();
    assert!(seen.contains(own.to_str().unwrap()) && seen.contains("4242"), "{seen}");
    let mut second = Bundle::new("readlink /proc/self/ns/time");
    let path = format!("/proc/{}/ns/time", bundle.pid());
    let list = second.config["linux"]["namespaces"].as_array_mut().unwrap();
    list.push(json!({ "type": "time", "path": path }));
    assert_eq!(second.run().ok().trim(), own.to_str().unwrap());
}

#[test]
fn offsets_without_a_namespace_of_their_own_are_refused() {
    let mut bundle = Bundle::new("true");
    bundle.config["linux"]["timeOffsets"] = json!({ "monotonic": { "secs": 1, "nanosecs": 0 } });
    if is_runc_since(2) {
        bundle.run().fails_with("time namespace");
    }
}

/// The policy of the program's own memory, as the kernel names it.
const POLICY: &str = "grep -m1 stack /proc/self/numa_maps | cut -d' ' -f2";

#[test]
fn the_numa_policy_is_that_of_the_container_and_of_exec() {
    if !is_pinion() || !std::path::Path::new("/proc/self/numa_maps").exists() {
        crate::bundle::moot!("the kernel has no NUMA, or runc no memoryPolicy");
        return;
    }
    for (policy, seen) in [
        (json!({ "mode": "MPOL_BIND", "nodes": "0" }), "bind:0"),
        (
            json!({ "mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"] }),
            "bind=static:0",
        ),
        (json!({ "mode": "MPOL_PREFERRED", "nodes": "0" }), "prefer:0"),
        (json!({ "mode": "MPOL_PREFERRED_MANY", "nodes": "0" }), "prefer (many):0"),
        (json!({ "mode": "MPOL_INTERLEAVE", "nodes": "0" }), "interleave:0"),
        (json!({ "mode": "MPOL_WEIGHTED_INTERLEAVE", "nodes": "0" }), "weighted interleave:0"),
        (json!({ "mode": "MPOL_LOCAL" }), "local"),
        (json!({ "mode": "MPOL_DEFAULT" }), "default"),
    ] {
        let mut bundle = Bundle::new(&format!("{POLICY}; sleep 100"));
        bundle.config["linux"]["memoryPolicy"] = policy.clone();
        bundle.write_config();
        let out = bundle.path().join("out");
        let mut command = bundle.command(&["run", "--detach", &bundle.id]);
        // Files, for a pipe would stay open as long as the container runs.
        let told = bundle.path().join("told");
        command.stdout(std::fs::File::create(&out).unwrap());
        let status = command.stderr(std::fs::File::create(&told).unwrap()).status().unwrap();
        let told = std::fs::read_to_string(&told).unwrap();
        if !status.success() {
            // Weighted interleaving came with Linux 6.9, several preferred nodes with 5.15.
            assert!(told.contains("set_mempolicy"), "{policy}: {told}");
            crate::bundle::moot!("{policy}: {told}");
            continue;
        }
        crate::bundle::eventually(|| std::fs::read_to_string(&out).unwrap().contains('\n'));
        let word = seen.split(' ').next().unwrap();
        assert!(std::fs::read_to_string(&out).unwrap().trim().starts_with(word), "{policy}");
        assert!(bundle.exec(POLICY).ok().trim().starts_with(word), "{policy} in exec");
    }
}

#[test]
fn a_numa_policy_without_its_nodes_is_refused() {
    if !is_pinion() {
        return;
    }
    let mut bundle = Bundle::new("true");
    bundle.config["linux"]["memoryPolicy"] = json!({ "mode": "MPOL_BIND" });
    bundle.run().fails_with("memoryPolicy");
    bundle.assert_nothing_left();
}
