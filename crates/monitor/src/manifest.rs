//! The boot manifest (version 0.5) that tells the RMM what the machine has.

use crate::platform::GRANULE_SIZE;

/// At most this many banks of DRAM.
pub const MAX_BANKS: usize = 4;

/// A range of memory that the host may delegate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bank {
    /// First byte.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

/// The console that the RMM may use.
#[derive(Clone, Copy, Debug)]
pub struct Console {
    /// Physical address of its registers.
    pub base: u64,
    /// Name of the device's model, padded with zeroes.
    pub name: [u8; 8],
    /// Input clock.
    pub clock_hz: u64,
    /// Speed.
    pub baud: u64,
}

const VERSION: u32 = 5;
const HEADER_SIZE: usize = 168;
const PLAT_DRAM: usize = 16;
const PLAT_CONSOLE: usize = 40;
const RC_VERSION: usize = 144;
const RC_VERSION_0_1: u32 = 1;
const BANK_SIZE: usize = 16;
const CONSOLE_SIZE: usize = 48;

/// Bytes of the largest manifest.
pub const MAX_SIZE: usize = HEADER_SIZE + MAX_BANKS * BANK_SIZE + CONSOLE_SIZE;

/// A manifest's bytes, to be copied to the start of the shared page.
#[derive(Clone, Debug)]
pub struct Manifest {
    bytes: [u8; MAX_SIZE],
}

impl Manifest {
    /// Lays the manifest out for a page at `page`. Banks must be ascending and disjoint; those past
    /// [`MAX_BANKS`] are left out.
    pub fn new(page: u64, banks: &[Bank], console: Console) -> Self {
        let mut m = Self { bytes: [0; MAX_SIZE] };
        m.put32(0, VERSION);
        // An empty list needs no pointer and its sum is zero; the root complex list has a version of its own.
        m.put32(RC_VERSION, RC_VERSION_0_1);
        let banks = banks.get(..MAX_BANKS).unwrap_or(banks);
        for (i, bank) in banks.iter().enumerate() {
            m.put64(HEADER_SIZE + i * BANK_SIZE, bank.base);
            m.put64(HEADER_SIZE + i * BANK_SIZE + 8, bank.size);
        }
        m.list(PLAT_DRAM, page, HEADER_SIZE, banks.len(), BANK_SIZE);
        let at = HEADER_SIZE + banks.len() * BANK_SIZE;
        m.put64(at, console.base);
        m.put64(at + 8, 1);
        m.put64(at + 16, u64::from_le_bytes(console.name));
        m.put64(at + 24, console.clock_hz);
        m.put64(at + 32, console.baud);
        m.list(PLAT_CONSOLE, page, at, 1, CONSOLE_SIZE);
        m
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Fills in count, pointer and checksum of a list whose items are in place.
    fn list(&mut self, header: usize, page: u64, items: usize, count: usize, item_size: usize) {
        let count64 = count as u64;
        let pointer = if count == 0 { 0 } else { page + items as u64 };
        let words = (items..items + count * item_size).step_by(8).map(|at| self.get64(at));
        let sum = words.fold(count64.wrapping_add(pointer), u64::wrapping_add);
        self.put64(header, count64);
        self.put64(header + 8, pointer);
        self.put64(header + 16, sum.wrapping_neg());
    }

    fn get64(&self, at: usize) -> u64 {
        self.bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
    }

    fn put64(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn put32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

const _: () = assert!(MAX_SIZE as u64 <= GRANULE_SIZE);

/// The banks without `carve_out`, and without what lies below it in the same bank: the device tree's megabyte,
/// which the host keeps for itself. So one bank stays one bank.
pub fn delegable(banks: &[Bank], carve_out: Bank, out: &mut [Bank; MAX_BANKS]) -> usize {
    let mut count = 0;
    let carve_end = carve_out.base + carve_out.size;
    for bank in banks {
        let end = bank.base.saturating_add(bank.size);
        let base = if bank.base < carve_end && carve_out.base < end { carve_end } else { bank.base };
        if let (true, Some(slot)) = (base < end, out.get_mut(count)) {
            *slot = Bank { base, size: end - base };
            count += 1;
        }
    }
    count
}
