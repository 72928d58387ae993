//! Values exchanged with the run loop.

use crate::sync::{AtomicU64, Ordering::SeqCst};

/// List registers of `rec_enter` and `rec_exit`.
pub const MAX_LRS: usize = 16;

/// Most vCPUs that one GIC serves.
pub const MAX_VCPUS: usize = 512;

const SET_WORDS: usize = MAX_VCPUS / 64;

/// The vCPUs that have to look at their interrupts again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VcpuSet {
    words: [u64; SET_WORDS],
}

impl VcpuSet {
    /// Nobody.
    pub const EMPTY: VcpuSet = VcpuSet { words: [0; SET_WORDS] };

    /// The vCPUs 0..`n`.
    pub fn first(n: usize) -> VcpuSet {
        let mut set = VcpuSet::EMPTY;
        for vcpu in 0..n.min(MAX_VCPUS) {
            set.insert(vcpu);
        }
        set
    }

    /// Adds `vcpu`.
    pub fn insert(&mut self, vcpu: usize) {
        if let Some(word) = self.words.get_mut(vcpu / 64) {
            *word |= 1 << (vcpu % 64);
        }
    }

    /// Takes `vcpu` out.
    pub fn remove(&mut self, vcpu: usize) {
        if let Some(word) = self.words.get_mut(vcpu / 64) {
            *word &= !(1 << (vcpu % 64));
        }
    }

    /// Adds all of `other`.
    pub fn extend(&mut self, other: &VcpuSet) {
        for (word, more) in self.words.iter_mut().zip(other.words) {
            *word |= more;
        }
    }

    /// Whether `vcpu` is in the set.
    pub fn contains(&self, vcpu: usize) -> bool {
        self.words.get(vcpu / 64).is_some_and(|word| word & (1 << (vcpu % 64)) != 0)
    }

    /// Whether nobody is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The vCPUs in the set, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.words.iter().enumerate().flat_map(|(i, &word)| Bits::new(word).map(move |bit| i * 64 + bit))
    }
}

/// A set that several may change at once.
pub(super) struct AtomicVcpuSet {
    words: [AtomicU64; SET_WORDS],
}

impl AtomicVcpuSet {
    pub(super) const fn new() -> AtomicVcpuSet {
        AtomicVcpuSet { words: [const { AtomicU64::new(0) }; SET_WORDS] }
    }

    pub(super) fn contains(&self, vcpu: usize) -> bool {
        self.words.get(vcpu / 64).is_some_and(|word| word.load(SeqCst) & (1 << (vcpu % 64)) != 0)
    }

    pub(super) fn set(&self, vcpu: usize, member: bool) {
        let Some(word) = self.words.get(vcpu / 64) else { return };
        if member {
            word.fetch_or(1 << (vcpu % 64), SeqCst);
        } else {
            word.fetch_and(!(1 << (vcpu % 64)), SeqCst);
        }
    }

    pub(super) fn first(&self) -> Option<usize> {
        let words = self.words.iter().enumerate();
        words.flat_map(|(i, word)| Bits::new(word.load(SeqCst)).map(move |bit| i * 64 + bit)).next()
    }
}

/// The positions of the ones in a word, in ascending order.
pub(super) struct Bits(u64);

impl Bits {
    pub(super) fn new(word: u64) -> Bits {
        Bits(word)
    }
}

impl Iterator for Bits {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros();
        self.0 &= self.0 - 1;
        usize::try_from(bit).ok()
    }
}

/// What goes into `rec_enter`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LrImage {
    /// `rec_enter.gicv3_hcr`: maintenance conditions and ICC_DIR_EL1 trapping, nothing else.
    pub hcr: u64,
    /// `rec_enter.gicv3_lrs`.
    pub lrs: [u64; MAX_LRS],
}

impl LrImage {
    /// No interrupt.
    pub const EMPTY: LrImage = LrImage { hcr: 0, lrs: [0; MAX_LRS] };
}

/// The GIC fields of `rec_exit`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExitGic {
    /// `rec_exit.gicv3_hcr`; its EOIcount says how many active interrupts outside list registers ended.
    pub hcr: u64,
    /// `rec_exit.gicv3_lrs`.
    pub lrs: [u64; MAX_LRS],
    /// `rec_exit.gicv3_misr`: why the maintenance interrupt fired.
    pub misr: u64,
    /// `rec_exit.gicv3_vmcr`: priority mask and group enables of the virtual CPU interface.
    pub vmcr: u64,
}

/// What [`Vgic::sync`](super::Vgic::sync) found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SyncOutcome {
    /// Other vCPUs that an interrupt has moved to. Never contains the vCPU that exited by itself.
    pub kick: VcpuSet,
    /// Level-triggered SPIs that the guest has finished: their resample eventfds are to be signalled.
    pub ended: SpiList,
}

/// A short list of SPIs, as INTIDs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SpiList {
    intids: [u16; SpiList::CAPACITY],
    len: usize,
}

impl SpiList {
    /// All list registers, and as many as EOIcount can report.
    const CAPACITY: usize = MAX_LRS + 31;

    /// The INTIDs.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.intids.iter().take(self.len).map(|&intid| u32::from(intid))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn push(&mut self, intid: u16) {
        if let Some(slot) = self.intids.get_mut(self.len) {
            *slot = intid;
            self.len += 1;
        }
    }
}

impl Default for SpiList {
    fn default() -> Self {
        SpiList { intids: [0; SpiList::CAPACITY], len: 0 }
    }
}
