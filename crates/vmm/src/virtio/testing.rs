//! A driver for tests: it plays the guest's part through the registers and in the guest's memory, by the rules or
//! against them.
#![cfg_attr(not(test), allow(dead_code))]

use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cca_abi::kvm::ioctl as kvm;
use vm_memory::{Bytes, GuestAddress};

use super::transport::VirtioPci;
use super::{Device, REQUIRED_FEATURES};
use crate::Result;
use crate::eventfd::EventFd;
use crate::kvm::Message;
use crate::layout::RAM_BASE;
use crate::memory::{GuestView, SharedMemory};
use crate::pci::Function;
use crate::seccomp::Confinement;
use crate::wiring::Wiring;

/// Bytes of RAM, of which the second half is private.
pub(super) const RAM: u64 = 0x20_0000;
const QUEUE_BYTES: u64 = 0x4000;

/// A machine that remembers what its devices asked for.
#[derive(Default)]
pub(super) struct Wires {
    pub(super) lines: Mutex<BTreeMap<u32, bool>>,
    pub(super) routes: Mutex<BTreeMap<u32, Message>>,
    pub(super) connected: Mutex<BTreeMap<u32, OwnedFd>>,
    pub(super) doorbells: Mutex<BTreeMap<u64, OwnedFd>>,
    pub(super) without_its: bool,
}

fn duplicate(event: &EventFd) -> OwnedFd {
    // SAFETY: a system call without pointers; the new descriptor is checked and owned.
    unsafe {
        let fd = libc::dup(event.fd());
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    }
}

impl Wires {
    /// How often a global interrupt was raised since the last look.
    pub(super) fn raised(&self, gsi: u32) -> u64 {
        use std::io::Read as _;
        let connected = self.connected.lock().unwrap();
        let Some(fd) = connected.get(&gsi) else { return 0 };
        let mut count = [0; 8];
        let mut file = std::fs::File::from(fd.try_clone().unwrap());
        file.read_exact(&mut count).map_or(0, |()| u64::from_ne_bytes(count))
    }

    /// Rings the doorbell at an address, if there is one.
    pub(super) fn ring(&self, address: u64) -> bool {
        use std::io::Write as _;
        let doorbells = self.doorbells.lock().unwrap();
        let Some(fd) = doorbells.get(&address) else { return false };
        let _ = std::fs::File::from(fd.try_clone().unwrap()).write_all(&1u64.to_ne_bytes());
        true
    }
}

/// Asks the kernel as the real wiring does, and reaches nothing: whoever's filter does not allow it ends with the test.
fn ask(request: u32) {
    // SAFETY: a system call on no file, without pointers.
    unsafe { libc::ioctl(-1, request.into()) };
}

impl Wiring for Wires {
    fn set_line(&self, spi: u32, level: bool) -> Result<()> {
        ask(kvm::IRQ_LINE);
        self.lines.lock().unwrap().insert(spi, level);
        Ok(())
    }

    fn has_messages(&self) -> bool {
        !self.without_its
    }

    fn route(&self, gsi: u32, message: Message) -> Result<()> {
        ask(kvm::SET_GSI_ROUTING);
        self.routes.lock().unwrap().insert(gsi, message);
        Ok(())
    }

    fn connect(&self, gsi: u32, event: &EventFd) -> Result<()> {
        ask(kvm::IRQFD);
        assert!(self.connected.lock().unwrap().insert(gsi, duplicate(event)).is_none(), "connected twice");
        Ok(())
    }

    fn doorbell(&self, address: u64, event: &EventFd, there: bool) -> bool {
        ask(kvm::IOEVENTFD);
        let mut doorbells = self.doorbells.lock().unwrap();
        if there && !doorbells.contains_key(&address) {
            doorbells.insert(address, duplicate(event)).is_none()
        } else {
            !there && doorbells.remove(&address).is_some()
        }
    }
}

/// The guest's side of a device.
pub struct Driver {
    /// The device behind its registers.
    pub device: Arc<VirtioPci>,
    pub(super) wires: Arc<Wires>,
    /// What the device sees of the guest's memory.
    pub view: GuestView,
    /// What the device had to complain about.
    pub reports: Arc<Mutex<Vec<String>>>,
    queues: Vec<Ring>,
    event_idx: bool,
    next_buffer: u64,
}

#[derive(Clone, Copy)]
struct Ring {
    base: u64,
    size: u16,
    next: u16,
    seen: u16,
}

/// One buffer of a chain.
pub enum Part<'a> {
    /// Bytes for the device.
    Read(&'a [u8]),
    /// Room for so many bytes from it.
    Write(usize),
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

impl Driver {
    /// A machine with this one device.
    #[must_use]
    pub fn new(device: Box<dyn Device>) -> Self {
        Self::on(device, Wires::default())
    }

    pub(super) fn on(device: Box<dyn Device>, wires: Wires) -> Self {
        Confinement::On.prepare().unwrap();
        let wires = Arc::new(wires);
        let memory = Arc::new(SharedMemory::new(RAM, true).unwrap());
        memory.set_shared(0, RAM / 2, true);
        let view = GuestView::new(memory, 1 << 32);
        let reports = Arc::new(Mutex::new(Vec::new()));
        let sink = reports.clone();
        let device = VirtioPci::new(
            1,
            device,
            Arc::new(view.clone()),
            wires.clone(),
            Arc::new(move |text| sink.lock().unwrap().push(text.to_owned())),
            Confinement::On,
        )
        .unwrap();
        let device = Arc::new(device);
        Self {
            device,
            wires,
            view,
            reports,
            queues: Vec::new(),
            event_idx: false,
            next_buffer: RAM_BASE + 0x8_0000,
        }
    }

    /// Reads a register of the window.
    #[must_use]
    pub fn get<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.device.read(offset, &mut bytes).unwrap();
        bytes
    }

    /// Writes a register of the window.
    pub fn put(&self, offset: u64, bytes: &[u8]) {
        self.device.write(offset, bytes).unwrap();
    }

    /// The device status.
    #[must_use]
    pub fn status(&self) -> u8 {
        self.get::<1>(20)[0]
    }

    /// Resets the device and waits for it.
    pub(super) fn reset(&self) {
        self.put(20, &[0]);
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.status() != 0 {
            assert!(Instant::now() < deadline, "the reset does not end");
            std::thread::yield_now();
        }
    }

    /// Goes through the initialization that the specification prescribes.
    pub fn start(&mut self, wanted: u64) {
        self.reset();
        self.start_at_once(wanted);
    }

    /// As [`Driver::start`], without a reset.
    pub(super) fn start_at_once(&mut self, wanted: u64) {
        self.put(20, &[1]);
        self.put(20, &[3]);
        let mut offered = 0;
        for half in 0..2u32 {
            self.put(0, &half.to_le_bytes());
            offered |= u64::from(u32::from_le_bytes(self.get(4))) << (32 * half);
        }
        let accepted = offered & wanted;
        for half in 0..2u32 {
            self.put(8, &half.to_le_bytes());
            self.put(12, &u32::try_from(accepted >> (32 * half) & 0xffff_ffff).unwrap().to_le_bytes());
        }
        self.event_idx = accepted >> 29 & 1 != 0;
        self.put(20, &[11]);
        assert_eq!(self.status(), 11, "the features were not accepted");
        let count = u16::from_le_bytes(self.get(18));
        self.queues.clear();
        for index in 0..count {
            self.put(22, &index.to_le_bytes());
            let size = u16::from_le_bytes(self.get(24));
            let base = RAM_BASE + u64::from(index) * QUEUE_BYTES;
            let zeroes = vec![0; usize::try_from(QUEUE_BYTES).unwrap()];
            self.view.write_slice(&zeroes, GuestAddress(base)).unwrap();
            for (offset, address) in [(32, base), (40, base + 0x2000), (48, base + 0x3000)] {
                self.put(offset, &address.to_le_bytes());
            }
            self.put(28, &[1, 0]);
            self.queues.push(Ring { base, size, next: 0, seen: 0 });
        }
        self.put(20, &[15]);
        self.next_buffer = RAM_BASE + 0x8_0000;
    }

    /// Makes a chain available; returns the addresses of its buffers.
    pub(super) fn give(&mut self, queue: usize, parts: &[Part<'_>]) -> Vec<u64> {
        let addresses = self.give_quietly(queue, parts);
        self.kick_if_wanted(queue);
        addresses
    }

    /// Makes a chain available and tells nobody.
    pub(super) fn give_quietly(&mut self, queue: usize, parts: &[Part<'_>]) -> Vec<u64> {
        let mut addresses = Vec::new();
        let buffers: Vec<(u64, u32, u16)> = parts
            .iter()
            .map(|part| {
                let at = self.next_buffer;
                let (len, flags) = match part {
                    Part::Read(bytes) => {
                        self.view.write_slice(bytes, GuestAddress(at)).unwrap();
                        (bytes.len(), 0)
                    }
                    Part::Write(len) => (*len, 2),
                };
                self.next_buffer = at + u64::try_from(len.next_multiple_of(16)).unwrap();
                if self.next_buffer > RAM_BASE + 0xf_0000 {
                    self.next_buffer = RAM_BASE + 0x8_0000;
                }
                addresses.push(at);
                (at, u32::try_from(len).unwrap(), flags)
            })
            .collect();
        self.put_raw(queue, &buffers);
        addresses
    }

    /// Makes a chain of any descriptors available: address, length, flags.
    pub(super) fn give_raw(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) {
        self.put_raw(queue, buffers);
        self.kick_if_wanted(queue);
    }

    fn put_raw(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) {
        let ring = &mut self.queues[queue];
        let count = u16::try_from(buffers.len()).unwrap();
        // Tests wait for each chain before the table is used again.
        let first = ring.next % ring.size;
        for (index, (address, len, flags)) in (0u16..).zip(buffers) {
            let place = (first + index) % ring.size;
            let next = (place + 1) % ring.size;
            let flags = flags | u16::from(index + 1 < count);
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(len.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend(next.to_le_bytes());
            self.view.write_slice(&descriptor, GuestAddress(ring.base + 16 * u64::from(place))).unwrap();
        }
        let avail = ring.base + 0x2000;
        let index: u16 = u16::from_le_bytes(read(&self.view, avail + 2));
        let place = u64::from(index % ring.size);
        self.view.write_slice(&first.to_le_bytes(), GuestAddress(avail + 4 + 2 * place)).unwrap();
        self.view.write_slice(&index.wrapping_add(1).to_le_bytes(), GuestAddress(avail + 2)).unwrap();
        ring.next = (first + count) % ring.size;
    }

    fn kick_if_wanted(&self, queue: usize) {
        let ring = self.queues[queue];
        let index = u16::from_le_bytes(read::<2>(&self.view, ring.base + 0x2000 + 2)).wrapping_sub(1);
        // A driver notifies when the device has asked for it, and not otherwise.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let wanted = u16::from_le_bytes(read(&self.view, ring.base + 0x3000 + 4 + 8 * u64::from(ring.size)));
        if wanted == index || !self.event_idx {
            self.kick(queue);
        }
    }

    pub(super) fn kick(&self, queue: usize) {
        self.put(0x3000 + 4 * u64::try_from(queue).unwrap(), &u16::try_from(queue).unwrap().to_le_bytes());
    }

    /// Waits for the next chain to come back; gives how much was written into it.
    pub(super) fn take(&mut self, queue: usize) -> Option<usize> {
        let deadline = Instant::now() + Duration::from_secs(5);
        let ring = &mut self.queues[queue];
        let used = ring.base + 0x3000;
        while u16::from_le_bytes(read(&self.view, used + 2)) == ring.seen {
            if Instant::now() > deadline || !self.reports.lock().unwrap().is_empty() {
                return None;
            }
            std::thread::yield_now();
        }
        let place = u64::from(ring.seen % ring.size);
        ring.seen = ring.seen.wrapping_add(1);
        let len = u32::from_le_bytes(read(&self.view, used + 4 + 8 * place + 4));
        Some(usize::try_from(len).unwrap())
    }

    pub(super) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.view.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// What a hostile guest does, as bytes: each step is a byte that says what, and then what it needs; missing bytes are
/// zeroes. Every string of bytes is a script.
#[derive(Debug)]
pub struct Script<'a>(pub &'a [u8]);

impl<'a> Script<'a> {
    /// The next number.
    pub fn number<const N: usize>(&mut self) -> u64 {
        let mut bytes = [0; 8];
        bytes[..N.min(8)].iter_mut().for_each(|byte| *byte = self.byte().unwrap_or(0));
        u64::from_le_bytes(bytes)
    }

    /// The next byte, unless this is the end.
    pub fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// The next bytes; fewer at the end.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (first, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        first
    }
}

impl Driver {
    /// Plays a script against a device that is started.
    pub fn play(&mut self, script: &mut Script<'_>) {
        while let Some(what) = script.byte() {
            let choice = usize::from(what / 10);
            let width = 1 << (choice % 4);
            let queue = choice % self.queues.len().max(1);
            match what % 10 {
                // Registers, all of them.
                0 => {
                    let at = script.number::<2>() % 0x6100;
                    self.put(at, &script.number::<8>().to_le_bytes()[..width]);
                }
                1 => drop(self.get::<8>(script.number::<2>() % 0x6100)),
                // Configuration space.
                2 => {
                    let at = usize::try_from(script.number::<2>() % 300).unwrap();
                    self.device.config_write(at, &script.number::<8>().to_le_bytes()[..width]).unwrap();
                }
                3 => {
                    let at = usize::try_from(script.number::<2>() % 300).unwrap();
                    self.device.config_read(at, &mut [0; 8][..width]).unwrap();
                }
                // Rings and descriptors.
                4 => {
                    let at = RAM_BASE + script.number::<3>() % 0x2_0000;
                    self.view.write_slice(&script.number::<8>().to_le_bytes(), GuestAddress(at)).unwrap();
                    self.kick(queue);
                }
                5 => {
                    let place = script.number::<1>();
                    let at = match place % 4 {
                        0 => RAM_BASE,
                        1 => RAM_BASE + 0x8_0000,
                        2 => RAM_BASE + RAM / 2 - 8,
                        _ => script.number::<8>(),
                    };
                    let (len, flags) = (script.number::<4>(), u16::try_from(place >> 2 & 7).unwrap());
                    self.give_raw(queue, &[(at, u32::try_from(len).unwrap(), flags)]);
                }
                // Chains by the rules, with any contents.
                6 => {
                    let count = script.number::<1>() % 5;
                    let parts: Vec<Part<'_>> = (0..count)
                        .map(|_| {
                            let len = usize::try_from(script.number::<1>()).unwrap();
                            if len < 128 {
                                Part::Read(script.bytes(len))
                            } else {
                                Part::Write((len - 127) * 16)
                            }
                        })
                        .collect();
                    self.give(queue, &parts);
                }
                // Messages: the table, and the control word.
                7 => {
                    let at = 0x4000 + script.number::<1>();
                    self.put(at, &script.number::<8>().to_le_bytes()[..width]);
                }
                8 => {
                    let control = script.number::<2>().to_le_bytes();
                    self.device.config_write(control_word(self).unwrap(), &control[..2]).unwrap();
                }
                _ => self.start(script.number::<8>() | REQUIRED_FEATURES),
            }
        }
    }
}

/// Where MSI-X's control word is in configuration space.
pub(super) fn control_word(driver: &Driver) -> Option<usize> {
    let byte = |at: usize| {
        let mut byte = [0];
        driver.device.config_read(at, &mut byte).unwrap();
        usize::from(byte[0])
    };
    let mut at = byte(0x34);
    while at != 0 {
        if byte(at) == 0x11 {
            return Some(at + 2);
        }
        at = byte(at + 1);
    }
    None
}

fn read<const N: usize>(view: &GuestView, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    view.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}
