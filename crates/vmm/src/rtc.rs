//! A PL031 real-time clock, by its technical reference manual (ARM DDI 0224): seconds since 1970 in 32 bits, a register for
//! each thing. Its interrupt is not wired: nothing here sleeps until a second has come, and a driver that sees no
//! interrupt in the device tree offers no alarms. That the match register's second has passed can be read all the same.
//!
//! The seconds are the host's. A Realm has no better ones, and must not believe them where the host could gain from a lie.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::Result;
use crate::bus::Mmio;

/// Data: the seconds now.
const DR: u64 = 0x00;
/// Match: the second that raises the interrupt.
const MR: u64 = 0x04;
/// Load: sets the clock.
const LR: u64 = 0x08;
/// Control: whether the clock runs.
const CR: u64 = 0x0c;
/// Whether the interrupt is let through.
const IMSC: u64 = 0x10;
/// The interrupt, and what of it is let through.
const RIS: u64 = 0x14;
const MIS: u64 = 0x18;
/// Clears the interrupt.
const ICR: u64 = 0x1c;
/// The first of the eight words that say what this is.
const ID: u64 = 0xfe0;
/// One byte of them in each word.
const IDS: [u8; 8] = [0x31, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// Tells the seconds since 1970.
pub type Clock = Box<dyn Fn() -> u32 + Send + Sync>;

/// The clock.
pub struct Rtc {
    clock: Clock,
    registers: Mutex<Registers>,
}

#[derive(Debug, Default)]
struct Registers {
    /// What is added to the host's seconds: the guest may set its clock.
    offset: u32,
    matched: u32,
    loaded: u32,
    mask: u32,
    raised: u32,
    /// The second of the last access: what lies between it and now has not been compared yet.
    seen: u32,
}

impl std::fmt::Debug for Rtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rtc").finish_non_exhaustive()
    }
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new(Box::new(host_seconds))
    }
}

/// This machine's seconds, as many of their bits as the register has: it is full in 2106.
fn host_seconds() -> u32 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u32::try_from(since.as_secs() & u64::from(u32::MAX)).unwrap_or(0)
}

impl Rtc {
    /// A clock after reset.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        let registers = Registers { seen: clock(), ..Registers::default() };
        Self { clock, registers: Mutex::new(registers) }
    }

    /// The registers, and the second that it is for the guest.
    fn now(&self) -> (MutexGuard<'_, Registers>, u32) {
        // The registers are whole after every single change.
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (self.clock)().wrapping_add(registers.offset);
        registers.pass(now);
        (registers, now)
    }
}

impl Registers {
    /// Time has passed until `now`. A host's clock that goes back raises nothing.
    fn pass(&mut self, now: u32) {
        let passed = now.wrapping_sub(self.seen);
        let awaited = self.matched.wrapping_sub(self.seen);
        if passed <= u32::MAX / 2 && (1..=passed).contains(&awaited) {
            self.raised = 1;
        }
        self.seen = now;
    }

    /// The guest has changed one side of the comparison.
    fn compare(&mut self, now: u32) {
        self.seen = now;
        self.raised |= u32::from(self.matched == now);
    }

    fn read(&self, offset: u64, now: u32) -> u32 {
        match offset {
            DR => now,
            MR => self.matched,
            LR => self.loaded,
            // The host's clock runs always, and so does this one.
            CR => 1,
            IMSC => self.mask,
            RIS => self.raised,
            MIS => self.raised & self.mask,
            _ => {
                let id = offset.checked_sub(ID).and_then(|offset| usize::try_from(offset / 4).ok());
                id.and_then(|id| IDS.get(id)).copied().map_or(0, u32::from)
            }
        }
    }

    fn write(&mut self, offset: u64, value: u32, now: u32) {
        match offset {
            MR => {
                self.matched = value;
                self.compare(now);
            }
            LR => {
                self.loaded = value;
                self.offset = self.offset.wrapping_add(value.wrapping_sub(now));
                self.compare(value);
            }
            IMSC => self.mask = value & 1,
            ICR => self.raised &= !value,
            _ => {}
        }
    }
}

/// Registers are words. Any other access reads as ones and changes nothing.
impl Mmio for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        if let (0, Ok(word)) = (offset % 4, <&mut [u8; 4]>::try_from(data)) {
            let (registers, now) = self.now();
            *word = registers.read(offset, now).to_le_bytes();
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        if let (0, Ok(word)) = (offset % 4, <[u8; 4]>::try_from(data)) {
            let (mut registers, now) = self.now();
            registers.write(offset, u32::from_le_bytes(word), now);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::bus::Bus;
    use crate::layout::{RTC_BASE, RTC_SIZE};

    /// A clock on a bus, and the host's seconds.
    fn on_a_bus(start: u32) -> (Bus, Arc<AtomicU32>) {
        let host = Arc::new(AtomicU32::new(start));
        let seconds = host.clone();
        let mut bus = Bus::default();
        let rtc = Rtc::new(Box::new(move || seconds.load(Ordering::SeqCst)));
        bus.add(RTC_BASE, RTC_SIZE, Arc::new(rtc));
        (bus, host)
    }

    fn read(bus: &Bus, offset: u64) -> u32 {
        let bytes = bus.read(RTC_BASE + offset, 4).unwrap();
        u32::from_le_bytes(*bytes.first_chunk().unwrap())
    }

    fn write(bus: &Bus, offset: u64, value: u32) {
        bus.write(RTC_BASE + offset, &value.to_le_bytes()).unwrap();
    }

    #[test]
    fn the_clock_is_this_machines() {
        let rtc = Rtc::default();
        let mut word = [0; 4];
        rtc.read(DR, &mut word).unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        assert!(now - u64::from(u32::from_le_bytes(word)) <= 2);
    }

    #[test]
    fn a_driver_finds_a_primecell_that_runs() {
        let (bus, host) = on_a_bus(1_000);
        let id = |first: u64| (0..4u32).fold(0, |id, n| id | read(&bus, first + u64::from(4 * n)) << (8 * n));
        // What Linux's AMBA bus and its driver look for.
        assert_eq!((id(0xfe0) & 0x000f_ffff, id(0xff0)), (0x0004_1031, 0xb105_f00d));
        assert_eq!((read(&bus, DR), read(&bus, CR)), (1_000, 1));
        write(&bus, CR, 0);
        host.store(1_007, Ordering::SeqCst);
        assert_eq!((read(&bus, DR), read(&bus, CR)), (1_007, 1));
    }

    #[test]
    fn a_guest_may_set_its_clock_and_then_it_goes_on() {
        let (bus, host) = on_a_bus(1_000);
        for (load, at) in [(5_000, 1_000), (7, 1_010), (u32::MAX, 1_020)] {
            host.store(at, Ordering::SeqCst);
            write(&bus, LR, load);
            assert_eq!((read(&bus, DR), read(&bus, LR)), (load, load));
            host.store(at + 3, Ordering::SeqCst);
            assert_eq!((read(&bus, DR), read(&bus, LR)), (load.wrapping_add(3), load));
        }
    }

    #[test]
    fn the_match_is_seen_once_it_has_passed_and_until_it_is_cleared() {
        let (bus, host) = on_a_bus(1_000);
        write(&bus, MR, 1_005);
        assert_eq!(read(&bus, RIS), 0);
        host.store(1_100, Ordering::SeqCst);
        assert_eq!((read(&bus, RIS), read(&bus, MIS)), (1, 0));
        write(&bus, IMSC, u32::MAX);
        assert_eq!((read(&bus, IMSC), read(&bus, MIS)), (1, 1));
        write(&bus, ICR, 1);
        assert_eq!((read(&bus, RIS), read(&bus, MIS)), (0, 0));
        // Back and forth: only forth passes it.
        host.store(1_000, Ordering::SeqCst);
        assert_eq!(read(&bus, RIS), 0);
        host.store(1_005, Ordering::SeqCst);
        assert_eq!(read(&bus, RIS), 1);
        write(&bus, ICR, 1);
        write(&bus, MR, 1_005);
        assert_eq!(read(&bus, RIS), 1);
    }

    #[test]
    fn only_words_are_registers() {
        let (bus, _) = on_a_bus(0x1234_5678);
        for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 2), (0xffc, 8), (0xffe, 4)] {
            assert_eq!(bus.read(RTC_BASE + offset, len).unwrap()[..len], [0xff; 8][..len], "{offset} {len}");
            bus.write(RTC_BASE + LR + offset, &[1; 8][..len]).unwrap();
        }
        assert_eq!((read(&bus, DR), read(&bus, LR)), (0x1234_5678, 0));
    }

    proptest! {
        #[test]
        fn whatever_a_guest_writes_its_clock_is_the_hosts_and_what_it_loaded(
            start in any::<u32>(),
            accesses in proptest::collection::vec(
                (prop_oneof![0..0x24u64, any::<u64>()], proptest::collection::vec(any::<u8>(), 0..9), any::<u32>()),
                0..100,
            ),
        ) {
            let (bus, host) = on_a_bus(start);
            let mut offset = 0u32;
            for (place, bytes, time) in accesses {
                host.store(time, Ordering::SeqCst);
                let address = RTC_BASE.wrapping_add(place);
                bus.write(address, &bytes).unwrap();
                if let (LR, Ok(word)) = (place, <[u8; 4]>::try_from(&bytes[..])) {
                    offset = u32::from_le_bytes(word).wrapping_sub(time);
                }
                let _ = bus.read(address, bytes.len()).unwrap();
                prop_assert_eq!(read(&bus, DR), time.wrapping_add(offset));
                prop_assert!(read(&bus, RIS) <= 1 && read(&bus, MIS) <= read(&bus, IMSC));
            }
        }
    }
}
