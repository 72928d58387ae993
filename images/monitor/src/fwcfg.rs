//! fw_cfg: kernel, initial RAM disk and RMM come from QEMU by DMA.
//!
//! The device sees the Non-secure memory view and no granule protection, so its descriptor must lie in DRAM;
//! it uses the start of the RMM's carve-out's shared page, which holds nothing yet.

use core::sync::atomic::{Ordering, fence};

use crate::layout::{FW_CFG, SHARED_PAGE};
use crate::mmio::write64;

const DMA: usize = FW_CFG + 16;
const CONTROL_ERROR: u32 = 1;
const CONTROL_READ: u32 = 1 << 1;
const CONTROL_SELECT: u32 = 1 << 3;

const KERNEL_SIZE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x11;
const INITRD_SIZE: u16 = 0x0B;
const INITRD_DATA: u16 = 0x12;
const FILE_DIR: u16 = 0x19;
const FILE_ENTRY_SIZE: usize = 64;

/// The descriptor in the shared page, and room for small items behind it.
const SCRATCH: u64 = SHARED_PAGE + 64;

/// Something that QEMU has for us.
#[derive(Clone, Copy)]
pub struct Item {
    key: u16,
    pub size: u32,
}

/// A transfer failed.
pub struct DmaError;

/// Reads on from where the last read of the selected item ended; `select` starts another item.
fn read(select: Option<u16>, address: u64, size: u32) -> Result<(), DmaError> {
    let control = CONTROL_READ | select.map_or(0, |key| CONTROL_SELECT | u32::from(key) << 16);
    let descriptor = core::ptr::with_exposed_provenance_mut::<u32>(SHARED_PAGE as usize);
    // SAFETY: the shared page is mapped, the RMM does not run yet, and this is the only CPU that does; what the
    // device writes lies outside of all Rust objects.
    unsafe {
        descriptor.add(1).write_volatile(size.to_be());
        descriptor.add(2).cast::<u64>().write_volatile(address.to_be());
        descriptor.write_volatile(control.to_be());
        fence(Ordering::SeqCst);
        write64(DMA, SHARED_PAGE.to_be());
        loop {
            match u32::from_be(descriptor.read_volatile()) {
                0 => break,
                state if state & CONTROL_ERROR != 0 => return Err(DmaError),
                _ => {}
            }
        }
        fence(Ordering::SeqCst);
    }
    Ok(())
}

fn scratch(bytes: &mut [u8]) {
    let from = core::ptr::with_exposed_provenance::<u8>(SCRATCH as usize);
    for (i, byte) in bytes.iter_mut().enumerate() {
        // SAFETY: inside the shared page: callers read at most 64 bytes.
        *byte = unsafe { from.add(i).read_volatile() };
    }
}

fn sized(size_key: u16, key: u16) -> Result<Item, DmaError> {
    let mut size = [0; 4];
    read(Some(size_key), SCRATCH, 4)?;
    scratch(&mut size);
    Ok(Item { key, size: u32::from_le_bytes(size) })
}

pub fn kernel() -> Result<Item, DmaError> {
    sized(KERNEL_SIZE, KERNEL_DATA)
}

pub fn initrd() -> Result<Item, DmaError> {
    sized(INITRD_SIZE, INITRD_DATA)
}

/// A file of the directory.
pub fn file(name: &[u8]) -> Result<Option<Item>, DmaError> {
    let mut count = [0; 4];
    read(Some(FILE_DIR), SCRATCH, 4)?;
    scratch(&mut count);
    for _ in 0..u32::from_be_bytes(count) {
        let mut entry = [0; FILE_ENTRY_SIZE];
        read(None, SCRATCH, 64)?;
        scratch(&mut entry);
        let [s0, s1, s2, s3, k0, k1, _, _, path @ ..] = entry;
        if path.split(|&c| c == 0).next() == Some(name) {
            let size = u32::from_be_bytes([s0, s1, s2, s3]);
            return Ok(Some(Item { key: u16::from_be_bytes([k0, k1]), size }));
        }
    }
    Ok(None)
}

impl Item {
    /// The item's first bytes; zeroes behind its end.
    pub fn start(self) -> Result<[u8; 64], DmaError> {
        let mut bytes = [0; 64];
        let size = self.size.min(64);
        read(Some(self.key), SCRATCH, size)?;
        scratch(bytes.get_mut(..size as usize).unwrap_or_default());
        Ok(bytes)
    }

    /// Loads the whole item to DRAM at `address`, where the caller has room for it.
    pub fn load(self, address: u64) -> Result<(), DmaError> {
        read(Some(self.key), address, self.size)
    }
}
