//! A CPU's block of memory: one saved context and stack per world, and what a crash report needs.
//!
//! While a world runs, SP_EL3 points to its context, which lies on top of its stack. So an exception can save
//! the general-purpose registers without looking for a place, and a world switch is a change of SP. The
//! assembly in `switch.rs` knows the offsets.

use core::mem::offset_of;

use monitor::{Regs, World};

use crate::layout;

/// Bytes per CPU: crash stack with the crash area on top, then per world a stack with its context on top. Below
/// each of the three is a page that is not mapped.
pub const CPU_BLOCK_SIZE: usize = 0x1_0000;
pub const GUARDS: [usize; 3] = [0x0, 0x2000, 0x7000];
pub const CRASH_AREA: usize = 0x1C00;
pub const NORMAL_CONTEXT: usize = 0x6C00;
pub const REALM_CONTEXT: usize = 0xFC00;
const _: () = assert!(REALM_CONTEXT + size_of::<Context>() <= CPU_BLOCK_SIZE);
const _: () = assert!(NORMAL_CONTEXT + size_of::<Context>() <= GUARDS[2]);
const _: () = assert!(CRASH_AREA + size_of::<Regs>() <= GUARDS[1]);
const _: () = assert!(layout::CPUS as usize + monitor::MAX_CPUS * CPU_BLOCK_SIZE <= layout::GPT as usize);

// For who looks at the image whether its stacks suffice.
core::arch::global_asm!(
    ".global monitor_crash_stack_size, monitor_normal_stack_size, monitor_realm_stack_size",
    ".set monitor_crash_stack_size, {crash}",
    ".set monitor_normal_stack_size, {normal}",
    ".set monitor_realm_stack_size, {realm}",
    crash = const CRASH_AREA - GUARDS[0] - 0x1000,
    normal = const NORMAL_CONTEXT - GUARDS[1] - 0x1000,
    realm = const REALM_CONTEXT - GUARDS[2] - 0x1000,
);

/// Number of 64-bit slots for EL2 registers and keys; which is which says `switch.rs`.
pub const SLOTS: usize = 68;

/// What a world has when it does not run.
#[repr(C, align(64))]
pub struct Context {
    pub regs: Regs,
    pub sp_el0: u64,
    pub elr_el3: u64,
    pub spsr_el3: u64,
    pub scr_el3: u64,
    /// The other world's context on the same CPU.
    pub peer: *mut Context,
    pub cpu: usize,
    pub realm: bool,
    pub el2: [u64; SLOTS],
}

pub const SP_EL0: usize = offset_of!(Context, sp_el0);
pub const SPSR_EL3: usize = offset_of!(Context, spsr_el3);
// Saved and loaded in pairs.
const _: () = assert!(offset_of!(Context, elr_el3) == SP_EL0 + 8);
const _: () = assert!(offset_of!(Context, scr_el3) == SPSR_EL3 + 8);
pub const PEER: usize = offset_of!(Context, peer);
pub const EL2: usize = offset_of!(Context, el2);

/// Slots that have a value when a world is first entered.
pub mod slot {
    pub const HCR: usize = 9;
    pub const MDCR: usize = 13;
    pub const SCTLR: usize = 14;
    pub const VMPIDR: usize = 20;
    pub const VPIDR: usize = 21;
    pub const HFGITR: usize = 28;
    pub const HFGRTR: usize = 29;
    pub const HFGWTR: usize = 30;
    pub const ACTLR: usize = 60;
    pub const ICC_SRE: usize = 65;
}

impl Context {
    pub fn world(&self) -> World {
        if self.realm { World::Realm } else { World::NonSecure }
    }
}
