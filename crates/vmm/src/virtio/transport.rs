//! The PCI transport: a function with one window of registers, in the layout of virtio 1.2, section 4.1.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::{Queue, QueueT};

use super::interrupt::Interrupt;
use super::worker::{Report, Worker};
use super::{COMMON_FEATURES, Device, REQUIRED_FEATURES};
use crate::Result;
use crate::layout::{PCI_BAR_SIZE, PCI_MMIO_BASE, PCI_MMIO_SIZE};
use crate::memory::GuestView;
use crate::msix;
use crate::pci::{Config, Function, Identity};
use crate::seccomp::Confinement;
use crate::wiring::Wiring;

const VENDOR: u16 = 0x1af4;
/// Modern devices are numbered from here on.
const DEVICE_BASE: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;

const COMMON: u64 = 0x0000;
const COMMON_SIZE: usize = 64;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MESSAGES: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const REGION: u64 = 0x1000;
/// Bytes between the notification registers of two queues.
const NOTIFY_STEP: u32 = 4;

const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    state: Mutex<State>,
    worker: Worker,
    wiring: Arc<dyn Wiring>,
    features: u64,
}

struct State {
    config: Config,
    /// Where the window through which configuration space reaches the registers is described.
    pci_access: usize,
    /// Where MSI-X's control word is, if the function has it.
    msix: Option<usize>,
    /// The notification registers for whose stores the kernel signals the queues' events itself: from which address on,
    /// and which of them.
    doorbells: Option<(u64, Vec<bool>)>,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    /// What the status register shows until a reset has been carried out.
    status_before: u8,
    queue_select: u16,
    queues: Vec<Queue>,
}

impl std::fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioPci").finish_non_exhaustive()
    }
}

impl VirtioPci {
    /// Puts a device into a slot of the bus and starts its thread.
    pub fn new(
        slot: usize,
        device: Box<dyn Device>,
        memory: Arc<GuestView>,
        wiring: Arc<dyn Wiring>,
        report: Report,
        confinement: Confinement,
    ) -> Result<Self> {
        let id = device.id();
        let slot = u32::try_from(slot).unwrap_or(u32::MAX);
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + id,
            class: class(id),
            subsystem: (VENDOR, DEVICE_BASE + id),
        };
        let bar_size = u32::try_from(PCI_BAR_SIZE).unwrap_or(u32::MAX);
        let bar = u32::try_from(PCI_MMIO_BASE).unwrap_or(u32::MAX).wrapping_add(slot.wrapping_mul(bar_size));
        let mut config = Config::new(identity, bar, bar_size);
        for (kind, offset) in [(CFG_COMMON, COMMON), (CFG_ISR, ISR), (CFG_DEVICE, DEVICE)] {
            config.add_capability(CAPABILITY_VENDOR, &capability(16, kind, offset), &[]);
        }
        let mut notify = capability(20, CFG_NOTIFY, NOTIFY);
        notify.extend(NOTIFY_STEP.to_le_bytes());
        config.add_capability(CAPABILITY_VENDOR, &notify, &[]);
        let mut access = capability(20, CFG_PCI, 0);
        access.extend([0; 4]);
        // The guest chooses the window's BAR, offset and length.
        let writable = [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let pci_access = config.add_capability(CAPABILITY_VENDOR, &access, &writable);

        let sizes = device.queue_sizes();
        let queues = sizes.iter().filter_map(|size| Queue::new(*size).ok()).collect::<Vec<_>>();
        assert_eq!(queues.len(), sizes.len(), "a queue's size is a power of two");
        let features = device.features() | COMMON_FEATURES;
        let interrupt = Interrupt::new(slot, queues.len(), wiring.clone())?;
        let msix = interrupt.with_msix(|msix| {
            let place = |offset| u32::try_from(offset).unwrap_or(0);
            let body = msix.capability(place(MESSAGES), place(PENDING));
            config.add_capability(msix::CAPABILITY, &body, &msix::CAPABILITY_WRITABLE) + 2
        });
        let worker = Worker::start(device, memory, interrupt, report, confinement)?;
        let state = State {
            config,
            pci_access,
            msix,
            doorbells: None,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            status_before: 0,
            queue_select: 0,
            queues,
        };
        Ok(Self { state: Mutex::new(state), worker, wiring, features })
    }

    /// Ends the device's thread.
    pub fn stop(&self) {
        self.worker.stop();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The registers are valid after every single change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self, state: &State) -> u8 {
        if state.status == 0 && self.worker.shared.resetting.load(Ordering::Acquire) {
            return state.status_before;
        }
        let broken = self.worker.shared.broken.load(Ordering::Acquire);
        state.status | if broken && state.status & STATUS_DRIVER_OK != 0 { STATUS_NEEDS_RESET } else { 0 }
    }

    /// All common registers as bytes.
    fn common(&self, state: &State) -> [u8; COMMON_SIZE] {
        let mut image = [0; COMMON_SIZE];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &state.device_feature_select.to_le_bytes());
        put(4, &half(self.features, state.device_feature_select).to_le_bytes());
        put(8, &state.driver_feature_select.to_le_bytes());
        put(12, &half(state.driver_features, state.driver_feature_select).to_le_bytes());
        let (config_vector, queue_vector) = self.worker.shared.interrupt.vectors(state.queue_select);
        put(16, &config_vector.to_le_bytes());
        put(18, &u16::try_from(state.queues.len()).unwrap_or(0).to_le_bytes());
        put(20, &[self.status(state), self.worker.shared.config.generation()]);
        put(22, &state.queue_select.to_le_bytes());
        put(26, &queue_vector.to_le_bytes());
        if let Some(queue) = state.queues.get(usize::from(state.queue_select)) {
            put(24, &queue.size().to_le_bytes());
            put(28, &u16::from(queue.ready()).to_le_bytes());
            put(30, &state.queue_select.to_le_bytes());
            put(32, &queue.desc_table().to_le_bytes());
            put(40, &queue.avail_ring().to_le_bytes());
            put(48, &queue.used_ring().to_le_bytes());
            put(56, &state.queue_select.to_le_bytes());
        }
        image
    }

    fn write_common(&self, state: &mut State, offset: u64, data: &[u8]) -> Result<()> {
        if let Ok(halves) = <[u8; 8]>::try_from(data) {
            self.write_common(state, offset, &halves[..4])?;
            return self.write_common(state, offset + 4, &halves[4..]);
        }
        let value = data.iter().rev().fold(0u32, |value, byte| value << 8 | u32::from(*byte));
        let short = u16::try_from(value & 0xffff).unwrap_or(0);
        match (offset, data.len()) {
            (0, 4) => state.device_feature_select = value,
            (8, 4) => state.driver_feature_select = value,
            (12, 4) if state.status & STATUS_FEATURES_OK == 0 => match state.driver_feature_select {
                0 => state.driver_features = state.driver_features & !0xffff_ffff | u64::from(value),
                1 => state.driver_features = state.driver_features & 0xffff_ffff | u64::from(value) << 32,
                _ => {}
            },
            (16, 2) => self.worker.shared.interrupt.set_vector(None, short),
            (26, 2) => self.worker.shared.interrupt.set_vector(Some(state.queue_select), short),
            (20, 1) => self.write_status(state, data[0])?,
            (22, 2) => state.queue_select = short,
            (24..32, 2) | (32..56, 4) => write_queue(state, offset, value),
            _ => {}
        }
        Ok(())
    }

    fn write_status(&self, state: &mut State, value: u8) -> Result<()> {
        if value == 0 {
            if state.status & STATUS_DRIVER_OK != 0 {
                state.status_before = self.status(state);
                self.worker.reset();
            }
            self.worker.shared.interrupt.forget_vectors();
            self.worker.shared.interrupt.take()?;
            state.queues.iter_mut().for_each(Queue::reset);
            (state.status, state.driver_features, state.queue_select) = (0, 0, 0);
            (state.device_feature_select, state.driver_feature_select) = (0, 0);
            return Ok(());
        }
        let new = value & !state.status;
        // Bits are cleared by a reset and by nothing else.
        state.status |= value & !(STATUS_FEATURES_OK | STATUS_DRIVER_OK | STATUS_NEEDS_RESET);
        let accepted = state.driver_features;
        if new & STATUS_FEATURES_OK != 0
            && accepted & !self.features == 0
            && accepted & REQUIRED_FEATURES == REQUIRED_FEATURES
        {
            state.status |= STATUS_FEATURES_OK;
        }
        if new & STATUS_DRIVER_OK != 0 && state.status & STATUS_FEATURES_OK != 0 {
            state.status |= STATUS_DRIVER_OK;
            let queues = state.queues.iter().map(|queue| queue.ready().then(|| copy(queue)).flatten());
            self.worker.activate(accepted, queues.collect());
        }
        Ok(())
    }

    /// Does what has become due when the guest has written the configuration space.
    fn settle(&self, state: &mut State) -> Result<()> {
        let control = state.msix.map_or(0, |at| state.config.u16(at));
        self.worker.shared.interrupt.configure(state.config.intx_disabled(), control)?;
        // Elsewhere than where the bus leads nothing is ours, whatever the guest says.
        let bus = PCI_MMIO_BASE..PCI_MMIO_BASE + PCI_MMIO_SIZE;
        let window = state.config.window().filter(|at| bus.contains(&at.start) && at.end <= bus.end);
        let wanted = window.map(|window| window.start + NOTIFY);
        if state.doorbells.as_ref().map(|(at, _)| *at) == wanted {
            return Ok(());
        }
        let place = |base: u64, index: usize| {
            base + u64::from(NOTIFY_STEP) * u64::try_from(index).unwrap_or(u64::MAX / 8)
        };
        if let Some((base, rings)) = state.doorbells.take() {
            for (index, (event, _)) in
                self.worker.doorbells().iter().zip(rings).enumerate().filter(|(_, (_, rings))| *rings)
            {
                self.wiring.doorbell(place(base, index), event, false);
            }
        }
        state.doorbells = wanted.map(|base| {
            let doorbells = self.worker.doorbells().iter().enumerate();
            (
                base,
                doorbells
                    .map(|(index, event)| self.wiring.doorbell(place(base, index), event, true))
                    .collect(),
            )
        });
        Ok(())
    }

    /// The guest reads through the window in configuration space.
    fn pci_access(&self, state: &State) -> Option<(u64, usize)> {
        let mut body = [0; 16];
        state.config.read(state.pci_access, &mut body);
        let word = |at: usize| u32::from_le_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]]);
        let len = usize::try_from(word(12)).ok().filter(|len| matches!(len, 1 | 2 | 4))?;
        (body[4] == 0).then(|| (u64::from(word(8)), len))
    }
}

fn write_queue(state: &mut State, offset: u64, value: u32) {
    if state.status & STATUS_DRIVER_OK != 0 {
        return;
    }
    let Some(queue) = state.queues.get_mut(usize::from(state.queue_select)) else { return };
    match offset {
        24 => queue.set_size(u16::try_from(value).unwrap_or(0)),
        28 => queue.set_ready(value == 1),
        32 => queue.set_desc_table_address(Some(value), None),
        36 => queue.set_desc_table_address(None, Some(value)),
        40 => queue.set_avail_ring_address(Some(value), None),
        44 => queue.set_avail_ring_address(None, Some(value)),
        48 => queue.set_used_ring_address(Some(value), None),
        52 => queue.set_used_ring_address(None, Some(value)),
        _ => {}
    }
}

fn copy(queue: &Queue) -> Option<Queue> {
    Queue::try_from(queue.state()).ok()
}

/// The half of the features that a select register names.
fn half(features: u64, select: u32) -> u32 {
    let half = match select {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(half & 0xffff_ffff).unwrap_or(0)
}

/// `struct virtio_pci_cap` without the two bytes that every capability has.
fn capability(len: u8, kind: u8, offset: u64) -> Vec<u8> {
    let mut body = vec![len, kind, 0, 0, 0, 0];
    body.extend(u32::try_from(offset).unwrap_or(0).to_le_bytes());
    body.extend(if kind == CFG_PCI { 0u32 } else { u32::try_from(REGION).unwrap_or(0) }.to_le_bytes());
    body
}

/// PCI's class for a device.
fn class(id: u16) -> u32 {
    match id {
        1 => 0x02_0000,
        2 => 0x01_8000,
        3 => 0x07_8000,
        _ => 0xff_0000,
    }
}

impl Function for VirtioPci {
    fn config_read(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        let (window, data_at) = {
            let state = self.lock();
            state.config.read(offset, data);
            (self.pci_access(&state), state.pci_access + 16)
        };
        if let (Some((at, len)), true) = (window, offset == data_at) {
            let len = len.min(data.len());
            self.read(at, &mut data[..len])?;
        }
        Ok(())
    }

    fn config_write(&self, offset: usize, data: &[u8]) -> Result<()> {
        let (window, data_at) = {
            let state = &mut *self.lock();
            state.config.write(offset, data);
            self.settle(state)?;
            (self.pci_access(state), state.pci_access + 16)
        };
        if let (Some((at, len)), true) = (window, offset == data_at) {
            self.write(at, &data[..len.min(data.len())])?;
        }
        Ok(())
    }

    fn window(&self) -> Option<Range<u64>> {
        self.lock().config.window()
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let within = offset % REGION;
        match offset - within {
            COMMON => copy_out(&self.common(&self.lock()), within, data),
            ISR => {
                data.fill(0);
                if let (0, Some(first)) = (within, data.first_mut()) {
                    *first = self.worker.shared.interrupt.take()?;
                }
            }
            DEVICE => self.worker.shared.config.read(within, data),
            MESSAGES | PENDING => {
                data.fill(0);
                self.worker.shared.interrupt.with_msix(|msix| match offset - within {
                    MESSAGES => msix.read_table(within, data),
                    _ => msix.read_pending(within, data),
                });
            }
            _ => data.fill(0),
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let within = offset % REGION;
        match offset - within {
            COMMON => self.write_common(&mut self.lock(), within, data),
            NOTIFY if within % u64::from(NOTIFY_STEP) == 0 => {
                // The register's place names the queue; a driver's value says the same.
                self.worker.kick(usize::try_from(within / u64::from(NOTIFY_STEP)).unwrap_or(usize::MAX));
                Ok(())
            }
            DEVICE => {
                if self.worker.shared.config.write(within, data) {
                    self.worker.config_written();
                }
                Ok(())
            }
            MESSAGES => self
                .worker
                .shared
                .interrupt
                .with_msix(|msix| msix.write_table(within, data))
                .unwrap_or(Ok(())),
            _ => Ok(()),
        }
    }
}

/// Copies bytes to the guest; what is beyond them reads as zeroes.
pub(super) fn copy_out(from: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = start.checked_add(index).and_then(|at| from.get(at)).copied().unwrap_or(0);
    }
}
