//! What belongs to one vCPU: SGIs and PPIs, the redistributor's own registers, and the list registers of
//! the entry that is under way.

use super::irq::{Groups, Irq, Trigger};
use super::types::MAX_LRS;

/// SGIs are 0..16, PPIs 16..32.
pub(super) const NR_PRIVATE: usize = 32;
pub(super) const NR_SGIS: usize = 16;

pub(super) struct Cpu {
    /// Which vCPU this is.
    pub(super) index: usize,
    pub(super) private: [Irq; NR_PRIVATE],
    /// `GICR_WAKER.ProcessorSleep`.
    pub(super) asleep: bool,
    /// There is an ITS.
    pub(super) has_lpis: bool,
    /// `GICR_CTLR.EnableLPIs`.
    pub(super) lpis_enabled: bool,
    /// `GICR_PENDBASER`: read when LPIs are enabled, never written.
    pub(super) pendbaser: u64,
    /// Its PTZ: nothing is pending in the table.
    pub(super) pending_zero: bool,
    /// The INTID in each list register between flush and sync.
    pub(super) loaded: [u16; MAX_LRS],
    pub(super) nr_loaded: usize,
    pub(super) cpu_interface: Vmcr,
}

impl Cpu {
    pub(super) fn new(index: usize, has_lpis: bool) -> Cpu {
        Cpu {
            index,
            private: core::array::from_fn(|intid| {
                Irq::new(if intid < NR_SGIS { Trigger::Edge } else { Trigger::Level })
            }),
            // Firmware would have woken the redistributor, and a Realm has none: operating systems that rely
            // on firmware find it awake.
            asleep: false,
            has_lpis,
            lpis_enabled: false,
            pendbaser: 0,
            pending_zero: false,
            loaded: [0; MAX_LRS],
            nr_loaded: 0,
            cpu_interface: Vmcr::from_bits(0),
        }
    }
}

/// `ICH_VMCR_EL2`, as the last exit reported it.
#[derive(Clone, Copy)]
pub(super) struct Vmcr {
    pub(super) enabled: Groups,
    /// VEOIM: ending an interrupt needs a separate write of ICC_DIR_EL1.
    pub(super) split_eoi: bool,
    pub(super) priority_mask: u8,
}

impl Vmcr {
    pub(super) fn from_bits(bits: u64) -> Vmcr {
        Vmcr {
            enabled: Groups { group0: bits & 1 != 0, group1: bits & (1 << 1) != 0 },
            split_eoi: bits & (1 << 9) != 0,
            priority_mask: bits.to_le_bytes()[3],
        }
    }
}
