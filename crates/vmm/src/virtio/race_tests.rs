//! CPUs that do things at the same time, and devices that hang: no CPU waits, and a reset brings everything back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::testing::{Driver, Part, RAM};
use super::{Active, Device, Served, rng::Rng};
use crate::layout::RAM_BASE;
use crate::pci::Function as _;
use vm_memory::{Bytes as _, GuestAddress};

const ALL: u64 = u64::MAX;

/// A device that is stuck in its backend until somebody lets it go on.
struct Stuck {
    go_on: mpsc::Receiver<()>,
    resets: Arc<AtomicBool>,
}

impl Device for Stuck {
    fn id(&self) -> u16 {
        4
    }
    fn name(&self) -> String {
        "stuck".into()
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![8]
    }
    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4]
    }
    fn config_writable(&self) -> Vec<u8> {
        vec![0, 0xf0]
    }
    fn config_written(&mut self, active: &mut Active) -> Served {
        let heard = active.config()[1];
        active.set_config(3, &[heard])
    }
    fn reset(&mut self) {
        self.resets.store(true, Ordering::SeqCst);
    }
    fn queue(&mut self, index: usize, active: &mut Active) -> Served {
        active.serve(index, &mut |_, _| {
            let _ = self.go_on.recv();
            Ok(0)
        })
    }
}

fn stuck() -> (Driver, mpsc::Sender<()>, Arc<AtomicBool>) {
    let (sender, go_on) = mpsc::channel();
    let resets = Arc::new(AtomicBool::new(false));
    (Driver::new(Box::new(Stuck { go_on, resets: resets.clone() })), sender, resets)
}

fn within(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_cpu_does_not_wait_for_a_device_that_hangs() {
    let (mut driver, go_on, resets) = stuck();
    driver.start(ALL);
    driver.give(0, &[Part::Write(8)]);
    std::thread::sleep(Duration::from_millis(30));
    let start = Instant::now();
    driver.put(20, &[0]);
    for _ in 0..100 {
        driver.kick(0);
        driver.put(20, &[0]);
        driver.put(20, &[1]);
        driver.put(20, &[0]);
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(driver.status(), 15, "the device has not let go yet");
    assert!(!resets.load(Ordering::SeqCst));
    go_on.send(()).unwrap();
    within("the reset ends", || driver.status() == 0);
    assert!(resets.load(Ordering::SeqCst));
    driver.start(ALL);
    driver.give(0, &[Part::Write(8)]);
    go_on.send(()).unwrap();
    assert_eq!(driver.take(0), Some(0));
}

#[test]
fn a_driver_that_does_not_wait_for_a_reset_gets_its_queues_all_the_same() {
    let (mut driver, go_on, _) = stuck();
    driver.start(ALL);
    driver.give(0, &[Part::Write(8)]);
    std::thread::sleep(Duration::from_millis(30));
    driver.put(20, &[0]);
    driver.start_at_once(ALL);
    assert_eq!(driver.status(), 15);
    go_on.send(()).unwrap();
    go_on.send(()).unwrap();
    driver.give(0, &[Part::Write(8)]);
    assert_eq!(driver.take(0), Some(0));
}

#[test]
fn a_device_that_hangs_is_left_behind_at_the_end() {
    let (mut driver, go_on, _) = stuck();
    driver.start(ALL);
    driver.give(0, &[Part::Write(8)]);
    std::thread::sleep(Duration::from_millis(30));
    let start = Instant::now();
    driver.device.stop();
    assert!(start.elapsed() < Duration::from_secs(20));
    assert!(driver.reports.lock().unwrap()[0].contains("left behind"));
    drop(go_on);
}

#[test]
fn a_driver_changes_what_it_may_of_a_configuration_and_hears_of_changes() {
    let (mut driver, _go_on, _) = stuck();
    driver.start(ALL);
    assert_eq!(driver.get::<4>(0x2000), [1, 2, 3, 4]);
    let generation = driver.get::<1>(21);
    driver.put(0x2000, &[0xff; 4]);
    within("the device answers", || driver.get::<4>(0x2000) == [1, 0xf2, 3, 0xf2]);
    assert_ne!(driver.get::<1>(21), generation);
    within("an interrupt says so", || driver.get::<1>(0x1000) == [2]);
    driver.put(0x2ffc, &[0xff; 8]);
    assert_eq!(driver.get::<8>(0x2ffc), [0; 8]);
}

/// Several CPUs reset, start, notify, move and mask at random while another one writes into the rings.
#[test]
fn cpus_that_disagree_do_no_harm() {
    let rounds = std::env::var("REALM_FUZZ_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(300u64);
    let mut driver = Driver::new(Box::new(Rng));
    driver.start(ALL);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for cpu in 1..4u64 {
            let (device, view, control) =
                (driver.device.clone(), driver.view.clone(), super::testing::control_word(&driver));
            scope.spawn(move || {
                let mut state = cpu.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let mut random = move || {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state
                };
                for _ in 0..rounds {
                    let (what, value) = (random() % 12, random());
                    match what {
                        0 => device.write(20, &[0]).unwrap(),
                        1..=3 => {
                            for (offset, bytes) in [(8, 1u32), (12, 3), (8, 0), (12, 1 << 29)] {
                                device.write(offset, &bytes.to_le_bytes()).unwrap();
                            }
                            for status in [1u8, 3, 11] {
                                device.write(20, &[status]).unwrap();
                            }
                            for (offset, at) in [(32, 0u64), (40, 0x2000), (48, 0x3000)] {
                                device.write(offset, &(RAM_BASE + at).to_le_bytes()).unwrap();
                            }
                            device.write(28, &[1, 0]).unwrap();
                            device.write(20, &[15]).unwrap();
                        }
                        4..=6 => device.write(0x3000, &[0, 0]).unwrap(),
                        7 => device.write(0x4000 + value % 32, &value.to_le_bytes()).unwrap(),
                        8 => device
                            .config_write(
                                control.unwrap(),
                                &[0, [0, 0x80, 0xc0][usize::try_from(value % 3).unwrap()]],
                            )
                            .unwrap(),
                        9 => device.config_write(0x10, &value.to_le_bytes()[..4]).unwrap(),
                        10 => device.config_write(4, &[value.to_le_bytes()[0], 0]).unwrap(),
                        _ => {
                            let at = GuestAddress(
                                RAM_BASE
                                    + [0, 0x2000, 0x3000, value % (RAM / 2)]
                                        [usize::try_from(value >> 60 & 3).unwrap()],
                            );
                            let _ = view.write_slice(&value.to_le_bytes()[..4], at);
                        }
                    }
                    device.read(20, &mut [0]).unwrap();
                    device.read(0x1000, &mut [0]).unwrap();
                }
            });
        }
    });
    driver.start(ALL);
    driver.reports.lock().unwrap().clear();
    driver.give(0, &[Part::Write(8)]);
    assert_eq!(driver.take(0), Some(8));
    let stopping = Instant::now();
    driver.device.stop();
    assert!(stopping.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn a_guest_that_breaks_the_rules_for_ever_fills_no_log() {
    let mut driver = Driver::new(Box::new(Rng));
    for _ in 0..50 {
        driver.start(ALL);
        driver.give_raw(0, &[(0, 16, 2)]);
        within("the device stops", || driver.status() & 64 != 0);
    }
    let reports = driver.reports.lock().unwrap();
    assert_eq!(reports.len(), 20);
    assert!(reports.last().unwrap().contains("nothing more"));
}
