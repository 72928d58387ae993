//! A power cut: whatever the disk had written of a qcow2 image, it can be opened again, has what was flushed, and every cluster
//! is used once and counted.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Result;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{DenyImplicitOpenGate, FormatCreateBuilder as _, Storage};
use proptest::prelude::*;

use super::*;
use crate::qcow2::Use;

const SECTOR: usize = 512;
/// The guest's disk. A table of a small cluster maps 32 KiB of it, a block of counters 128 KiB of the file.
const SECTORS: usize = 1024;
const CLUSTER: usize = 512;

/// What a file was told.
#[derive(Clone, Debug)]
enum Event {
    Write(usize, Vec<u8>),
    Length(usize),
    Sync,
}

#[derive(Debug, Default)]
struct Tape {
    content: Vec<u8>,
    events: Vec<Event>,
}

impl Tape {
    fn put(&mut self, event: Event) {
        apply(&mut self.content, &event);
        self.events.push(event);
    }
}

fn apply(content: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Write(at, bytes) => {
            content.resize(content.len().max(at + bytes.len()), 0);
            content[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        Event::Length(len) => content.resize(*len, 0),
        Event::Sync => {}
    }
}

/// A file in memory that remembers what it was told.
#[derive(Debug, Default)]
struct Recorder {
    tape: Arc<Mutex<Tape>>,
    helper: CommonStorageHelper,
}

impl fmt::Display for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("recorder")
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap()
}

impl Storage for Recorder {
    fn size(&self) -> Result<u64> {
        Ok(self.tape.lock().unwrap().content.len().try_into().unwrap())
    }

    unsafe fn pure_readv(&self, mut buffers: IoVectorMut<'_>, offset: u64) -> Result<()> {
        let tape = self.tape.lock().unwrap();
        let mut bytes = tape.content.get(index(offset)..).unwrap_or_default().to_vec();
        bytes.resize(index(buffers.len()), 0);
        buffers.copy_from_slice(&bytes);
        Ok(())
    }

    unsafe fn pure_writev(&self, buffers: IoVector<'_>, offset: u64) -> Result<()> {
        let mut bytes = vec![0; index(buffers.len())];
        buffers.copy_into_slice(&mut bytes);
        self.tape.lock().unwrap().put(Event::Write(index(offset), bytes));
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.tape.lock().unwrap().put(Event::Sync);
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, size: u64, _: PreallocateMode) -> Result<()> {
        self.tape.lock().unwrap().put(Event::Length(index(size)));
        Ok(())
    }
}

/// What a guest does: where in sectors, how many.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(usize, usize, u8),
    Zero(usize, usize),
    Discard(usize, usize),
    Flush,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // A few places far from each other, so that tables are made, and places that are freed are taken again.
    let range = (0..SECTORS / 16, 0..16usize, 1..12usize).prop_map(|(part, at, len)| {
        let at = part * 16 + at;
        (at, len.min(SECTORS - at))
    });
    let step = prop_oneof![
        6 => (range.clone(), 1..=255u8).prop_map(|((at, len), fill)| Step::Write(at, len, fill)),
        2 => range.clone().prop_map(|(at, len)| Step::Zero(at, len)),
        3 => range.prop_map(|(at, len)| Step::Discard(at, len)),
        1 => Just(Step::Flush),
    ];
    proptest::collection::vec(step, 1..60)
}

/// What may be read from a sector: one of these fills, or anything.
#[derive(Clone, Debug)]
enum May {
    Be(Vec<u8>),
    BeAnything,
}

/// What the guest may see when the events before `cut` have been said, where `ends` tells after how many each step had ended.
fn allowed(steps: &[Step], ends: &[usize], cut: usize) -> Vec<May> {
    let mut all = vec![May::Be(vec![0]); SECTORS];
    let begins = std::iter::once(0).chain(ends.iter().copied());
    for ((step, begin), end) in steps.iter().zip(begins).zip(ends) {
        if begin >= cut && begin != *end || begin > cut {
            break;
        }
        match *step {
            Step::Write(at, len, fill) => all[at..at + len].iter_mut().for_each(|may| match may {
                May::Be(fills) => fills.push(fill),
                May::BeAnything => {}
            }),
            Step::Zero(at, len) | Step::Discard(at, len) => all[at..at + len].fill(May::BeAnything),
            Step::Flush if *end <= cut => all.iter_mut().for_each(|may| {
                if let May::Be(fills) = may {
                    fills.drain(..fills.len() - 1);
                }
            }),
            Step::Flush => {}
        }
    }
    all
}

/// The image's file after `cut` events, of which those after the last sync have been written or not, by `luck`, sector for
/// sector.
fn wreck(first: &[u8], events: &[Event], mut luck: u64) -> Vec<u8> {
    let synced = events.iter().rposition(|event| matches!(event, Event::Sync)).unwrap_or(0);
    let mut content = first.to_vec();
    for (number, event) in events.iter().enumerate() {
        let Event::Write(at, bytes) = event else {
            apply(&mut content, event);
            continue;
        };
        if number < synced {
            apply(&mut content, event);
            continue;
        }
        // The parts of a sector are written together.
        let mut from = 0;
        while from < bytes.len() {
            let to = bytes.len().min(((at + from) / SECTOR + 1) * SECTOR - at);
            luck = luck.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if luck >> 62 != 0 {
                apply(&mut content, &Event::Write(at + from, bytes[from..to].to_vec()));
            }
            from = to;
        }
    }
    content
}

/// Every cluster that is used is used once, and counted.
fn check(path: &Path) {
    let file = std::fs::File::open(path).unwrap();
    let header = Header::read(&file).unwrap();
    let mut uses = BTreeMap::<u64, Vec<Use>>::new();
    header
        .uses(&file, |what, offset| {
            uses.entry(offset).or_default().push(what);
            Ok(())
        })
        .unwrap();
    for (offset, uses) in &uses {
        assert_eq!(uses.len(), 1, "the cluster at {offset:#x} is {uses:?}");
    }
    let copy = path.with_extension("copy");
    std::fs::copy(path, &copy).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&copy).unwrap();
    assert_eq!(qcow2::settle(&file, &header, true).unwrap(), 0, "clusters that are used are not counted");
    std::fs::remove_file(copy).unwrap();
}

/// What QEMU's own checker says of an image: nothing is wrong, but that there may be clusters which nobody uses. `None` without
/// the program.
fn qemu_agrees(path: &Path) -> Option<bool> {
    let mut program = std::process::Command::new("qemu-img");
    let output = program.args(["check", "-q", "-f", "qcow2"]).arg(path).output().ok()?;
    const LEAKS: i32 = 3;
    Some(matches!(output.status.code(), Some(0 | LEAKS)))
}

fn scratch() -> PathBuf {
    static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    std::env::temp_dir().join(format!("realm-power-{}-{number}", std::process::id()))
}

fn cut_off(steps: &[Step], cut: prop::sample::Index, luck: u64) {
    let path = scratch();
    let size = u64::try_from(SECTORS * SECTOR).unwrap();
    let new = Recorder::default();
    let tape = new.tape.clone();
    Qcow2::<Recorder>::create_builder(new).size(size).cluster_size(CLUSTER).create().unwrap();
    let first = std::mem::take(&mut *tape.lock().unwrap()).content;
    std::fs::write(&path, &first).unwrap();

    let recorder = Recorder::default();
    let tape = recorder.tape.clone();
    tape.lock().unwrap().content = first.clone();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut image = Image::qcow2(recorder, &file, true, DenyImplicitOpenGate::default()).unwrap();
    let place =
        |at: usize, len: usize| (u64::try_from(at * SECTOR).unwrap(), u64::try_from(len * SECTOR).unwrap());
    let mut ends = Vec::new();
    for step in steps {
        match *step {
            Step::Write(at, len, fill) => image.write(&vec![fill; len * SECTOR], place(at, len).0).unwrap(),
            Step::Zero(at, len) => image.write_zeroes(place(at, len).0, place(at, len).1).unwrap(),
            Step::Discard(at, len) => image.discard(place(at, len).0, place(at, len).1).unwrap(),
            Step::Flush => image.flush().unwrap(),
        }
        ends.push(tape.lock().unwrap().events.len());
    }
    let events = tape.lock().unwrap().events.clone();
    drop(image);

    let cut = cut.index(events.len() + 1);
    std::fs::write(&path, wreck(&first, &events[..cut], luck)).unwrap();
    let mut disk = Disk::open(&path, Format::Qcow2, false).unwrap();
    check(&path);
    for (sector, may) in allowed(steps, &ends, cut).iter().enumerate() {
        let mut bytes = [0; SECTOR];
        disk.read(&mut bytes, place(sector, 1).0).unwrap();
        if let May::Be(fills) = may {
            assert!(
                fills.iter().any(|fill| bytes == [*fill; SECTOR]),
                "sector {sector} is {:?}, which is none of {fills:?}",
                &bytes[..4]
            );
        }
    }
    // The next life changes what it likes, and nothing else.
    let mut model = vec![0; SECTORS * SECTOR];
    disk.read(&mut model, 0).unwrap();
    for sector in (0..SECTORS).step_by(7) {
        disk.write(&[0xaa; SECTOR], place(sector, 1).0).unwrap();
        model[sector * SECTOR..(sector + 1) * SECTOR].fill(0xaa);
    }
    disk.flush().unwrap();
    let mut bytes = vec![0; SECTORS * SECTOR];
    disk.read(&mut bytes, 0).unwrap();
    assert!(bytes == model, "writes after the power cut changed others' sectors");
    drop(disk);
    check(&path);
    assert_ne!(qemu_agrees(&path), Some(false), "QEMU finds the image broken");
    std::fs::remove_file(path).unwrap();
}

/// Images of QEMU's, compressed and with a snapshot, are what they were, and stay whole when they are changed.
#[test]
fn images_that_qemu_made_are_whole_before_and_after() {
    let (raw, path) = (scratch(), scratch());
    let mut content: Vec<u8> = (0..4_000_000u32).map(|number| (number / 1000).to_le_bytes()[0]).collect();
    content.resize(8 << 20, 0);
    std::fs::write(&raw, &content).unwrap();
    let qemu_img = |words: &[&str]| {
        let output = std::process::Command::new("qemu-img").args(words).output().ok()?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(())
    };
    let (from, to) = (raw.to_str().unwrap(), path.to_str().unwrap());
    for kind in [&["-o", "cluster_size=64k"][..], &["-c"], &["-o", "compat=0.10,cluster_size=4k"]] {
        let words = [&["convert", "-f", "raw", "-O", "qcow2"], kind, &[from, to]].concat();
        if qemu_img(&words).is_none() {
            eprintln!("skipped: qemu-img is not installed (Debian: apt install qemu-utils)");
            break;
        }
        for snapshot in [false, true] {
            if snapshot {
                qemu_img(&["snapshot", "-c", "first", to]);
            }
            let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
            let header = Header::read(&file).unwrap();
            assert_eq!(qcow2::settle(&file, &header, true).unwrap(), 0, "{kind:?}: QEMU counts everything");
            let mut disk = Disk::open(&path, Format::Qcow2, false).unwrap();
            let mut bytes = vec![0; content.len()];
            disk.read(&mut bytes, 0).unwrap();
            assert!(bytes == content, "{kind:?}");
            for at in (0..content.len()).step_by(900_000) {
                let at = at / SECTOR * SECTOR;
                disk.write(&[0x55; SECTOR], at.try_into().unwrap()).unwrap();
                content[at..at + SECTOR].fill(0x55);
            }
            disk.flush().unwrap();
            drop(disk);
            assert_eq!(qemu_agrees(&path), Some(true), "{kind:?}, snapshot: {snapshot}");
        }
        std::fs::write(&raw, &content).unwrap();
    }
    let _ = std::fs::remove_file(path);
    std::fs::remove_file(raw).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("REALM_FUZZ_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(40)
    ))]

    #[test]
    fn a_power_cut_loses_nothing_that_was_flushed(
        steps in steps(),
        cut in any::<prop::sample::Index>(),
        luck in any::<u64>(),
    ) {
        cut_off(&steps, cut, luck);
    }
}
