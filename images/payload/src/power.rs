//! CPUs that come and go: races for one CPU, standby, and the reset of the whole machine.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use cca_abi::psci::{self, Code};

use crate::entry::smc;
use crate::guest::Guest;
use crate::{DONE, GRANULE, check, expect, guest, line, pool, probe_read, probe_write, secondary_start};

/// The CPU that others fight for, and who fights.
const PRIZE: u64 = 1;
const RIVALS: [u64; 2] = [0, 2];
const ROUNDS: u64 = 20;

/// How many rivals stand at the line of each round.
static LINE: AtomicU64 = AtomicU64::new(0);
static WON: AtomicU64 = AtomicU64::new(0);
static LOST: AtomicU64 = AtomicU64::new(0);
static STRANGE: AtomicU64 = AtomicU64::new(0);

/// Several CPUs turn the same one on at once: one succeeds, the others hear that it is coming or there. `cpu`'s part.
pub(crate) fn race(cpu: u64) {
    if !RIVALS.contains(&cpu) {
        return;
    }
    let rivals = RIVALS.len() as u64;
    for round in 1..=ROUNDS {
        let before = DONE[PRIZE as usize].load(Ordering::Acquire);
        LINE.fetch_add(1, Ordering::AcqRel);
        while LINE.load(Ordering::Acquire) < round * rivals * 2 - rivals {
            core::hint::spin_loop();
        }
        let entry = secondary_start as *const () as u64;
        match smc(psci::fid::CPU_ON_64, PRIZE, entry, PRIZE)[0] {
            0 => {
                WON.fetch_add(1, Ordering::AcqRel);
                // It does its work and turns itself off; nobody may try again before.
                while DONE[PRIZE as usize].load(Ordering::Acquire) == before
                    || smc(psci::fid::AFFINITY_INFO_64, PRIZE, 0, 0)[0] != 1
                {
                    core::hint::spin_loop();
                }
            }
            code if code == Code::AlreadyOn.to_register() || code == Code::OnPending.to_register() => {
                LOST.fetch_add(1, Ordering::AcqRel);
            }
            code => STRANGE.store(code, Ordering::Relaxed),
        }
        // Everybody is through with this round before the next begins.
        LINE.fetch_add(1, Ordering::AcqRel);
        while LINE.load(Ordering::Acquire) < round * rivals * 2 {
            core::hint::spin_loop();
        }
    }
}

/// After the race.
pub(crate) fn race_report() {
    let (won, lost) = (WON.load(Ordering::Relaxed), LOST.load(Ordering::Relaxed));
    let strange = STRANGE.load(Ordering::Relaxed);
    // A rival that comes when the winner's CPU is off again wins as well: what counts is that all calls were answered
    // with a word that fits, and that every CPU that was won has run.
    if strange == 0 && won >= ROUNDS && won + lost == ROUNDS * RIVALS.len() as u64 {
        check("one-cpu-on-wins", Ok(()));
    } else {
        check("one-cpu-on-wins", Err(format_args!("{won} won, {lost} lost, strange answer {strange:#x}")));
    }
}

/// CPU_SUSPEND in standby comes back when an interrupt is pending, here the EL2 timer's.
pub(crate) fn standby() {
    const TIMER: u64 = 26;
    const MILLISECOND: u64 = 1_000_000;
    let supported = smc(psci::fid::FEATURES, psci::fid::CPU_SUSPEND_64, 0, 0)[0];
    expect("cpu-suspend-exists", supported, 0);
    // Own redistributor, frame of the private interrupts: enable the timer's, at the highest of our priorities.
    let frame = 0x080A_0000 + 0x1_0000;
    let priority = frame + 0x400 + TIMER / 4 * 4;
    poke32(priority, 0);
    poke32(frame + 0x100, 1 << TIMER);
    // GICD_CTLR.EnableGrp1A and ARE, in the Non-secure view.
    poke32(0x0800_0000, 0x12);
    let (before, after): (u64, u64);
    let cval: u64;
    // SAFETY: the interrupt is masked in PSTATE; it only wakes.
    unsafe {
        asm!(
            "msr S3_0_C4_C6_0, {pmr}", "msr S3_0_C12_C12_7, {one}", "isb",
            "mrs {before}, cntpct_el0", "add {cval}, {before}, {ms}",
            "msr S3_4_C14_C2_2, {cval}", "msr S3_4_C14_C2_1, {one}", "isb",
            pmr = in(reg) 0xF0_u64, one = in(reg) 1_u64, ms = in(reg) MILLISECOND,
            before = out(reg) before, cval = out(reg) cval, options(nostack)
        );
    }
    let _ = before;
    let answer = smc(psci::fid::CPU_SUSPEND_64, 0, 0, 0)[0];
    // SAFETY: everything as it was.
    unsafe {
        asm!(
            "mrs {after}, cntpct_el0", "msr S3_4_C14_C2_1, xzr", "msr S3_0_C12_C12_7, xzr", "isb",
            after = out(reg) after, options(nostack)
        );
    }
    poke32(frame + 0x180, 1 << TIMER);
    expect("standby-comes-back", answer, 0);
    if after >= cval {
        check("standby-waits-for-an-interrupt", Ok(()));
    } else {
        check("standby-waits-for-an-interrupt", Err(format_args!("it was {} early", cval - after)));
    }
    let wrong = smc(psci::fid::CPU_SUSPEND_64, 1 << 16, pool(1), 0)[0];
    expect("power-down-is-refused", wrong, Code::InvalidParameters.to_register());
}

fn poke32(address: u64, value: u32) {
    // SAFETY: a register of the interrupt controller.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(address as usize).write_volatile(value) };
}

/// Where boots are counted: memory that the payload's image does not cover, and a reset keeps.
const BOOTS: u64 = 1000;
const MAGIC: u64 = 0xB007_B007_0000_0000;

/// Resets the machine once while a Realm lives; on the second boot nothing of it may be left. Gives the boot's number.
pub(crate) fn reset() -> u64 {
    let place = pool(BOOTS);
    let word = probe_read(place).unwrap_or(0);
    let boot = if word & !0xF == MAGIC { (word & 0xF) + 1 } else { 1 };
    let _ = probe_write(place, MAGIC | boot);
    match boot {
        1 => {
            // Never destroyed: its memory is full when the machine goes down.
            let Some(guest) = Guest::new(|create| create()) else { return boot };
            guest.fill(1);
            line(format_args!("resetting the machine"));
            smc(psci::fid::SYSTEM_RESET, 0, 0, 0);
            check("reset", Err(format_args!("the call came back")));
        }
        2 => {
            check("reset-boots-again", Ok(()));
            let left = guest::private_pages().find_map(|page| {
                (0..GRANULE / 8).find_map(|n| match probe_read(page + n * 8) {
                    Ok(0) => None,
                    other => Some((page + n * 8, other)),
                })
            });
            match left {
                None => check("reset-leaves-nothing-of-a-realm", Ok(())),
                Some((at, found)) => {
                    check("reset-leaves-nothing-of-a-realm", Err(format_args!("{at:#x}: {found:#x?}")));
                }
            }
        }
        _ => check("reset", Err(format_args!("boot number {boot}"))),
    }
    boot
}
