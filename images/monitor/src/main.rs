//! The EL3 monitor for QEMU's virt machine with FEAT_RME.
//!
//! The policy is in the `monitor` crate; here is what needs assembly or a device.
#![no_std]
#![no_main]
#![allow(missing_docs, unreachable_pub, reason = "nothing outside of this image uses it")]

mod boot;
mod context;
mod entry;
mod fatal;
mod fwcfg;
mod gic;
mod hw;
mod layout;
mod mmio;
mod pagetable;
mod switch;
mod sysreg;
mod trap;
mod uart;

use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

use monitor::enables::{IdRegs, feature};
use monitor::{Action, Monitor, Platform, Start, World};

use context::{Context, slot};
use hw::Machine;
use sysreg::read_sysreg;

/// Register groups that the world switch moves; see `monitor::enables::feature`.
#[unsafe(no_mangle)]
static FEATURES: AtomicU64 = AtomicU64::new(0);

/// Set once by the first CPU before it releases any other.
static MONITOR: AtomicPtr<Monitor> = AtomicPtr::new(core::ptr::null_mut());

/// Where the RMM is entered.
static RMM_ENTRY: AtomicU64 = AtomicU64::new(layout::RMM);

static FIRST_BOOT: AtomicBool = AtomicBool::new(true);

unsafe extern "C" {
    fn enter_world(context: *mut Context) -> !;
    fn cpu_park() -> !;
    fn scrub_root(base: u64, size: u64);
}

fn the_monitor() -> &'static Monitor {
    // SAFETY: either null or a reference to a static that lives for ever and is only read.
    match unsafe { MONITOR.load(Ordering::Acquire).as_ref() } {
        Some(monitor) => monitor,
        None => fatal::fatal(format_args!("a call before the monitor was set up")),
    }
}

/// Every CPU comes here, at reset and after each CPU_ON, on its Normal-world stack.
#[unsafe(no_mangle)]
extern "C" fn el3_main(cpu: usize, block: *mut u8) -> ! {
    let id = sysreg::id_regs();
    sysreg::init_cpu(&id);
    let start = if cpu == 0 && FIRST_BOOT.swap(false, Ordering::AcqRel) {
        uart::init();
        let boot = boot::first_cpu(&id);
        let monitor = boot.monitor;
        let gic = if boot.interface.el3_switches_gic() { feature::OTHER | feature::GIC } else { 0 };
        FEATURES.store(id.features() | sysreg::implementation_defined() | gic, Ordering::Release);
        RMM_ENTRY.store(boot.rmm, Ordering::Release);
        MONITOR.store(core::ptr::from_ref(monitor).cast_mut(), Ordering::Release);
        gic::init_distributor();
        gic::init_cpu(cpu);
        let start = monitor.start_primary(boot.kernel);
        let stage = if start.realm.is_some() { "rmm-boot" } else { "kernel-entry" };
        uart::line(format_args!("stage {stage} cntpct={}", Machine.counter()));
        start
    } else {
        let monitor = the_monitor();
        let geometry = monitor.gpt().geometry();
        sysreg::enable_gpc(geometry.l0, id.pps());
        gic::init_cpu(cpu);
        uart::line(format_args!("stage cpu-on {cpu} cntpct={}", Machine.counter()));
        monitor.start_cpu(cpu)
    };
    enter(cpu, block, &id, &start)
}

/// Prepares both worlds' contexts and enters the first one.
fn enter(cpu: usize, block: *mut u8, id: &IdRegs, start: &Start) -> ! {
    // SAFETY: the block is this CPU's own. The Normal context lies above the stack that is in use.
    let (normal, realm) = unsafe {
        let normal = block.add(context::NORMAL_CONTEXT).cast::<Context>();
        let realm = block.add(context::REALM_CONTEXT).cast::<Context>();
        normal.write(new_context(cpu, id, World::NonSecure, realm, start.normal.0));
        realm.write(new_context(cpu, id, World::Realm, normal, RMM_ENTRY.load(Ordering::Acquire)));
        (normal, realm)
    };
    // SAFETY: both were just written, and nobody else looks at them.
    let first = unsafe {
        (&mut (*normal).regs)[0] = start.normal.1;
        match start.realm {
            Some(args) => {
                (&mut (*realm).regs)[..8].copy_from_slice(&args);
                realm
            }
            None => normal,
        }
    };
    // SAFETY: a complete context.
    unsafe { enter_world(first) }
}

fn new_context(cpu: usize, id: &IdRegs, world: World, peer: *mut Context, pc: u64) -> Context {
    const EL2H_MASKED: u64 = 0x3C9;
    const HCR_RW: u64 = 1 << 31;
    const SCTLR_RES1: u64 = 0x30C5_0830;
    // Bits of negative polarity: software that does not know these traps must not take them.
    const HFGXTR: u64 = 0x00C4_0000_0000_0000;
    const HFGITR: u64 = 0x0180_0000_0000_0000;
    let mut el2 = [0; context::SLOTS];
    el2[slot::ACTLR] = read_sysreg!("actlr_el2");
    el2[slot::HCR] = HCR_RW;
    el2[slot::MDCR] = read_sysreg!("pmcr_el0") >> 11 & 0x1F;
    el2[slot::SCTLR] = SCTLR_RES1;
    el2[slot::VMPIDR] = read_sysreg!("mpidr_el1");
    el2[slot::VPIDR] = read_sysreg!("midr_el1");
    el2[slot::HFGITR] = HFGITR;
    el2[slot::HFGRTR] = HFGXTR;
    el2[slot::HFGWTR] = HFGXTR;
    el2[slot::ICC_SRE] = 0xF;
    Context {
        regs: [0; 31],
        sp_el0: 0,
        elr_el3: pc,
        spsr_el3: EL2H_MASKED,
        scr_el3: id.scr_el3(world),
        peer,
        cpu,
        realm: world == World::Realm,
        el2,
    }
}

/// A synchronous exception from a lower exception level. What is returned goes to `world_switch`.
///
/// Calls between the worlds are decided here, without a stack frame; everything else takes the longer way.
#[unsafe(no_mangle)]
extern "C" fn el3_sync(context: &mut Context) -> u64 {
    // SAFETY: null, or a reference to a static that lives for ever and is only read.
    if let (true, Some(monitor)) = (is_smc(), unsafe { MONITOR.load(Ordering::Acquire).as_ref() }) {
        let world = context.world();
        if let Some(action) = monitor.forward(world, &mut context.regs) {
            return action as u64;
        }
    }
    el3_call(context)
}

const EC_SMC32: u64 = 0x13;
const EC_SMC64: u64 = 0x17;

fn is_smc() -> bool {
    // What is above the class (ISS2) is zero for a call.
    read_sysreg!("esr_el3") >> 26 == EC_SMC64
}

fn exception_class() -> u64 {
    read_sysreg!("esr_el3") >> 26 & 0x3F
}

#[inline(never)]
extern "C" fn el3_call(context: &mut Context) -> u64 {
    if !is_smc() {
        match exception_class() {
            // A 32-bit guest of a host that does not trap its calls. Nobody here speaks SMC32 from AArch32.
            EC_SMC32 => context.regs[0] = 0xFFFF_FFFF,
            class if trap::is_undefined(class) => trap::reflect(context),
            _ => fatal::report(&context.regs, 8),
        }
        return Action::Resume as u64;
    }
    let monitor = the_monitor();
    let world = context.world();
    match monitor.handle_smc(&Machine, context.cpu, world, &mut context.regs) {
        Action::Resume => Action::Resume as u64,
        action => slow(monitor, context, action),
    }
}

#[cold]
fn slow(monitor: &Monitor, context: &mut Context, action: Action) -> u64 {
    match action {
        Action::CpuOff => {
            gic::cpu_off();
            monitor.cpu_is_off(context.cpu);
            // SAFETY: nothing of this CPU is needed any more; it starts afresh when it is released.
            unsafe { cpu_park() }
        }
        Action::SystemOff => fatal::system_off(),
        Action::SystemReset => {
            monitor.gpt().seize_realm(&Machine, |base, size| {
                if base >= layout::DTB {
                    // SAFETY: Realm memory until a moment ago, which from now on only Root reaches.
                    unsafe { scrub_root(base, size) };
                }
            });
            fatal::system_reset()
        }
        Action::Standby => {
            // Whatever is pending for the caller ends the wait, masked or not.
            // SAFETY: waiting changes nothing.
            unsafe { asm!("dsb sy", "wfi", options(nostack, nomem)) };
            return Action::Resume as u64;
        }
        Action::BootNormal if context.cpu == 0 => {
            uart::line(format_args!("stage kernel-entry cntpct={}", Machine.counter()));
        }
        _ => {}
    }
    action as u64
}

/// Makes table writes visible to walkers that do not look into caches.
fn clean_to_poc(base: u64, size: u64) {
    for line in (base..base + size).step_by(64) {
        // SAFETY: cleaning changes no memory.
        unsafe { asm!("dc cvac, {}", in(reg) line, options(nostack)) };
    }
    // SAFETY: a barrier.
    unsafe { asm!("dsb sy", options(nostack)) };
}
