//! QEMU as an external process: the machine as a command line, and QMP commands.
//!
//! A q35 machine with nothing on it but what is named here. Descriptors instead of paths
//! wherever QEMU takes one, so that it needs to open nothing of the host but itself, the
//! kernel and the initramfs.
//!
//! | device | for |
//! |---|---|
//! | virtio-serial, port `agent` | the channel to the agent |
//! | isa-serial | what the kernel says when it dies |
//! | virtio-rng | entropy |
//! | pci-bridge | slots that disks are plugged into while it runs |
//! | virtio-net per interface | the pod's network |
//! | vhost-user-fs | volumes: files of the host, served by a process of their own |

use std::ffi::OsString;

use serde_json::json;

use crate::driver::{Disk, Driver, Ends, Launch, Script, Step};
use crate::machine::{Accelerator, Machine};

/// The driver of QEMU 7.2 and later.
#[derive(Debug, Clone, Copy, Default)]
pub struct Qemu;

/// QEMU's descriptor sets are numbered; a slot's disk has its slot's number and these.
const FDSET: u32 = 100;

impl Driver for Qemu {
    fn launch(&self, machine: &Machine, ends: &Ends) -> Launch {
        let emulator = &machine.emulator;
        let modules = emulator.modules.clone();
        Launch {
            program: emulator.program.clone(),
            arguments: arguments(machine, ends),
            environment: modules.into_iter().map(|dir| ("QEMU_MODULE_DIR", dir)).collect(),
        }
    }

    fn add_disk(&self, disk: Disk) -> Script {
        let (node, set) = (node(disk.slot), FDSET + u32::from(disk.slot));
        vec![
            Step::Command {
                name: "add-fd",
                arguments: json!({ "fdset-id": set }),
                fd: Some(disk.image),
            },
            Step::Command {
                name: "blockdev-add",
                arguments: json!({
                    "driver": "raw", "node-name": node, "read-only": true,
                    "file": {
                        "driver": "file", "filename": format!("/dev/fdset/{set}"),
                        "read-only": true, "aio": "threads",
                    },
                }),
                fd: None,
            },
            Step::Command {
                name: "device_add",
                arguments: json!({
                    "driver": "virtio-blk-pci", "id": device(disk.slot), "drive": node,
                    "bus": "slots", "addr": format!("{:#x}", disk.slot),
                    "serial": disk.serial, "disable-legacy": "on", "num-queues": 1,
                }),
                fd: None,
            },
        ]
    }

    fn remove_disk(&self, slot: u8) -> Script {
        let command = |name, arguments| Step::Command { name, arguments, fd: None };
        vec![
            command("device_del", json!({ "id": device(slot) })),
            Step::Gone(device(slot)),
            command("blockdev-del", json!({ "node-name": node(slot) })),
            command("remove-fd", json!({ "fdset-id": FDSET + u32::from(slot) })),
        ]
    }

    fn processors(&self) -> Script {
        vec![Step::Command { name: "query-cpus-fast", arguments: json!({}), fd: None }]
    }
}

fn node(slot: u8) -> String {
    format!("disk{slot}")
}

fn device(slot: u8) -> String {
    format!("slot{slot}")
}

fn arguments(machine: &Machine, ends: &Ends) -> Vec<OsString> {
    let mut line = Line::default();
    for directory in &machine.emulator.firmware {
        line.words.push("-L".into());
        line.words.push(directory.into());
    }
    line.add("-name", "pinion-guest,process=pinion-vm,debug-threads=on");
    line.add("-machine", machine_type(machine));
    line.add("-accel", accelerator(machine.accelerator));
    line.add("-cpu", if machine.accelerator == Accelerator::Kvm { "host" } else { "max" });
    let smp = machine.processors;
    let cores = smp.count / smp.threads.max(1);
    line.add("-smp", format!("{},sockets=1,cores={cores},threads={}", smp.count, smp.threads));
    line.add("-m", format!("{}M", machine.memory));
    line.add("-object", memory(machine));
    for word in ["-nodefaults", "-no-user-config", "-no-reboot", "-nographic"] {
        line.words.push(word.into());
    }
    line.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    line.add("-chardev", format!("socket,id=control,fd={}", ends.control));
    line.add("-mon", "chardev=control,mode=control");
    line.add("-chardev", format!("socket,id=console,fd={}", ends.console));
    line.add("-serial", "chardev:console");
    line.add("-device", "virtio-serial-pci,max_ports=2,disable-legacy=on");
    line.add("-chardev", format!("socket,id=agent,fd={}", ends.agent));
    line.add("-device", "virtserialport,chardev=agent,name=agent,nr=1");
    line.add("-object", "rng-random,id=rng,filename=/dev/urandom");
    line.add("-device", "virtio-rng-pci,rng=rng,disable-legacy=on");
    line.add("-device", "pci-bridge,id=slots,chassis_nr=1");
    for (index, tap) in ends.taps.iter().enumerate() {
        line.add("-netdev", format!("tap,id=net{index},fd={}", tap.fd));
        let mac = tap.mac.map(|byte| format!("{byte:02x}")).join(":");
        line.add(
            "-device",
            format!(
                "virtio-net-pci,netdev=net{index},mac={mac},host_mtu={},romfile=,disable-legacy=on",
                tap.mtu
            ),
        );
    }
    if let Some(fd) = ends.share {
        line.add("-chardev", format!("socket,id=share,fd={fd}"));
        line.add("-device", "vhost-user-fs-pci,chardev=share,tag=share,queue-size=512");
    }
    line.words.push("-kernel".into());
    line.words.push(machine.kernel.clone().into());
    line.words.push("-initrd".into());
    line.words.push(machine.initramfs.clone().into());
    line.add("-append", command_line(machine));
    line.words
}

#[derive(Default)]
struct Line {
    words: Vec<OsString>,
}

impl Line {
    fn add(&mut self, option: &str, value: impl Into<OsString>) {
        self.words.push(option.into());
        self.words.push(value.into());
    }
}

fn machine_type(_machine: &Machine) -> &'static str {
    // No graphics, mice, floppies, and none of the buses for them.
    "q35,memory-backend=ram,usb=off,graphics=off,vmport=off,smm=off,hpet=off"
}

fn accelerator(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "kvm",
        // 32 MiB of translated code are enough for a guest of this size.
        Accelerator::Tcg => "tcg,thread=multi,tb-size=32",
    }
}

fn memory(machine: &Machine) -> String {
    let size = format!("id=ram,size={}M", machine.memory);
    let Some(huge) = &machine.huge else {
        return format!("memory-backend-memfd,{size},share=on");
    };
    let mut text = format!(
        "memory-backend-memfd,{size},share=on,prealloc=on,hugetlb=on,hugetlbsize={}",
        huge.page
    );
    if !huge.nodes.is_empty() {
        // QEMU takes one range or number per key, and the key any number of times.
        for part in huge.nodes.split(',') {
            text.push_str(&format!(",host-nodes={part}"));
        }
        text.push_str(",policy=bind");
    }
    text
}

fn command_line(machine: &Machine) -> String {
    let mut words = vec!["console=ttyS0 quiet loglevel=3 panic=-1 oops=panic"];
    // A guest in a guest has nothing to gain from these, and they cost a second to set up.
    words.push("mitigations=auto nomodule_sig random.trust_cpu=on cgroup_no_v1=all");
    words.push("i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd tsc=reliable");
    if machine.accelerator == Accelerator::Tcg {
        // Timers of an emulated machine fail the kernel's checks of real ones.
        words.push("no_timer_check rcupdate.rcu_cpu_stall_timeout=120");
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::Tap;
    use crate::machine::{Emulator, HugeMemory, Processors};

    fn machine() -> Machine {
        Machine {
            emulator: Emulator {
                program: "/usr/bin/qemu-system-x86_64".into(),
                firmware: vec!["/usr/share/seabios".into()],
                modules: None,
            },
            accelerator: Accelerator::Kvm,
            kernel: "/k".into(),
            initramfs: "/i".into(),
            processors: Processors { count: 4, threads: 2 },
            memory: 256,
            huge: None,
        }
    }

    fn line(machine: &Machine) -> String {
        let tap = Tap { fd: 13, mac: [2, 0, 0, 0, 0, 0x1f], mtu: 1450 };
        let ends = Ends { agent: 10, control: 11, console: 12, taps: vec![tap], share: None };
        let launch = Qemu.launch(machine, &ends);
        launch.arguments.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn nothing_is_there_that_was_not_asked_for() {
        let line = line(&machine());
        for word in [
            "-nodefaults",
            "-no-user-config",
            "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            "-smp 4,sockets=1,cores=2,threads=2",
            "-cpu host",
            "socket,id=agent,fd=10",
            "tap,id=net0,fd=13",
            "mac=02:00:00:00:00:1f,host_mtu=1450",
        ] {
            assert!(line.contains(word), "{word} in {line}");
        }
        for word in ["fsdev", "vhost-user", "hugetlb", "-drive", "no_timer_check", "format=qcow2"] {
            assert!(!line.contains(word), "{word} in {line}");
        }
    }

    #[test]
    fn memory_is_bound_to_the_nodes_it_was_granted_on() {
        let huge = HugeMemory { page: 2 << 20, nodes: "0,2-3".into() };
        let line = line(&Machine { huge: Some(huge), ..machine() });
        let backend = "share=on,prealloc=on,hugetlb=on,hugetlbsize=2097152,\
                       host-nodes=0,host-nodes=2-3,policy=bind";
        assert!(line.contains(backend), "{line}");
    }

    #[test]
    fn a_disk_is_raw_and_read_only_whatever_it_holds() {
        let image = std::fs::File::open("/dev/null").unwrap().into();
        let script = Qemu.add_disk(Disk { serial: "s".into(), slot: 3, image });
        let Step::Command { name: "blockdev-add", arguments, .. } = &script[1] else { panic!() };
        assert_eq!(arguments["driver"], "raw");
        assert_eq!(arguments["read-only"], true);
        assert_eq!(arguments["file"]["filename"], "/dev/fdset/103");
    }
}
