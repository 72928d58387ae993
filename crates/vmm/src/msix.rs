//! MSI-X: the table in which a guest writes down a message for each of a function's interrupts, the vectors.
//!
//! A vector is an event that raises a global interrupt whose route is the message in the table. The route is told to
//! the kernel when the guest lets the vector through, and again when it has changed by then; to raise the interrupt
//! takes a signal to the event and nothing else. The former is what CPUs' threads do, the latter what the device's thread
//! does, whose filter knows no other way.

use std::sync::Arc;

use crate::Result;
use crate::eventfd::EventFd;
use crate::kvm::Message;
use crate::wiring::Wiring;

/// The capability's number.
pub const CAPABILITY: u8 = 0x11;
/// What of the capability the guest may write: enable and mask all, in the control word's second byte.
pub const CAPABILITY_WRITABLE: [u8; 2] = [0, 0xc0];
/// The most vectors of a function here: each slot of the bus has so many global interrupts.
pub const MAX_VECTORS: usize = 64;
/// "No vector", in the registers that hold a vector's number.
pub const NO_VECTOR: u16 = 0xffff;

const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;
const ENTRY: usize = 16;
/// Where an entry's control word lies, and its one bit.
const CONTROL: usize = 12;
const MASKED: u8 = 1;

struct Vector {
    entry: [u8; ENTRY],
    /// The interrupt was to be raised while the vector was masked.
    pending: bool,
    event: EventFd,
    /// The route that the kernel knows.
    route: Option<Message>,
}

/// A function's table.
pub struct Msix {
    wiring: Arc<dyn Wiring>,
    /// The function's number on the bus, which its messages carry.
    device: u32,
    first_gsi: u32,
    enabled: bool,
    masked: bool,
    vectors: Vec<Vector>,
}

impl std::fmt::Debug for Msix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Msix").field("vectors", &self.vectors.len()).finish_non_exhaustive()
    }
}

impl Msix {
    /// A table with up to `count` vectors, at most [`MAX_VECTORS`], all masked, for the function in `slot`.
    pub fn new(slot: u32, count: usize, wiring: Arc<dyn Wiring>) -> Result<Self> {
        let vectors = (0..count.min(MAX_VECTORS))
            .map(|_| {
                let mut entry = [0; ENTRY];
                entry[CONTROL] = MASKED;
                Ok(Vector { entry, pending: false, event: EventFd::new()?, route: None })
            })
            .collect::<Result<_>>()?;
        let first_gsi = slot.saturating_mul(u32::try_from(MAX_VECTORS).unwrap_or(0));
        Ok(Self { wiring, device: slot << 3, first_gsi, enabled: false, masked: false, vectors })
    }

    /// The body of the capability, for a table and a pending array at these offsets in the first window.
    #[must_use]
    pub fn capability(&self, table: u32, pending: u32) -> Vec<u8> {
        let last = u16::try_from(self.vectors.len().saturating_sub(1)).unwrap_or(0);
        let mut body = last.to_le_bytes().to_vec();
        body.extend(table.to_le_bytes());
        body.extend(pending.to_le_bytes());
        body
    }

    /// Whether a register may hold this vector's number.
    #[must_use]
    pub fn has(&self, vector: u16) -> bool {
        usize::from(vector) < self.vectors.len()
    }

    /// Whether interrupts are messages now.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// The guest has written the capability's control word.
    pub fn control(&mut self, control: u16) -> Result<()> {
        let (enabled, masked) = (control & ENABLE != 0, control & MASK_ALL != 0);
        if (enabled, masked) == (self.enabled, self.masked) {
            return Ok(());
        }
        (self.enabled, self.masked) = (enabled, masked);
        (0..self.vectors.len()).try_for_each(|index| self.settle(index))
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in places(offset).zip(data) {
            *byte = self.vectors.get(at / ENTRY).map_or(0, |vector| vector.entry[at % ENTRY]);
        }
    }

    /// The guest writes the table.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        for (at, byte) in places(offset).zip(data) {
            if let Some(vector) = self.vectors.get_mut(at / ENTRY) {
                vector.entry[at % ENTRY] = match at % ENTRY {
                    CONTROL => byte & MASKED,
                    at if at > CONTROL => 0,
                    _ => *byte,
                };
            }
        }
        // An access that is not aligned touches two entries.
        let first = places(offset).next().unwrap_or(0);
        let last = first.saturating_add(data.len().saturating_sub(1));
        (first / ENTRY..=last / ENTRY).try_for_each(|index| self.settle(index))
    }

    /// The guest reads the array of pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in places(offset).zip(data) {
            let bits = (0..8usize).filter(|bit| {
                let index = at.checked_mul(8).and_then(|first| first.checked_add(*bit));
                index.and_then(|index| self.vectors.get(index)).is_some_and(|vector| vector.pending)
            });
            *byte = bits.fold(0, |byte, bit| byte | 1 << bit);
        }
    }

    /// Raises an interrupt; nothing happens if the vector is none.
    pub fn raise(&mut self, vector: u16) {
        if let (true, Some(vector)) = (self.enabled, self.vectors.get_mut(usize::from(vector))) {
            vector.pending = true;
            vector.deliver(self.masked);
        }
    }

    /// Forgets interrupts that have not been let through.
    pub fn forget(&mut self) {
        self.vectors.iter_mut().for_each(|vector| vector.pending = false);
    }

    /// Does what has become due when the guest has changed a vector or its masks.
    fn settle(&mut self, index: usize) -> Result<()> {
        let Some(vector) = self.vectors.get_mut(index) else { return Ok(()) };
        if !self.enabled || self.masked || vector.masked() {
            return Ok(());
        }
        let gsi = self.first_gsi.saturating_add(u32::try_from(index).unwrap_or(0));
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, ..] = vector.entry;
        let message = Message {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
            device: self.device,
        };
        if vector.route != Some(message) {
            self.wiring.route(gsi, message)?;
            if vector.route.is_none() {
                self.wiring.connect(gsi, &vector.event)?;
            }
            vector.route = Some(message);
        }
        vector.deliver(self.masked);
        Ok(())
    }
}

impl Vector {
    fn masked(&self) -> bool {
        self.entry[CONTROL] & MASKED != 0
    }

    /// Signals what is pending, if nothing masks it. A vector that nothing masks has its route: whoever unmasked it saw to that.
    fn deliver(&mut self, all_masked: bool) {
        if !all_masked && !self.masked() && std::mem::take(&mut self.pending) {
            self.event.signal();
        }
    }
}

/// The places in a table that an access from `offset` on touches.
fn places(offset: u64) -> impl Iterator<Item = usize> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX / 2).min(usize::MAX / 2);
    start..
}
