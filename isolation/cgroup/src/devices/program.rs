//! Device rules as a `BPF_PROG_TYPE_CGROUP_DEVICE` program.
//!
//! ```text
//! r2 = type of the device   r3 = accesses not decided yet   r4 = major   r5 = minor
//! for each rule, last one first:
//!     not this device?       → next rule
//!     allow: r3 &= ~access;  r3 == 0 → allowed
//!     deny:  r3 & access     → denied
//! denied
//! ```
//!
//! Every access bit is thereby decided by the last rule that mentions it.

use super::rules::{ALL, Kind, Rule};

// eBPF opcodes (Documentation/bpf/standardization/instruction-set.rst).
const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + off)
const MOVE: u8 = 0xbf; // dst = src
const MOVE_IMMEDIATE: u8 = 0xb7; // dst = imm
const AND_IMMEDIATE: u8 = 0x57; // dst &= imm
const SHIFT_RIGHT: u8 = 0x77; // dst >>= imm
const JUMP_IF_EQUAL: u8 = 0x15; // 64-bit: if dst == imm
const JUMP32_IF_NOT_EQUAL: u8 = 0x56; // 32-bit: if (u32)dst != imm
const JUMP_IF_SET: u8 = 0x45; // if dst & imm
const EXIT: u8 = 0x95;

const BLOCK: i32 = 1; // BPF_DEVCG_DEV_BLOCK
const CHAR: i32 = 2; // BPF_DEVCG_DEV_CHAR

/// One instruction in the kernel's layout: opcode, registers, offset, immediate.
const fn instruction(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> u64 {
    code as u64
        | (dst as u64) << 8
        | (src as u64) << 12
        | (offset as u16 as u64) << 16
        | (immediate as u32 as u64) << 32
}

/// The program for normalised rules.
pub(super) fn assemble(rules: &[Rule]) -> Vec<u64> {
    // struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor; } in r1, where
    // access_type is access << 16 | type.
    let mut code = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(MOVE, 3, 2, 0, 0),
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),
        instruction(AND_IMMEDIATE, 2, 0, 0, 0xffff),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        code.extend(block(rule));
    }
    code.extend(verdict(false));
    code
}

fn verdict(allowed: bool) -> [u64; 2] {
    [instruction(MOVE_IMMEDIATE, 0, 0, 0, i32::from(allowed)), instruction(EXIT, 0, 0, 0, 0)]
}

/// One rule: the comparisons that skip it, then its effect.
fn block(rule: &Rule) -> Vec<u64> {
    let kind = if rule.kind == Kind::Block { BLOCK } else { CHAR };
    let comparisons: Vec<(u8, i32)> = std::iter::once((2, kind))
        .chain(rule.major.map(|major| (4, major as i32)))
        .chain(rule.minor.map(|minor| (5, minor as i32)))
        .collect();
    let mut effect = Vec::new();
    if rule.allow {
        effect.push(instruction(AND_IMMEDIATE, 3, 0, 0, i32::from(!rule.access & ALL)));
        effect.push(instruction(JUMP_IF_EQUAL, 3, 0, 1, 0));
        // Something is left to decide: over the verdict, to the next rule.
        effect.push(instruction(0x05, 0, 0, 2, 0));
    } else {
        effect.push(instruction(JUMP_IF_SET, 3, 0, 1, i32::from(rule.access)));
        effect.push(instruction(0x05, 0, 0, 2, 0));
    }
    effect.extend(verdict(rule.allow));
    let mut code = Vec::with_capacity(comparisons.len() + effect.len());
    for (index, (register, value)) in comparisons.iter().enumerate() {
        let skip = comparisons.len() - index - 1 + effect.len();
        code.push(instruction(JUMP32_IF_NOT_EQUAL, *register, 0, skip as i16, *value));
    }
    code.extend(effect);
    code
}

#[cfg(test)]
mod tests {
    use super::super::rules::{MKNOD, READ, WRITE};
    use super::*;
    use proptest::prelude::*;

    /// Runs the program on one access.
    fn run(code: &[u64], kind: Kind, major: u32, minor: u32, access: u8) -> bool {
        let kind = if kind == Kind::Block { 1u32 } else { 2 };
        let context = [u32::from(access) << 16 | kind, major, minor];
        let mut registers = [0u64; 11];
        let mut counter = 0usize;
        loop {
            let word = code[counter];
            counter += 1;
            let (dst, src) = ((word >> 8 & 15) as usize, (word >> 12 & 15) as usize);
            let offset = (word >> 16) as u16 as usize;
            let immediate = (word >> 32) as u32;
            match word as u8 {
                LOAD_WORD => registers[dst] = u64::from(context[offset / 4]),
                MOVE => registers[dst] = registers[src],
                MOVE_IMMEDIATE => registers[dst] = u64::from(immediate),
                AND_IMMEDIATE => registers[dst] &= u64::from(immediate),
                SHIFT_RIGHT => registers[dst] >>= immediate,
                JUMP_IF_EQUAL if registers[dst] == u64::from(immediate) => counter += offset,
                JUMP32_IF_NOT_EQUAL if registers[dst] as u32 != immediate => counter += offset,
                JUMP_IF_SET if registers[dst] & u64::from(immediate) != 0 => counter += offset,
                JUMP_IF_EQUAL | JUMP32_IF_NOT_EQUAL | JUMP_IF_SET => {}
                0x05 => counter += offset,
                EXIT => return registers[0] != 0,
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    /// The last rule that mentions an access decides it; all accesses must be allowed.
    fn model(rules: &[Rule], kind: Kind, major: u32, minor: u32, access: u8) -> bool {
        [MKNOD, READ, WRITE].iter().filter(|bit| access & **bit != 0).all(|bit| {
            let matching = rules.iter().rev().find(|rule| {
                rule.kind == kind
                    && rule.major.is_none_or(|number| number == major)
                    && rule.minor.is_none_or(|number| number == minor)
                    && rule.access & bit != 0
            });
            matching.is_some_and(|rule| rule.allow)
        })
    }

    fn kinds() -> impl Strategy<Value = Kind> {
        prop::sample::select(vec![Kind::Block, Kind::Char])
    }

    fn rules() -> impl Strategy<Value = Vec<Rule>> {
        let number = || prop::option::of(prop::sample::select(vec![0u32, 1, 3, 0xFFFF_FFFF]));
        let rule = (any::<bool>(), kinds(), number(), number(), 1u8..=ALL).prop_map(
            |(allow, kind, major, minor, access)| Rule { allow, kind, major, minor, access },
        );
        prop::collection::vec(rule, 0..10)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn the_program_decides_as_the_rules_read(
            rules in rules(),
            accesses in prop::collection::vec(
                (kinds(), prop::sample::select(vec![0u32, 1, 2, 3, 0xFFFF_FFFF]),
                 prop::sample::select(vec![0u32, 1, 2, 3, 0xFFFF_FFFF]), 1u8..=ALL), 32),
        ) {
            let code = assemble(&rules);
            for (kind, major, minor, access) in accesses {
                prop_assert_eq!(
                    run(&code, kind, major, minor, access),
                    model(&rules, kind, major, minor, access),
                    "{:?} {}:{} access {}", kind, major, minor, access);
            }
        }
    }

    #[test]
    fn without_rules_everything_is_denied() {
        assert!(!run(&assemble(&[]), Kind::Char, 1, 3, READ));
    }

    #[test]
    fn the_kernel_accepts_the_program_where_it_lets_us_load_any() {
        let rule = |allow, major| Rule {
            allow,
            kind: Kind::Char,
            major: Some(major),
            minor: None,
            access: READ | WRITE,
        };
        let code = assemble(&[rule(true, 1), rule(false, 2), rule(true, u32::MAX)]);
        match pinion_sys::bpf::load_device_program(&code, super::super::PROGRAM_NAME) {
            Ok(_program) => {}
            Err(error) if matches!(error.raw_os_error(), Some(1 | 38)) => {
                println!("not possible here: bpf(BPF_PROG_LOAD): {error}");
            }
            Err(error) => panic!("{error}"),
        }
    }
}
