//! LPIs: interrupts without lines and without an active state, that an ITS makes pending. Their configuration lies in
//! the guest's memory and is copied here when the guest says so (`INV`, `INVALL`, enabling them at a redistributor).

use crate::lock::Lock;
use crate::sync::Ordering::SeqCst;

use super::Vgic;
use super::irq::Irq;
use super::types::VcpuSet;

/// The first LPI.
pub(super) const FIRST: usize = 8192;
/// INTIDs have so many bits if there are LPIs.
pub(super) const INTID_BITS: u32 = 16;
/// No INTID from here on.
pub(super) const END: usize = 1 << INTID_BITS;

/// LPI configuration: bit 0 enables, the priority is in bits 7:2.
const CONFIG_ENABLE: u8 = 1;
const CONFIG_PRIORITY: u8 = 0xFC;
/// The address in `GICR_PROPBASER` and `GICR_PENDBASER`.
const PROPBASER_ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
const PENDBASER_ADDRESS: u64 = 0x000F_FFFF_FFFF_0000;

/// What an ITS does to LPIs. Any context but [`Vgic::lpi_prepare`], which allocates.
impl<R: Lock> Vgic<R> {
    /// Makes room for the state of `intid`. `false` if it is no LPI, or there are none.
    pub fn lpi_prepare(&self, intid: u32) -> bool {
        let Some(state) = self.state.get() else { return false };
        usize::try_from(intid).is_ok_and(|intid| state.dist.prepare_lpi(intid))
    }

    fn lpi_change(&self, intid: u32, change: impl FnOnce(&mut Irq)) -> VcpuSet {
        let mut kick = VcpuSet::EMPTY;
        if let (Some(state), Ok(intid @ FIRST..)) = (self.state.get(), usize::try_from(intid)) {
            state.dist.change(intid, &mut kick, change);
        }
        kick
    }

    /// Routes an LPI to `vcpu`, or to nobody.
    pub fn lpi_route(&self, intid: u32, vcpu: Option<usize>) -> VcpuSet {
        let mut kick = VcpuSet::EMPTY;
        if let (Some(state), Ok(intid @ FIRST..)) = (self.state.get(), usize::try_from(intid)) {
            state.dist.set_target(intid, vcpu, &mut kick);
        }
        kick
    }

    /// The vCPU that an LPI goes to.
    pub fn lpi_target(&self, intid: u32) -> Option<usize> {
        let intid = usize::try_from(intid).ok().filter(|&intid| intid >= FIRST)?;
        self.state.get()?.dist.with(intid, |lpi| lpi.target)?.map(usize::from)
    }

    /// Applies a byte of the configuration table.
    pub fn lpi_configure(&self, intid: u32, config: u8) -> VcpuSet {
        self.lpi_change(intid, |irq| {
            irq.enabled = config & CONFIG_ENABLE != 0;
            irq.set_priority(config & CONFIG_PRIORITY);
        })
    }

    /// Makes an LPI pending, or takes that back.
    pub fn lpi_set_pending(&self, intid: u32, pending: bool) -> VcpuSet {
        self.lpi_change(intid, |irq| if pending { irq.set_latch() } else { irq.clear_latch() })
    }

    /// Whether an LPI is pending outside list registers.
    pub fn lpi_is_pending(&self, intid: u32) -> bool {
        let (Some(state), Ok(intid @ FIRST..)) = (self.state.get(), usize::try_from(intid)) else {
            return false;
        };
        state.dist.with(intid, |lpi| lpi.irq.is_pending()).unwrap_or(false)
    }

    /// Address of the byte that configures `intid`, as the guest has set it up.
    pub fn lpi_config_address(&self, intid: u32) -> Option<u64> {
        let propbaser = self.state.get()?.dist.propbaser.load(SeqCst);
        let n = u64::from(intid).checked_sub(u64::try_from(FIRST).ok()?)?;
        // IDbits minus one in bits 4:0.
        let ids = 1u64 << ((propbaser & 0x1F) + 1).min(u64::from(INTID_BITS));
        (u64::from(intid) < ids).then_some((propbaser & PROPBASER_ADDRESS) + n)
    }

    /// Address of the byte in which `vcpu`'s table says whether `intid` is pending, in bit `intid % 8`. `None` if the
    /// guest has said that there is nothing in it.
    pub fn lpi_pending_address(&self, vcpu: usize, intid: u32) -> Option<u64> {
        let cpu = self.state.get()?.cpus.get(vcpu)?.lock();
        (!cpu.pending_zero).then_some((cpu.pendbaser & PENDBASER_ADDRESS) + u64::from(intid / 8))
    }

    /// A vCPU at which LPIs were enabled since the last call: their configuration and pending state have to be read.
    pub fn take_lpis_enabled(&self) -> Option<usize> {
        let state = self.state.get()?;
        let vcpu = self.lpis_enabled.first()?;
        self.lpis_enabled.set(vcpu, false);
        (vcpu < state.cpus.len()).then_some(vcpu)
    }
}
