//! Interrupts as messages, notifications as doorbells: by the rules and against them.

use super::testing::{Driver, Part, Wires, control_word};
use super::{Device, rng::Rng};
use crate::kvm::Message;
use crate::layout::{PCI_MMIO_BASE, PCI_MMIO_SIZE};
use crate::pci::Function as _;

/// All features but EVENT_IDX: the driver wants to hear of everything.
const ALL: u64 = !(1 << 29);
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
/// The device is in slot 1, where the second vector is the queue's.
const CONFIG_GSI: u32 = 64;
const QUEUE_GSI: u32 = 65;
const LINE: u32 = 65;

fn enable(driver: &Driver, control: u16) {
    driver.device.config_write(control_word(driver).unwrap(), &control.to_le_bytes()).unwrap();
}

fn write_entry(driver: &Driver, vector: u64, address: u64, data: u32, control: u32) {
    driver.put(TABLE + 16 * vector, &address.to_le_bytes());
    driver.put(TABLE + 16 * vector + 8, &data.to_le_bytes());
    driver.put(TABLE + 16 * vector + 12, &control.to_le_bytes());
}

/// A started device whose queue has vector 1, and its configuration vector 0.
fn with_messages(device: Box<dyn Device>) -> Driver {
    let mut driver = Driver::new(device);
    enable(&driver, 0x8000);
    write_entry(&driver, 0, 0x3ffc_0040, 0, 0);
    write_entry(&driver, 1, 0x3ffc_0040, 1, 0);
    driver.start(ALL);
    choose(&driver);
    driver
}

fn choose(driver: &Driver) {
    driver.put(22, &[0, 0]);
    for (offset, vector) in [(16, 0u16), (26, 1)] {
        driver.put(offset, &vector.to_le_bytes());
        assert_eq!(u16::from_le_bytes(driver.get(offset)), vector);
    }
}

/// Has the queue serve a chain; the interrupt comes after the chain, so wait for it.
fn serve(driver: &mut Driver) {
    driver.give(0, &[Part::Write(8)]);
    assert_eq!(driver.take(0), Some(8));
}

fn raised(driver: &Driver, gsi: u32) -> bool {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    loop {
        match driver.wires.raised(gsi) {
            0 if std::time::Instant::now() < deadline => std::thread::yield_now(),
            count => return count == 1,
        }
    }
}

fn pending(driver: &Driver, bit: u8) -> bool {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while driver.get::<8>(PENDING)[0] >> bit & 1 == 0 {
        if std::time::Instant::now() > deadline {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

#[test]
fn a_queue_interrupts_by_its_message_and_not_by_the_line() {
    let mut driver = with_messages(Box::new(Rng));
    // Nothing has been given back yet: a notification alone raises no interrupt.
    driver.kick(0);
    serve(&mut driver);
    assert!(raised(&driver, QUEUE_GSI));
    let message = Message { address: 0x3ffc_0040, data: 1, device: 8 };
    assert_eq!(driver.wires.routes.lock().unwrap().get(&QUEUE_GSI), Some(&message));
    assert_eq!(driver.wires.raised(CONFIG_GSI), 0);
    assert_eq!(driver.get::<1>(0x1000), [0]);
    assert!(!driver.wires.lines.lock().unwrap().get(&LINE).copied().unwrap_or(false));
    // The guest moves its interrupt.
    write_entry(&driver, 1, 0x3ffc_0040, 77, 0);
    serve(&mut driver);
    assert!(raised(&driver, QUEUE_GSI));
    assert_eq!(driver.wires.routes.lock().unwrap()[&QUEUE_GSI].data, 77);
    // A mistake of the driver's is an interrupt of the configuration.
    driver.give_raw(0, &[(0, 16, 2)]);
    assert!(raised(&driver, CONFIG_GSI));
    assert_eq!(driver.status() & 64, 64);
}

#[test]
fn a_masked_message_waits_and_a_reset_forgets_it() {
    let mut driver = with_messages(Box::new(Rng));
    for (mask, unmask) in [(1u32, 0u32), (0xffff_ffff, 0xffff_fffe)] {
        driver.put(TABLE + 16 + 12, &mask.to_le_bytes());
        assert_eq!(driver.get::<4>(TABLE + 16 + 12), [1, 0, 0, 0]);
        serve(&mut driver);
        assert!(pending(&driver, 1));
        assert_eq!(driver.wires.raised(QUEUE_GSI), 0);
        driver.put(TABLE + 16 + 12, &unmask.to_le_bytes());
        assert!(raised(&driver, QUEUE_GSI));
        assert_eq!(driver.get::<8>(PENDING), [0; 8]);
    }
    enable(&driver, 0xc000);
    serve(&mut driver);
    assert!(pending(&driver, 1));
    enable(&driver, 0x8000);
    assert!(raised(&driver, QUEUE_GSI));
    enable(&driver, 0xc000);
    serve(&mut driver);
    assert!(pending(&driver, 1));
    driver.reset();
    enable(&driver, 0x8000);
    assert_eq!((driver.wires.raised(QUEUE_GSI), driver.get::<8>(PENDING)), (0, [0; 8]));
    // Nor does the queue still have its vector.
    driver.start(ALL);
    assert_eq!(driver.get::<2>(26), [0xff, 0xff]);
    serve(&mut driver);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(driver.wires.raised(QUEUE_GSI), 0);
}

#[test]
fn without_messages_it_is_the_line() {
    let quiet = |driver: &Driver| !driver.wires.lines.lock().unwrap().get(&LINE).copied().unwrap_or(false);
    let high = |driver: &Driver| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while quiet(driver) && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        !quiet(driver)
    };
    for without_its in [false, true] {
        let mut driver = Driver::on(Box::new(Rng), Wires { without_its, ..Wires::default() });
        assert_eq!(control_word(&driver).is_none(), without_its);
        driver.start(ALL);
        if without_its {
            driver.put(26, &[0, 0]);
            assert_eq!(driver.get::<2>(26), [0xff, 0xff]);
            driver.put(TABLE, &[0; 8]);
            assert_eq!(driver.get::<8>(TABLE), [0; 8]);
        }
        serve(&mut driver);
        assert!(high(&driver));
        assert_eq!(driver.get::<1>(0x1000), [1]);
        assert!(quiet(&driver));
        driver.device.config_write(4, &[6, 4]).unwrap();
        serve(&mut driver);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(quiet(&driver), "the guest has forbidden the line");
        driver.device.config_write(4, &[6, 0]).unwrap();
        assert!(high(&driver));
        // Who changes over to messages has no line any more.
        if let Some(control) = control_word(&driver) {
            driver.device.config_write(control, &[0, 0x80]).unwrap();
            assert!(quiet(&driver));
        }
    }
}

#[test]
fn vectors_that_are_not_there_are_none() {
    let driver = Driver::new(Box::new(Rng));
    enable(&driver, 0x8000);
    for vector in [2u16, 63, 2047, 0xfffe, 0xffff] {
        driver.put(16, &vector.to_le_bytes());
        driver.put(26, &vector.to_le_bytes());
        assert_eq!((driver.get::<2>(16), driver.get::<2>(26)), ([0xff; 2], [0xff; 2]));
    }
    // Beyond the table, across two entries, across its end, at odd places.
    for (offset, len) in [(32, 8), (12, 8), (28, 8), (0xffc, 8), (13, 2), (7, 4), (31, 1)] {
        driver.put(TABLE + offset, &vec![0; len]);
    }
    assert_eq!(driver.get::<8>(TABLE + 32), [0; 8]);
    assert_eq!(driver.get::<8>(TABLE + 0xffc), [0; 8]);
    assert_eq!(driver.get::<8>(PENDING + 0xffc), [0; 8]);
    assert_eq!(driver.wires.raised(CONFIG_GSI) + driver.wires.raised(QUEUE_GSI), 0);
}

#[test]
fn doorbells_are_where_the_window_is() {
    let mut driver = Driver::new(Box::new(Rng));
    let there = |driver: &Driver| driver.wires.doorbells.lock().unwrap().keys().copied().collect::<Vec<_>>();
    assert!(there(&driver).is_empty());
    driver.device.config_write(4, &[2, 0]).unwrap();
    let first = PCI_MMIO_BASE + 0x8000 + 0x3000;
    assert_eq!(there(&driver), [first]);
    driver.start(ALL);
    driver.give_quietly(0, &[Part::Write(8)]);
    assert!(driver.wires.ring(first));
    assert_eq!(driver.take(0), Some(8));
    // It moves, leaves the bus, comes back, and is switched off.
    let place = |driver: &Driver, at: u64| {
        driver.device.config_write(0x10, &u32::try_from(at).unwrap().to_le_bytes()).unwrap()
    };
    place(&driver, PCI_MMIO_BASE + 0x12_3456);
    assert_eq!(there(&driver), [PCI_MMIO_BASE + 0x12_0000 + 0x3000]);
    for elsewhere in [0, 0x3fff_0000, PCI_MMIO_BASE - 0x8000, PCI_MMIO_BASE + PCI_MMIO_SIZE, 0xffff_ffff] {
        place(&driver, elsewhere);
        assert!(there(&driver).is_empty(), "{elsewhere:#x}");
    }
    place(&driver, PCI_MMIO_BASE);
    assert_eq!(there(&driver), [PCI_MMIO_BASE + 0x3000]);
    driver.device.config_write(4, &[0, 0]).unwrap();
    assert!(there(&driver).is_empty());
    // Somebody else has it already: the device's registers serve then.
    let event = crate::eventfd::EventFd::new().unwrap();
    assert!(crate::wiring::Wiring::doorbell(&*driver.wires, PCI_MMIO_BASE + 0x3000, &event, true));
    driver.device.config_write(4, &[2, 0]).unwrap();
    serve(&mut driver);
    driver.device.config_write(4, &[0, 0]).unwrap();
    assert_eq!(there(&driver), [PCI_MMIO_BASE + 0x3000], "it is the other one's");
}
