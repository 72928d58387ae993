//! The distributor: shared peripheral interrupts, their routing, and the group enables.

use alloc::vec::Vec;

use super::cpu::NR_PRIVATE;
use super::irq::{Groups, Irq, Trigger};
use super::lpi::{self, Lpis};
use super::mmio::{Bank, BankReg, IIDR, PIDR2, PIDR2_OFFSET, part, replace_part};
use super::types::{Bits, VcpuSet};

/// INTIDs from here on are special or reserved.
const SPI_END: usize = 1020;
const WORDS: usize = 1024 / 64;

/// `GICD_IROUTER<n>`: any participating vCPU may take the interrupt.
const ROUTE_ANY: u64 = 1 << 31;
/// The affinity fields of `GICD_IROUTER<n>` and MPIDR.
pub(super) const AFFINITY_MASK: u64 = 0xff_00ff_ffff;

/// One SPI.
pub(super) struct Spi {
    pub(super) irq: Irq,
    route: u64,
    /// The vCPU that `route` leads to.
    target: Option<u16>,
    /// The vCPU at which it is active, or whose list registers have it.
    owner: Option<u16>,
}

pub(super) struct Dist {
    pub(super) groups: Groups,
    nr_irqs: usize,
    spis: Vec<Spi>,
    affinities: Vec<u64>,
    /// SPIs that a vCPU has to look at, by INTID: pending, active, or in a list register.
    busy: [u64; WORDS],
    /// vCPUs whose redistributor is asleep; they take no part in 1-of-N distribution.
    asleep: VcpuSet,
    pub(super) lpis: Lpis,
}

impl Dist {
    /// `nr_irqs` INTIDs, the private ones included; affinities are those of the vCPUs.
    pub(super) fn new(nr_irqs: usize, affinities: Vec<u64>, lpis: bool) -> Dist {
        let nr_spis = nr_irqs.min(SPI_END).saturating_sub(NR_PRIVATE);
        let mut dist = Dist {
            groups: Groups::default(),
            nr_irqs,
            spis: Vec::with_capacity(nr_spis),
            affinities,
            busy: [0; WORDS],
            asleep: VcpuSet::EMPTY,
            lpis: Lpis::new(lpis),
        };
        for intid in NR_PRIVATE..NR_PRIVATE + nr_spis {
            let irq = Irq::new(Trigger::Level);
            let target = dist.resolve(intid, 0);
            dist.spis.push(Spi { irq, route: 0, target, owner: None });
        }
        dist
    }

    pub(super) fn spi(&self, intid: usize) -> Option<&Spi> {
        self.spis.get(intid.checked_sub(NR_PRIVATE)?)
    }

    fn spi_mut(&mut self, intid: usize) -> Option<&mut Spi> {
        self.spis.get_mut(intid.checked_sub(NR_PRIVATE)?)
    }

    /// The SPIs and LPIs that concern `vcpu`, and whether each may become pending there.
    pub(super) fn busy_at(&self, vcpu: usize) -> impl Iterator<Item = (u16, &Irq, bool)> + '_ {
        let intids =
            self.busy.iter().enumerate().flat_map(|(i, &word)| Bits::new(word).map(move |bit| i * 64 + bit));
        let spis = intids.filter_map(move |intid| {
            let spi = self.spi(intid)?;
            let targeted = spi.target.is_some_and(|target| usize::from(target) == vcpu);
            let here = spi.owner.map_or(targeted, |owner| usize::from(owner) == vcpu);
            if here {
                Some((u16::try_from(intid).ok()?, &spi.irq, targeted || !spi.irq.is_active()))
            } else {
                None
            }
        });
        spis.chain(self.lpis.busy_at(vcpu))
    }

    /// Changes an SPI or LPI, and says who has to look at it.
    pub(super) fn change(&mut self, intid: usize, kick: &mut VcpuSet, change: impl FnOnce(&mut Irq)) {
        let groups = self.groups;
        if intid >= lpi::FIRST {
            self.lpis.change(intid, groups, kick, change);
            return;
        }
        let Some(spi) = self.spi_mut(intid) else { return };
        change(&mut spi.irq);
        let loaned = spi.irq.is_loaned();
        if spi.irq.is_active() {
            spi.owner = spi.owner.or(spi.target);
        } else if !loaned {
            spi.owner = None;
        }
        if loaned || spi.irq.is_deliverable(groups) {
            if let Some(vcpu) = spi.owner.or(spi.target) {
                kick.insert(usize::from(vcpu));
            }
        }
        let busy = loaned || spi.irq.is_pending() || spi.irq.is_active();
        if let Some(word) = self.busy.get_mut(intid / 64) {
            let bit = 1 << (intid % 64);
            *word = if busy { *word | bit } else { *word & !bit };
        }
    }

    /// Hands an SPI or LPI to a list register of `vcpu`.
    pub(super) fn lend(&mut self, intid: usize, vcpu: usize, lend: impl FnOnce(&mut Irq)) {
        if intid >= lpi::FIRST {
            self.lpis.lend(intid, vcpu, lend);
            return;
        }
        if let Some(spi) = self.spi_mut(intid) {
            lend(&mut spi.irq);
            spi.owner = u16::try_from(vcpu).ok();
        }
    }

    /// Drives the line of an SPI. `None` if there is no such interrupt.
    pub(super) fn set_line(&mut self, intid: u32, level: bool, kick: &mut VcpuSet) -> Option<()> {
        let intid = usize::try_from(intid).ok()?;
        self.spi(intid)?;
        let mut concerned = VcpuSet::EMPTY;
        let mut look = false;
        self.change(intid, &mut concerned, |irq| look = irq.set_line(level));
        if look {
            kick.extend(&concerned);
        }
        Some(())
    }

    /// The redistributor of `vcpu` went to sleep or woke up.
    pub(super) fn set_asleep(&mut self, vcpu: usize, asleep: bool, kick: &mut VcpuSet) {
        if asleep == self.asleep.contains(vcpu) {
            return;
        }
        if asleep {
            self.asleep.insert(vcpu);
        } else {
            self.asleep.remove(vcpu);
        }
        for intid in NR_PRIVATE..NR_PRIVATE + self.spis.len() {
            if self.spi(intid).is_some_and(|spi| spi.route & ROUTE_ANY != 0) {
                self.retarget(intid, kick);
            }
        }
    }

    fn retarget(&mut self, intid: usize, kick: &mut VcpuSet) {
        let Some(route) = self.spi(intid).map(|spi| spi.route) else { return };
        let target = self.resolve(intid, route);
        if let Some(spi) = self.spi_mut(intid) {
            spi.target = target;
        }
        if self.busy.get(intid / 64).is_some_and(|word| word & (1 << (intid % 64)) != 0) {
            self.change(intid, kick, |_| ());
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
        let (bits, lpis) = if self.lpis.exist() { (lpi::INTID_BITS, 1) } else { (10, 0) };
        it_lines | lpis << 17 | u64::from(bits - 1) << 19 | (u64::from(aff3) << 24)
    }

    fn ctlr(&self) -> u64 {
        // One security state (DS) and affinity routing (ARE), both fixed; RWP never set, since a write is
        // in effect when the vCPUs it returns were kicked.
        u64::from(self.groups.group0) | (u64::from(self.groups.group1) << 1) | (1 << 4) | (1 << 6)
    }

    fn set_ctlr(&mut self, value: u64, kick: &mut VcpuSet) {
        let groups = Groups { group0: value & 1 != 0, group1: value & (1 << 1) != 0 };
        if groups != self.groups {
            self.groups = groups;
            kick.extend(&VcpuSet::first(self.affinities.len()));
        }
    }

    /// Reads `len` bytes at `offset` of the distributor's frame.
    pub(super) fn read(&self, offset: u64, len: usize) -> u64 {
        if let Some(reg) = BankReg::decode(offset, len) {
            return reg.read(self);
        }
        match (offset, len) {
            (0x0000, 4) => self.ctlr(),
            (0x0004, 4) => self.typer(),
            (0x0008, 4) => IIDR,
            (0x6100..0x8000, 4 | 8) => {
                router(offset).and_then(|n| self.spi(n)).map_or(0, |spi| part(spi.route, offset, len))
            }
            (PIDR2_OFFSET, 4) => PIDR2,
            // GICD_TYPER2, STATUSR, the GICv2 registers, and whatever is reserved.
            _ => 0,
        }
    }

    /// Writes `len` bytes at `offset` of the distributor's frame.
    pub(super) fn write(&mut self, offset: u64, len: usize, value: u64, kick: &mut VcpuSet) {
        if let Some(reg) = BankReg::decode(offset, len) {
            reg.write(self, value, kick);
            return;
        }
        match (offset, len) {
            (0x0000, 4) => self.set_ctlr(value, kick),
            (0x6100..0x8000, 4 | 8) => {
                let Some(intid) = router(offset) else { return };
                let Some(spi) = self.spi_mut(intid) else { return };
                spi.route = replace_part(spi.route, offset, len, value) & (AFFINITY_MASK | ROUTE_ANY);
                self.retarget(intid, kick);
            }
            _ => (),
        }
    }
}

fn router(offset: u64) -> Option<usize> {
    usize::try_from(offset.checked_sub(0x6000)? / 8).ok()
}

// With affinity routing, SGIs and PPIs are the redistributors' alone: here they read as zero.
impl Bank for Dist {
    fn irq(&self, intid: usize) -> Option<&Irq> {
        self.spi(intid).map(|spi| &spi.irq)
    }

    fn change(&mut self, intid: usize, kick: &mut VcpuSet, change: impl FnOnce(&mut Irq)) {
        Dist::change(self, intid, kick, change);
    }
}
