//! List registers: which interrupts go in before an entry, and what comes back after the exit.
//!
//! When there are more interrupts than list registers, what stays outside must neither be lost nor wait
//! longer than it has to:
//!
//! * Interrupts that are pending outside have no precedence over those inside. At least one list register
//!   then holds a pending interrupt, and the condition "no pending" (NP) ends the run as soon as the last of
//!   them was taken.
//! * Active interrupts make room for pending ones, lowest priority first. When the guest ends one of them,
//!   the CPU interface finds no list register and counts (EOIcount); the condition LRENP ends the run.
//!   Priority drops come in the reverse order of acknowledgement, so the count says which ones ended. With
//!   a separate deactivation (EOImode 1) the order is free: then writes of ICC_DIR_EL1 are trapped.
//! * Interrupts of a group that the guest has disabled at its CPU interface come last. The condition "group
//!   enabled" (VGrp0E, VGrp1E) ends the run when that changes.

use crate::lock::Lock;

use super::cpu::{Cpu, NR_PRIVATE, Vmcr};
use super::dist::Dist;
use super::irq::{Held, Irq, Trigger};
use super::lpi;
use super::types::{ExitGic, LrImage, MAX_LRS, SyncOutcome};

const HCR_LRENPIE: u64 = 1 << 2;
const HCR_NPIE: u64 = 1 << 3;
const HCR_VGRP0EIE: u64 = 1 << 4;
const HCR_VGRP1EIE: u64 = 1 << 6;
const HCR_TDIR: u64 = 1 << 14;
/// What the host may set in `gicv3_hcr`.
const HCR_PERMITTED: u64 = 0x40fe;
const HCR_EOICOUNT_SHIFT: u32 = 27;
const HCR_EOICOUNT_MASK: u64 = 0x1f;

const LR_PENDING: u64 = 1 << 62;
const LR_ACTIVE: u64 = 1 << 63;
const LR_HW: u64 = 1 << 61;
const LR_GROUP1: u64 = 1 << 60;
const LR_PRIORITY_SHIFT: u32 = 48;
const LR_EOI: u64 = 1 << 41;
const LR_PINTID: u64 = 0x1fff << 32;
const LR_VINTID: u64 = 0xffff_ffff;

fn encode(intid: u16, irq: &Irq, held: Held) -> u64 {
    let bit = |set: bool, bit: u64| if set { bit } else { 0 };
    bit(held.pending, LR_PENDING)
        | bit(held.active, LR_ACTIVE)
        | bit(irq.group1, LR_GROUP1)
        | bit(held.notify, LR_EOI)
        | (u64::from(irq.priority()) << LR_PRIORITY_SHIFT)
        | u64::from(intid)
}

/// A candidate for a list register. Those with the smaller key go first.
#[derive(Clone, Copy, Default)]
struct Candidate {
    key: u32,
    intid: u16,
}

/// The best candidates of one kind, and how many there were.
#[derive(Default)]
struct Ranking {
    best: [Candidate; MAX_LRS],
    len: usize,
    total: usize,
}

impl Ranking {
    fn offer(&mut self, candidate: Candidate) {
        self.total += 1;
        let mut candidate = candidate;
        for place in self.best.iter_mut().take(self.len) {
            if candidate.key < place.key {
                core::mem::swap(place, &mut candidate);
            }
        }
        if let Some(place) = self.best.get_mut(self.len) {
            *place = candidate;
            self.len += 1;
        }
    }
}

/// Everything that could go into the list registers of one vCPU.
struct Ready {
    active: Ranking,
    pending: Ranking,
    /// Deliverable interrupts of group 0 and 1 whose group is disabled at the CPU interface.
    blocked: [bool; 2],
    /// Deliverable interrupts whose group is enabled there.
    open: usize,
}

impl Ready {
    fn collect<R: Lock>(vcpu: usize, cpu: &Cpu, dist: &Dist<R>) -> Ready {
        let mut ready =
            Ready { active: Ranking::default(), pending: Ranking::default(), blocked: [false; 2], open: 0 };
        let groups = dist.groups();
        for (intid, irq) in (0..).zip(&cpu.private) {
            ready.add(intid, irq, irq.offer(groups, true), cpu.cpu_interface);
        }
        dist.each_at(vcpu, |intid, irq, may_pend| {
            ready.add(intid, irq, irq.offer(groups, may_pend), cpu.cpu_interface);
            true
        });
        ready
    }

    fn add(&mut self, intid: u16, irq: &Irq, held: Held, cpu_interface: Vmcr) {
        if held.is_empty() {
            return;
        }
        if held.active {
            let key = u32::from(irq.active_priority()) << 16 | u32::from(intid);
            self.active.offer(Candidate { key, intid });
            return;
        }
        let open = cpu_interface.enabled.allow(irq);
        if open {
            self.open += 1;
        } else {
            self.blocked[usize::from(irq.group1)] = true;
        }
        let key = u32::from(!open) << 24 | u32::from(irq.priority()) << 16 | u32::from(intid);
        self.pending.offer(Candidate { key, intid });
    }
}

/// Fills the list registers for an entry of `vcpu`.
pub(super) fn flush<R: Lock>(vcpu: usize, cpu: &mut Cpu, dist: &Dist<R>, nr_lrs: usize) -> LrImage {
    // Nothing is lost if the caller has left out the counterpart of the last flush.
    cancel(vcpu, cpu, dist, &mut SyncOutcome::default());

    let nr_lrs = nr_lrs.min(MAX_LRS);
    let mut image = LrImage::EMPTY;
    if nr_lrs == 0 {
        return image;
    }
    let ready = Ready::collect(vcpu, cpu, dist);
    let reserved = ready.pending.total.min(1);
    let active = ready.active.total.min(nr_lrs - reserved);
    let pending = ready.pending.total.min(nr_lrs - active);

    let chosen = ready.active.best.iter().take(active).chain(ready.pending.best.iter().take(pending));
    let groups = dist.groups();
    let mut loaded = 0;
    for candidate in chosen {
        let intid = candidate.intid;
        // Since it was chosen, a shared one may have changed, or gone elsewhere. Whoever did it has sent a kick.
        let lend = |irq: &mut Irq, may_pend: bool| {
            let held = irq.offer(groups, may_pend);
            if held.is_empty() {
                return None;
            }
            let lr = encode(intid, irq, held);
            irq.lend(held);
            Some(lr)
        };
        let lr = match cpu.private.get_mut(usize::from(intid)) {
            Some(irq) => lend(irq, true),
            None => dist.lend(usize::from(intid), vcpu, lend),
        };
        if let (Some(lr), Some(place), Some(number)) =
            (lr, image.lrs.get_mut(loaded), cpu.loaded.get_mut(loaded))
        {
            (*place, *number) = (lr, intid);
            loaded += 1;
        }
    }
    cpu.nr_loaded = loaded;

    if ready.active.total > active {
        image.hcr |= HCR_LRENPIE;
        if cpu.cpu_interface.split_eoi {
            image.hcr |= HCR_TDIR;
        }
    }
    if ready.pending.total > pending {
        if ready.open > pending {
            image.hcr |= HCR_NPIE;
        }
        // Blocked ones come last, so some are outside if any exist.
        let [group0, group1] = ready.blocked;
        if group0 {
            image.hcr |= HCR_VGRP0EIE;
        }
        if group1 {
            image.hcr |= HCR_VGRP1EIE;
        }
    }
    debug_assert_eq!(image.validate(nr_lrs), Ok(()));
    image
}

/// Takes back what an entry of `vcpu` has left in the list registers.
pub(super) fn sync<R: Lock>(
    vcpu: usize,
    cpu: &mut Cpu,
    dist: &Dist<R>,
    exit: &ExitGic,
    outcome: &mut SyncOutcome,
) {
    cpu.cpu_interface = Vmcr::from_bits(exit.vmcr);
    // First those outside, which are told from the others by having no list register.
    for _ in 0..(exit.hcr >> HCR_EOICOUNT_SHIFT) & HCR_EOICOUNT_MASK {
        if !end_outermost(vcpu, cpu, dist, outcome) {
            break;
        }
    }
    for (lr, intid) in exit.lrs.into_iter().zip(cpu.loaded).take(cpu.nr_loaded) {
        // An LPI has no active state.
        let (pending, active) =
            (lr & LR_PENDING != 0, lr & LR_ACTIVE != 0 && usize::from(intid) < lpi::FIRST);
        let occupied = pending || active;
        if occupied && lr & LR_VINTID != u64::from(intid) {
            // Not what we put there. Whatever happened, the interrupt is not lost.
            change(cpu, dist, intid, outcome, Irq::take_back_untouched);
            continue;
        }
        let mut ended = false;
        let mut level = false;
        change(cpu, dist, intid, outcome, |irq| {
            level = irq.trigger == Trigger::Level;
            ended = irq.take_back(pending, active);
        });
        if ended && level && usize::from(intid) >= NR_PRIVATE {
            outcome.ended.push(intid);
        }
    }
    cpu.nr_loaded = 0;
    outcome.kick.remove(vcpu);
}

/// Takes back what was put into the list registers for an entry that did not happen.
pub(super) fn cancel<R: Lock>(vcpu: usize, cpu: &mut Cpu, dist: &Dist<R>, outcome: &mut SyncOutcome) {
    let loaded = cpu.loaded;
    for intid in loaded.into_iter().take(cpu.nr_loaded) {
        change(cpu, dist, intid, outcome, Irq::take_back_untouched);
    }
    cpu.nr_loaded = 0;
    outcome.kick.remove(vcpu);
}

/// Whether an interrupt would be signalled to `vcpu`.
pub(super) fn has_pending<R: Lock>(vcpu: usize, cpu: &Cpu, dist: &Dist<R>) -> bool {
    let groups = dist.groups();
    let signalled = |irq: &Irq| {
        irq.is_deliverable(groups)
            && !irq.is_active()
            && cpu.cpu_interface.enabled.allow(irq)
            && irq.priority() < cpu.cpu_interface.priority_mask
    };
    let mut found = cpu.private.iter().any(signalled);
    if !found {
        dist.each_at(vcpu, |_, irq, may_pend| {
            found = may_pend && signalled(irq);
            !found
        });
    }
    found
}

fn change<R: Lock>(
    cpu: &mut Cpu,
    dist: &Dist<R>,
    intid: u16,
    outcome: &mut SyncOutcome,
    change: impl FnOnce(&mut Irq),
) {
    match cpu.private.get_mut(usize::from(intid)) {
        Some(irq) => change(irq),
        None => drop(dist.change(usize::from(intid), &mut outcome.kick, change)),
    }
}

/// Ends the active interrupt without a list register that the guest must have acknowledged last.
fn end_outermost<R: Lock>(vcpu: usize, cpu: &mut Cpu, dist: &Dist<R>, outcome: &mut SyncOutcome) -> bool {
    let mut outermost: Option<(u8, u16, Trigger)> = None;
    let mut look = |intid: u16, irq: &Irq| {
        let key = (irq.active_priority(), intid);
        let better = outermost.is_none_or(|(priority, other, _)| key < (priority, other));
        if irq.is_active() && !irq.is_loaned() && better {
            outermost = Some((key.0, intid, irq.trigger));
        }
    };
    (0..).zip(&cpu.private).for_each(|(intid, irq)| look(intid, irq));
    dist.each_at(vcpu, |intid, irq, _| {
        look(intid, irq);
        true
    });
    let Some((_, intid, trigger)) = outermost else { return false };
    change(cpu, dist, intid, outcome, Irq::clear_active);
    if trigger == Trigger::Level && usize::from(intid) >= NR_PRIVATE {
        outcome.ended.push(intid);
    }
    true
}

/// What the RMM would refuse in an [`LrImage`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LrFault {
    /// `gicv3_hcr` has a bit that is not the host's to set.
    Hcr,
    /// This list register has HW set.
    Hw(usize),
    /// This list register has a priority bit that is not implemented.
    Priority(usize),
    /// This list register's pINTID has more than the EOI bit.
    Pintid(usize),
    /// This list register's vINTID is not that of an SGI, PPI, SPI or LPI.
    Vintid(usize),
    /// This list register has the vINTID of an earlier one.
    Duplicate(usize),
    /// This list register is not implemented, and not zero.
    Unimplemented(usize),
}

impl LrImage {
    /// Checks the image by the RMM's rules for `rec_enter`: `RMI_ERROR_REC` does not say what was wrong.
    pub fn validate(&self, nr_lrs: usize) -> Result<(), LrFault> {
        if self.hcr & !HCR_PERMITTED != 0 {
            return Err(LrFault::Hcr);
        }
        for (i, lr) in self.lrs.into_iter().enumerate() {
            if i >= nr_lrs {
                if lr != 0 {
                    return Err(LrFault::Unimplemented(i));
                }
                continue;
            }
            if lr & (LR_PENDING | LR_ACTIVE) == 0 {
                continue;
            }
            let vintid = lr & LR_VINTID;
            if lr & LR_HW != 0 {
                return Err(LrFault::Hw(i));
            }
            if lr & (0x7 << LR_PRIORITY_SHIFT) != 0 {
                return Err(LrFault::Priority(i));
            }
            if lr & LR_PINTID & !LR_EOI != 0 {
                return Err(LrFault::Pintid(i));
            }
            let is_lpi = (0x2000..1 << lpi::INTID_BITS).contains(&vintid);
            if vintid >= 1020 && !is_lpi {
                return Err(LrFault::Vintid(i));
            }
            let occupied = |other: &&u64| **other & (LR_PENDING | LR_ACTIVE) != 0;
            if self.lrs.iter().take(i).filter(occupied).any(|other| other & LR_VINTID == vintid) {
                return Err(LrFault::Duplicate(i));
            }
        }
        Ok(())
    }
}
