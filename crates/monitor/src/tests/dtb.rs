use std::vec;
use std::vec::Vec;

use crate::dtb::{Dtb, DtbError};
use crate::manifest::{Bank, MAX_BANKS};

/// A tree in the making: structure and strings.
#[derive(Default)]
struct Tree {
    structure: Vec<u8>,
    strings: Vec<u8>,
}

impl Tree {
    fn word(&mut self, word: u32) {
        self.structure.extend(word.to_be_bytes());
    }
    fn pad(&mut self) {
        while self.structure.len() % 4 != 0 {
            self.structure.push(0);
        }
    }
    fn node(&mut self, name: &str, body: impl FnOnce(&mut Self)) {
        self.word(1);
        self.structure.extend(name.as_bytes());
        self.structure.push(0);
        self.pad();
        body(self);
        self.word(2);
    }
    fn prop(&mut self, name: &str, value: &[u8]) {
        self.word(3);
        self.word(value.len().try_into().unwrap());
        let offset = self.strings.len().try_into().unwrap();
        self.word(offset);
        self.strings.extend(name.as_bytes());
        self.strings.push(0);
        self.structure.extend(value);
        self.pad();
    }
    fn blob(mut self, total: usize) -> Vec<u8> {
        self.word(9);
        let structure_at = 56;
        let strings_at = structure_at + self.structure.len();
        let sizes = [self.strings.len(), self.structure.len()];
        let mut out = Vec::new();
        for word in [0xD00D_FEED, total, structure_at, strings_at, 40, 17, 16, 0, sizes[0], sizes[1]] {
            out.extend(u32::try_from(word).unwrap().to_be_bytes());
        }
        out.extend([0; 16]);
        out.extend(self.structure);
        out.extend(self.strings);
        assert!(out.len() <= total);
        out.resize(total, 0);
        out
    }
}

fn machine(cpus: usize, total: usize) -> Vec<u8> {
    let mut tree = Tree::default();
    tree.node("", |t| {
        t.prop("#address-cells", &2_u32.to_be_bytes());
        t.node("memory@40000000", |t| {
            let mut reg = 0x4000_0000_u64.to_be_bytes().to_vec();
            reg.extend(0x8000_0000_u64.to_be_bytes());
            t.prop("reg", &reg);
            t.prop("device_type", b"memory\0");
        });
        t.node("cpus", |t| {
            t.prop("#address-cells", &1_u32.to_be_bytes());
            t.node("cpu-map", |t| t.node("socket0", |_| {}));
            for cpu in 0..cpus {
                t.node(&std::format!("cpu@{cpu}"), |t| t.prop("device_type", b"cpu\0"));
            }
        });
        t.node("chosen", |t| t.prop("bootargs", b"console=ttyAMA0\0"));
    });
    tree.blob(total)
}

#[test]
fn memory_and_cpus_are_found() {
    let mut blob = machine(3, 4096);
    let dtb = Dtb::new(&mut blob).unwrap();
    let mut banks = [Bank::default(); MAX_BANKS];
    assert_eq!(dtb.memory(&mut banks), Ok(1));
    assert_eq!(banks[0], Bank { base: 0x4000_0000, size: 0x8000_0000 });
    assert_eq!(dtb.cpu_count(), Ok(3));
}

#[test]
fn memory_of_several_nodes_is_put_together_where_it_touches() {
    let mut tree = Tree::default();
    tree.node("", |t| {
        for (base, size) in [(0x6000_0000, 0x2000_0000), (0x4000_0000, 0x2000_0000), (1 << 33, 1 << 30)] {
            t.node(&std::format!("memory@{base:x}"), |t| {
                let mut reg = u64::to_be_bytes(base).to_vec();
                reg.extend(u64::to_be_bytes(size));
                t.prop("reg", &reg);
                t.prop("device_type", b"memory\0");
            });
        }
    });
    let mut blob = tree.blob(1024);
    let mut banks = [Bank::default(); MAX_BANKS];
    assert_eq!(Dtb::new(&mut blob).unwrap().memory(&mut banks), Ok(2));
    let expected = [Bank { base: 0x4000_0000, size: 0x4000_0000 }, Bank { base: 1 << 33, size: 1 << 30 }];
    assert_eq!(banks[..2], expected);
}

#[test]
fn the_amended_tree_says_everything_that_linux_needs() {
    let mut blob = machine(3, 4096);
    let mut dtb = Dtb::new(&mut blob).unwrap();
    dtb.add_psci().unwrap();
    dtb.reserve(b"rmm@40100000", Bank { base: 0x4010_0000, size: 0x180_0000 }).unwrap();
    dtb.set_initrd(0x4400_0000, 0x4480_0000).unwrap();
    // A second time: properties are replaced, not doubled.
    dtb.set_initrd(0x4400_0000, 0x4490_0000).unwrap();

    let dtb = Dtb::new(&mut blob).unwrap();
    let value = |path: &[&[u8]], name: &[u8]| dtb.property(dtb.find(path).unwrap(), name).map(<[u8]>::to_vec);
    assert_eq!(value(&[b"psci"], b"method"), Some(b"smc\0".to_vec()));
    assert!(value(&[b"psci"], b"compatible").unwrap().ends_with(b"arm,psci-0.2\0"));
    for cpu in [&b"cpu@0"[..], b"cpu@1", b"cpu@2"] {
        assert_eq!(value(&[b"cpus", cpu], b"enable-method"), Some(b"psci\0".to_vec()));
        assert_eq!(value(&[b"cpus", cpu], b"device_type"), Some(b"cpu\0".to_vec()));
    }
    let rmm: &[&[u8]] = &[b"reserved-memory", b"rmm"];
    assert_eq!(value(rmm, b"no-map"), Some(vec![]));
    assert_eq!(value(rmm, b"reg").unwrap()[..8], 0x4010_0000_u64.to_be_bytes());
    assert_eq!(value(&[b"reserved-memory"], b"ranges"), Some(vec![]));
    assert_eq!(value(&[b"reserved-memory"], b"#address-cells"), Some(vec![0, 0, 0, 2]));
    assert_eq!(value(&[b"chosen"], b"linux,initrd-start"), Some(0x4400_0000_u64.to_be_bytes().to_vec()));
    assert_eq!(value(&[b"chosen"], b"linux,initrd-end"), Some(0x4490_0000_u64.to_be_bytes().to_vec()));
    assert_eq!(value(&[b"chosen"], b"bootargs"), Some(b"console=ttyAMA0\0".to_vec()));
    assert_eq!(dtb.cpu_count(), Ok(3));
}

#[test]
fn a_tree_without_room_is_refused_and_not_overrun() {
    let mut blob = machine(1, 560);
    let mut dtb = Dtb::new(&mut blob).unwrap();
    let result = dtb.add_psci().and_then(|()| dtb.reserve(b"rmm", Bank::default()));
    assert_eq!(result, Err(DtbError::NoSpace));
}

#[test]
fn garbage_is_an_error_and_never_a_panic() {
    assert_eq!(Dtb::new(&mut [0; 64]).unwrap_err(), DtbError::BadHeader);
    assert_eq!(Dtb::new(&mut []).unwrap_err(), DtbError::BadHeader);
    let good = machine(2, 1024);
    for at in 0..700 {
        for bits in [0xFF, 0x80, 0x01] {
            let mut blob = good.clone();
            blob[at] ^= bits;
            if let Ok(mut dtb) = Dtb::new(&mut blob) {
                let _ = dtb.memory(&mut [Bank::default(); MAX_BANKS]);
                let _ = dtb.cpu_count();
                let _ = dtb.add_psci();
                let _ = dtb.reserve(b"x", Bank::default());
                let _ = dtb.set_initrd(0, 1);
            }
        }
    }
}
