//! The virtual machine monitor: builds and runs a Realm on `/dev/kvm-realm`.
//!
//! | module | question it answers |
//! |---|---|
//! | [`layout`] | where does everything lie in guest physical memory? |
//! | [`image`] | what is in a kernel file? |
//! | [`fdt`] | what does the guest's device tree say? |
//! | [`plan`] | what is in memory at the start, and in which order is it measured? |
//! | [`memory`], [`footprint`] | what of the guest's RAM does this process see, and what does it cost beside? |
//! | [`kvm`], [`probe`] | how is the device called, and what can it do? |
//! | [`machine`] | in which order is a Realm built? |
//! | [`bus`], [`serial`], [`rtc`], [`pci`], [`msix`] | what does the guest see when it touches a device? |
//! | [`wiring`] | how do devices interrupt the guest, and the guest's stores reach devices, without this process? |
//! | [`virtio`] | what do disks, terminals and the like do? |
//! | [`disk`], [`link`] | what is in a disk's file, and at the other end of a network card's wire? |
//! | [`share`] | what of a folder of the host does the guest see, and what may it do there? |
//! | [`runner`] | what happens while the CPUs run? |
//! | [`seccomp`] | which system calls may each thread make? |
//! | [`control`] | how does the guest's init learn what to do? |
//! | [`terminal`], [`mailbox`], [`eventfd`] | how do user and threads talk to it all? |
//!
//! Everything compiles on every architecture and is tested where `cargo test` runs; only the device itself is
//! arm64's.

pub mod bus;
pub mod control;
pub mod disk;
mod error;
pub mod eventfd;
pub mod fdt;
pub mod footprint;
pub mod image;
pub mod kvm;
pub mod layout;
pub mod link;
pub mod machine;
pub mod mailbox;
pub mod memory;
pub mod msix;
mod ordered;
pub mod pci;
pub mod plan;
pub mod probe;
mod qcow2;
pub mod rtc;
pub mod runner;
pub mod seccomp;
pub mod serial;
pub mod share;
pub mod terminal;
pub mod virtio;
pub mod wiring;

pub use error::{Error, Layer, Result};
