//! A device's configuration space: bytes that the device may change, and some that the driver may.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The bytes. CPUs' threads and the device's thread touch them.
#[derive(Debug)]
pub struct ConfigSpace {
    state: Mutex<State>,
    /// The bits that the driver may change.
    writable: Vec<u8>,
}

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    /// Changes with every change of the device's, so that a driver notices one between two reads.
    generation: u8,
}

impl ConfigSpace {
    /// Bytes, and a mask of the bits in them that the driver may change.
    #[must_use]
    pub fn new(bytes: Vec<u8>, writable: Vec<u8>) -> Self {
        Self { state: Mutex::new(State { bytes, generation: 0 }), writable }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Any bytes are valid ones.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the device's changes.
    #[must_use]
    pub fn generation(&self) -> u8 {
        self.lock().generation
    }

    /// All bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// The driver reads.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        super::transport::copy_out(&self.lock().bytes, offset, data);
    }

    /// The driver writes. Whether something may have changed.
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        let Ok(start) = usize::try_from(offset) else { return false };
        let mut state = self.lock();
        let mut touched = false;
        for (index, value) in data.iter().enumerate() {
            let at = start.saturating_add(index);
            let mask = self.writable.get(at).copied().unwrap_or(0);
            if let (Some(byte), true) = (state.bytes.get_mut(at), mask != 0) {
                *byte = *byte & !mask | value & mask;
                touched = true;
            }
        }
        touched
    }

    /// The device writes. Whether something has changed.
    pub fn set(&self, offset: usize, data: &[u8]) -> bool {
        let mut state = self.lock();
        let end = offset.checked_add(data.len());
        let Some(place) = end.and_then(|end| state.bytes.get_mut(offset..end)) else { return false };
        if place == data {
            return false;
        }
        place.copy_from_slice(data);
        state.generation = state.generation.wrapping_add(1);
        true
    }
}
