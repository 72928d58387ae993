//! A platform whose tables are a map and whose shared page is an array.

use std::collections::BTreeSet;
use std::string::String;
use std::sync::Mutex;
use std::vec::Vec;
use std::{fmt, vec};

use crate::gpt::{Geometry, Gpi, Gpt, Region};
use crate::manifest::Bank;
use crate::{Config, Interface, Monitor, Pas, Platform};

pub(crate) const DRAM: u64 = 0x4000_0000;
pub(crate) const DRAM_SIZE: u64 = 0x6000_0000;
pub(crate) const CARVE_OUT: Bank = Bank { base: 0x4010_0000, size: 0x0180_0000 };
pub(crate) const SHARED_PAGE: u64 = 0x418F_F000;
pub(crate) const RESERVE: Bank = Bank { base: 0x4190_0000, size: 0x0070_0000 };
pub(crate) const NS_PAGE: u64 = 0x4200_0000;
const L0: u64 = 0x0E80_0000;
const L1_POOL: u64 = 0x0E82_0000;
const L1_POOL_SIZE: u64 = 0x10_0000;

/// The memory of the tables.
pub(crate) struct Tables(Vec<u64>);

impl Default for Tables {
    fn default() -> Self {
        Self(vec![0; usize::try_from((L1_POOL + L1_POOL_SIZE - L0) / 8).unwrap()])
    }
}

impl Tables {
    pub(crate) fn at(&mut self, pa: u64) -> &mut u64 {
        assert_eq!(pa % 8, 0);
        let index = pa.checked_sub(L0).and_then(|offset| usize::try_from(offset / 8).ok());
        index.and_then(|index| self.0.get_mut(index)).expect("a descriptor inside the tables")
    }
}

#[derive(Default)]
pub(crate) struct Machine {
    pub(crate) tables: Mutex<Tables>,
    pub(crate) page: Mutex<Vec<u8>>,
    pub(crate) released: Mutex<Vec<usize>>,
    pub(crate) log: Mutex<Vec<String>>,
    /// Descriptors changed and not yet followed by an invalidation.
    pub(crate) stale: Mutex<BTreeSet<u64>>,
    pub(crate) flushed: Mutex<Vec<(u64, Pas)>>,
    /// What a CPU remembers of the tables: base, size, protection.
    pub(crate) cached: Mutex<Vec<(u64, u64, u64)>>,
    /// What the entropy source gives, from the end; `None` when it fails.
    pub(crate) entropy: Mutex<Vec<Option<u64>>>,
}

impl Machine {
    /// A CPU looks at memory: it remembers what the descriptor says about all that it may stand for.
    pub(crate) fn walk(&self, pa: u64) {
        let mut tables = self.tables.lock().unwrap();
        let l0 = *tables.at(L0 + (pa >> 30) * 8);
        let descriptor = *tables.at((l0 & !0xFFF) + ((pa & 0x3FFF_FFFF) >> 16) * 8);
        let (size, gpi) = match (descriptor & 0xF, descriptor >> 8 & 3) {
            (1, 1) => (0x20_0000, descriptor >> 4 & 0xF),
            (1, 2) => (0x200_0000, descriptor >> 4 & 0xF),
            (1, 3) => (0x2000_0000, descriptor >> 4 & 0xF),
            (1, _) => panic!("reserved size"),
            _ => (0x1000, descriptor >> ((pa >> 12 & 0xF) * 4) & 0xF),
        };
        self.cached.lock().unwrap().push((pa & !(size - 1), size, gpi));
    }

    /// Whether something that is remembered of `pa` is not `gpi`.
    pub(crate) fn remembers_other_than(&self, pa: u64, gpi: Gpi) -> bool {
        let covers = |base: u64, size: u64| pa.wrapping_sub(base) < size;
        self.cached.lock().unwrap().iter().any(|&(base, size, is)| covers(base, size) && is != gpi as u64)
    }

    /// Whether all descriptors of each contiguous block of a gigabyte say the same.
    pub(crate) fn blocks_are_uniform(&self, gigabyte: u64) -> bool {
        let mut tables = self.tables.lock().unwrap();
        let table = *tables.at(L0 + gigabyte * 8) & !0xFFF;
        let mut entry = |i: u64| *tables.at(table + i * 8);
        (0..16384).all(|i| {
            let bits = match (entry(i) & 0xF, entry(i) >> 8 & 3) {
                (1, 1) => 5,
                (1, 2) => 9,
                (1, 3) => 13,
                _ => return true,
            };
            i & ((1 << bits) - 1) != 0 && entry(i - 1) == entry(i)
                || i & ((1 << bits) - 1) == 0 && entry(i + (1 << bits) - 1) == entry(i)
        })
    }
}

impl Platform for Machine {
    fn gpt_load(&self, pa: u64) -> u64 {
        *self.tables.lock().unwrap().at(pa)
    }
    fn gpt_store(&self, pa: u64, descriptor: u64) {
        *self.tables.lock().unwrap().at(pa) = descriptor;
    }
    fn gpt_compare_exchange(&self, pa: u64, old: u64, new: u64) -> Result<(), u64> {
        let mut tables = self.tables.lock().unwrap();
        let now = tables.at(pa);
        if *now != old {
            return Err(*now);
        }
        *now = new;
        self.stale.lock().unwrap().insert(pa);
        Ok(())
    }
    fn gpt_invalidate(&self, base: u64, log2_size: u32) {
        self.stale.lock().unwrap().clear();
        let end = base + (1 << log2_size);
        self.cached.lock().unwrap().retain(|&(at, size, _)| at + size <= base || end <= at);
    }
    fn flush_granule(&self, pa: u64, pas: Pas) {
        self.flushed.lock().unwrap().push((pa, pas));
    }
    fn shared_page_read(&self, offset: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.page.lock().unwrap()[offset..offset + out.len()]);
    }
    fn shared_page_write(&self, offset: usize, data: &[u8]) {
        self.page.lock().unwrap()[offset..offset + data.len()].copy_from_slice(data);
    }
    fn release_cpu(&self, cpu: usize) {
        self.released.lock().unwrap().push(cpu);
    }
    fn random(&self) -> Option<u64> {
        self.entropy.lock().unwrap().pop().flatten()
    }
    fn print(&self, line: fmt::Arguments<'_>) {
        self.log.lock().unwrap().push(std::format!("{line}"));
    }
    fn counter(&self) -> u64 {
        0
    }
}

pub(crate) const fn geometry() -> Geometry {
    Geometry { l0: L0, l1_pool: L1_POOL, l1_pool_size: L1_POOL_SIZE, pps_bits: 40, l0_bits: 30 }
}

pub(crate) fn machine() -> (Machine, Gpt) {
    let machine = Machine::default();
    machine.page.lock().unwrap().resize(4096, 0);
    let regions = [
        Region { base: DRAM, size: DRAM_SIZE, gpi: Gpi::NonSecure },
        Region { base: CARVE_OUT.base, size: CARVE_OUT.size, gpi: Gpi::Realm },
        Region { base: RESERVE.base, size: RESERVE.size, gpi: Gpi::Realm },
        Region { base: 0x0E00_0000, size: 0x0100_0000, gpi: Gpi::Root },
    ];
    let gpt = Gpt::build(&machine, geometry(), &regions).unwrap();
    (machine, gpt)
}

/// A machine with `cpus` CPUs and an RMM that has not booted yet.
pub(crate) fn monitor(cpus: usize, interface: Interface) -> (Machine, Monitor) {
    let (machine, gpt) = machine();
    let config = Config {
        cpus,
        shared_page: SHARED_PAGE,
        carve_out: CARVE_OUT,
        reserve: RESERVE,
        measured: crate::attest::Measured::default(),
        rmm: true,
        interface,
        id: super::enables::max(),
    };
    (machine, Monitor::new(config, gpt))
}
