//! What a guest's driver does to its GIC.

use crate::guest::{Guest, Op};
use crate::vmm::{GICD, SHARED};

/// Distance between the redistributors of two vCPUs, and of one's two frames.
const REDISTRIBUTOR: u64 = 0x2_0000;
const SGI_FRAME: u64 = 0x1_0000;

fn store(address: u64, size: u64, value: u64) -> Op {
    Op::Write { ipa: address | SHARED, size, value }
}

/// Makes an SPI one of group 1, of the highest priority, that vCPU 0 takes.
#[must_use]
pub fn enable_spi(intid: u64) -> [Op; 5] {
    [
        enable(),
        store(GICD + 0x80 + intid / 32 * 4, 4, 0xFFFF_FFFF),
        store(GICD + 0x400 + intid, 1, 0x80),
        // Affinity 0.0.0.0, which is also the reset value.
        store(GICD + 0x6000 + intid * 8, 8, 0),
        store(GICD + 0x100 + intid / 32 * 4, 4, 1 << (intid % 32)),
    ]
}

/// Lets interrupts of group 1 through.
fn enable() -> Op {
    store(GICD, 4, 0x12)
}

impl Guest {
    /// As the function, for an edge or a level.
    pub fn enable_spi(&self, intid: u64, edge: bool) {
        let (config, bit) = (GICD + 0xC00 + intid / 16 * 4, 2 << (intid % 16 * 2));
        let others = self.expect(Op::Read { ipa: config | SHARED, size: 4 })[0] & !bit;
        self.expect(store(config, 4, others | if edge { bit } else { 0 }));
        for op in enable_spi(intid) {
            self.expect(op);
        }
    }

    /// Makes a private interrupt of a vCPU one of group 1. The redistributors lie at `frames`.
    pub fn enable_private(&self, frames: u64, vcpu: u64, intid: u64) {
        let frame = frames + vcpu * REDISTRIBUTOR + SGI_FRAME;
        self.expect(enable());
        self.expect(store(frame + 0x80, 4, 0xFFFF_FFFF));
        self.expect(store(frame + 0x400 + intid, 1, 0x80));
        self.expect(store(frame + 0x100, 4, 1 << intid));
    }
}
