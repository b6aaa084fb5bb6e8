//! An allocator for processes that live for milliseconds.
//!
//! musl's allocator maps and unmaps pages one by one: some eighty system calls and as many
//! page faults for a command that prints a line. This one takes memory from the kernel in
//! large pieces and never gives it back; freed blocks are kept in lists by size and used
//! again, so that a command in the foreground does not grow.
//!
//! ```text
//! piece: ┌─────┬───────┬──┬───── … ──────────┐      free: 16 → □ → □
//!        │ 32  │  128  │16│       unused     │            32 → □
//!        └─────┴───────┴──┴───── … ──────────┘            64 → (none)
//! ```

use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};

/// The smallest block, which is also the alignment of all.
const SMALLEST: usize = 16;
/// Block sizes are `SMALLEST` times a power of two below this one.
const CLASSES: usize = 40;
/// What is asked of the kernel at once, at least.
const PIECE: usize = 256 << 10;

/// The allocator; to be installed with `#[global_allocator]`.
#[derive(Debug)]
pub struct Arena {
    locked: AtomicBool,
    state: UnsafeCell<State>,
}

#[derive(Debug)]
struct State {
    next: usize,
    end: usize,
    free: [Option<NonNull<Free>>; CLASSES],
}

/// A freed block holds the address of the next one of its size.
#[derive(Debug)]
struct Free {
    next: Option<NonNull<Free>>,
}

// SAFETY: `state` is only touched between `lock` and `unlock`.
unsafe impl Sync for Arena {}

impl Arena {
    /// An arena without memory.
    #[must_use]
    pub const fn new() -> Self {
        let state = State { next: 0, end: 0, free: [None; CLASSES] };
        Self { locked: AtomicBool::new(false), state: UnsafeCell::new(state) }
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        while self.locked.swap(true, Ordering::Acquire) {
            std::hint::spin_loop();
        }
        // SAFETY: the flag gives this thread sole use; `act` cannot come back here, for it
        // allocates nothing.
        let result = act(unsafe { &mut *self.state.get() });
        self.locked.store(false, Ordering::Release);
        result
    }
}

impl Default for Arena {
    fn default() -> Self {
        Self::new()
    }
}

/// The class of blocks that hold `layout`.
fn class_of(layout: Layout) -> usize {
    let size = layout.size().max(layout.align()).max(SMALLEST).next_power_of_two();
    (size / SMALLEST).trailing_zeros() as usize
}

impl State {
    fn take(&mut self, class: usize) -> *mut u8 {
        if let Some(block) = self.free[class] {
            // SAFETY: blocks in the list were freed by `give` and hold a `Free`.
            self.free[class] = unsafe { block.as_ref().next };
            return block.as_ptr().cast();
        }
        let size = SMALLEST << class;
        // A power-of-two block is aligned to its size, up to a page.
        let aligned = self.next.next_multiple_of(size.min(4096));
        if aligned.saturating_add(size) <= self.end {
            self.next = aligned + size;
            return aligned as *mut u8;
        }
        self.grow(size)
    }

    /// Takes a new piece; what is left of the old one is small by comparison and forgotten.
    fn grow(&mut self, size: usize) -> *mut u8 {
        let length = size.next_multiple_of(PIECE);
        // SAFETY: an anonymous mapping at an address of the kernel's choice.
        let piece = unsafe {
            libc::mmap(
                null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if piece == libc::MAP_FAILED {
            return null_mut();
        }
        let start = piece as usize;
        if length - size > self.end - self.next {
            (self.next, self.end) = (start + size, start + length);
        }
        piece.cast()
    }

    fn give(&mut self, block: *mut u8, class: usize) {
        let Some(block) = NonNull::new(block.cast::<Free>()) else { return };
        // SAFETY: the caller gives up the block, which is at least `SMALLEST` large.
        unsafe { block.write(Free { next: self.free[class] }) };
        self.free[class] = Some(block);
    }
}

// SAFETY: blocks are disjoint, at least as large and aligned as asked (alignments above a
// page are refused), and stay valid until they are given back.
unsafe impl GlobalAlloc for Arena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let class = class_of(layout);
        if layout.align() > 4096 || class >= CLASSES {
            return null_mut();
        }
        self.with(|state| state.take(class))
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        self.with(|state| state.give(block, class_of(layout)));
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Ok(wanted) = Layout::from_size_align(size, layout.align()) else { return null_mut() };
        if class_of(wanted) == class_of(layout) {
            return block;
        }
        // SAFETY: the caller's contract for `layout` and `block` is that of these calls.
        unsafe {
            let moved = self.alloc(wanted);
            if !moved.is_null() {
                moved.copy_from_nonoverlapping(block, layout.size().min(size));
                self.dealloc(block, layout);
            }
            moved
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize, align: usize) -> Layout {
        Layout::from_size_align(size, align).unwrap()
    }

    #[test]
    fn blocks_are_aligned_disjoint_and_used_again() {
        let arena = Arena::new();
        let mut blocks = Vec::new();
        for (size, align) in [(1, 1), (17, 8), (100, 64), (5000, 4096), (1 << 20, 16), (3, 1024)] {
            // SAFETY: sizes are not zero; the block is only used within its layout.
            let block = unsafe { arena.alloc(layout(size, align)) };
            assert!(!block.is_null() && (block as usize).is_multiple_of(align), "{size} {align}");
            // SAFETY: as above.
            unsafe { block.write_bytes(size as u8, size) };
            blocks.push((block, size, align));
        }
        for (block, size, _) in &blocks {
            // SAFETY: written above.
            assert!((0..*size).all(|at| unsafe { block.add(at).read() } == *size as u8));
        }
        let (block, size, align) = blocks[1];
        // SAFETY: allocated with this layout.
        unsafe { arena.dealloc(block, layout(size, align)) };
        // SAFETY: not zero.
        assert_eq!(unsafe { arena.alloc(layout(32, 16)) }, block);
    }

    #[test]
    fn growing_a_block_keeps_its_content() {
        let arena = Arena::new();
        // SAFETY: not zero; used within the layouts.
        unsafe {
            let block = arena.alloc(layout(16, 1));
            block.write_bytes(7, 16);
            let grown = arena.realloc(block, layout(16, 1), 4000);
            assert!((0..16).all(|at| grown.add(at).read() == 7));
            assert_eq!(arena.realloc(grown, layout(4000, 1), 4001), grown);
        }
    }

    #[test]
    fn alignments_above_a_page_are_refused() {
        // SAFETY: not zero.
        assert!(unsafe { Arena::new().alloc(layout(1, 8192)) }.is_null());
    }

    #[test]
    fn a_loop_of_allocations_does_not_grow() {
        let arena = Arena::new();
        for round in 0..100_000usize {
            let layout = layout(1 + round % 3000, 8);
            // SAFETY: not zero; freed at once.
            unsafe { arena.dealloc(arena.alloc(layout), layout) };
        }
        assert!(arena.with(|state| state.end - state.next) > 0);
    }
}
