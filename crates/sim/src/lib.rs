//! A simulated RME machine on which monitor, RMM and host core run together in one process.
//!
//! | module | what it stands for |
//! |---|---|
//! | [`memory`] | DRAM and secure RAM behind the granule protection check |
//! | [`stage2`] | the MMU's stage 2, with a TLB |
//! | [`machine`] | CPUs, counter, firmware |
//! | [`root`], [`realm`] | EL3 and R-EL2: the platforms of monitor and RMM |
//! | [`host`] | the host kernel: the host core's kernel |
//! | [`guest`] | scripted guests inside Realms |
//! | [`gic`] | what a guest's driver does to its GIC |
//! | [`vmm`] | a small VMM: the ioctls in their order |
//! | [`hostile`] | threads of a VMM that do anything |
//! | `sync` | locks and threads: real ones, or those of an explorer of schedules |
//! | [`bench`] | all of it set up, and the check that everything came back |
//!
//! The code under test is the cores' own, unchanged. What the simulation adds is suspicion: a wrong-world access
//! faults as on hardware (and panics where hardware would crash the host), the TLB forgets nothing by itself, fresh
//! pages are poisoned, a page that is freed while delegated is reported, sleeping under a spin lock panics.

pub mod bench;
pub mod gic;
pub mod guest;
pub mod host;
pub mod hostile;
pub mod machine;
pub mod memory;
pub mod realm;
pub mod root;
pub mod stage2;
mod sync;
pub mod vmm;
