//! The ITS as a guest's driver uses it, and as a hostile one does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::vec::Vec;

use super::machine::Random;
use super::*;
use crate::vgic::{GuestMemory, Its, Remembered, VcpuSet};

type TestIts = Its<spin::Mutex<()>, spin::Mutex<()>>;

const ITS: u64 = 0x3e00_0000;
const QUEUE: u64 = 0x8000_0000;
const CONFIG: u64 = 0x8010_0000;
const PENDING: u64 = 0x8020_0000;
const VALID: u64 = 1 << 63;
const ALL: u8 = 0xA1;

/// 4 MiB at [`QUEUE`]; everything else is not shared.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    pauses: Mutex<u64>,
}

impl GuestMemory for Memory {
    fn read(&self, gpa: u64, to: &mut [u8]) -> bool {
        let bytes = self.bytes.lock().unwrap();
        let Some(at) = gpa.checked_sub(QUEUE).and_then(|at| usize::try_from(at).ok()) else { return false };
        let Some(from) = bytes.get(at..at.saturating_add(to.len())) else { return false };
        to.copy_from_slice(from);
        true
    }

    fn pause(&self) -> bool {
        *self.pauses.lock().unwrap() += 1;
        true
    }
}

impl Memory {
    fn write(&self, gpa: u64, from: &[u8]) {
        let at = usize::try_from(gpa - QUEUE).unwrap();
        self.bytes.lock().unwrap()[at..at + from.len()].copy_from_slice(from);
    }
}

struct Bench {
    gic: TestGic,
    its: TestIts,
    memory: Memory,
    writer: u64,
}

fn processor(vcpu: usize) -> u64 {
    (vcpu as u64) << 16
}

impl Bench {
    /// LPIs enabled everywhere, collection n for vCPU n, nothing mapped.
    fn new(nr_vcpus: usize) -> Bench {
        let gic = TestGic::new(Limits { ipa_bits: 40 });
        gic.set_attr(3, 0, 128).unwrap();
        gic.set_attr(0, 2, DIST).unwrap();
        gic.set_attr(0, 3, REDISTS).unwrap();
        for vcpu in 0..nr_vcpus {
            gic.vcpu_added(mpidr(vcpu)).unwrap();
        }
        assert!(gic.add_its());
        gic.set_attr(4, 0, 0).unwrap();
        gic.start().unwrap();
        gic.mmio_write(DIST, 4, 0b11).unwrap();
        let its = TestIts::new();
        its.set_address(gic.limits(), ITS).unwrap();
        let memory = Memory { bytes: Mutex::new(std::vec![0; 4 << 20]), pauses: Mutex::new(0) };
        memory.write(CONFIG, &[ALL; 0x1_0000]);
        let mut bench = Bench { gic, its, memory, writer: 0 };
        for vcpu in 0..nr_vcpus {
            bench.redist(vcpu, 0x70, CONFIG | 15);
            bench.redist(vcpu, 0x78, 1 << 62);
            bench.redist32(vcpu, 0, 1);
        }
        bench.take_enables();
        bench.reg(0x80, VALID | QUEUE | 15);
        bench.reg(0x100, VALID | 0x9000_0000 | 0x200 | 7);
        bench.reg(0x108, VALID | 0x9100_0000 | 0x200);
        bench.reg32(0, 1);
        // Until it has run its vCPU's interface is closed.
        for vcpu in 0..nr_vcpus {
            bench.gic.flush(vcpu, 4);
            bench.gic.sync(vcpu, &empty_exit());
            bench.order([9, 0, VALID | processor(vcpu) | vcpu as u64, 0]);
        }
        bench
    }

    fn reg(&self, offset: u64, value: u64) -> VcpuSet {
        self.its.mmio_write(&self.gic, &self.memory, ITS + offset, 8, value).unwrap()
    }

    fn reg32(&self, offset: u64, value: u64) -> VcpuSet {
        self.its.mmio_write(&self.gic, &self.memory, ITS + offset, 4, value).unwrap()
    }

    fn redist(&self, vcpu: usize, offset: u64, value: u64) {
        self.gic.mmio_write(REDISTS + vcpu as u64 * 0x2_0000 + offset, 8, value).unwrap();
    }

    fn redist32(&self, vcpu: usize, offset: u64, value: u64) {
        self.gic.mmio_write(REDISTS + vcpu as u64 * 0x2_0000 + offset, 4, value).unwrap();
    }

    fn take_enables(&self) {
        while let Some(vcpu) = self.gic.take_lpis_enabled() {
            let _ = self.its.enabled_at(&self.gic, &self.memory, vcpu);
        }
    }

    fn order(&mut self, words: [u64; 4]) -> VcpuSet {
        for (n, word) in words.iter().enumerate() {
            self.memory.write(QUEUE + self.writer + n as u64 * 8, &word.to_le_bytes());
        }
        self.writer = (self.writer + 32) % 0x1_0000;
        let kick = self.reg(0x88, self.writer);
        assert_eq!(self.its.mmio_read(ITS + 0x90, 8), Some(self.writer), "all orders are carried out");
        kick
    }

    fn mapd(&mut self, device: u64, bits: u64) {
        self.order([8 | device << 32, bits - 1, VALID | 0x9200_0000, 0]);
    }

    fn mapti(&mut self, device: u64, event: u64, intid: u64, collection: u64) -> VcpuSet {
        self.order([0xA | device << 32, event | intid << 32, collection, 0])
    }

    fn signal(&self, device: u32, event: u32) -> Option<VcpuSet> {
        self.its.signal(&self.gic, device, event, None)
    }

    /// What `vcpu` is told at its next entry, and takes.
    fn told(&self, vcpu: usize) -> Vec<u32> {
        let image = self.gic.flush(vcpu, 4);
        assert_eq!(image.validate(4), Ok(()));
        self.gic.sync(vcpu, &empty_exit());
        image.lrs.iter().filter(|lr| state_of(**lr) != 0).map(|lr| intid_of(*lr)).collect()
    }
}

fn only(vcpu: usize) -> Option<VcpuSet> {
    let mut set = VcpuSet::EMPTY;
    set.insert(vcpu);
    Some(set)
}

#[test]
fn a_driver_finds_what_it_needs() {
    let bench = Bench::new(2);
    assert_eq!(bench.its.mmio_read(ITS + 0xffe8, 4).unwrap() & 0xf0, 0x30);
    let typer = bench.its.mmio_read(ITS + 8, 8).unwrap();
    assert_eq!(typer & 1, 1, "physical LPIs");
    assert_eq!((typer >> 4 & 0xf, typer >> 8 & 0x1f, typer >> 13 & 0x1f), (7, 15, 15));
    assert_eq!(typer >> 19 & 1, 0, "processor numbers");
    assert_eq!(bench.its.mmio_read(ITS, 4), Some(1));
    assert_eq!(bench.its.mmio_read(ITS + 0x100, 8).unwrap() >> 56 & 7, 1);
    assert_eq!(bench.its.mmio_read(ITS + 0x108, 8).unwrap() >> 56 & 7, 4);
    assert_eq!(bench.its.mmio_read(ITS + 0x110, 8), Some(0));
    let dist = bench.gic.mmio_read(DIST + 4, 4).unwrap();
    assert_eq!((dist >> 17 & 1, dist >> 19 & 0x1f), (1, 15));
    assert_eq!(bench.gic.mmio_read(REDISTS + 8, 8).unwrap() & 1, 1);
    assert!(bench.its.owns_doorbell(ITS + 0x1_0040) && !bench.its.owns_doorbell(ITS + 0x1_0044));
    assert_eq!(bench.its.mmio_read(ITS + 0x2_0000, 4), None);
}

#[test]
fn a_message_becomes_an_interrupt_of_the_right_vcpu() {
    let mut bench = Bench::new(2);
    bench.mapd(7, 5);
    bench.mapti(7, 3, 8200, 1);
    // MAPI: the event's number is the interrupt's.
    bench.mapd(8, 14);
    bench.order([0xB | 8 << 32, 8300, 0, 0]);
    assert_eq!(bench.signal(7, 3), only(1));
    assert_eq!(bench.signal(8, 8300), only(0));
    assert!(bench.gic.has_pending(1) && bench.gic.has_pending(0));
    assert_eq!(bench.told(1), [8200]);
    assert_eq!(bench.told(0), [8300]);
    assert!(bench.told(1).is_empty() && bench.told(0).is_empty());
    for (device, event) in [(7, 4), (7, 64), (9, 3), (8, 3), (u32::MAX, 0)] {
        assert_eq!(bench.signal(device, event), None, "{device} {event}");
    }
    // Switched off, it drops messages.
    bench.reg32(0, 0);
    assert_eq!(bench.signal(7, 3), None);
}

#[test]
fn every_order_does_what_it_says() {
    let mut bench = Bench::new(3);
    bench.mapd(1, 4);
    bench.mapti(1, 0, 8192, 0);
    bench.mapti(1, 1, 8193, 0);
    // INT and CLEAR.
    assert!(bench.order([3 | 1 << 32, 0, 0, 0]).contains(0));
    bench.order([4 | 1 << 32, 0, 0, 0]);
    assert!(bench.told(0).is_empty());
    bench.order([3 | 1 << 32, 1, 0, 0]);
    // MOVI takes what is pending along.
    assert!(bench.order([1 | 1 << 32, 1, 2, 0]).contains(2));
    assert!(bench.told(0).is_empty());
    assert_eq!(bench.told(2), [8193]);
    // MOVALL.
    bench.signal(1, 0).unwrap();
    assert!(bench.order([0xE, 0, processor(0), processor(1)]).contains(1));
    assert_eq!((bench.told(0), bench.told(1)), (Vec::new(), std::vec![8192]));
    // MAPC moves all of a collection.
    bench.signal(1, 1).unwrap();
    assert!(bench.order([9, 0, VALID | processor(0) | 2, 0]).contains(0));
    assert_eq!((bench.told(2), bench.told(0)), (Vec::new(), std::vec![8193]));
    // A collection that is gone: nobody is told, until it is there again.
    bench.order([9, 0, 2, 0]);
    assert_eq!(bench.signal(1, 1), None);
    bench.order([9, 0, VALID | processor(2) | 2, 0]);
    assert_eq!(bench.signal(1, 1), only(2));
    assert_eq!(bench.told(2), [8193]);
    // INV: the configuration is read again, priority and enable.
    bench.memory.write(CONFIG, &[0xA0]);
    bench.signal(1, 0).unwrap();
    assert_eq!(bench.told(1), [8192], "not before it was told to");
    bench.order([0xC | 1 << 32, 0, 0, 0]);
    assert_eq!(bench.signal(1, 0), Some(VcpuSet::EMPTY));
    assert!(bench.told(1).is_empty());
    // INVALL: of the collection only. What was pending while disabled comes now.
    bench.memory.write(CONFIG, &[ALL]);
    assert!(bench.order([0xD, 0, 2, 0]).is_empty());
    assert!(bench.order([0xD, 0, 0, 0]).contains(1));
    assert_eq!(bench.told(1), [8192]);
    // DISCARD forgets what is pending.
    bench.signal(1, 1).unwrap();
    bench.order([0xF | 1 << 32, 1, 0, 0]);
    assert!(bench.told(2).is_empty());
    assert_eq!(bench.signal(1, 1), None);
    // MAPD without valid: the device is gone, with all its events.
    bench.signal(1, 0).unwrap();
    bench.order([8 | 1 << 32, 3, 0, 0]);
    assert_eq!(bench.signal(1, 0), None);
    assert!(bench.told(1).is_empty());
    // SYNC.
    bench.order([5, 0, processor(0), 0]);
}

#[test]
fn a_sender_that_remembers_is_not_led_astray() {
    let mut bench = Bench::new(2);
    let remembered = Remembered::default();
    let send = |bench: &Bench| bench.its.signal(&bench.gic, 1, 0, Some(&remembered));
    bench.mapd(1, 4);
    assert_eq!(send(&bench), None);
    bench.mapti(1, 0, 8192, 0);
    for _ in 0..2 {
        assert_eq!(send(&bench), only(0));
        assert_eq!(bench.told(0), [8192]);
    }
    bench.order([1 | 1 << 32, 0, 1, 0]);
    assert_eq!(send(&bench), only(1));
    assert_eq!(bench.told(1), [8192]);
    bench.order([0xF | 1 << 32, 0, 0, 0]);
    assert_eq!(send(&bench), None);
    bench.mapti(1, 0, 8193, 0);
    assert_eq!(send(&bench), only(0));
    assert_eq!(bench.told(0), [8193]);
    // What another sender remembers is another thing.
    remembered.forget();
    assert_eq!(bench.its.signal(&bench.gic, 1, 1, Some(&remembered)), None);
}

#[test]
fn lpis_wait_for_their_redistributor_and_start_with_the_pending_table() {
    let mut bench = Bench::new(2);
    bench.mapd(1, 6);
    for event in 0..64 {
        bench.mapti(1, event, 8192 + event, event % 2);
    }
    bench.redist32(1, 0, 0);
    bench.signal(1, 1).unwrap();
    assert!(bench.told(1).is_empty(), "LPIs are disabled there");
    bench.memory.write(PENDING + (8192 + 8) / 8, &[0b0000_1010]);
    // PTZ is not set: the table counts. Only for those that go to this vCPU.
    bench.redist(1, 0x78, PENDING);
    bench.redist32(1, 0, 1);
    bench.take_enables();
    assert_eq!(bench.told(1), [8193, 8201, 8203]);
    assert!(bench.told(0).is_empty());
    // While some are enabled, the tables cannot be moved.
    bench.redist(0, 0x70, 0xdead_0000);
    assert_eq!(bench.gic.mmio_read(REDISTS + 0x70, 8), Some(CONFIG | 15));
}

#[test]
fn more_lpis_than_list_registers_all_arrive_by_priority() {
    let mut bench = Bench::new(1);
    bench.mapd(1, 8);
    for event in 0..200u64 {
        bench.memory.write(CONFIG + event, &[(event as u8 % 20) << 3 | 1]);
        bench.mapti(1, event, 8192 + event, 0);
    }
    for event in 0..200 {
        bench.signal(1, event).unwrap();
    }
    let mut seen = Vec::new();
    loop {
        let told = bench.told(0);
        if told.is_empty() {
            break;
        }
        seen.extend(told);
    }
    let priorities: Vec<u32> = seen.iter().map(|intid| (intid - 8192) % 20).collect();
    assert!(priorities.is_sorted(), "{priorities:?}");
    assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), 200);
    // Long work lets others run.
    bench.order([0xD, 0, 0, 0]);
    assert!(*bench.memory.pauses.lock().unwrap() >= 3);
}

#[test]
fn orders_that_make_no_sense_are_skipped() {
    let mut bench = Bench::new(2);
    bench.mapd(1, 4);
    for words in [
        // Unknown; MAPD beyond the table, too many events; MAPC for a vCPU or a collection that does not exist.
        [0x77, 0, 0, 0],
        [8 | 0x1_0000 << 32, 3, VALID, 0],
        [8 | 2 << 32, 0x1F, VALID, 0],
        [9, 0, VALID | processor(2) | 5, 0],
        [9, 0, VALID | processor(0x7_0000_0000) | 5, 0],
        // MAPTI: no device, no such event, no LPI, no such collection.
        [0xA | 3 << 32, 8192 << 32, 0, 0],
        [0xA | 1 << 32, 16 | 8192 << 32, 0, 0],
        [0xA | 1 << 32, 1 | 8191 << 32, 0, 0],
        [0xA | 1 << 32, 1 | 0x1_0000 << 32, 0, 0],
        [0xA | 1 << 32, 1 | 8192 << 32, 0xFFFF, 0],
        [0xB | 1 << 32, 1, 0, 0],
        // Events that are not mapped.
        [1 | 1 << 32, 2, 0, 0],
        [3 | 1 << 32, 2, 0, 0],
        [0xC | 9 << 32, 2, 0, 0],
        [0xF | 1 << 32, 2, 0, 0],
        [0xD, 0, 77, 0],
        [0xE, 0, processor(0), processor(9)],
    ] {
        assert!(bench.order(words).is_empty(), "{words:x?}");
    }
    for event in 0..16 {
        assert_eq!(bench.signal(1, event), None);
    }
    // A queue in memory that is not shared: its orders cannot be read.
    bench.reg32(0, 0);
    bench.reg(0x80, VALID | 0x1000_0000 | 15);
    bench.reg32(0, 1);
    bench.reg(0x88, 320);
    assert_eq!(bench.its.mmio_read(ITS + 0x90, 8), Some(320));
    // A place outside the queue is none.
    bench.reg(0x88, 0x2_0000);
    assert_eq!(bench.its.mmio_read(ITS + 0x88, 8), Some(320));
}

#[test]
fn what_a_guest_can_make_the_host_remember_is_bounded() {
    let mut bench = Bench::new(1);
    let mut mapped = 0;
    for device in 0..300 {
        bench.mapd(device, 16);
        mapped += u64::from(bench.mapti(device, 0, 8192 + device, 0).is_empty());
    }
    let answers = (0..300).filter(|device| bench.signal(*device, 0).is_some()).count();
    assert_eq!((mapped, answers), (300, 16), "2^20 events in all");
    bench.its.reset(&bench.gic, &bench.memory);
    assert_eq!((0..300).filter(|device| bench.signal(*device, 0).is_some()).count(), 0);
}

/// Random orders, sensible and not, against a model that is as simple as the architecture's text.
#[test]
fn random_orders_agree_with_a_model() {
    #[derive(Default)]
    struct Model {
        devices: BTreeMap<u64, u64>,
        events: BTreeMap<(u64, u64), (u64, u64)>,
        collections: BTreeMap<u64, usize>,
    }
    let rounds = std::env::var("KVM_REALM_ITS_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(40u64);
    for seed in 1..=rounds {
        let mut bench = Bench::new(3);
        let collections = (0..3).map(|n| (n as u64, n)).collect();
        let mut model = Model { collections, ..Model::default() };
        let mut random = Random(0x9E37_79B9_7F4A_7C15u64.wrapping_mul(seed));
        let mut used = BTreeSet::new();
        for _ in 0..400 {
            let device = random.below(5) as u64;
            let event = random.below(20) as u64;
            let collection = random.below(5) as u64;
            let vcpu = random.below(4);
            match random.below(12) {
                0 => {
                    let (bits, valid) = (random.below(5) as u64 + 1, !random.one_in(4));
                    bench.order([8 | device << 32, bits - 1, if valid { VALID } else { 0 }, 0]);
                    model.events.retain(|key, _| key.0 != device);
                    model.devices.remove(&device);
                    if valid {
                        model.devices.insert(device, bits);
                    }
                }
                1 => {
                    let valid = !random.one_in(4);
                    let flag = if valid { VALID } else { 0 };
                    bench.order([9, 0, flag | processor(vcpu) | collection, 0]);
                    if !valid {
                        model.collections.remove(&collection);
                    } else if vcpu < 3 {
                        model.collections.insert(collection, vcpu);
                    }
                }
                2..=5 => {
                    // Two events with one LPI are unpredictable: a driver does not do it.
                    let intid = 8192 + device * 32 + event;
                    bench.mapti(device, event, intid, collection);
                    let fits = model.devices.get(&device).is_some_and(|bits| event >> bits == 0);
                    if fits {
                        model.events.entry((device, event)).or_insert((intid, collection));
                        used.insert(intid);
                    }
                }
                6 => {
                    bench.order([1 | device << 32, event, collection, 0]);
                    if model.collections.contains_key(&collection) {
                        model.events.entry((device, event)).and_modify(|to| to.1 = collection);
                    }
                }
                7 => {
                    bench.order([0xF | device << 32, event, 0, 0]);
                    model.events.remove(&(device, event));
                }
                8 => {
                    let garbage = [random.0, random.0 ^ 0x55, random.0 >> 3, random.0 << 7];
                    // Anything but what changes the tables.
                    let code = [0x00, 0x02, 0x05, 0x0C, 0x0D, 0x10, 0x25, 0xFF][random.below(8)];
                    bench.order([garbage[0] & !0xFF | code, garbage[1], garbage[2], garbage[3]]);
                }
                _ => {
                    let told = bench.signal(device as u32, event as u32);
                    let expected = model
                        .events
                        .get(&(device, event))
                        .and_then(|(intid, to)| Some((*intid, *model.collections.get(to)?)));
                    match expected {
                        Some((intid, vcpu)) => {
                            assert_eq!(told, only(vcpu), "seed {seed}");
                            for other in 0..3 {
                                let expected: &[u32] = if other == vcpu { &[intid as u32] } else { &[] };
                                assert_eq!(bench.told(other), expected, "seed {seed}");
                            }
                        }
                        None => assert_eq!(told, None, "seed {seed}"),
                    }
                }
            }
        }
        for vcpu in 0..3 {
            assert!(bench.told(vcpu).is_empty(), "something is left over, seed {seed}");
        }
    }
}

#[test]
fn messages_and_orders_of_many_threads_end_in_rest() {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
    const DEVICES: u64 = 4;
    let mut bench = Bench::new(4);
    for device in 0..DEVICES {
        bench.mapd(device, 3);
        for event in 0..8 {
            bench.mapti(device, event, 8192 + device * 8 + event, (device + event) % 4);
        }
    }
    let done = AtomicBool::new(false);
    let (sent, taken) = (AtomicU64::new(0), AtomicU64::new(0));
    let gic = &bench.gic;
    let its = &bench.its;
    let memory = &bench.memory;
    std::thread::scope(|scope| {
        let senders: Vec<_> = (0..DEVICES as u32)
            .map(|device| {
                let sent = &sent;
                scope.spawn(move || {
                    let remembered: Vec<Remembered> = (0..8).map(|_| Remembered::default()).collect();
                    for n in 0..4000u32 {
                        let event = n % 8;
                        its.signal(gic, device, event, Some(&remembered[event as usize])).unwrap();
                        sent.fetch_add(1, SeqCst);
                    }
                })
            })
            .collect();
        for vcpu in 0..4 {
            let (done, taken) = (&done, &taken);
            scope.spawn(move || {
                loop {
                    let last = done.load(SeqCst);
                    let image = gic.flush(vcpu, 4);
                    assert_eq!(image.validate(4), Ok(()));
                    let n = image.lrs.iter().filter(|lr| state_of(**lr) != 0).count();
                    gic.sync(vcpu, &empty_exit());
                    taken.fetch_add(n as u64, SeqCst);
                    if n == 0 && last {
                        break;
                    }
                }
            });
        }
        // Somebody moves interrupts from vCPU to vCPU all the time, one order at a time.
        let mut writer = bench.writer;
        let mut random = Random(7);
        while !senders.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            let (device, event) = (random.below(4) as u64, random.below(8) as u64);
            let words = [1 | device << 32, event, random.below(4) as u64, 0];
            for (n, word) in words.iter().enumerate() {
                memory.write(QUEUE + writer + n as u64 * 8, &word.to_le_bytes());
            }
            writer = (writer + 32) % 0x1_0000;
            let _ = its.mmio_write(gic, memory, ITS + 0x88, 8, writer).unwrap();
        }
        done.store(true, SeqCst);
    });
    let taken = taken.into_inner();
    assert!(taken > 0 && taken <= sent.into_inner());
    for vcpu in 0..4 {
        let image = bench.gic.flush(vcpu, 4);
        assert_eq!(image.lrs, [0; MAX_LRS], "vCPU {vcpu} was not told of the last message");
    }
    for intid in 8192..8192 + 32 {
        assert!(!bench.gic.lpi_is_pending(intid));
    }
}
