//! The Interrupt Translation Service: turns a device's message (device and event number) into an LPI.
//!
//! The guest gives it orders through a queue in its memory. What the orders say is kept here and never written to the
//! tables that the guest provides for it; their sizes are respected, as they are what a real ITS could remember. An
//! order that makes no sense is skipped.
//!
//! Two locks: `registers` sleeps, is taken for orders, and guards what only they need; `table` is taken in any context,
//! to translate.

use alloc::vec::Vec;

use lock_api::{Mutex, RawMutex};

use super::attr::{AttrError, Limits, check_frame};
use super::mmio::{PIDR2, PIDR2_OFFSET, part, replace_part};
use super::types::VcpuSet;
use super::{Vgic, lpi};

/// Memory of the guest that it shares with the host.
pub trait GuestMemory {
    /// Reads at a guest address. `false` if there is no such memory.
    fn read(&self, gpa: u64, to: &mut [u8]) -> bool;
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
/// As many translations as there are LPIs.
const MAX_EVENTS: usize = (1 << lpi::INTID_BITS) - lpi::FIRST;
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
    /// Device number and bits of its event numbers, sorted.
    devices: Vec<(u32, u32)>,
    /// Collection and the vCPU it stands for, sorted.
    collections: Vec<(u16, u16)>,
}

/// One translation.
#[derive(Clone, Copy)]
struct Event {
    /// Device number, event number.
    key: (u32, u32),
    intid: u16,
    collection: u16,
}

/// An ITS. `M` sleeps, `R` is the vGIC's.
pub struct Its<R: RawMutex, M: RawMutex> {
    registers: Mutex<M, Registers>,
    table: Mutex<R, Table>,
}

struct Table {
    base: Option<u64>,
    enabled: bool,
    /// Sorted by key.
    events: Vec<Event>,
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

fn find<K: Ord + Copy, V: Copy>(list: &[(K, V)], key: K) -> Option<V> {
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

impl<R: RawMutex, M: RawMutex> Default for Its<R, M> {
    fn default() -> Self {
        Self::new()
    }
}

impl<R: RawMutex, M: RawMutex> Its<R, M> {
    /// As `KVM_CREATE_DEVICE` leaves it: nowhere.
    pub fn new() -> Self {
        let registers = Registers {
            enabled: false,
            cbaser: 0,
            cwriter: 0,
            creadr: 0,
            baser: BASER_KIND.map(|kind| kind | BASER_ENTRY),
            devices: Vec::new(),
            collections: Vec::new(),
        };
        let table = Table { base: None, enabled: false, events: Vec::new() };
        Its { registers: Mutex::new(registers), table: Mutex::new(table) }
    }

    /// `KVM_VGIC_ITS_ADDR_TYPE`.
    pub fn set_address(&self, limits: Limits, base: u64) -> Result<(), AttrError> {
        check_frame(limits, base, ITS_SIZE)?;
        let mut table = self.table.lock();
        if table.base.is_some() {
            return Err(AttrError::Exists);
        }
        table.base = Some(base);
        Ok(())
    }

    /// Where it lies.
    pub fn address(&self) -> Option<u64> {
        self.table.lock().base
    }

    /// `KVM_DEV_ARM_ITS_CTRL_RESET`: as after creation, but for the address.
    pub fn reset<G: RawMutex>(&self, gic: &Vgic<G>) {
        let mut registers = self.registers.lock();
        registers.enabled = false;
        (registers.cbaser, registers.cwriter, registers.creadr) = (0, 0, 0);
        registers.baser = BASER_KIND.map(|kind| kind | BASER_ENTRY);
        registers.devices.clear();
        registers.collections.clear();
        let mut table = self.table.lock();
        table.enabled = false;
        let events = core::mem::take(&mut table.events);
        drop(table);
        for event in events {
            let _ = gic.lpi_route(event.intid.into(), None);
        }
    }

    /// Whether a message to `address` is for this ITS.
    pub fn owns_doorbell(&self, address: u64) -> bool {
        self.table.lock().base.is_some_and(|base| address == base + TRANSLATER)
    }

    /// Whether the guest has switched it on.
    pub fn is_enabled(&self) -> bool {
        self.table.lock().enabled
    }

    /// A message of a device. `None` if the guest has not asked for it: it is dropped. Any context.
    pub fn signal(&self, gic: &Vgic<R>, device: u32, event: u32) -> Option<VcpuSet> {
        let table = self.table.lock();
        if !table.enabled {
            return None;
        }
        let intid = table.find((device, event))?.intid;
        drop(table);
        Some(gic.lpi_set_pending(intid.into(), true))
    }

    fn offset(&self, gpa: u64) -> Option<u64> {
        let base = self.table.lock().base?;
        gpa.checked_sub(base).filter(|offset| *offset < ITS_SIZE)
    }

    /// Reads `len` bytes at the guest address `gpa` (without the shared bit). `None` if it is not the ITS's.
    pub fn mmio_read(&self, gpa: u64, len: usize) -> Option<u64> {
        let offset = self.offset(gpa)?;
        let registers = self.registers.lock();
        Some(match (offset, len) {
            (0x0000, 4) => {
                if registers.enabled {
                    CTLR_ENABLED
                } else {
                    CTLR_QUIESCENT
                }
            }
            (0x0004, 4) => IIDR,
            (0x0008 | 0x000C, 4 | 8) => part(TYPER, offset, len),
            (0x0080 | 0x0084, 4 | 8) => part(registers.cbaser, offset, len),
            (0x0088 | 0x008C, 4 | 8) => part(registers.cwriter, offset, len),
            (0x0090 | 0x0094, 4 | 8) => part(registers.creadr, offset, len),
            (0x0100..0x0110, 4 | 8) => {
                let which = usize::from(offset >= 0x108);
                part(registers.baser[which], offset, len)
            }
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
        let mut kick = VcpuSet::EMPTY;
        let mut registers = self.registers.lock();
        match (offset, len) {
            (0x0000, 4) => {
                registers.enabled = value & CTLR_ENABLED != 0;
                self.table.lock().enabled = registers.enabled;
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
                if new & VALID == 0 {
                    self.forget(gic, &mut registers, which, &mut kick);
                }
            }
            _ => {}
        }
        if registers.enabled {
            self.run(gic, memory, &mut registers, &mut kick);
        }
        Some(kick)
    }

    /// A table was taken away, with all that was in it.
    fn forget(&self, gic: &Vgic<R>, registers: &mut Registers, which: usize, kick: &mut VcpuSet) {
        if which == 0 {
            registers.devices.clear();
            let events = core::mem::take(&mut self.table.lock().events);
            for event in events {
                kick.extend(&gic.lpi_route(event.intid.into(), None));
            }
        } else {
            registers.collections.clear();
        }
    }

    /// Carries out the queue's orders. At most a queue full of them: a guest that is fast in writing more only
    /// writes the register again.
    fn run(&self, gic: &Vgic<R>, memory: &dyn GuestMemory, registers: &mut Registers, kick: &mut VcpuSet) {
        if registers.cbaser & VALID == 0 {
            return;
        }
        let (base, size) = (registers.cbaser & 0x000F_FFFF_FFFF_F000, registers.queue_size());
        let mut left = size / COMMAND_SIZE;
        while registers.creadr != registers.cwriter && left > 0 {
            left -= 1;
            let mut bytes = [0; 32];
            if memory.read(base + registers.creadr, &mut bytes) {
                let _ = self.execute(gic, memory, registers, &Command::parse(&bytes), kick);
            }
            registers.creadr = (registers.creadr + COMMAND_SIZE) % size;
        }
    }

    /// `None` if the order makes no sense.
    fn execute(
        &self,
        gic: &Vgic<R>,
        memory: &dyn GuestMemory,
        registers: &mut Registers,
        command: &Command,
        kick: &mut VcpuSet,
    ) -> Option<()> {
        let key = (command.device(), command.event());
        match command.code() {
            // MAPD
            0x08 => {
                let bits = u32::try_from(command.0[1] & 0x1F).ok()? + 1;
                if u64::from(key.0) >= registers.capacity(0).min(1 << DEVICE_BITS) || bits > EVENT_BITS {
                    return None;
                }
                self.drop_events(gic, kick, |event| event.key.0 == key.0);
                replace(&mut registers.devices, key.0, command.valid().then_some(bits)).then_some(())
            }
            // MAPC
            0x09 => {
                let collection = command.collection();
                if u64::from(collection) >= registers.capacity(1).min(1 << COLLECTION_BITS) {
                    return None;
                }
                let vcpu = u16::try_from(Command::processor(command.0[2])).ok();
                let vcpu = vcpu.filter(|vcpu| usize::from(*vcpu) < gic.vcpu_count());
                if !command.valid() {
                    self.route(gic, kick, |event| event.collection == collection, None);
                    return replace(&mut registers.collections, collection, None).then_some(());
                }
                replace(&mut registers.collections, collection, Some(vcpu?)).then_some(())?;
                self.route(gic, kick, |event| event.collection == collection, vcpu);
                Some(())
            }
            // MAPTI, MAPI
            code @ (0x0A | 0x0B) => {
                let intid = if code == 0x0A { command.intid() } else { command.event() };
                let bits = find(&registers.devices, key.0)?;
                let vcpu = find(&registers.collections, command.collection());
                if u64::from(key.1) >> bits != 0 || self.table.lock().find(key).is_some() {
                    return None;
                }
                let event =
                    Event { key, intid: u16::try_from(intid).ok()?, collection: command.collection() };
                if !gic.lpi_prepare(intid) || !self.insert(event) {
                    return None;
                }
                // What was left over from an earlier use of the number is not this device's.
                let _ = gic.lpi_set_pending(intid, false);
                configure(gic, memory, intid, kick);
                kick.extend(&gic.lpi_route(intid, vcpu.map(usize::from)));
                Some(())
            }
            // MOVI
            0x01 => {
                let vcpu = find(&registers.collections, command.collection())?;
                let mut table = self.table.lock();
                let at = table.position(key).ok()?;
                let event = table.events.get_mut(at)?;
                event.collection = command.collection();
                let intid = event.intid;
                drop(table);
                kick.extend(&gic.lpi_route(intid.into(), Some(vcpu.into())));
                Some(())
            }
            // INV
            0x0C => {
                let intid = self.table.lock().find(key)?.intid;
                configure(gic, memory, intid.into(), kick);
                Some(())
            }
            // INVALL
            0x0D => {
                find(&registers.collections, command.collection())?;
                self.configure_where(gic, memory, kick, |event| event.collection == command.collection());
                Some(())
            }
            // DISCARD
            0x0F => {
                self.table.lock().find(key)?;
                self.drop_events(gic, kick, |event| event.key == key);
                Some(())
            }
            // INT, CLEAR
            code @ (0x03 | 0x04) => {
                let intid = self.table.lock().find(key)?.intid;
                kick.extend(&gic.lpi_set_pending(intid.into(), code == 0x03));
                Some(())
            }
            // MOVALL
            0x0E => {
                let from = u16::try_from(Command::processor(command.0[2])).ok()?;
                let to = u16::try_from(Command::processor(command.0[3])).ok()?;
                if usize::from(to) >= gic.vcpu_count() {
                    return None;
                }
                let moved = |event: &Event| find(&registers.collections, event.collection) == Some(from);
                self.route(gic, kick, moved, Some(to));
                Some(())
            }
            // SYNC: everything has happened already.
            0x05 => Some(()),
            _ => None,
        }
    }

    /// Adds a translation whose key is free. `false` if there is no room.
    fn insert(&self, event: Event) -> bool {
        // Only orders change the table, one after the other, so its length does not change in between.
        let len = self.table.lock().events.len();
        if len == MAX_EVENTS {
            return false;
        }
        let mut spare = Vec::new();
        if self.table.lock().events.capacity() == len {
            if spare.try_reserve_exact((len * 2).max(64)).is_err() {
                return false;
            }
        }
        let mut table = self.table.lock();
        if spare.capacity() != 0 {
            spare.append(&mut table.events);
            core::mem::swap(&mut table.events, &mut spare);
        }
        if let Err(at) = table.position(event.key) {
            table.events.insert(at, event);
        }
        drop(table);
        // The old memory is freed here, without the lock.
        drop(spare);
        true
    }

    fn drop_events(&self, gic: &Vgic<R>, kick: &mut VcpuSet, which: impl Fn(&Event) -> bool) {
        let mut table = self.table.lock();
        table.events.retain(|event| {
            let goes = which(event);
            if goes {
                kick.extend(&gic.lpi_route(event.intid.into(), None));
                kick.extend(&gic.lpi_set_pending(event.intid.into(), false));
            }
            !goes
        });
    }

    fn route(&self, gic: &Vgic<R>, kick: &mut VcpuSet, which: impl Fn(&Event) -> bool, to: Option<u16>) {
        let table = self.table.lock();
        for event in table.events.iter().filter(|event| which(event)) {
            kick.extend(&gic.lpi_route(event.intid.into(), to.map(usize::from)));
        }
    }

    fn configure_where(
        &self,
        gic: &Vgic<R>,
        memory: &dyn GuestMemory,
        kick: &mut VcpuSet,
        which: impl Fn(&Event) -> bool,
    ) {
        // Reading the guest's memory may sleep: not under the table's lock.
        let mut at = 0;
        loop {
            let event = self.table.lock().events.get(at).copied();
            let Some(event) = event else { break };
            at += 1;
            if which(&event) {
                configure(gic, memory, event.intid.into(), kick);
            }
        }
    }

    /// Reads the configuration of all LPIs: a redistributor has learnt where it is.
    pub fn reload(&self, gic: &Vgic<R>, memory: &dyn GuestMemory) -> VcpuSet {
        let mut kick = VcpuSet::EMPTY;
        let _registers = self.registers.lock();
        self.configure_where(gic, memory, &mut kick, |_| true);
        kick
    }
}

fn configure<R: RawMutex>(gic: &Vgic<R>, memory: &dyn GuestMemory, intid: u32, kick: &mut VcpuSet) {
    let mut config = [0];
    if gic.lpi_config_address(intid).is_some_and(|gpa| memory.read(gpa, &mut config)) {
        kick.extend(&gic.lpi_configure(intid, config[0]));
    }
}

impl Table {
    fn position(&self, key: (u32, u32)) -> Result<usize, usize> {
        self.events.binary_search_by_key(&key, |event| event.key)
    }

    fn find(&self, key: (u32, u32)) -> Option<Event> {
        self.position(key).ok().and_then(|at| self.events.get(at)).copied()
    }
}
