//! virtio 1.2 devices: what a device is, and what it may do with its queues.
//!
//! Each device has a thread of its own ([`worker`]), which the guest's notifications wake without the CPUs' threads; those
//! only touch registers ([`transport`]). Rings and
//! buffers lie in memory that the guest writes at any time, so everything is copied once and then judged. A
//! guest that breaks the rules gets the device's `DEVICE_NEEDS_RESET` and a line on our standard error; it can
//! reset the device and go on.

pub mod block;
pub mod config;
pub mod console;
pub mod fs;
pub mod interrupt;
pub mod net;
pub mod rng;
pub mod transport;
pub mod vsock;
pub mod worker;

#[cfg(test)]
mod msix_tests;
#[cfg(test)]
mod passt_tests;
#[cfg(test)]
mod race_tests;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, Reader, Writer};

use crate::memory::GuestView;
use crate::seccomp::{Call, DEVICE_DEFAULT};
use worker::Shared;

/// `VIRTIO_F_INDIRECT_DESC`.
const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`: no device here is a legacy one.
const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_ACCESS_PLATFORM`: the device sees only what the platform lets it see. Linux bounces everything through
/// shared memory then, which is what a Realm has to do, and what a plain guest does here as well.
const F_ACCESS_PLATFORM: u64 = 1 << 33;

/// What every device offers.
pub const COMMON_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | F_ACCESS_PLATFORM;
/// What every guest must accept.
pub const REQUIRED_FEATURES: u64 = F_VERSION_1 | F_ACCESS_PLATFORM;

/// A rule that the guest has broken.
#[derive(Debug)]
pub struct Broken(pub String);

impl<T: std::fmt::Display> From<T> for Broken {
    fn from(what: T) -> Self {
        Self(what.to_string())
    }
}

/// What serving a queue gives.
pub type Served<T = ()> = std::result::Result<T, Broken>;

/// A chain of buffers that the guest has made available.
pub type Chain = DescriptorChain<Arc<GuestView>>;

/// What is different between devices.
pub trait Device: Send {
    /// The device's number in the specification.
    fn id(&self) -> u16;
    /// A name for messages and threads.
    fn name(&self) -> String;
    /// The system calls that it makes beside those of every thread and every device: any other ends the process. See
    /// [`crate::seccomp`].
    fn system_calls(&self) -> &'static [Call] {
        DEVICE_DEFAULT
    }
    /// The features it has beside [`COMMON_FEATURES`].
    fn features(&self) -> u64 {
        0
    }
    /// The largest size of each queue.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Its configuration space.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    /// The bits of it that the driver may change; all others keep their value whatever is written.
    fn config_writable(&self) -> Vec<u8> {
        Vec::new()
    }
    /// The driver has written its configuration space: see [`Active::config`].
    fn config_written(&mut self, _active: &mut Active) -> Served {
        Ok(())
    }
    /// The driver is ready.
    fn activate(&mut self, _active: &mut Active) -> Served {
        Ok(())
    }
    /// The driver has gone; a new one may come.
    fn reset(&mut self) {}
    /// The driver has put something into a queue.
    fn queue(&mut self, index: usize, active: &mut Active) -> Served;
    /// What to wait for beside the driver.
    fn wait_for(&self, _active: &Active) -> Vec<libc::pollfd> {
        Vec::new()
    }
    /// One of those has happened; `index` counts in what [`Device::wait_for`] returned.
    fn ready(&mut self, _index: usize, _active: &mut Active) -> Served {
        Ok(())
    }
}

/// A device's side of its driver: queues, memory, interrupt.
pub struct Active {
    /// The guest's memory.
    pub memory: Arc<GuestView>,
    /// The features that the driver accepted.
    pub features: u64,
    queues: Vec<Option<Queue>>,
    /// The queues in which something has been given back since the driver was last told, as bits.
    untold: u64,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Active {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Active").field("features", &self.features).finish_non_exhaustive()
    }
}

impl Active {
    fn get(&mut self, index: usize) -> Option<&mut Queue> {
        self.queues.get_mut(index)?.as_mut()
    }

    /// The next chain of a queue, if there is one. While the driver waits for a reset there is none.
    pub fn next(&mut self, index: usize) -> Served<Option<Chain>> {
        if self.shared.attention.load(Ordering::Acquire) {
            return Ok(None);
        }
        let memory = self.memory.clone();
        let Some(queue) = self.get(index) else { return Ok(None) };
        Ok(queue.iter(memory)?.next())
    }

    /// As [`Active::next`]; where there is none, the driver notifies us about the next one.
    pub fn next_or_rearm(&mut self, index: usize) -> Served<Option<Chain>> {
        loop {
            if let Some(chain) = self.next(index)? {
                return Ok(Some(chain));
            }
            if !self.rearm(index)? {
                return Ok(None);
            }
        }
    }

    /// Whether a queue holds a chain; where it does not, the driver notifies us about the next one.
    pub fn has_next(&mut self, index: usize) -> Served<bool> {
        let Some(chain) = self.next_or_rearm(index)? else { return Ok(false) };
        drop(chain);
        self.give_back(index);
        Ok(true)
    }

    /// The chain that was taken last stays where it was.
    pub fn give_back(&mut self, index: usize) {
        if let Some(queue) = self.get(index) {
            queue.go_to_previous_position();
        }
    }

    /// Gives a chain back of which `len` bytes have been written.
    pub fn used(&mut self, index: usize, head: u16, len: usize) -> Served {
        let memory = self.memory.clone();
        let Some(queue) = self.get(index) else { return Ok(()) };
        queue.add_used(&*memory, head, u32::try_from(len)?)?;
        self.untold |= 1 << index;
        Ok(())
    }

    /// Interrupts the driver if something has been given back of which it wants to know.
    pub fn notify(&mut self, index: usize) -> Served {
        if self.untold >> index & 1 == 0 {
            return Ok(());
        }
        self.untold &= !(1 << index);
        let memory = self.memory.clone();
        let Some(queue) = self.get(index) else { return Ok(()) };
        if queue.needs_notification(&*memory)? {
            self.shared.interrupt.queue(index)?;
        }
        Ok(())
    }

    /// The configuration space with what the driver has written.
    #[must_use]
    pub fn config(&self) -> Vec<u8> {
        self.shared.config.bytes()
    }

    /// Changes the configuration space and tells the driver, if that is a change.
    pub fn set_config(&mut self, offset: usize, bytes: &[u8]) -> Served {
        if self.shared.config.set(offset, bytes) {
            self.shared.interrupt.config()?;
        }
        Ok(())
    }

    /// Serves all chains of a queue: `serve` returns how many bytes it wrote into one.
    pub fn serve(
        &mut self,
        index: usize,
        serve: &mut dyn FnMut(&GuestView, Chain) -> Served<usize>,
    ) -> Served {
        let memory = self.memory.clone();
        loop {
            while let Some(chain) = self.next(index)? {
                let head = chain.head_index();
                let len = serve(&memory, chain)?;
                self.used(index, head, len)?;
            }
            self.notify(index)?;
            if !self.rearm(index)? {
                return Ok(());
            }
        }
    }

    /// Asks the driver for a notification about the next chain; `true` if there is one already.
    pub fn rearm(&mut self, index: usize) -> Served<bool> {
        let memory = self.memory.clone();
        let stop = self.shared.attention.load(Ordering::Acquire);
        let Some(queue) = self.get(index) else { return Ok(false) };
        Ok(queue.enable_notification(&*memory)? && !stop)
    }
}

/// What of a chain the device may read.
pub fn reader<'a>(memory: &'a GuestView, chain: &Chain) -> Served<Reader<'a, ()>> {
    Ok(chain.clone().reader(memory)?)
}

/// What of a chain the device may write.
pub fn writer<'a>(memory: &'a GuestView, chain: &Chain) -> Served<Writer<'a, ()>> {
    Ok(chain.clone().writer(memory)?)
}
