//! Tests of the whole GIC; `cpu_interface` and `machine` are the models they run against.

mod attributes;
mod cpu_interface;
mod delivery;
mod its;
mod machine;
mod random;
mod registers;

use super::{ExitGic, Limits, LrImage, MAX_LRS, Vgic};

type TestGic = Vgic<spin::Mutex<()>>;

const DIST: u64 = 0x3fff_0000;
const REDISTS: u64 = 0x3f00_0000;

const SGI_FRAME: u64 = 0x1_0000;
const ISENABLER: u64 = 0x100;
const ICENABLER: u64 = 0x180;
const ISPENDR: u64 = 0x200;
const ICPENDR: u64 = 0x280;
const ISACTIVER: u64 = 0x300;
const ICACTIVER: u64 = 0x380;
const IPRIORITYR: u64 = 0x400;
const ICFGR: u64 = 0xc00;
const IROUTER: u64 = 0x6000;

/// VMCR with both groups enabled and nothing masked.
const VMCR_OPEN: u64 = 0xf8 << 24 | 0b11;

fn mpidr(vcpu: usize) -> u64 {
    let vcpu = vcpu as u64;
    vcpu & 0xf | (vcpu >> 4) << 8
}

/// A started GIC with 128 interrupts and both groups forwarded.
fn gic(nr_vcpus: usize) -> TestGic {
    let gic = TestGic::new(Limits { ipa_bits: 40 });
    gic.set_attr(3, 0, 128).unwrap();
    gic.set_attr(0, 2, DIST).unwrap();
    gic.set_attr(0, 3, REDISTS).unwrap();
    for vcpu in 0..nr_vcpus {
        assert_eq!(gic.vcpu_added(mpidr(vcpu) | 1 << 31), Ok(vcpu));
    }
    gic.set_attr(4, 0, 0).unwrap();
    gic.start().unwrap();
    gic.mmio_write(DIST, 4, 0b11).unwrap();
    gic
}

/// The frame that has an interrupt's registers: the distributor, or the vCPU's SGI frame.
fn bank(vcpu: usize, intid: u32) -> u64 {
    if intid < 32 { REDISTS + 0x2_0000 * vcpu as u64 + SGI_FRAME } else { DIST }
}

/// The word and bit of an interrupt in a register with one bit for each.
fn bit(vcpu: usize, register: u64, intid: u32) -> (u64, u64) {
    (bank(vcpu, intid) + register + u64::from(intid / 32 * 4), 1 << (intid % 32))
}

fn write_bit(gic: &TestGic, vcpu: usize, register: u64, intid: u32) -> super::VcpuSet {
    let (gpa, bit) = bit(vcpu, register, intid);
    gic.mmio_write(gpa, 4, bit).unwrap()
}

fn read_bit(gic: &TestGic, vcpu: usize, register: u64, intid: u32) -> bool {
    let (gpa, bit) = bit(vcpu, register, intid);
    gic.mmio_read(gpa, 4).unwrap() & bit != 0
}

fn set_priority(gic: &TestGic, vcpu: usize, intid: u32, priority: u8) {
    gic.mmio_write(bank(vcpu, intid) + IPRIORITYR + u64::from(intid), 1, priority.into()).unwrap();
}

fn set_edge(gic: &TestGic, intid: u32) {
    let gpa = DIST + ICFGR + u64::from(intid / 16 * 4);
    let value = gic.mmio_read(gpa, 4).unwrap();
    gic.mmio_write(gpa, 4, value | 2 << (intid % 16 * 2)).unwrap();
}

fn route(gic: &TestGic, intid: u32, vcpu: usize) -> super::VcpuSet {
    gic.mmio_write(DIST + IROUTER + u64::from(intid) * 8, 8, mpidr(vcpu)).unwrap()
}

/// An exit that leaves the list registers as they were.
fn exit_of(image: &LrImage) -> ExitGic {
    ExitGic { hcr: image.hcr, lrs: image.lrs, misr: 0, vmcr: VMCR_OPEN }
}

/// An exit at which no list register holds anything.
fn empty_exit() -> ExitGic {
    ExitGic { hcr: 0, lrs: [0; MAX_LRS], misr: 0, vmcr: VMCR_OPEN }
}

const LR_PENDING: u64 = 1 << 62;
const LR_ACTIVE: u64 = 1 << 63;
const LR_EOI: u64 = 1 << 41;

fn intid_of(lr: u64) -> u32 {
    lr as u32
}

fn state_of(lr: u64) -> u64 {
    lr & (LR_PENDING | LR_ACTIVE)
}
