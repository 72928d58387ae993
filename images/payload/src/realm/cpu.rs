//! Another CPU, for one job.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use cca_abi::psci;

use crate::entry::smc;

global_asm!(
    r#"
.section .text.realm_cpu, "ax"
.global realm_cpu_start
realm_cpu_start:
    ldr     x1, =payload_vectors
    msr     vbar_el2, x1
    isb
    ldr     x1, =__stacks
    add     x2, x0, #1
    add     x1, x1, x2, lsl #14
    mov     sp, x1
    bl      realm_cpu_main
"#
);

unsafe extern "C" {
    fn realm_cpu_start();
}

static JOB: AtomicU64 = AtomicU64::new(0);

#[unsafe(no_mangle)]
extern "C" fn realm_cpu_main() -> ! {
    let job = JOB.load(SeqCst) as usize;
    // SAFETY: written by `start` from a function of this type.
    let job: extern "C" fn() = unsafe { core::mem::transmute(job) };
    job();
    JOB.store(0, SeqCst);
    smc(psci::fid::CPU_OFF, 0, 0, 0);
    crate::console::fail()
}

/// Whether there is such a CPU.
pub(super) fn exists(cpu: u64) -> bool {
    smc(psci::fid::AFFINITY_INFO_64, cpu, 0, 0)[0] == 1
}

/// Lets another CPU begin; false if there is none.
pub(super) fn start(cpu: u64, job: extern "C" fn()) -> bool {
    if !exists(cpu) {
        return false;
    }
    JOB.store(job as usize as u64, SeqCst);
    let entry = realm_cpu_start as *const () as u64;
    smc(psci::fid::CPU_ON_64, cpu, entry, cpu)[0] == 0
}

/// Waits until it has ended.
pub(super) fn join(cpu: u64) {
    while JOB.load(SeqCst) != 0 || !exists(cpu) {
        core::hint::spin_loop();
    }
}

/// Both.
pub(super) fn run_on(cpu: u64, job: extern "C" fn()) -> bool {
    let started = start(cpu, job);
    if started {
        join(cpu);
    }
    started
}
