//! The host side of Realms: what a hypervisor does so that a VMM can build, run and tear down a Realm through the
//! KVM ioctl ABI, with an RMM underneath.
//!
//! The core is portable: it reaches kernel and hardware only through [`Kernel`]. It runs in the kernel module, on the
//! simulated machine and in unit tests, unchanged.
//!
//! | module | question |
//! |---|---|
//! | [`kernel`], [`files`], [`errno`] | what is needed from, and offered to, the kernel |
//! | [`system`] | the device node: what can this machine do, make a VM |
//! | [`vm`], [`caps`], [`realm`] | the VM file: its ioctls, its life from nothing to a running Realm and back |
//! | [`memory`], [`slots`], [`gmem`], `shared`, [`rtt`], [`populate`], [`fault`] | who owns which page, and what the Realm sees where |
//! | [`vcpu`], `vcpu_attr`, [`regs`], [`rec`] | the vCPU file and the REC behind it |
//! | [`run`], [`mmio`], [`psci`], [`hostcall`], [`smccc`], [`timer`] | `KVM_RUN`, and what to do with each exit |
//! | [`irqchip`], `events`, [`routing`], [`device`], [`vgic`] | interrupts, eventfds |
//! | [`rmi`], [`granule`], [`stats`] | calling the RMM; pages that belong to the Realm world; counters |
//! | [`lock`], `sync` | locks that are told what they guard; atomics |
//!
//! # Locks, outermost first
//!
//! 1. [`vm::Vm::control`]: configuration and life cycle. Never taken by a thread that runs a vCPU.
//! 2. a vCPU's state, held for the whole of `KVM_RUN`.
//! 3. [`vm::Vm::memory`]: slots, attributes, translation tables, and so every RMI command that changes a mapping.
//! 4. a guest_memfd's pages.
//! 5. eventfds, and the orders of an ITS. Memory (3) may be taken inside the latter.
//! 6. spin locks: shared pages, routing of interrupts, ioeventfds, and inside the vGIC.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "explore"))]
extern crate std;

pub mod caps;
pub mod device;
pub mod errno;
mod events;
pub mod fault;
pub mod files;
pub mod gmem;
pub mod granule;
pub mod hostcall;
pub mod irqchip;
pub mod kernel;
pub mod lock;
pub mod memory;
pub mod mmio;
pub mod populate;
pub mod psci;
pub mod ranges;
pub mod realm;
pub mod rec;
pub mod regs;
pub mod rmi;
pub mod routing;
pub mod rtt;
pub mod run;
mod shared;
pub mod slots;
pub mod smccc;
pub mod sparse;
pub mod stats;
mod sync;
pub mod system;
pub mod timer;
pub mod vcpu;
mod vcpu_attr;
pub mod vgic;
pub mod vm;

pub use errno::{Errno, Result};
pub use files::FileObject;
pub use gmem::Gmem;
pub use kernel::Kernel;
pub use stats::Stats;
pub use system::{ProbeError, System, SystemConfig};
pub use vcpu::{Vcpu, VcpuFile};
pub use vm::Vm;
