//! The distributor: shared peripheral interrupts, where they are routed, and the registers for them. And the state that
//! LPIs share with it.

use crate::lock::Lock;
use crate::sync::{AtomicU8, AtomicU64, Ordering::SeqCst};
use alloc::vec::Vec;

use super::cpu::NR_PRIVATE;
use super::irq::{Groups, Irq, Trigger};
use super::lpi;
use super::mmio::{Bank, BankReg, IIDR, PIDR2, PIDR2_OFFSET, part, replace_part};
use super::shared::{Attention, Shared, Table};
use super::types::{AtomicVcpuSet, VcpuSet};

/// INTIDs from here on are special or reserved.
const SPI_END: usize = 1020;

/// `GICD_IROUTER<n>`: any participating vCPU may take the interrupt.
const ROUTE_ANY: u64 = 1 << 31;
/// The affinity fields of `GICD_IROUTER<n>` and MPIDR.
pub(super) const AFFINITY_MASK: u64 = 0xff_00ff_ffff;

pub(super) struct Dist<R: Lock> {
    /// `GICD_CTLR`: bit 0 group 0, bit 1 group 1.
    groups: AtomicU8,
    nr_irqs: usize,
    table: Table<R>,
    affinities: Vec<u64>,
    /// By vCPU.
    attention: Vec<Attention>,
    /// vCPUs whose redistributor is asleep; they take no part in 1-of-N distribution.
    asleep: AtomicVcpuSet,
    /// There are LPIs.
    pub(super) has_lpis: bool,
    /// vCPUs with `GICR_CTLR.EnableLPIs`.
    pub(super) lpis_enabled_at: AtomicVcpuSet,
    /// `GICR_PROPBASER`, which all redistributors share.
    pub(super) propbaser: AtomicU64,
}

impl<R: Lock> Dist<R> {
    /// `nr_irqs` INTIDs, the private ones included; affinities are those of the vCPUs.
    pub(super) fn new(nr_irqs: usize, affinities: Vec<u64>, has_lpis: bool) -> Dist<R> {
        let end = if has_lpis { lpi::END } else { 1024 };
        let attention = affinities.iter().map(|_| Attention::new(end)).collect();
        let dist = Dist {
            groups: AtomicU8::new(0),
            nr_irqs: nr_irqs.min(SPI_END.next_multiple_of(32)),
            table: Table::new(end),
            affinities,
            attention,
            asleep: AtomicVcpuSet::new(),
            has_lpis,
            lpis_enabled_at: AtomicVcpuSet::new(),
            propbaser: AtomicU64::new(0),
        };
        for intid in dist.spis() {
            dist.table.prepare(intid, Trigger::Level);
            let target = dist.resolve(intid, 0);
            if let Some(spi) = dist.table.get(intid) {
                spi.lock().target = target;
            }
        }
        dist
    }

    fn spis(&self) -> core::ops::Range<usize> {
        NR_PRIVATE..self.nr_irqs.min(SPI_END)
    }

    pub(super) fn is_spi(&self, intid: usize) -> bool {
        self.spis().contains(&intid)
    }

    /// Makes room for an LPI. Process context.
    pub(super) fn prepare_lpi(&self, intid: usize) -> bool {
        self.has_lpis && intid >= lpi::FIRST && self.table.prepare(intid, Trigger::Edge)
    }

    pub(super) fn groups(&self) -> Groups {
        let bits = self.groups.load(SeqCst);
        Groups { group0: bits & 1 != 0, group1: bits & 2 != 0 }
    }

    /// Looks at an SPI or LPI under its lock.
    pub(super) fn with<T>(&self, intid: usize, look: impl FnOnce(&mut Shared) -> T) -> Option<T> {
        let exists = self.is_spi(intid) || intid >= lpi::FIRST;
        let shared = exists.then(|| self.table.get(intid)).flatten()?;
        let mut shared = shared.lock();
        Some(look(&mut shared))
    }

    fn may_pend(&self, vcpu: usize, intid: usize, shared: &Shared) -> bool {
        let targeted = shared.target.is_some_and(|target| usize::from(target) == vcpu);
        if intid >= lpi::FIRST {
            return self.lpis_enabled_at.contains(vcpu) && targeted;
        }
        targeted || !shared.irq.is_active()
    }

    /// Looks at the SPIs and LPIs that concern `vcpu`, and whether each may become pending there, as long as `look` says
    /// so.
    pub(super) fn each_at(&self, vcpu: usize, mut look: impl FnMut(u16, &Irq, bool) -> bool) {
        let Some(attention) = self.attention.get(vcpu) else { return };
        for intid in attention.iter() {
            let go_on = self.with(intid, |shared| {
                if !shared.is_busy() || shared.place() != Some(vcpu) {
                    attention.clear(intid);
                    return true;
                }
                let may_pend = self.may_pend(vcpu, intid, shared);
                u16::try_from(intid).map_or(true, |n| look(n, &shared.irq, may_pend))
            });
            if go_on == Some(false) {
                break;
            }
        }
    }

    /// Changes an SPI or LPI, and says who has to look at it.
    pub(super) fn change<T>(
        &self,
        intid: usize,
        kick: &mut VcpuSet,
        change: impl FnOnce(&mut Irq) -> T,
    ) -> Option<T> {
        self.with(intid, |shared| {
            let result = change(&mut shared.irq);
            self.changed(intid, shared, kick);
            result
        })
    }

    fn changed(&self, intid: usize, shared: &mut Shared, kick: &mut VcpuSet) {
        let loaned = shared.irq.is_loaned();
        if shared.irq.is_active() {
            shared.owner = shared.owner.or(shared.target);
        } else if !loaned {
            shared.owner = None;
        }
        let Some(vcpu) = shared.place() else { return };
        if shared.is_busy() {
            if let Some(attention) = self.attention.get(vcpu) {
                attention.set(intid);
            }
        }
        let enabled = intid < lpi::FIRST || self.lpis_enabled_at.contains(vcpu);
        if loaned || (enabled && shared.irq.is_deliverable(self.groups())) {
            kick.insert(vcpu);
        }
    }

    /// Hands an SPI or LPI to a list register of `vcpu`, if it is still one for it. Others may have changed it since it
    /// was looked at; then they have sent a kick.
    pub(super) fn lend<T>(
        &self,
        intid: usize,
        vcpu: usize,
        lend: impl FnOnce(&mut Irq, bool) -> Option<T>,
    ) -> Option<T> {
        self.with(intid, |shared| {
            if shared.place() != Some(vcpu) || shared.irq.is_loaned() {
                return None;
            }
            let may_pend = self.may_pend(vcpu, intid, shared);
            let lent = lend(&mut shared.irq, may_pend)?;
            shared.owner = u16::try_from(vcpu).ok();
            Some(lent)
        })?
    }

    /// Sends an LPI to another vCPU, or to nobody.
    pub(super) fn set_target(&self, intid: usize, target: Option<usize>, kick: &mut VcpuSet) {
        self.with(intid, |shared| {
            let target = target.and_then(|vcpu| u16::try_from(vcpu).ok());
            if shared.target != target {
                shared.target = target;
                self.changed(intid, shared, kick);
            }
        });
    }

    /// Drives the line of an SPI. `None` if there is no such interrupt.
    pub(super) fn set_line(&self, intid: u32, level: bool, kick: &mut VcpuSet) -> Option<()> {
        let intid = usize::try_from(intid).ok().filter(|&intid| self.is_spi(intid))?;
        let mut concerned = VcpuSet::EMPTY;
        if self.change(intid, &mut concerned, |irq| irq.set_line(level))? {
            kick.extend(&concerned);
        }
        Some(())
    }

    /// The redistributor of `vcpu` went to sleep or woke up. Not under the vCPU's lock: it takes its time.
    pub(super) fn set_asleep(&self, vcpu: usize, asleep: bool, kick: &mut VcpuSet) {
        self.asleep.set(vcpu, asleep);
        for intid in self.spis() {
            self.with(intid, |spi| {
                if spi.route & ROUTE_ANY != 0 {
                    self.retarget(intid, spi, kick);
                }
            });
        }
    }

    fn retarget(&self, intid: usize, spi: &mut Shared, kick: &mut VcpuSet) {
        spi.target = self.resolve(intid, spi.route);
        if spi.is_busy() {
            self.changed(intid, spi, kick);
        }
    }

    fn resolve(&self, intid: usize, route: u64) -> Option<u16> {
        let vcpu = if route & ROUTE_ANY != 0 {
            // Spread by INTID: no state, and each interrupt stays where its data is warm.
            let n = self.affinities.len();
            let first = intid.checked_rem(n)?;
            (0..n).map(|i| (first + i) % n).find(|&vcpu| !self.asleep.contains(vcpu)).unwrap_or(first)
        } else {
            self.affinities.iter().position(|&affinity| affinity == route & AFFINITY_MASK)?
        };
        u16::try_from(vcpu).ok()
    }

    fn typer(&self) -> u64 {
        let it_lines = u64::try_from((self.nr_irqs / 32).saturating_sub(1)).unwrap_or(0);
        let aff3 = self.affinities.iter().any(|affinity| affinity >> 32 != 0);
        // Bits of an INTID; LPIs (LPIS); no message-based SPIs (MBIS).
        let (bits, lpis) = if self.has_lpis { (lpi::INTID_BITS, 1) } else { (10, 0) };
        it_lines | lpis << 17 | u64::from(bits - 1) << 19 | (u64::from(aff3) << 24)
    }

    fn ctlr(&self) -> u64 {
        // One security state (DS) and affinity routing (ARE), both fixed; RWP never set, since a write is
        // in effect when the vCPUs it returns were kicked.
        u64::from(self.groups.load(SeqCst)) | (1 << 4) | (1 << 6)
    }

    fn set_ctlr(&self, value: u64, kick: &mut VcpuSet) {
        let [bits, ..] = (value & 0b11).to_le_bytes();
        if self.groups.swap(bits, SeqCst) != bits {
            kick.extend(&VcpuSet::first(self.affinities.len()));
        }
    }

    /// Reads `len` bytes at `offset` of the distributor's frame.
    pub(super) fn read(&self, offset: u64, len: usize) -> u64 {
        if let Some(reg) = BankReg::decode(offset, len) {
            return reg.read(&self);
        }
        match (offset, len) {
            (0x0000, 4) => self.ctlr(),
            (0x0004, 4) => self.typer(),
            (0x0008, 4) => IIDR,
            (0x6100..0x8000, 4 | 8) => router(offset)
                .filter(|&intid| self.is_spi(intid))
                .and_then(|intid| self.with(intid, |spi| part(spi.route, offset, len)))
                .unwrap_or(0),
            (PIDR2_OFFSET, 4) => PIDR2,
            // GICD_TYPER2, STATUSR, the GICv2 registers, and whatever is reserved.
            _ => 0,
        }
    }

    /// Writes `len` bytes at `offset` of the distributor's frame.
    pub(super) fn write(&self, offset: u64, len: usize, value: u64, kick: &mut VcpuSet) {
        if let Some(reg) = BankReg::decode(offset, len) {
            reg.write(&mut &*self, value, kick);
            return;
        }
        match (offset, len) {
            (0x0000, 4) => self.set_ctlr(value, kick),
            (0x6100..0x8000, 4 | 8) => {
                let Some(intid) = router(offset).filter(|&intid| self.is_spi(intid)) else { return };
                self.with(intid, |spi| {
                    spi.route = replace_part(spi.route, offset, len, value) & (AFFINITY_MASK | ROUTE_ANY);
                    self.retarget(intid, spi, kick);
                });
            }
            _ => (),
        }
    }
}

fn router(offset: u64) -> Option<usize> {
    usize::try_from(offset.checked_sub(0x6000)? / 8).ok()
}

// With affinity routing, SGIs and PPIs are the redistributors' alone: here they read as zero.
impl<R: Lock> Bank for &Dist<R> {
    fn irq(&self, intid: usize) -> Option<Irq> {
        if self.is_spi(intid) { self.with(intid, |spi| spi.irq) } else { None }
    }

    fn change(&mut self, intid: usize, kick: &mut VcpuSet, change: impl FnOnce(&mut Irq)) {
        if self.is_spi(intid) {
            Dist::change(self, intid, kick, change);
        }
    }
}
