//! The device attributes of `KVM_DEV_TYPE_ARM_VGIC_V3`: how a VMM configures the GIC before the first run.

use crate::lock::{Lock, guarded};
use crate::sync::Ordering;
use alloc::vec::Vec;

use super::cpu::Cpu;
use super::dist::{AFFINITY_MASK, Dist};
use super::types::MAX_VCPUS;
use super::{State, Vgic};

const GRP_ADDR: u32 = 0;
const GRP_NR_IRQS: u32 = 3;
const GRP_CTRL: u32 = 4;
/// Groups of saved state, which a Realm does not have: DIST_REGS, REDIST_REGS, CPU_SYSREGS, LEVEL_INFO and
/// MAINT_IRQ.
const GRP_STATE: [u32; 5] = [1, 5, 6, 7, 9];

const ADDR_TYPE_DIST: u64 = 2;
const ADDR_TYPE_REDIST: u64 = 3;
const ADDR_TYPE_REDIST_REGION: u64 = 5;

const CTRL_INIT: u64 = 0;

/// The distributor is one 64 KiB frame, a redistributor two.
const DIST_SIZE: u64 = 0x1_0000;
const REDIST_SIZE: u64 = 0x2_0000;
const FRAME_ALIGN: u64 = 0x1_0000;

const MIN_IRQS: u64 = 64;
const MAX_IRQS: u64 = 1024;
/// INTIDs of a GIC whose VMM has not said how many it wants.
const DEFAULT_IRQS: usize = 256;

const MAX_REGIONS: usize = 64;

/// What `KVM_GET_DEVICE_ATTR` reads for an address that was not set.
const ADDR_UNDEFINED: u64 = u64::MAX;

/// Bounds that the VM sets for its GIC.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Frames lie below `1 << ipa_bits`: the protected half, whose other alias the guest uses for MMIO.
    pub ipa_bits: u32,
}

/// Why a device attribute was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttrError {
    /// No such group or attribute, or not everything needed was set.
    Missing,
    /// No such redistributor region.
    NoRegion,
    /// The value makes no sense.
    Invalid,
    /// The address was set before.
    Exists,
    /// The frame does not fit into the address space.
    TooBig,
    /// Too late: the GIC or the VM is past this step.
    Busy,
    /// Saved state, which a Realm does not have.
    Unsupported,
}

impl AttrError {
    /// The error number, positive.
    pub fn errno(self) -> i32 {
        match self {
            AttrError::Missing => 6,      // ENXIO
            AttrError::NoRegion => 2,     // ENOENT
            AttrError::Invalid => 22,     // EINVAL
            AttrError::Exists => 17,      // EEXIST
            AttrError::TooBig => 7,       // E2BIG
            AttrError::Busy => 16,        // EBUSY
            AttrError::Unsupported => 95, // EOPNOTSUPP
        }
    }
}

/// A range of redistributors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Region {
    base: u64,
    /// `None`: as many as there are vCPUs.
    count: Option<usize>,
}

/// What was configured so far.
pub(super) struct Config {
    dist: Option<u64>,
    regions: Vec<Region>,
    nr_irqs: Option<usize>,
    affinities: Vec<u64>,
    /// No vCPU can be added any more.
    counted: bool,
    /// No address can be set any more.
    placed: bool,
}

impl Config {
    /// All that is ever needed is allocated here: the configuration is behind a spin lock.
    pub(super) fn new() -> Config {
        Config {
            dist: None,
            regions: Vec::with_capacity(MAX_REGIONS),
            nr_irqs: None,
            affinities: Vec::with_capacity(MAX_VCPUS),
            counted: false,
            placed: false,
        }
    }

    fn set_addr(&mut self, limits: Limits, attr: u64, value: u64) -> Result<(), AttrError> {
        if self.placed {
            return Err(AttrError::Busy);
        }
        match attr {
            ADDR_TYPE_DIST => {
                check_frame(limits, value, DIST_SIZE)?;
                if self.dist.is_some() {
                    return Err(AttrError::Exists);
                }
                self.dist = Some(value);
                Ok(())
            }
            ADDR_TYPE_REDIST => {
                check_frame(limits, value, REDIST_SIZE)?;
                match self.regions.first() {
                    Some(Region { count: None, .. }) => Err(AttrError::Exists),
                    Some(_) => Err(AttrError::Invalid),
                    None => self.add_region(value, None),
                }
            }
            ADDR_TYPE_REDIST_REGION => {
                let payload = RegionPayload::decode(value);
                let count = usize::try_from(payload.count).map_err(|_| AttrError::Invalid)?;
                if count == 0 || payload.flags != 0 {
                    return Err(AttrError::Invalid);
                }
                let size = REDIST_SIZE.checked_mul(payload.count).ok_or(AttrError::TooBig)?;
                check_frame(limits, payload.base, size)?;
                let single = self.regions.iter().any(|region| region.count.is_none());
                if single || usize::try_from(payload.index) != Ok(self.regions.len()) {
                    return Err(AttrError::Invalid);
                }
                let overlaps = |region: &Region| match region.count.and_then(|n| u64::try_from(n).ok()) {
                    Some(n) => overlap(region.base, n * REDIST_SIZE, payload.base, size),
                    None => false,
                };
                if self.regions.iter().any(overlaps) {
                    return Err(AttrError::Invalid);
                }
                self.add_region(payload.base, Some(count))
            }
            _ => Err(AttrError::Missing),
        }
    }

    fn add_region(&mut self, base: u64, count: Option<usize>) -> Result<(), AttrError> {
        if self.regions.len() == MAX_REGIONS {
            return Err(AttrError::TooBig);
        }
        self.regions.push(Region { base, count });
        Ok(())
    }

    fn get_addr(&self, attr: u64, payload: u64) -> Result<u64, AttrError> {
        match attr {
            ADDR_TYPE_DIST => Ok(self.dist.unwrap_or(ADDR_UNDEFINED)),
            ADDR_TYPE_REDIST => match self.regions.first() {
                Some(Region { base, count: None }) => Ok(*base),
                Some(_) => Err(AttrError::Invalid),
                None => Ok(ADDR_UNDEFINED),
            },
            ADDR_TYPE_REDIST_REGION => {
                let index = RegionPayload::decode(payload).index;
                let at = usize::try_from(index).map_err(|_| AttrError::NoRegion)?;
                match self.regions.get(at) {
                    Some(Region { base, count: Some(count) }) => {
                        let count = u64::try_from(*count).map_err(|_| AttrError::Invalid)?;
                        Ok((count << 52) | base | index)
                    }
                    _ => Err(AttrError::NoRegion),
                }
            }
            _ => Err(AttrError::Missing),
        }
    }

    fn set_nr_irqs(&mut self, value: u64) -> Result<(), AttrError> {
        if !(MIN_IRQS..=MAX_IRQS).contains(&value) || value % 32 != 0 {
            return Err(AttrError::Invalid);
        }
        if self.counted || self.nr_irqs.is_some() {
            return Err(AttrError::Busy);
        }
        self.nr_irqs = usize::try_from(value).ok();
        Ok(())
    }
}

/// The payload of `KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION`.
struct RegionPayload {
    count: u64,
    base: u64,
    flags: u64,
    index: u64,
}

impl RegionPayload {
    fn decode(value: u64) -> RegionPayload {
        RegionPayload {
            count: value >> 52,
            base: value & 0x000f_ffff_ffff_0000,
            flags: (value >> 12) & 0xf,
            index: value & 0xfff,
        }
    }
}

pub(super) fn check_frame(limits: Limits, base: u64, size: u64) -> Result<(), AttrError> {
    if base % FRAME_ALIGN != 0 {
        return Err(AttrError::Invalid);
    }
    let end = base.checked_add(size).ok_or(AttrError::Invalid)?;
    let limit = 1u64.checked_shl(limits.ipa_bits).unwrap_or(u64::MAX);
    if end > limit { Err(AttrError::TooBig) } else { Ok(()) }
}

fn overlap(a: u64, a_size: u64, b: u64, b_size: u64) -> bool {
    a < b.saturating_add(b_size) && b < a.saturating_add(a_size)
}

/// Redistributors that are in use, one after the other.
struct Redists {
    base: u64,
    size: u64,
    first: usize,
}

/// Where the frames lie.
pub(super) struct Layout {
    dist: u64,
    redists: Vec<Redists>,
}

/// The frame that an address belongs to.
pub(super) enum Frame {
    Dist {
        offset: u64,
    },
    Redist {
        vcpu: usize,
        /// It is the last one of its region.
        last: bool,
        offset: u64,
    },
}

impl Layout {
    pub(super) fn find(&self, gpa: u64) -> Option<Frame> {
        if let Some(offset) = gpa.checked_sub(self.dist).filter(|offset| *offset < DIST_SIZE) {
            return Some(Frame::Dist { offset });
        }
        self.redists.iter().find_map(|redists| {
            let offset = gpa.checked_sub(redists.base).filter(|offset| *offset < redists.size)?;
            let vcpu = redists.first + usize::try_from(offset / REDIST_SIZE).ok()?;
            let last = redists.size - offset <= REDIST_SIZE;
            Some(Frame::Redist { vcpu, last, offset: offset % REDIST_SIZE })
        })
    }
}

impl<R: Lock> Vgic<R> {
    /// Adds a vCPU with this MPIDR; its index is what names it from now on.
    pub fn vcpu_added(&self, mpidr: u64) -> Result<usize, AttrError> {
        let mut config = self.config.lock();
        if config.counted {
            return Err(AttrError::Busy);
        }
        let index = config.affinities.len();
        if index == MAX_VCPUS {
            return Err(AttrError::TooBig);
        }
        config.affinities.push(mpidr & AFFINITY_MASK);
        Ok(index)
    }

    /// `KVM_HAS_DEVICE_ATTR`, and how many bytes the attribute's payload has.
    pub fn attr_size(&self, group: u32, attr: u64) -> Result<usize, AttrError> {
        match (group, attr) {
            (GRP_ADDR, ADDR_TYPE_DIST | ADDR_TYPE_REDIST | ADDR_TYPE_REDIST_REGION) => Ok(8),
            (GRP_NR_IRQS, _) => Ok(4),
            (GRP_CTRL, CTRL_INIT) => Ok(0),
            _ if GRP_STATE.contains(&group) => Err(AttrError::Unsupported),
            _ => Err(AttrError::Missing),
        }
    }

    /// `KVM_SET_DEVICE_ATTR`, with the payload as [`Vgic::attr_size`] says, zero-extended.
    pub fn set_attr(&self, group: u32, attr: u64, payload: u64) -> Result<(), AttrError> {
        self.attr_size(group, attr)?;
        match group {
            GRP_ADDR => self.config.lock().set_addr(self.limits, attr, payload),
            GRP_NR_IRQS => self.config.lock().set_nr_irqs(payload),
            _ => {
                self.init();
                Ok(())
            }
        }
    }

    /// `KVM_GET_DEVICE_ATTR`. The payload is an input, too, for the index of a redistributor region.
    pub fn get_attr(&self, group: u32, attr: u64, payload: u64) -> Result<u64, AttrError> {
        self.attr_size(group, attr)?;
        let config = self.config.lock();
        match group {
            GRP_ADDR => config.get_addr(attr, payload),
            GRP_NR_IRQS => {
                u64::try_from(config.nr_irqs.unwrap_or(DEFAULT_IRQS)).map_err(|_| AttrError::Invalid)
            }
            _ => Err(AttrError::Missing),
        }
    }

    /// `KVM_DEV_ARM_VGIC_CTRL_INIT`: creates the interrupts of all vCPUs that were added.
    fn init(&self) {
        let mut affinities = Vec::with_capacity(MAX_VCPUS);
        let nr_irqs = {
            let mut config = self.config.lock();
            config.counted = true;
            affinities.extend_from_slice(&config.affinities);
            *config.nr_irqs.get_or_insert(DEFAULT_IRQS)
        };
        if self.state.is_completed() {
            return;
        }
        // Made before, not inside `call_once`: that spins, so whoever is inside must not sleep for memory. Two vCPUs
        // that start at once make the same state, and one is dropped.
        let lpis = self.has_its.load(Ordering::SeqCst);
        let state = State {
            cpus: (0..affinities.len()).map(|index| guarded(c"vgic.cpu", Cpu::new(index, lpis))).collect(),
            dist: Dist::new(nr_irqs, affinities.clone(), lpis),
            affinities,
        };
        self.state.call_once(move || state);
    }

    /// Makes the GIC ready for the first vCPU to run: initialises it if the VMM has not, and fixes where
    /// its frames lie. Does nothing if that was done before.
    pub fn start(&self) -> Result<(), AttrError> {
        if self.layout.is_completed() {
            return Ok(());
        }
        self.init();
        let mut regions = Vec::with_capacity(MAX_REGIONS);
        let (dist, mut left) = {
            let config = self.config.lock();
            regions.extend_from_slice(&config.regions);
            (config.dist.ok_or(AttrError::Missing)?, config.affinities.len())
        };

        let mut redists = Vec::with_capacity(regions.len());
        let mut first = 0;
        for region in regions {
            let count = region.count.unwrap_or(left).min(left);
            if count == 0 {
                continue;
            }
            let size = u64::try_from(count)
                .ok()
                .and_then(|n| REDIST_SIZE.checked_mul(n))
                .ok_or(AttrError::Invalid)?;
            check_frame(self.limits, region.base, size)?;
            if overlap(region.base, size, dist, DIST_SIZE) {
                return Err(AttrError::Invalid);
            }
            redists.push(Redists { base: region.base, size, first });
            first += count;
            left -= count;
        }
        if left != 0 {
            return Err(AttrError::Missing);
        }
        self.config.lock().placed = true;
        self.layout.call_once(move || Layout { dist, redists });
        Ok(())
    }
}
