//! Where everything is: the machine's devices and the monitor's own choices.

use monitor::manifest::Bank;

pub const GICD: usize = 0x0800_0000;
pub const GICR: usize = 0x080A_0000;
/// Wakes a parked CPU; belongs to the host on every other CPU.
pub const WAKE_SGI: u32 = 15;
pub const GICR_STRIDE: usize = 0x2_0000;
pub const UART0: u64 = 0x0900_0000;
pub const FW_CFG: usize = 0x0902_0000;
pub const UART1: usize = 0x0904_0000;
pub const SECURE_GPIO: usize = 0x090B_0000;

pub const SECURE_RAM: u64 = 0x0E00_0000;
pub const SECURE_RAM_SIZE: u64 = 0x0100_0000;
/// Level 0 table, then level 1 tables to the end of secure RAM; as in the linker script.
pub const GPT: u64 = 0x0E80_0000;
pub const GPT_L1_POOL: u64 = 0x0E82_0000;

pub const DTB: u64 = 0x4000_0000;
pub const DTB_SIZE: u64 = 0x10_0000;
/// Realm memory from boot: the RMM's image and all that it uses, and the shared page at its end.
pub const CARVE_OUT: Bank = Bank { base: 0x4010_0000, size: 0x0180_0000 };
pub const RMM: u64 = CARVE_OUT.base;
pub const SHARED_PAGE: u64 = 0x418F_F000;
/// What RMM_RESERVE_MEMORY may give away; an RMM that calls it must not use this by itself.
pub const RESERVE: Bank = Bank { base: 0x4100_0000, size: SHARED_PAGE - 0x4100_0000 };
pub const KERNEL: u64 = 0x4200_0000;
