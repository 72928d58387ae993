//! The Interrupt Translation Service: turns a device's message (device and event number) into an LPI.
//!
//! The guest gives it orders through a queue in its memory. What the orders say is kept in [`translate`](super::translate)
//! and never written to the tables that the guest provides for it; their sizes are respected, as they are what a real
//! ITS could remember. An order that makes no sense is skipped.
//!
//! `registers` sleeps and is taken for orders, which thus come one after the other. A message takes the lock of the list
//! of devices, or none if its sender remembers the translation.

use crate::lock::{Lock, guarded};
use crate::sync::{AtomicBool, AtomicU64, Ordering::SeqCst};
use alloc::vec::Vec;

use lock_api::Mutex;

use super::attr::{AttrError, Limits, check_frame};
use super::mmio::{PIDR2, PIDR2_OFFSET, part, replace_part};
use super::translate::{Device, Devices, Translation};
use super::types::VcpuSet;
use super::{Vgic, lpi};

/// Memory of the guest that it shares with the host.
pub trait GuestMemory {
    /// Reads at a guest address. `false` if there is no such memory.
    fn read(&self, gpa: u64, to: &mut [u8]) -> bool;

    /// Called often during work that takes long. `false`: end it where it is.
    fn pause(&self) -> bool;
}

/// Control frame and translation frame.
pub(super) const ITS_SIZE: u64 = 0x2_0000;
/// `GITS_TRANSLATER` in the translation frame: where devices write.
const TRANSLATER: u64 = 0x1_0040;

const CTLR_ENABLED: u64 = 1;
const CTLR_QUIESCENT: u64 = 1 << 31;
const VALID: u64 = 1 << 63;
const DEVICE_BITS: u32 = 16;
const EVENT_BITS: u32 = 16;
const COLLECTION_BITS: u32 = 16;
/// Bytes of an entry in the guest's tables, and of an entry in a device's translation table.
const ENTRY_SIZE: u64 = 8;
/// Physical LPIs; entries of 8 bytes; 16 bits of event and device number; collections in memory, which name processor
/// numbers.
const TYPER: u64 = 1 | (ENTRY_SIZE - 1) << 4 | (EVENT_BITS as u64 - 1) << 8 | (DEVICE_BITS as u64 - 1) << 13;
const IIDR: u64 = 0x5200_1000;
const COMMAND_SIZE: u64 = 32;

/// `GITS_BASER<n>`: kind 1 devices, kind 4 collections.
const BASER_KIND: [u64; 2] = [1 << 56, 4 << 56];
const BASER_ENTRY: u64 = (ENTRY_SIZE - 1) << 48;
const BASER_INDIRECT: u64 = 1 << 62;
/// Type and entry size cannot be written.
const BASER_FIXED: u64 = 7 << 56 | 0x1F << 48;

struct Registers {
    enabled: bool,
    cbaser: u64,
    cwriter: u64,
    creadr: u64,
    baser: [u64; 2],
    /// Collection and the vCPU it stands for, sorted.
    collections: Vec<(u16, u16)>,
}

/// An ITS. `M` sleeps, `R` is the vGIC's.
pub struct Its<R: Lock, M: Lock> {
    /// Where it lies; [`NOWHERE`] until user space has said it.
    base: AtomicU64,
    enabled: AtomicBool,
    registers: Mutex<M, Registers>,
    devices: Devices<R>,
}

const NOWHERE: u64 = u64::MAX;

/// A translation that a sender has remembered, to be asked for again with the next message. All zero: none.
#[derive(Debug, Default)]
pub struct Remembered(AtomicU64);

impl Remembered {
    const INTID_BITS: u32 = lpi::INTID_BITS;

    fn get(&self, generation: u64) -> Option<u32> {
        let word = self.0.load(SeqCst);
        let [a, b, ..] = word.to_le_bytes();
        (word >> Self::INTID_BITS == generation).then(|| u16::from_le_bytes([a, b]).into())
    }

    fn set(&self, generation: u64, intid: u16) {
        self.0.store(generation << Self::INTID_BITS | u64::from(intid), SeqCst);
    }

    /// The sender's messages are others from now on.
    pub fn forget(&self) {
        self.0.store(0, SeqCst);
    }
}

/// What an order says.
struct Command([u64; 4]);

impl Command {
    fn parse(bytes: &[u8; 32]) -> Command {
        let word = |n: usize| u64::from_le_bytes(core::array::from_fn(|i| bytes[n * 8 + i]));
        Command([word(0), word(1), word(2), word(3)])
    }
    fn code(&self) -> u64 {
        self.0[0] & 0xFF
    }
    fn low(word: u64) -> u32 {
        let [a, b, c, d, ..] = word.to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }
    fn high(word: u64) -> u32 {
        Self::low(word >> 32)
    }
    fn device(&self) -> u32 {
        Self::high(self.0[0])
    }
    fn event(&self) -> u32 {
        Self::low(self.0[1])
    }
    fn intid(&self) -> u32 {
        Self::high(self.0[1])
    }
    fn collection(&self) -> u16 {
        let [a, b, ..] = self.0[2].to_le_bytes();
        u16::from_le_bytes([a, b])
    }
    fn valid(&self) -> bool {
        self.0[2] & VALID != 0
    }
    /// RDbase, bits 50:16, a processor number as `GITS_TYPER.PTA` is 0.
    fn processor(word: u64) -> u64 {
        word >> 16 & 0x7_FFFF_FFFF
    }
}

/// Puts `value` in the place of `key`, or takes that out; the vector is sorted.
fn replace<K: Ord + Copy, V>(list: &mut Vec<(K, V)>, key: K, value: Option<V>) -> bool {
    match (list.binary_search_by_key(&key, |entry| entry.0), value) {
        (Ok(at), Some(value)) => {
            if let Some(entry) = list.get_mut(at) {
                entry.1 = value;
            }
            true
        }
        (Ok(at), None) => {
            list.remove(at);
            true
        }
        (Err(at), Some(value)) => {
            let room = list.try_reserve(1).is_ok();
            if room {
                list.insert(at, (key, value));
            }
            room
        }
        (Err(_), None) => true,
    }
}

fn find_in<K: Ord + Copy, V: Copy>(list: &[(K, V)], key: K) -> Option<V> {
    list.binary_search_by_key(&key, |entry| entry.0).ok().and_then(|at| list.get(at)).map(|entry| entry.1)
}

impl Registers {
    /// How many entries the guest's table has room for.
    fn capacity(&self, which: usize) -> u64 {
        let baser = self.baser[which];
        if baser & VALID == 0 {
            return 0;
        }
        let page: u64 = match baser >> 8 & 3 {
            0 => 0x1000,
            1 => 0x4000,
            _ => 0x1_0000,
        };
        let bytes = ((baser & 0xFF) + 1) * page;
        // The first level of an indirect table has 8-byte pointers to pages of entries.
        if baser & BASER_INDIRECT != 0 { bytes / 8 * (page / ENTRY_SIZE) } else { bytes / ENTRY_SIZE }
    }

    fn queue_size(&self) -> u64 {
        ((self.cbaser & 0xFF) + 1) * 0x1000
    }
}

impl<R: Lock, M: Lock> Default for Its<R, M> {
    fn default() -> Self {
        Self::new()
    }
}

/// What executing orders needs besides the ITS itself.
struct Orders<'a, R: Lock> {
    gic: &'a Vgic<R>,
    memory: &'a dyn GuestMemory,
    kick: VcpuSet,
    /// Counts steps, to pause now and then.
    steps: u32,
}

impl<R: Lock> Orders<'_, R> {
    /// `false`: end it where it is.
    fn pause(&mut self) -> bool {
        self.steps = self.steps.wrapping_add(1);
        self.steps % 64 != 0 || self.memory.pause()
    }

    fn route(&mut self, intid: u16, vcpu: Option<u16>) {
        self.kick.extend(&self.gic.lpi_route(intid.into(), vcpu.map(usize::from)));
    }

    fn set_pending(&mut self, intid: u16, pending: bool) {
        self.kick.extend(&self.gic.lpi_set_pending(intid.into(), pending));
    }

    fn configure(&mut self, intid: u16) {
        let intid = intid.into();
        let mut config = [0];
        let address = self.gic.lpi_config_address(intid);
        if address.is_some_and(|gpa| self.memory.read(gpa, &mut config)) {
            self.kick.extend(&self.gic.lpi_configure(intid, config[0]));
        }
    }

    /// What the pending table says, if anything.
    fn read_pending(&mut self, vcpu: usize, intid: u16) {
        let mut bits = [0];
        let address = self.gic.lpi_pending_address(vcpu, intid.into());
        if address.is_some_and(|gpa| self.memory.read(gpa, &mut bits)) && bits[0] & 1 << (intid % 8) != 0 {
            self.set_pending(intid, true);
        }
    }

    /// Nothing leads to these LPIs any more.
    fn discard(&mut self, device: &Device) {
        for (_, to) in device.iter() {
            self.route(to.intid, None);
            self.set_pending(to.intid, false);
            self.pause();
        }
    }
}

impl<R: Lock, M: Lock> Its<R, M> {
    /// As `KVM_CREATE_DEVICE` leaves it: nowhere.
    pub fn new() -> Self {
        let registers = Registers {
            enabled: false,
            cbaser: 0,
            cwriter: 0,
            creadr: 0,
            baser: BASER_KIND.map(|kind| kind | BASER_ENTRY),
            collections: Vec::new(),
        };
        Its {
            base: AtomicU64::new(NOWHERE),
            enabled: AtomicBool::new(false),
            registers: guarded(c"its.orders", registers),
            devices: Devices::new(),
        }
    }

    /// `KVM_VGIC_ITS_ADDR_TYPE`.
    pub fn set_address(&self, limits: Limits, base: u64) -> Result<(), AttrError> {
        check_frame(limits, base, ITS_SIZE)?;
        let placed = self.base.compare_exchange(NOWHERE, base, SeqCst, SeqCst);
        placed.map(|_| ()).map_err(|_| AttrError::Exists)
    }

    /// Where it lies.
    pub fn address(&self) -> Option<u64> {
        Some(self.base.load(SeqCst)).filter(|base| *base != NOWHERE)
    }

    /// `KVM_DEV_ARM_ITS_CTRL_RESET`: as after creation, but for the address.
    pub fn reset(&self, gic: &Vgic<R>, memory: &dyn GuestMemory) -> VcpuSet {
        let mut orders = Orders { gic, memory, kick: VcpuSet::EMPTY, steps: 0 };
        let mut registers = self.registers.lock();
        self.enabled.store(false, SeqCst);
        registers.enabled = false;
        (registers.cbaser, registers.cwriter, registers.creadr) = (0, 0, 0);
        registers.baser = BASER_KIND.map(|kind| kind | BASER_ENTRY);
        registers.collections = Vec::new();
        self.forget_devices(&mut orders);
        orders.kick
    }

    /// Whether a message to `address` is for this ITS.
    pub fn owns_doorbell(&self, address: u64) -> bool {
        self.address().is_some_and(|base| address == base + TRANSLATER)
    }

    /// Whether the guest has switched it on.
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(SeqCst)
    }

    /// A message of a device, whose sender may remember where it went. `None` if the guest has not asked for it: it is
    /// dropped. Any context.
    pub fn signal(
        &self,
        gic: &Vgic<R>,
        device: u32,
        event: u32,
        remembered: Option<&Remembered>,
    ) -> Option<VcpuSet> {
        if !self.is_enabled() {
            return None;
        }
        // Read first: a change that comes later makes what is remembered worthless.
        let generation = self.devices.generation();
        if let Some(intid) = remembered.and_then(|remembered| remembered.get(generation)) {
            return Some(gic.lpi_set_pending(intid, true));
        }
        let to = self.devices.find(device, event)?;
        if let Some(remembered) = remembered {
            remembered.set(generation, to.intid);
        }
        gic.lpi_target(to.intid.into())?;
        Some(gic.lpi_set_pending(to.intid.into(), true))
    }

    fn offset(&self, gpa: u64) -> Option<u64> {
        gpa.checked_sub(self.address()?).filter(|offset| *offset < ITS_SIZE)
    }

    /// Reads `len` bytes at the guest address `gpa` (without the shared bit). `None` if it is not the ITS's.
    pub fn mmio_read(&self, gpa: u64, len: usize) -> Option<u64> {
        let offset = self.offset(gpa)?;
        let registers = self.registers.lock();
        Some(match (offset, len) {
            (0x0000, 4) if registers.enabled => CTLR_ENABLED,
            (0x0000, 4) => CTLR_QUIESCENT,
            (0x0004, 4) => IIDR,
            (0x0008 | 0x000C, 4 | 8) => part(TYPER, offset, len),
            (0x0080 | 0x0084, 4 | 8) => part(registers.cbaser, offset, len),
            (0x0088 | 0x008C, 4 | 8) => part(registers.cwriter, offset, len),
            (0x0090 | 0x0094, 4 | 8) => part(registers.creadr, offset, len),
            (0x0100..0x0108, 4 | 8) => part(registers.baser[0], offset, len),
            (0x0108..0x0110, 4 | 8) => part(registers.baser[1], offset, len),
            (PIDR2_OFFSET, 4) => PIDR2,
            _ => 0,
        })
    }

    /// Writes `len` bytes at the guest address `gpa` (without the shared bit) and carries out what is in the queue.
    /// `None` if it is not the ITS's.
    pub fn mmio_write(
        &self,
        gic: &Vgic<R>,
        memory: &dyn GuestMemory,
        gpa: u64,
        len: usize,
        value: u64,
    ) -> Option<VcpuSet> {
        let offset = self.offset(gpa)?;
        let mut orders = Orders { gic, memory, kick: VcpuSet::EMPTY, steps: 0 };
        let mut registers = self.registers.lock();
        match (offset, len) {
            (0x0000, 4) => {
                registers.enabled = value & CTLR_ENABLED != 0;
                self.enabled.store(registers.enabled, SeqCst);
            }
            (0x0080 | 0x0084, 4 | 8) if !registers.enabled => {
                // Neither shareability nor cacheability matters: what is read back is what was written.
                registers.cbaser = replace_part(registers.cbaser, offset, len, value) & !0x300;
                (registers.creadr, registers.cwriter) = (0, 0);
            }
            (0x0088 | 0x008C, 4 | 8) => {
                let writer = replace_part(registers.cwriter, offset, len, value) & 0xF_FFE0;
                if writer < registers.queue_size() {
                    registers.cwriter = writer;
                }
            }
            (0x0100..0x0110, 4 | 8) if !registers.enabled => {
                let which = usize::from(offset >= 0x108);
                let fixed = BASER_KIND[which] | BASER_ENTRY;
                let mut new = replace_part(registers.baser[which], offset, len, value) & !BASER_FIXED | fixed;
                if which == 1 {
                    // Only devices are so many that their table may have two levels.
                    new &= !BASER_INDIRECT;
                }
                if new >> 8 & 3 == 3 {
                    new &= !(1 << 8);
                }
                registers.baser[which] = new;
                // A table that was taken away takes with it all that was in it.
                if new & VALID == 0 && which == 0 {
                    self.forget_devices(&mut orders);
                } else if new & VALID == 0 {
                    registers.collections = Vec::new();
                    self.each(&mut orders, |orders, _, to| orders.route(to.intid, None));
                }
            }
            _ => {}
        }
        if registers.enabled {
            self.run(&mut orders, &mut registers);
        }
        Some(orders.kick)
    }

    fn forget_devices(&self, orders: &mut Orders<'_, R>) {
        let devices = self.devices.take();
        self.devices.changed();
        for device in devices {
            orders.discard(&device);
        }
    }

    /// Carries out the queue's orders. At most a queue full of them: a guest that is fast in writing more only
    /// writes the register again.
    fn run(&self, orders: &mut Orders<'_, R>, registers: &mut Registers) {
        if registers.cbaser & VALID == 0 {
            return;
        }
        let (base, size) = (registers.cbaser & 0x000F_FFFF_FFFF_F000, registers.queue_size());
        let mut left = size / COMMAND_SIZE;
        while registers.creadr != registers.cwriter && left > 0 && orders.pause() {
            left -= 1;
            let mut bytes = [0; 32];
            if orders.memory.read(base + registers.creadr, &mut bytes) {
                // One that makes no sense is skipped.
                let _ = self.execute(orders, registers, &Command::parse(&bytes));
            }
            registers.creadr = (registers.creadr + COMMAND_SIZE) % size;
        }
    }

    /// Looks at every event that leads to an LPI.
    fn each(&self, orders: &mut Orders<'_, R>, mut look: impl FnMut(&mut Orders<'_, R>, u32, Translation)) {
        let mut at = 0;
        while let Some(device) = self.devices.nth(at) {
            at += 1;
            for (event, to) in device.iter() {
                look(orders, event, to);
                if !orders.pause() {
                    return;
                }
            }
            if !orders.pause() {
                return;
            }
        }
    }

    /// `None` if the order makes no sense.
    fn execute(
        &self,
        orders: &mut Orders<'_, R>,
        registers: &mut Registers,
        command: &Command,
    ) -> Option<()> {
        let (device, event, collection) = (command.device(), command.event(), command.collection());
        let find = || self.devices.find(device, event);
        match command.code() {
            MAPD => {
                let bits = u32::try_from(command.0[1] & 0x1F).ok()? + 1;
                if u64::from(device) >= registers.capacity(0).min(1 << DEVICE_BITS) || bits > EVENT_BITS {
                    return None;
                }
                if let Some(old) = self.devices.remove(device) {
                    self.devices.changed();
                    orders.discard(&old);
                }
                if command.valid() {
                    return self.devices.insert(Device::new(device, bits)?).then_some(());
                }
            }
            MAPC => {
                if u64::from(collection) >= registers.capacity(1).min(1 << COLLECTION_BITS) {
                    return None;
                }
                let vcpu = match command.valid() {
                    true => Some(orders.vcpu(command.0[2])?),
                    false => None,
                };
                replace(&mut registers.collections, collection, vcpu).then_some(())?;
                self.each(orders, |orders, _, to| {
                    if to.collection == collection {
                        orders.route(to.intid, vcpu);
                    }
                });
            }
            code @ (MAPTI | MAPI) => {
                let intid = if code == MAPTI { command.intid() } else { event };
                let vcpu = find_in(&registers.collections, collection);
                if u64::from(collection) >= registers.capacity(1) || find().is_some() {
                    return None;
                }
                let to = Translation { intid: u16::try_from(intid).ok()?, collection };
                let device = self.devices.get(device)?;
                if !orders.gic.lpi_prepare(intid) {
                    return None;
                }
                // What was left over from an earlier use of the number is not this device's.
                orders.set_pending(to.intid, false);
                orders.configure(to.intid);
                orders.route(to.intid, vcpu);
                device.set(event, Some(to)).then_some(())?;
                self.devices.changed();
            }
            MOVI => {
                let to = find()?;
                let vcpu = find_in(&registers.collections, collection)?;
                self.devices.get(device)?.set(event, Some(Translation { collection, ..to }));
                orders.route(to.intid, Some(vcpu));
            }
            DISCARD => {
                let to = find()?;
                self.devices.get(device)?.set(event, None);
                self.devices.changed();
                orders.route(to.intid, None);
                orders.set_pending(to.intid, false);
            }
            INV => orders.configure(find()?.intid),
            INVALL => {
                find_in(&registers.collections, collection)?;
                self.each(orders, |orders, _, to| {
                    if to.collection == collection {
                        orders.configure(to.intid);
                    }
                });
            }
            code @ (INT | CLEAR) => orders.set_pending(find()?.intid, code == INT),
            MOVALL => {
                let (from, target) = (orders.vcpu(command.0[2])?, orders.vcpu(command.0[3])?);
                self.each(orders, |orders, _, to| {
                    if orders.gic.lpi_target(to.intid.into()) == Some(from.into()) {
                        orders.route(to.intid, Some(target));
                    }
                });
            }
            // Everything has happened already.
            SYNC => {}
            _ => return None,
        }
        Some(())
    }

    /// LPIs were enabled at `vcpu`: reads what the guest's tables say about those that go there.
    pub fn enabled_at(&self, gic: &Vgic<R>, memory: &dyn GuestMemory, vcpu: usize) -> VcpuSet {
        let mut orders = Orders { gic, memory, kick: VcpuSet::EMPTY, steps: 0 };
        let _registers = self.registers.lock();
        self.each(&mut orders, |orders, _, to| {
            if gic.lpi_target(to.intid.into()) == Some(vcpu) {
                orders.configure(to.intid);
                orders.read_pending(vcpu, to.intid);
            }
        });
        orders.kick
    }
}

impl<R: Lock> Orders<'_, R> {
    /// The vCPU that RDbase in `word` names.
    fn vcpu(&self, word: u64) -> Option<u16> {
        let vcpu = u16::try_from(Command::processor(word)).ok()?;
        (usize::from(vcpu) < self.gic.vcpu_count()).then_some(vcpu)
    }
}

const MOVI: u64 = 0x01;
const INT: u64 = 0x03;
const CLEAR: u64 = 0x04;
const SYNC: u64 = 0x05;
const MAPD: u64 = 0x08;
const MAPC: u64 = 0x09;
const MAPTI: u64 = 0x0A;
const MAPI: u64 = 0x0B;
const INV: u64 = 0x0C;
const INVALL: u64 = 0x0D;
const MOVALL: u64 = 0x0E;
const DISCARD: u64 = 0x0F;
