//! The little that the payload reads of the device tree.

/// A big-endian word of the tree.
fn word(tree: u64, offset: u64) -> u64 {
    // SAFETY: the caller's tree, which lies in memory of its own.
    let value =
        unsafe { core::ptr::with_exposed_provenance::<u32>((tree + offset) as usize).read_volatile() };
    u64::from(u32::from_be(value))
}

/// The end of the memory that the first `reg` of 16 bytes below a node called `memory@…` gives; 0 if there is none.
pub(crate) fn memory_end(tree: u64) -> u64 {
    const BEGIN: u64 = 1;
    const PROPERTY: u64 = 3;
    const NAME: u64 = 0x6D65_6D6F; // "memo"
    let mut in_memory = false;
    let (mut at, end) = (word(tree, 8), word(tree, 8) + word(tree, 36));
    while at < end {
        let token = word(tree, at);
        at += 4;
        if token == BEGIN {
            in_memory = word(tree, at) == NAME;
            while word(tree, at).to_be_bytes()[4..].iter().all(|&byte| byte != 0) {
                at += 4;
            }
            at += 4;
        } else if token == PROPERTY {
            let (size, value) = (word(tree, at), at + 8);
            if in_memory && size == 16 {
                let cells = |n: u64| word(tree, value + n * 8) << 32 | word(tree, value + n * 8 + 4);
                return cells(0) + cells(1);
            }
            at = value + size.next_multiple_of(4);
        }
    }
    0
}
