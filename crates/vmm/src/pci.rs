//! A PCI host bridge of the generic ECAM kind: one bus, one function for each device, 32-bit memory windows.
//!
//! The guest may read and write any byte of the configuration space; what can be written, and nothing else, is
//! what the function's masks say.

use std::ops::Range;
use std::sync::Arc;

use crate::Result;
use crate::bus::Mmio;
use crate::layout::{PCI_MMIO_BASE, PCI_SLOTS};

/// Bytes of configuration space that a function has; the rest of its 4 KiB reads as zeroes.
pub const CONFIG_SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Memory space, bus master, INTx disable.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | COMMAND_INTX_DISABLE;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What names a function.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Class, subclass and programming interface.
    pub class: u32,
    /// Subsystem's vendor and device.
    pub subsystem: (u16, u16),
}

/// One function's configuration space.
#[derive(Debug)]
pub struct Config {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    next_capability: usize,
    last_pointer: usize,
    bar_size: u32,
}

impl Config {
    /// A function with one memory window of `bar_size` bytes, a power of two, at `bar`.
    #[must_use]
    pub fn new(identity: Identity, bar: u32, bar_size: u32) -> Self {
        let mut config = Self {
            bytes: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            next_capability: 0x40,
            last_pointer: CAPABILITIES,
            bar_size,
        };
        let class = identity.class.to_le_bytes();
        config.set(0x00, &identity.vendor.to_le_bytes());
        config.set(0x02, &identity.device.to_le_bytes());
        config.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        // The revision says that this is a modern device.
        config.set(0x08, &[1, class[0], class[1], class[2]]);
        config.set(BAR0, &bar.to_le_bytes());
        config.set(0x2c, &identity.subsystem.0.to_le_bytes());
        config.set(0x2e, &identity.subsystem.1.to_le_bytes());
        config.set(INTERRUPT_PIN, &[1]);
        config.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        config.allow(BAR0, &(!(bar_size - 1)).to_le_bytes());
        config.allow(INTERRUPT_LINE, &[0xff]);
        config
    }

    /// Adds a capability: `body` is what follows its number and the pointer to the next one. Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        assert!(end <= CONFIG_SIZE && writable.len() <= body.len(), "too many capabilities");
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        let pointer = u8::try_from(at).unwrap_or(0);
        self.set(self.last_pointer, &[pointer]);
        self.last_pointer = at + 1;
        self.next_capability = end.next_multiple_of(4);
        at
    }

    /// The guest reads.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = offset.checked_add(index).and_then(|at| self.bytes.get(at)).copied().unwrap_or(0);
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (index, value) in data.iter().enumerate() {
            let Some(at) = offset.checked_add(index).filter(|at| *at < CONFIG_SIZE) else { return };
            self.bytes[at] = (self.bytes[at] & !self.writable[at]) | (value & self.writable[at]);
        }
    }

    /// The addresses at which the window answers now.
    #[must_use]
    pub fn window(&self) -> Option<Range<u64>> {
        if self.u16(COMMAND) & COMMAND_MEMORY == 0 {
            return None;
        }
        let start = u32::from_le_bytes([
            self.bytes[BAR0],
            self.bytes[BAR0 + 1],
            self.bytes[BAR0 + 2],
            self.bytes[BAR0 + 3],
        ]);
        Some(u64::from(start)..u64::from(start) + u64::from(self.bar_size))
    }

    /// Whether the guest has forbidden the interrupt line.
    #[must_use]
    pub fn intx_disabled(&self) -> bool {
        self.u16(COMMAND) & COMMAND_INTX_DISABLE != 0
    }

    /// Two bytes at an offset that a capability or the header has.
    #[must_use]
    pub fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }
}

/// A function on the bus.
pub trait Function: Send + Sync {
    /// The guest reads the configuration space.
    fn config_read(&self, offset: usize, data: &mut [u8]) -> Result<()>;
    /// The guest writes the configuration space.
    fn config_write(&self, offset: usize, data: &[u8]) -> Result<()>;
    /// The addresses at which the function's registers answer now.
    fn window(&self) -> Option<Range<u64>>;
    /// The guest reads a register.
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<()>;
    /// The guest writes a register.
    fn write(&self, offset: u64, data: &[u8]) -> Result<()>;
}

/// The bus.
#[derive(Clone)]
pub struct Host {
    functions: Arc<Vec<Arc<dyn Function>>>,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("functions", &self.functions.len()).finish()
    }
}

impl Host {
    /// A bus with a function in each slot from 0 on; more than [`PCI_SLOTS`] are not reachable.
    #[must_use]
    pub fn new(mut functions: Vec<Arc<dyn Function>>) -> Self {
        functions.truncate(PCI_SLOTS);
        Self { functions: Arc::new(functions) }
    }

    /// The configuration space of all functions.
    #[must_use]
    pub fn ecam(&self) -> Arc<dyn Mmio> {
        Arc::new(Ecam(self.clone()))
    }

    /// The functions' registers.
    #[must_use]
    pub fn registers(&self) -> Arc<dyn Mmio> {
        Arc::new(Registers(self.clone()))
    }
}

struct Ecam(Host);

impl Ecam {
    fn find(&self, offset: u64) -> Option<(&dyn Function, usize)> {
        // Bits 11:0 are the register, 14:12 the function, 19:15 the device, the rest the bus.
        if offset >> 12 & 7 != 0 || offset >> 20 != 0 {
            return None;
        }
        let slot = usize::try_from(offset >> 15).ok()?;
        Some((&**self.0.functions.get(slot)?, usize::try_from(offset & 0xfff).ok()?))
    }
}

impl Mmio for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        match self.find(offset) {
            Some((function, register)) => function.config_read(register, data),
            None => Ok(()),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        match self.find(offset) {
            Some((function, register)) => function.config_write(register, data),
            None => Ok(()),
        }
    }
}

struct Registers(Host);

impl Registers {
    fn find(&self, offset: u64, len: usize) -> Option<(&dyn Function, u64)> {
        let address = PCI_MMIO_BASE.checked_add(offset)?;
        let end = address.checked_add(u64::try_from(len).ok()?)?;
        self.0.functions.iter().find_map(|function| {
            let window = function.window()?;
            (window.start <= address && end <= window.end).then(|| (&**function, address - window.start))
        })
    }
}

impl Mmio for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        match self.find(offset, data.len()) {
            Some((function, offset)) => function.read(offset, data),
            None => Ok(()),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        match self.find(offset, data.len()) {
            Some((function, offset)) => function.write(offset, data),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config() -> Config {
        let identity = Identity { vendor: 0x1af4, device: 0x1042, class: 0x01_0000, subsystem: (0x1af4, 2) };
        Config::new(identity, 0x5000_0000, 0x4000)
    }

    #[test]
    fn a_window_is_sized_moved_and_switched_as_pci_says() {
        let mut config = config();
        assert_eq!(config.window(), None);
        config.write(BAR0, &[0xff; 4]);
        let mut size = [0; 4];
        config.read(BAR0, &mut size);
        assert_eq!(u32::from_le_bytes(size), 0xffff_c000);
        config.write(BAR0, &0x5123_4567u32.to_le_bytes());
        config.write(COMMAND, &[2]);
        assert_eq!(config.window(), Some(0x5123_4000..0x5123_8000));
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut config = config();
        let first = config.add_capability(9, &[1; 14], &[]);
        let second = config.add_capability(9, &[2; 18], &[]);
        let mut byte = [0];
        config.read(CAPABILITIES, &mut byte);
        assert_eq!(usize::from(byte[0]), first);
        config.read(first + 1, &mut byte);
        assert_eq!(usize::from(byte[0]), second);
        config.read(second + 1, &mut byte);
        assert_eq!(byte[0], 0);
    }

    proptest! {
        #[test]
        fn only_what_the_masks_allow_ever_changes(writes in proptest::collection::vec((any::<usize>(), proptest::collection::vec(any::<u8>(), 0..9)), 0..50)) {
            let mut config = config();
            let before = config.bytes;
            for (offset, data) in writes {
                config.write(offset % 300, &data);
                config.write(offset, &data);
            }
            for ((now, then), mask) in config.bytes.iter().zip(before).zip(config.writable) {
                prop_assert_eq!(now & !mask, then & !mask);
            }
        }
    }
}
