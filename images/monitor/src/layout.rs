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

/// Secure RAM: what the monitor is made of and everything it knows. As in the linker script.
pub const SECURE_RAM: u64 = 0x0E00_0000;
pub const SECURE_RAM_SIZE: u64 = 0x0100_0000;
/// Constants, behind the code.
pub const RODATA: u64 = 0x0E08_0000;
/// Variables.
pub const DATA: u64 = 0x0E10_0000;
/// One block for each CPU: stacks and contexts, with guard pages.
pub const CPUS: u64 = 0x0E20_0000;
/// Level 0 table, then level 1 tables to the end of secure RAM: for the first 94 GiB of DRAM.
pub const GPT: u64 = 0x0E40_0000;
pub const GPT_L1_POOL: u64 = 0x0E42_0000;

pub const DTB: u64 = 0x4000_0000;
pub const DTB_SIZE: u64 = 0x10_0000;
/// The RMM's image and all that it uses by itself, and the page that it shares with EL3 at the end: Realm memory
/// from boot, that never goes to the host.
pub const CARVE_OUT: Bank = Bank { base: RMM, size: 0x0180_0000 };
pub const RMM: u64 = 0x4010_0000;
pub const SHARED_PAGE: u64 = 0x418F_F000;
pub const KERNEL: u64 = 0x4200_0000;
/// End of the first gigabyte of DRAM.
const FIRST_GIGABYTE: u64 = 0x8000_0000;

/// What RMM_RESERVE_MEMORY gives away, as much the RMM's as the carve-out: memory for each CPU, and four bytes for
/// each granule of DRAM. Between shared page and kernel, or, for more than 5 GiB of DRAM, at the end of the first
/// gigabyte.
pub const fn reserve(dram: u64) -> Bank {
    const PER_CPU: u64 = 0x1_0000;
    const MEGABYTE: u64 = 0x10_0000;
    let wanted = monitor::MAX_CPUS as u64 * PER_CPU + dram / 1024;
    let size = wanted.next_multiple_of(MEGABYTE);
    let behind = CARVE_OUT.base + CARVE_OUT.size;
    let base = if size <= KERNEL - behind { behind } else { FIRST_GIGABYTE - size };
    Bank { base, size }
}
