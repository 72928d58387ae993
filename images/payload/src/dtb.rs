//! The little that the payload reads of the device tree: which memory is its own.

use core::ops::ControlFlow;

/// A big-endian word of the tree.
fn word(tree: u64, offset: u64) -> u64 {
    // SAFETY: the caller's tree, which lies in memory of its own.
    let value =
        unsafe { core::ptr::with_exposed_provenance::<u32>((tree + offset) as usize).read_volatile() };
    u64::from(u32::from_be(value))
}

/// Whether a name of the tree begins with these four letters.
fn begins(tree: u64, at: u64, letters: &[u8; 4]) -> bool {
    word(tree, at) == u64::from(u32::from_be_bytes(*letters))
}

/// The places of a property of 16 bytes: base and size, in nodes that begin with `memo` or lie in one that begins with
/// `rese`.
fn ranges(tree: u64, mut found: impl FnMut(bool, u64, u64) -> ControlFlow<()>) {
    const BEGIN: u64 = 1;
    const END: u64 = 2;
    const PROPERTY: u64 = 3;
    let (mut in_memory, mut in_reserved, mut depth) = (false, false, 0_u64);
    let (mut at, end) = (word(tree, 8), word(tree, 8) + word(tree, 36));
    while at < end {
        let token = word(tree, at);
        at += 4;
        match token {
            BEGIN => {
                depth += 1;
                in_memory = depth == 2 && begins(tree, at, b"memo");
                in_reserved = depth == 2 && begins(tree, at, b"rese") || in_reserved && depth > 2;
                while word(tree, at).to_be_bytes()[4..].iter().all(|&byte| byte != 0) {
                    at += 4;
                }
                at += 4;
            }
            END => {
                depth -= 1;
                in_memory = false;
                in_reserved &= depth >= 2;
            }
            PROPERTY => {
                let (size, value) = (word(tree, at), at + 8);
                let wanted = in_memory || in_reserved && depth == 3;
                let cells = |n: u64| word(tree, value + n * 8) << 32 | word(tree, value + n * 8 + 4);
                if wanted && size == 16 && found(in_reserved, cells(0), cells(1)).is_break() {
                    return;
                }
                at = value + size.next_multiple_of(4);
            }
            _ => {}
        }
    }
}

/// Where the last memory ends.
pub(crate) fn memory_end(tree: u64) -> u64 {
    let mut end = 0;
    ranges(tree, |reserved, base, size| {
        if !reserved {
            end = end.max(base + size);
        }
        ControlFlow::Continue(())
    });
    end
}

/// Whether an address belongs to somebody else.
pub(crate) fn is_reserved(tree: u64, pa: u64) -> bool {
    let mut hit = false;
    ranges(tree, |reserved, base, size| {
        hit |= reserved && pa >= base && pa - base < size;
        if hit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    hit
}
