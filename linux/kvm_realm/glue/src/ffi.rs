//! What the C shim offers (`shim.h`, same order). The word behind each function says in which context it may be
//! called; `process` means process context with interrupts on, where sleeping is allowed.

use core::ffi::{c_char, c_void};

/// Facts about the kernel, filled in by C for [`crate::entry::kvmr_init`].
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) page_size: u64,
    pub(crate) smccc_version: u64,
    pub(crate) conduit: u32,
    pub(crate) vhe: u32,
    pub(crate) cpus: u64,
    pub(crate) counter_hz: u64,
    pub(crate) pseudo_nmi: u64,
    pub(crate) abi: u32,
    pub(crate) cap_arm_rme: u32,
}

/// A question that the shim asks back, with interrupts off or while going to sleep: must not sleep.
pub(crate) type Ask = extern "C" fn(*mut c_void) -> bool;

/// Level of [`shim_log`] for lines that are never held back.
pub(crate) const LOG_ALWAYS: u32 = 4;

unsafe extern "C" {
    // files.c
    pub(crate) fn shim_fd_new(kind: u32, name: *const c_char, object: *mut c_void, size: u64) -> i64; // process
    pub(crate) fn shim_file_get(fd: i32, object: *mut *mut c_void) -> *mut c_void; // process
    pub(crate) fn shim_file_put(file: *mut c_void); // process

    // services.c
    pub(crate) fn shim_log(level: u32, text: *const u8, len: usize); // any
    pub(crate) fn shim_bug(text: *const u8, len: usize) -> !; // any
    pub(crate) fn shim_alloc(size: usize, align: usize) -> *mut u8; // process
    pub(crate) fn shim_free(p: *mut u8); // process
    pub(crate) fn shim_pages_alloc(order: u32, zero: bool) -> u64; // process
    pub(crate) fn shim_page_free(phys: u64); // process
    pub(crate) fn shim_page_address(phys: u64) -> *mut u8; // any
    pub(crate) fn shim_copy_from_user(to: *mut u8, from: u64, len: usize) -> i32; // process
    pub(crate) fn shim_copy_to_user(to: u64, from: *const u8, len: usize) -> i32; // process
    pub(crate) fn shim_is_user_range(address: u64, size: u64) -> bool; // process
    pub(crate) fn shim_mm_grab() -> *mut c_void; // process
    pub(crate) fn shim_mm_drop(mm: *mut c_void); // process
    pub(crate) fn shim_mm_is_current(mm: *const c_void) -> bool; // process
    pub(crate) fn shim_pin_user_pages(address: u64, count: u32, shared: bool, phys: *mut u64) -> i64; // process
    pub(crate) fn shim_unpin_page(phys: u64, dirty: bool); // process
    pub(crate) fn shim_memory_watch_new(hook: *mut c_void, watch: *mut *mut c_void) -> i64; // process
    pub(crate) fn shim_memory_watch_free(watch: *mut c_void); // process
    pub(crate) fn shim_lock_kind(what: *const c_char) -> u32; // any
    pub(crate) fn shim_mutex_new(kind: u32) -> *mut c_void; // process
    pub(crate) fn shim_mutex_free(m: *mut c_void); // process
    pub(crate) fn shim_mutex_lock(m: *mut c_void); // process
    pub(crate) fn shim_mutex_trylock(m: *mut c_void) -> bool; // process
    pub(crate) fn shim_mutex_unlock(m: *mut c_void); // process
    pub(crate) fn shim_spin_lock(l: *mut u32) -> u64; // any
    pub(crate) fn shim_spin_trylock(l: *mut u32, flags: *mut u64) -> bool; // any
    pub(crate) fn shim_spin_unlock(l: *mut u32, flags: u64); // any
    pub(crate) fn shim_cond_resched(); // process
    pub(crate) fn shim_is_killed() -> bool; // process
    pub(crate) fn shim_online_cpus() -> u32; // any
    pub(crate) fn shim_id_register(encoding: u32) -> u64; // any
    pub(crate) fn shim_counter() -> u64; // any

    // events.c
    pub(crate) fn shim_event_get(fd: i32, event: *mut *mut c_void) -> i64; // process
    pub(crate) fn shim_event_hold(event: *mut c_void); // any
    pub(crate) fn shim_event_put(event: *mut c_void); // process
    pub(crate) fn shim_event_signal(event: *mut c_void); // any
    pub(crate) fn shim_event_same(a: *const c_void, b: *const c_void) -> bool; // any
    pub(crate) fn shim_event_closed(event: *const c_void) -> bool; // any
    pub(crate) fn shim_watch_new(
        fd: i32,
        event: *mut c_void,
        fire: *mut c_void,
        watch: *mut *mut c_void,
    ) -> i64; // process
    pub(crate) fn shim_watch_free(watch: *mut c_void); // process

    // run.c
    pub(crate) fn shim_can_mask_pmu() -> bool; // any
    pub(crate) fn shim_smc(regs: *mut u64); // any
    pub(crate) fn shim_trace_exit(vcpu: u32, reason: u32, esr: u64, ipa: u64); // any
    pub(crate) fn shim_trace_fault(vcpu: u32, gpa: u64, shared: bool, outcome: u32); // any
    pub(crate) fn shim_thread_new() -> *mut c_void; // process
    pub(crate) fn shim_thread_free(t: *mut c_void); // process
    pub(crate) fn shim_run_begin(t: *mut c_void); // process
    pub(crate) fn shim_run_end(t: *mut c_void); // process
    pub(crate) fn shim_run_prepare() -> i32; // process
    pub(crate) fn shim_run_enter(regs: *mut u64, mask_pmu: bool, go: Ask, ctx: *mut c_void) -> bool; // process
    pub(crate) fn shim_block(t: *mut c_void, timeout_ns: u64, wake: Ask, ctx: *mut c_void) -> i32; // process
    pub(crate) fn shim_kick(t: *mut c_void); // any
    pub(crate) fn shim_sigmask(mask: u64) -> u64; // process
}
