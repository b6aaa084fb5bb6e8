//! A classic BPF interpreter with the checks of the kernel's verifier, for filters under test.

/// What a filter sees of one call (`struct seccomp_data`, instruction pointer left out).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) arch: u32,
    pub(crate) number: u32,
    pub(crate) arguments: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        match offset {
            0 => self.number,
            4 => self.arch,
            16..64 => {
                let argument = self.arguments[(offset as usize - 16) / 8];
                if offset.is_multiple_of(8) { argument as u32 } else { (argument >> 32) as u32 }
            }
            other => panic!("load from {other}"),
        }
    }
}

/// Runs `program` and returns its verdict and the number of instructions executed.
///
/// Panics where the kernel would refuse the program.
pub(crate) fn run(program: &[libc::sock_filter], call: &Call) -> (u32, usize) {
    let mut accumulator = 0u32;
    let mut counter = 0usize;
    for steps in 1.. {
        let instruction = program.get(counter).expect("ran off the end");
        counter += 1;
        let taken = |yes: bool| usize::from(if yes { instruction.jt } else { instruction.jf });
        match instruction.code {
            0x20 => accumulator = call.word(instruction.k),
            0x54 => accumulator &= instruction.k,
            0x05 => counter += instruction.k as usize,
            0x15 => counter += taken(accumulator == instruction.k),
            0x25 => counter += taken(accumulator > instruction.k),
            0x35 => counter += taken(accumulator >= instruction.k),
            0x06 => return (instruction.k, steps),
            other => panic!("opcode {other:#x} is not one the kernel lets filters use"),
        }
    }
    unreachable!()
}
