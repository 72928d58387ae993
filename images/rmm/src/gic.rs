//! The GIC's virtual CPU interface of a REC.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use rmm::context::{RecContext, word};

static LIST_REGISTERS: AtomicU64 = AtomicU64::new(0);
static PRIORITY_REGISTERS: AtomicU64 = AtomicU64::new(0);

/// Reads the implementation's sizes, once.
pub(crate) fn init() {
    let vtr = read_reg!(ich_vtr_el2!());
    LIST_REGISTERS.store((vtr & 0x1F).min(15) + 1, Relaxed);
    let registers = match vtr >> 26 & 7 {
        0..=4 => 1,
        5 => 2,
        _ => 4,
    };
    PRIORITY_REGISTERS.store(registers, Relaxed);
}

macro_rules! list_registers {
    ($do:ident) => {
        $do! {
            0 "S3_4_C12_C12_0", 1 "S3_4_C12_C12_1", 2 "S3_4_C12_C12_2", 3 "S3_4_C12_C12_3",
            4 "S3_4_C12_C12_4", 5 "S3_4_C12_C12_5", 6 "S3_4_C12_C12_6", 7 "S3_4_C12_C12_7",
            8 "S3_4_C12_C13_0", 9 "S3_4_C12_C13_1", 10 "S3_4_C12_C13_2", 11 "S3_4_C12_C13_3",
            12 "S3_4_C12_C13_4", 13 "S3_4_C12_C13_5", 14 "S3_4_C12_C13_6", 15 "S3_4_C12_C13_7"
        }
    };
}

macro_rules! priority_registers {
    ($do:ident) => {
        $do! {
            0 "S3_4_C12_C8_0" "S3_4_C12_C9_0", 1 "S3_4_C12_C8_1" "S3_4_C12_C9_1",
            2 "S3_4_C12_C8_2" "S3_4_C12_C9_2", 3 "S3_4_C12_C8_3" "S3_4_C12_C9_3"
        }
    };
}

/// Loads list registers, active priorities and control. `ICH_VMCR_EL2` is switched with the other registers.
pub(crate) fn load(ctx: &RecContext<'_>) {
    let (lists, priorities) = (LIST_REGISTERS.load(Relaxed), PRIORITY_REGISTERS.load(Relaxed));
    macro_rules! load_lists {
        ($($n:literal $register:literal),*) => {
            'done: { $(
                if lists == $n { break 'done; }
                // SAFETY: an implemented register of the virtual interface, not enabled yet.
                unsafe { write_reg!($register, ctx.get(word::ICH_LR + $n)) };
            )* }
        };
    }
    macro_rules! load_priorities {
        ($($n:literal $group0:literal $group1:literal),*) => {
            'done: { $(
                if priorities == $n { break 'done; }
                // SAFETY: as above.
                unsafe {
                    write_reg!($group0, ctx.get(word::ICH_AP0R + $n));
                    write_reg!($group1, ctx.get(word::ICH_AP1R + $n));
                }
            )* }
        };
    }
    list_registers!(load_lists);
    priority_registers!(load_priorities);
    // SAFETY: enables the interface for the REC that is loaded.
    unsafe { write_reg!(ich_hcr_el2!(), ctx.get(word::ICH_HCR)) };
}

/// Stores all of it and leaves the interface disabled and empty: nothing of a REC is left for the host to read.
pub(crate) fn save(ctx: &RecContext<'_>) {
    let (lists, priorities) = (LIST_REGISTERS.load(Relaxed), PRIORITY_REGISTERS.load(Relaxed));
    ctx.set(word::ICH_MISR, read_reg!(ich_misr_el2!()));
    ctx.set(word::ICH_HCR, read_reg!(ich_hcr_el2!()));
    macro_rules! save_lists {
        ($($n:literal $register:literal),*) => {
            'done: { $(
                if lists == $n { break 'done; }
                ctx.set(word::ICH_LR + $n, read_reg!($register));
                // SAFETY: as in `load`.
                unsafe { write_reg!($register, 0) };
            )* }
        };
    }
    macro_rules! save_priorities {
        ($($n:literal $group0:literal $group1:literal),*) => {
            'done: { $(
                if priorities == $n { break 'done; }
                ctx.set(word::ICH_AP0R + $n, read_reg!($group0));
                ctx.set(word::ICH_AP1R + $n, read_reg!($group1));
                // SAFETY: as in `load`.
                unsafe {
                    write_reg!($group0, 0);
                    write_reg!($group1, 0);
                }
            )* }
        };
    }
    // SAFETY: disables the virtual interface.
    unsafe { write_reg!(ich_hcr_el2!(), 0) };
    list_registers!(save_lists);
    priority_registers!(save_priorities);
}
