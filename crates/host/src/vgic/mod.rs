//! The virtual GICv3 of a Realm.
//!
//! A Realm's interrupt controller is the host's: its distributor and redistributors are emulated MMIO in
//! the shared half of the address space, and interrupts reach a REC through the list registers that the
//! host passes in `rec_enter` and reads back from `rec_exit`. The RMM keeps the rest of the virtual CPU
//! interface (`ICH_VMCR_EL2`, active priorities) and never lets the host write it.
//!
//! The model is independent of the scheduler. Every operation that may make an interrupt deliverable
//! answers with the [`VcpuSet`] that has to look at its interrupts again; the caller wakes those which are
//! blocked and interrupts those which are running, and each of them calls [`Vgic::flush`] before its next
//! `REC_ENTER`.
//!
//! # Use
//!
//! ```text
//! CREATE_DEVICE   Vgic::new, then vcpu_added for every vCPU that exists already
//! CREATE_VCPU     vcpu_added
//! SET_DEVICE_ATTR attr_size, copy the payload, set_attr
//! first KVM_RUN   start
//! KVM_RUN loop    IRQs off; mark "in guest"; flush; REC_ENTER; sync (or cancel when not entered)
//! ```
//!
//! # Locks
//!
//! An ITS has a sleeping lock for the guest's orders, and a spin lock for its translations, which comes before these.
//! In this order: the lock of one vCPU's private interrupts and list registers, then the distributor's
//! lock (all SPIs). Never two vCPUs' locks at once. Both are the caller's `R`, which must disable
//! interrupts while held, since lines may be set from interrupt context. Nothing is allocated, freed or
//! called back while one of them is held. The configuration lock belongs to device attributes only and is
//! never taken together with the others.

mod attr;
mod cpu;
mod dist;
mod irq;
mod its;
mod list;
mod lpi;
mod mmio;
mod redist;
mod sgi;
mod shared;
#[cfg(test)]
mod tests;
mod translate;
mod types;

use crate::lock::{Lock, guarded};
use crate::sync::{AtomicBool, Ordering};
use alloc::vec::Vec;

use lock_api::Mutex;
use spin::Once;

pub use attr::{AttrError, Limits};
pub use its::{GuestMemory, Its, Remembered};
pub use list::LrFault;
pub use types::{ExitGic, LrImage, MAX_LRS, MAX_VCPUS, SpiList, SyncOutcome, VcpuSet};

use attr::{Config, Layout};
use cpu::Cpu;
use dist::Dist;
use types::AtomicVcpuSet;

/// One VM's GICv3: distributor, a redistributor per vCPU, and the contents of the list registers.
///
/// vCPUs are named by their index in order of [`Vgic::vcpu_added`]. An index that was never added is
/// answered as if the operation had nothing to do.
pub struct Vgic<R: Lock> {
    limits: Limits,
    config: Mutex<R, Config>,
    /// Interrupt state; there from `KVM_DEV_ARM_VGIC_CTRL_INIT` on.
    state: Once<State<R>>,
    /// Where the frames lie; fixed when the first vCPU runs.
    layout: Once<Layout>,
    /// There is an ITS.
    has_its: AtomicBool,
    /// vCPUs whose redistributors have enabled LPIs, see [`Vgic::take_lpis_enabled`].
    lpis_enabled: AtomicVcpuSet,
}

/// What exists once the number of vCPUs and interrupts is known.
struct State<R: Lock> {
    cpus: Vec<Mutex<R, Cpu>>,
    /// Affinity of each vCPU, as in `GICD_IROUTER<n>`; the same order as `cpus`.
    affinities: Vec<u64>,
    dist: Dist<R>,
}

impl<R: Lock> Vgic<R> {
    /// An interrupt controller without interrupts, as `KVM_CREATE_DEVICE` leaves it.
    pub fn new(limits: Limits) -> Self {
        Vgic {
            limits,
            config: guarded(c"vgic.config", Config::new()),
            state: Once::new(),
            layout: Once::new(),
            has_its: AtomicBool::new(false),
            lpis_enabled: AtomicVcpuSet::new(),
        }
    }

    /// There will be LPIs. `false` if it is too late for that.
    pub fn add_its(&self) -> bool {
        let early = !self.is_initialised();
        if early {
            self.has_its.store(true, Ordering::SeqCst);
        }
        early
    }

    /// Bounds of the address space.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// vCPUs of the initialised GIC.
    pub fn vcpu_count(&self) -> usize {
        self.state.get().map_or(0, |state| state.cpus.len())
    }

    /// Whether `KVM_DEV_ARM_VGIC_CTRL_INIT` was done; from then on no vCPU can be added (`-EBUSY`).
    pub fn is_initialised(&self) -> bool {
        self.state.is_completed()
    }

    /// Moves the interrupts of `vcpu` into list registers for its next `REC_ENTER`.
    ///
    /// `nr_lrs` is the smaller of the RMM's `GICV3_NUM_LRS` and 16. Must be followed by [`Vgic::sync`] when
    /// the REC ran, or else, also when `REC_ENTER` failed, by [`Vgic::cancel`]. Call it with interrupts
    /// disabled, after the vCPU was marked as running: a change that comes later then sends a kick.
    pub fn flush(&self, vcpu: usize, nr_lrs: usize) -> LrImage {
        let Some(state) = self.state.get() else { return LrImage::EMPTY };
        let Some(cpu) = state.cpus.get(vcpu) else { return LrImage::EMPTY };
        let mut cpu = cpu.lock();
        list::flush(vcpu, &mut cpu, &state.dist, nr_lrs)
    }

    /// Takes back what the list registers hold after an exit of `vcpu`.
    pub fn sync(&self, vcpu: usize, exit: &ExitGic) -> SyncOutcome {
        let mut outcome = SyncOutcome::default();
        let Some(state) = self.state.get() else { return outcome };
        let Some(cpu) = state.cpus.get(vcpu) else { return outcome };
        let mut cpu = cpu.lock();
        list::sync(vcpu, &mut cpu, &state.dist, exit, &mut outcome);
        outcome
    }

    /// Undoes [`Vgic::flush`] when `vcpu` did not enter its REC.
    pub fn cancel(&self, vcpu: usize) -> VcpuSet {
        let mut outcome = SyncOutcome::default();
        let Some(state) = self.state.get() else { return outcome.kick };
        let Some(cpu) = state.cpus.get(vcpu) else { return outcome.kick };
        let mut cpu = cpu.lock();
        list::cancel(vcpu, &mut cpu, &state.dist, &mut outcome);
        outcome.kick
    }

    /// Whether an interrupt would be signalled to `vcpu` now, so that it must not sleep in WFI.
    ///
    /// Uses the priority mask and group enables that the last exit reported.
    pub fn has_pending(&self, vcpu: usize) -> bool {
        let Some(state) = self.state.get() else { return false };
        let Some(cpu) = state.cpus.get(vcpu) else { return false };
        let cpu = cpu.lock();
        list::has_pending(vcpu, &cpu, &state.dist)
    }

    /// Drives the line of a shared peripheral interrupt, `intid` from 32. For an edge-triggered interrupt
    /// every `true` is an edge. `None` if there is no such interrupt.
    pub fn set_spi(&self, intid: u32, level: bool) -> Option<VcpuSet> {
        let mut kick = VcpuSet::EMPTY;
        self.state.get()?.dist.set_line(intid, level, &mut kick)?;
        Some(kick)
    }

    /// Makes a shared peripheral interrupt pending once, whatever its trigger. `None` if there is no such interrupt.
    pub fn pulse_spi(&self, intid: u32) -> Option<VcpuSet> {
        let mut kick = VcpuSet::EMPTY;
        let intid = usize::try_from(intid).ok()?;
        let dist = &self.state.get()?.dist;
        if !dist.is_spi(intid) {
            return None;
        }
        dist.change(intid, &mut kick, irq::Irq::set_latch)?;
        Some(kick)
    }

    /// Drives the line of a private peripheral interrupt of `vcpu`, `intid` in 16..32. `None` if there is no
    /// such interrupt.
    pub fn set_ppi(&self, vcpu: usize, intid: u32, level: bool) -> Option<VcpuSet> {
        let mut kick = VcpuSet::EMPTY;
        let state = self.state.get()?;
        let mut cpu = state.cpus.get(vcpu)?.lock();
        if !(16..32).contains(&intid) {
            return None;
        }
        let irq = cpu.private.get_mut(usize::try_from(intid).ok()?)?;
        if irq.set_line(level) && irq.enabled {
            kick.insert(vcpu);
        }
        Some(kick)
    }
}
