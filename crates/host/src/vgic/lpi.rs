//! LPIs: interrupts without lines and without an active state, that an ITS makes pending. Configuration lies in the
//! guest's memory and is copied here when the guest says so (`INV`, `INVALL`).

use alloc::boxed::Box;
use alloc::vec::Vec;

use lock_api::RawMutex;

use super::Vgic;
use super::irq::{Groups, Irq, Trigger};
use super::types::{Bits, VcpuSet};

/// The first LPI.
pub(super) const FIRST: usize = 8192;
/// INTIDs have so many bits if there are LPIs.
pub(super) const INTID_BITS: u32 = 16;
const END: usize = 1 << INTID_BITS;
const CHUNK: usize = 64;
const CHUNKS: usize = (END - FIRST) / CHUNK;
const WORDS: usize = CHUNKS.div_ceil(64);

/// LPI configuration: bit 0 enables, the priority is in bits 7:2.
const CONFIG_ENABLE: u8 = 1;
const CONFIG_PRIORITY: u8 = 0xFC;

struct Lpi {
    irq: Irq,
    /// The vCPU that it is routed to; `None` while nothing maps it.
    target: Option<u16>,
    /// The vCPU whose list registers have it.
    owner: Option<u16>,
}

/// 64 LPIs: allocated when the first of them is mapped.
pub(super) struct Chunk {
    lpis: [Lpi; CHUNK],
    busy: u64,
}

impl Chunk {
    fn new() -> Chunk {
        let lpi = |_| {
            let mut irq = Irq::new(Trigger::Edge);
            irq.group1 = true;
            Lpi { irq, target: None, owner: None }
        };
        Chunk { lpis: core::array::from_fn(lpi), busy: 0 }
    }
}

/// All LPIs of a VM. Empty, and then without cost, if it has no ITS.
pub(super) struct Lpis {
    chunks: Vec<Option<Box<Chunk>>>,
    busy: [u64; WORDS],
    /// vCPUs with `GICR_CTLR.EnableLPIs`.
    pub(super) enabled_at: VcpuSet,
    /// `GICR_PROPBASER`, which all redistributors share.
    pub(super) propbaser: u64,
}

impl Lpis {
    pub(super) fn new(exist: bool) -> Lpis {
        let mut chunks = Vec::new();
        if exist {
            chunks.resize_with(CHUNKS, || None);
        }
        Lpis { chunks, busy: [0; WORDS], enabled_at: VcpuSet::EMPTY, propbaser: 0 }
    }

    pub(super) fn exist(&self) -> bool {
        !self.chunks.is_empty()
    }

    fn place(intid: usize) -> Option<(usize, usize)> {
        let n = intid.checked_sub(FIRST)?;
        Some((n / CHUNK, n % CHUNK))
    }

    fn get(&self, intid: usize) -> Option<&Lpi> {
        let (chunk, at) = Self::place(intid)?;
        self.chunks.get(chunk)?.as_ref()?.lpis.get(at)
    }

    /// The LPIs that concern `vcpu`, and whether each may become pending there.
    pub(super) fn busy_at(&self, vcpu: usize) -> impl Iterator<Item = (u16, &Irq, bool)> + '_ {
        let enabled = self.enabled_at.contains(vcpu);
        let chunks =
            self.busy.iter().enumerate().flat_map(|(i, &word)| Bits::new(word).map(move |bit| i * 64 + bit));
        chunks
            .filter_map(|number| Some((number, self.chunks.get(number)?.as_ref()?)))
            .flat_map(|(number, chunk)| Bits::new(chunk.busy).map(move |bit| (number * CHUNK + bit, chunk)))
            .filter_map(move |(n, chunk)| {
                let lpi = chunk.lpis.get(n % CHUNK)?;
                let at = lpi.owner.or(lpi.target).map(usize::from);
                (at == Some(vcpu)).then_some((u16::try_from(FIRST + n).ok()?, &lpi.irq, enabled))
            })
    }

    /// Changes an LPI, and says who has to look at it.
    pub(super) fn change(
        &mut self,
        intid: usize,
        groups: Groups,
        kick: &mut VcpuSet,
        change: impl FnOnce(&mut Irq),
    ) {
        let Some((number, at)) = Self::place(intid) else { return };
        let Some(Some(chunk)) = self.chunks.get_mut(number) else { return };
        let Some(lpi) = chunk.lpis.get_mut(at) else { return };
        change(&mut lpi.irq);
        let loaned = lpi.irq.is_loaned();
        if !loaned {
            lpi.owner = None;
        }
        if let Some(vcpu) = lpi.owner.or(lpi.target).map(usize::from) {
            if loaned || (lpi.irq.is_deliverable(groups) && self.enabled_at.contains(vcpu)) {
                kick.insert(vcpu);
            }
        }
        let bit = 1 << at;
        chunk.busy = if loaned || lpi.irq.is_pending() { chunk.busy | bit } else { chunk.busy & !bit };
        if let Some(word) = self.busy.get_mut(number / 64) {
            let bit = 1 << (number % 64);
            *word = if chunk.busy == 0 { *word & !bit } else { *word | bit };
        }
    }

    /// Hands an LPI to a list register of `vcpu`.
    pub(super) fn lend(&mut self, intid: usize, vcpu: usize, lend: impl FnOnce(&mut Irq)) {
        let Some((number, at)) = Self::place(intid) else { return };
        let Some(Some(chunk)) = self.chunks.get_mut(number) else { return };
        if let Some(lpi) = chunk.lpis.get_mut(at) {
            lend(&mut lpi.irq);
            lpi.owner = u16::try_from(vcpu).ok();
        }
    }

    fn set_target(&mut self, intid: usize, target: Option<usize>, groups: Groups, kick: &mut VcpuSet) {
        let Some((number, at)) = Self::place(intid) else { return };
        if let Some(Some(chunk)) = self.chunks.get_mut(number) {
            if let Some(lpi) = chunk.lpis.get_mut(at) {
                lpi.target = target.and_then(|vcpu| u16::try_from(vcpu).ok());
            }
        }
        self.change(intid, groups, kick, |_| ());
    }
}

/// What an ITS does to LPIs. Any context but [`Vgic::lpi_prepare`], which allocates.
impl<R: RawMutex> Vgic<R> {
    /// Makes room for the state of `intid`. `false` if it is no LPI, or there are none.
    pub fn lpi_prepare(&self, intid: u32) -> bool {
        let Some(state) = self.state.get() else { return false };
        let place = usize::try_from(intid).ok().and_then(Lpis::place);
        let Some((number, _)) = place else { return false };
        match state.dist.lock().lpis.chunks.get(number) {
            None => return false,
            Some(Some(_)) => return true,
            Some(None) => {}
        }
        // Not under the lock. Of two that are made at once, one is dropped, also not under the lock.
        let mut new = Some(Box::new(Chunk::new()));
        let mut dist = state.dist.lock();
        if let Some(place @ None) = dist.lpis.chunks.get_mut(number) {
            *place = new.take();
        }
        drop(dist);
        drop(new);
        true
    }

    fn lpi_change(&self, intid: u32, change: impl FnOnce(&mut Irq)) -> VcpuSet {
        let mut kick = VcpuSet::EMPTY;
        if let (Some(state), Ok(intid)) = (self.state.get(), usize::try_from(intid)) {
            let mut dist = state.dist.lock();
            let groups = dist.groups;
            dist.lpis.change(intid, groups, &mut kick, change);
        }
        kick
    }

    /// Routes an LPI to `vcpu`, or to nobody.
    pub fn lpi_route(&self, intid: u32, vcpu: Option<usize>) -> VcpuSet {
        let mut kick = VcpuSet::EMPTY;
        if let (Some(state), Ok(intid)) = (self.state.get(), usize::try_from(intid)) {
            let mut dist = state.dist.lock();
            let groups = dist.groups;
            dist.lpis.set_target(intid, vcpu, groups, &mut kick);
        }
        kick
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
        let (Some(state), Ok(intid)) = (self.state.get(), usize::try_from(intid)) else { return false };
        state.dist.lock().lpis.get(intid).is_some_and(|lpi| lpi.irq.is_pending())
    }

    /// Address of the byte that configures `intid`, as the guest has set it up.
    pub fn lpi_config_address(&self, intid: u32) -> Option<u64> {
        let propbaser = self.state.get()?.dist.lock().lpis.propbaser;
        let n = u64::from(intid).checked_sub(u64::try_from(FIRST).ok()?)?;
        // IDbits minus one in bits 4:0.
        let ids = 1u64 << ((propbaser & 0x1F) + 1).min(u64::from(INTID_BITS));
        (u64::from(intid) < ids).then_some((propbaser & 0x000F_FFFF_FFFF_F000) + n)
    }

    /// Whether LPIs were enabled at a vCPU since the last call: then their configuration has to be read.
    pub fn take_lpis_enabled(&self) -> bool {
        self.lpis_enabled.swap(false, core::sync::atomic::Ordering::SeqCst)
    }
}
