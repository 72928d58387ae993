//! What an ITS remembers: devices, their events, collections. Kept here, never in the guest's tables, and bounded: a
//! guest decides how much of it there is.

use crate::lock::{Lock, guarded};
use crate::sync::{AtomicU64, Ordering::SeqCst};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use lock_api::Mutex;
use spin::Once;

/// Event numbers of all devices together, used or not.
const MAX_EVENTS: u64 = 1 << 20;
/// Devices. The list of them is searched and changed under a spin lock.
const MAX_DEVICES: usize = 4096;
/// Events are remembered in chunks of so many.
const CHUNK: usize = 64;
const MAPPED: u64 = 1 << 63;

/// Where an event leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Translation {
    pub(super) intid: u16,
    pub(super) collection: u16,
}

/// One device.
pub(super) struct Device {
    id: u32,
    /// A word for each event: mapped in bit 63, collection in 31:16, INTID in 15:0.
    chunks: Vec<Once<Box<[AtomicU64; CHUNK]>>>,
    events: u64,
}

impl Device {
    /// Room for events with numbers of so many bits.
    pub(super) fn new(id: u32, bits: u32) -> Option<Device> {
        let events = 1u64.checked_shl(bits)?;
        let count = usize::try_from(events).ok()?.div_ceil(CHUNK);
        let mut chunks = Vec::new();
        chunks.try_reserve_exact(count).ok()?;
        chunks.resize_with(count, Once::new);
        Some(Device { id, chunks, events })
    }

    fn place(event: u32) -> Option<(usize, usize)> {
        let event = usize::try_from(event).ok()?;
        Some((event / CHUNK, event % CHUNK))
    }

    pub(super) fn find(&self, event: u32) -> Option<Translation> {
        let (chunk, at) = Self::place(event)?;
        let word = self.chunks.get(chunk)?.get()?.get(at)?.load(SeqCst);
        if word & MAPPED == 0 {
            return None;
        }
        let [a, b, c, d, ..] = word.to_le_bytes();
        Some(Translation { intid: u16::from_le_bytes([a, b]), collection: u16::from_le_bytes([c, d]) })
    }

    /// Maps an event, or unmaps it. Process context. `false` if the device has no such event.
    pub(super) fn set(&self, event: u32, to: Option<Translation>) -> bool {
        let Some((chunk, at)) = Self::place(event).filter(|_| u64::from(event) < self.events) else {
            return false;
        };
        let Some(chunk) = self.chunks.get(chunk) else { return false };
        if !chunk.is_completed() {
            let new = Box::new([const { AtomicU64::new(0) }; CHUNK]);
            chunk.call_once(move || new);
        }
        let word = to.map_or(0, |to| MAPPED | u64::from(to.collection) << 16 | u64::from(to.intid));
        match chunk.get().and_then(|chunk| chunk.get(at)) {
            Some(place) => {
                place.store(word, SeqCst);
                true
            }
            None => false,
        }
    }

    /// All mapped events.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, Translation)> + '_ {
        let made = self.chunks.iter().enumerate().filter(|(_, chunk)| chunk.is_completed());
        made.flat_map(|(n, _)| n * CHUNK..(n + 1) * CHUNK).filter_map(|event| {
            let event = u32::try_from(event).ok()?;
            Some((event, self.find(event)?))
        })
    }
}

/// All devices of an ITS. Changed by one thread at a time, read by any in any context.
pub(super) struct Devices<R: Lock> {
    /// Sorted by number.
    list: Mutex<R, Vec<Arc<Device>>>,
    /// Counts changes, so that a translation can be remembered elsewhere.
    generation: AtomicU64,
}

impl<R: Lock> Devices<R> {
    pub(super) fn new() -> Devices<R> {
        Devices { list: guarded(c"its.translations", Vec::new()), generation: AtomicU64::new(1) }
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(SeqCst)
    }

    /// To be called after each change of a translation.
    pub(super) fn changed(&self) {
        self.generation.fetch_add(1, SeqCst);
    }

    /// Where a device's event leads. Any context.
    pub(super) fn find(&self, device: u32, event: u32) -> Option<Translation> {
        let list = self.list.lock();
        let at = list.binary_search_by_key(&device, |device| device.id).ok()?;
        list.get(at)?.find(event)
    }

    /// A device. Process context, as it may be the last to hold it.
    pub(super) fn get(&self, device: u32) -> Option<Arc<Device>> {
        let list = self.list.lock();
        let at = list.binary_search_by_key(&device, |device| device.id).ok()?;
        list.get(at).cloned()
    }

    /// The device at a place of the list, to go through all of them.
    pub(super) fn nth(&self, at: usize) -> Option<Arc<Device>> {
        self.list.lock().get(at).cloned()
    }

    /// Adds a device whose number is free. Process context. `false` if there is no room.
    pub(super) fn insert(&self, device: Device) -> bool {
        let (len, capacity, used) = {
            let list = self.list.lock();
            (list.len(), list.capacity(), list.iter().map(|device| device.events).sum::<u64>())
        };
        if len >= MAX_DEVICES || used + device.events > MAX_EVENTS {
            return false;
        }
        let device = Arc::new(device);
        let mut spare = Vec::new();
        if len == capacity && spare.try_reserve_exact((len * 2).max(16)).is_err() {
            return false;
        }
        let mut list = self.list.lock();
        if spare.capacity() != 0 {
            spare.append(&mut list);
            core::mem::swap(&mut *list, &mut spare);
        }
        let at = list.partition_point(|other| other.id < device.id);
        list.insert(at, device);
        drop(list);
        // The old memory is freed here, without the lock.
        drop(spare);
        true
    }

    /// Takes a device out.
    pub(super) fn remove(&self, device: u32) -> Option<Arc<Device>> {
        let mut list = self.list.lock();
        let at = list.binary_search_by_key(&device, |device| device.id).ok()?;
        Some(list.remove(at))
    }

    /// Takes all devices out.
    pub(super) fn take(&self) -> Vec<Arc<Device>> {
        core::mem::take(&mut *self.list.lock())
    }
}
