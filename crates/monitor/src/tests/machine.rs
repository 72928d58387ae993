//! A platform whose tables are a map and whose shared page is an array.

use std::collections::{BTreeMap, BTreeSet};
use std::string::String;
use std::sync::Mutex;
use std::{fmt, vec::Vec};

use crate::gpt::{Geometry, Gpi, Gpt, Region};
use crate::manifest::Bank;
use crate::{Config, Monitor, Pas, Platform};

pub(crate) const DRAM: u64 = 0x4000_0000;
pub(crate) const DRAM_SIZE: u64 = 0x1000_0000;
pub(crate) const CARVE_OUT: Bank = Bank { base: 0x4010_0000, size: 0x0180_0000 };
pub(crate) const SHARED_PAGE: u64 = 0x418F_F000;
pub(crate) const NS_PAGE: u64 = 0x4200_0000;
const L0: u64 = 0x0E80_0000;
const L1_POOL: u64 = 0x0E82_0000;

#[derive(Default)]
pub(crate) struct Machine {
    pub(crate) tables: Mutex<BTreeMap<u64, u64>>,
    pub(crate) page: Mutex<Vec<u8>>,
    pub(crate) released: Mutex<Vec<usize>>,
    pub(crate) log: Mutex<Vec<String>>,
    /// Descriptors changed and not yet followed by an invalidation.
    pub(crate) stale: Mutex<BTreeSet<u64>>,
    pub(crate) flushed: Mutex<Vec<(u64, Pas)>>,
}

impl Platform for Machine {
    fn gpt_load(&self, pa: u64) -> u64 {
        *self.tables.lock().unwrap().get(&pa).expect("a descriptor inside the tables")
    }
    fn gpt_store(&self, pa: u64, descriptor: u64) {
        self.tables.lock().unwrap().insert(pa, descriptor);
    }
    fn gpt_compare_exchange(&self, pa: u64, old: u64, new: u64) -> Result<(), u64> {
        let mut tables = self.tables.lock().unwrap();
        let now = tables.get_mut(&pa).expect("a descriptor inside the tables");
        if *now != old {
            return Err(*now);
        }
        *now = new;
        self.stale.lock().unwrap().insert(pa);
        Ok(())
    }
    fn gpt_invalidate(&self, _base: u64, _log2_size: u32) {
        self.stale.lock().unwrap().clear();
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
    fn print(&self, line: fmt::Arguments<'_>) {
        self.log.lock().unwrap().push(std::format!("{line}"));
    }
    fn counter(&self) -> u64 {
        0
    }
}

pub(crate) const fn geometry() -> Geometry {
    Geometry { l0: L0, l1_pool: L1_POOL, l1_pool_size: 0x10_0000, pps_bits: 40, l0_bits: 30 }
}

pub(crate) fn machine() -> (Machine, Gpt) {
    let machine = Machine::default();
    machine.page.lock().unwrap().resize(4096, 0);
    let regions = [
        Region { base: DRAM, size: DRAM_SIZE, gpi: Gpi::NonSecure },
        Region { base: CARVE_OUT.base, size: CARVE_OUT.size, gpi: Gpi::Realm },
        Region { base: 0x0E00_0000, size: 0x0100_0000, gpi: Gpi::Root },
    ];
    let gpt = Gpt::build(&machine, geometry(), &regions).unwrap();
    (machine, gpt)
}

/// A machine with `cpus` CPUs and an RMM that has not booted yet.
pub(crate) fn monitor(cpus: usize) -> (Machine, Monitor) {
    let (machine, gpt) = machine();
    let config = Config {
        cpus,
        shared_page: SHARED_PAGE,
        carve_out: CARVE_OUT,
        reserve: Bank { base: 0x4100_0000, size: SHARED_PAGE - 0x4100_0000 },
        measured: crate::attest::Measured::default(),
        rmm: true,
    };
    (machine, Monitor::new(config, gpt))
}
