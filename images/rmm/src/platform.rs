//! The core's [`Platform`] on this machine.

use crate::layout::NS_ALIAS;
use crate::percpu;
use crate::regs::isb;
use crate::vectors::{rmm_guest_run, rmm_ns_copy, rmm_zero};
use crate::{console, debug, el3, fatal, fp, hash, pmu, world};
use cca_abi::rmm_el3::fid;
use core::arch::asm;
use core::fmt;
use rmm::context::{RecContext, word};
use rmm::platform::{El1, El3Refused, Facts, IdRegisters, LiveTimers, NsFault, Page, Platform, RealmExit};

/// R-EL2 of this machine.
pub(crate) struct Machine {
    facts: Facts,
}

/// CNTHCTL_EL2.CNTVMASK and CNTPMASK.
const CNTVMASK: u64 = 1 << 18;
const CNTPMASK: u64 = 1 << 19;
/// HCR_EL2.VSE: a virtual SError is pending. The CPU clears it when the REC takes the exception.
const HCR_VSE: u64 = 1 << 8;
/// INTIDs of the EL1 timers.
const VIRTUAL_TIMER: u64 = 27;
const PHYSICAL_TIMER: u64 = 30;
/// ESR_EL2.EC of a trapped FP/SIMD access.
const EC_FP: u64 = 0x07;
/// The same for SVE.
const EC_SVE: u64 = 0x19;
/// Words in a granule.
const GRANULE_WORDS: u64 = 512;

impl Machine {
    /// Reads what the core wants to know.
    pub(crate) fn new(num_cpus: usize) -> Self {
        let id = IdRegisters {
            id_aa64pfr0: read_reg!("id_aa64pfr0_el1"),
            id_aa64pfr1: read_reg!("id_aa64pfr1_el1"),
            id_aa64zfr0: read_reg!(id_aa64zfr0_el1!()),
            id_aa64dfr0: read_reg!("id_aa64dfr0_el1"),
            id_aa64dfr1: read_reg!("id_aa64dfr1_el1"),
            id_aa64afr0: read_reg!("id_aa64afr0_el1"),
            id_aa64afr1: read_reg!("id_aa64afr1_el1"),
            id_aa64isar0: read_reg!("id_aa64isar0_el1"),
            id_aa64isar1: read_reg!("id_aa64isar1_el1"),
            id_aa64isar2: read_reg!(id_aa64isar2_el1!()),
            id_aa64mmfr0: read_reg!("id_aa64mmfr0_el1"),
            id_aa64mmfr1: read_reg!("id_aa64mmfr1_el1"),
            id_aa64mmfr2: read_reg!(id_aa64mmfr2_el1!()),
        };
        let sve_lengths = if world::features().sve { fp::lengths() } else { 0 };
        // Five bits.
        let pmu_counters = world::counters() as u8;
        Self { facts: Facts { id, ich_vtr: read_reg!(ich_vtr_el2!()), sve_lengths, pmu_counters, num_cpus } }
    }
}

/// Runs `invalidate` with the VMID of `vttbr` current. A loaded REC's stage 2 comes back afterwards.
fn with_stage2(vttbr: u64, vtcr: u64, invalidate: impl FnOnce()) {
    let before = (read_reg!("vttbr_el2"), read_reg!("vtcr_el2"));
    // SAFETY: stage 2 does not apply to EL2; the registers only select what the invalidation is about.
    unsafe {
        if before != (vttbr, vtcr) {
            write_reg!("vtcr_el2", vtcr);
            write_reg!("vttbr_el2", vttbr);
            isb();
        }
        asm!("dsb ishst", options(nostack, preserves_flags));
        invalidate();
        asm!("dsb ish", "isb", options(nostack, preserves_flags));
        if before != (vttbr, vtcr) && percpu::this().loaded {
            write_reg!("vtcr_el2", before.1);
            write_reg!("vttbr_el2", before.0);
        }
    }
}

/// Waits until masked timers no longer show at the CPU interface, so that they do not end the next run. A host
/// can keep such an interrupt pending by hand; then it gets its exit.
fn wait_for_masked(newly_masked: u64) {
    isb();
    for _ in 0..1000 {
        let pending = read_reg!(icc_hppir1_el1!()) & 0xFF_FFFF;
        let stale = (newly_masked & CNTVMASK != 0 && pending == VIRTUAL_TIMER)
            || (newly_masked & CNTPMASK != 0 && pending == PHYSICAL_TIMER);
        if !stale {
            return;
        }
    }
}

impl Platform for Machine {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    #[inline]
    fn granule(&self, pa: u64) -> &Page {
        // SAFETY: the core names only granules of the DRAM banks that it owns: they are mapped at their physical
        // address, belong to the Realm PAS and are accessed by everyone as atomics.
        unsafe { &*(pa as *const Page) }
    }

    fn zero(&self, pa: u64) {
        // SAFETY: the granule is the core's (see `granule`).
        unsafe { rmm_zero(pa, world::features().mops) };
    }

    fn ns_read(&self, pa: u64, buf: &mut [u64]) -> Result<(), NsFault> {
        let mops = world::features().mops;
        // SAFETY: the source is host memory, which may fault and may change but is nobody's object; the routine
        // survives the fault. The destination is `buf`.
        let fault = unsafe { rmm_ns_copy(buf.as_mut_ptr() as u64, pa | NS_ALIAS, buf.len() as u64, mops) };
        if fault == 0 { Ok(()) } else { Err(NsFault) }
    }

    fn ns_write(&self, pa: u64, words: &[u64]) -> Result<(), NsFault> {
        let mops = world::features().mops;
        // SAFETY: as in `ns_read`, the other way round.
        let fault = unsafe { rmm_ns_copy(pa | NS_ALIAS, words.as_ptr() as u64, words.len() as u64, mops) };
        if fault == 0 { Ok(()) } else { Err(NsFault) }
    }

    fn ns_copy_granule(&self, src: u64, dst: u64) -> Result<(), NsFault> {
        let mops = world::features().mops;
        // SAFETY: as in `ns_read`; `dst` is a granule of the core's.
        let fault = unsafe { rmm_ns_copy(dst, src | NS_ALIAS, GRANULE_WORDS, mops) };
        if fault == 0 { Ok(()) } else { Err(NsFault) }
    }

    fn delegate(&self, pa: u64) -> Result<(), El3Refused> {
        let [status, ..] = el3::call(fid::GTSI_DELEGATE, pa, 0, 0);
        if status == 0 { Ok(()) } else { Err(El3Refused) }
    }

    fn undelegate(&self, pa: u64) -> Result<(), El3Refused> {
        let [status, ..] = el3::call(fid::GTSI_UNDELEGATE, pa, 0, 0);
        if status == 0 { Ok(()) } else { Err(El3Refused) }
    }

    fn publish_table_writes(&self) {
        // SAFETY: a barrier.
        unsafe { asm!("dsb ishst", options(nostack, preserves_flags)) };
    }

    fn tlbi_ipa(&self, vttbr: u64, vtcr: u64, ipa: u64, level: i64) {
        if level < 3 {
            // What was one entry may have been cached as a table of smaller ones.
            return self.tlbi_vmid(vttbr, vtcr);
        }
        with_stage2(vttbr, vtcr, || {
            // SAFETY: invalidation is always allowed.
            unsafe {
                asm!("tlbi ipas2e1is, {}", "dsb ish", "tlbi vmalle1is",
                     in(reg) ipa >> 12 & 0xFF_FFFF_FFFF, options(nostack, preserves_flags));
            }
        });
    }

    fn tlbi_vmid(&self, vttbr: u64, vtcr: u64) {
        with_stage2(vttbr, vtcr, || {
            // SAFETY: invalidation is always allowed.
            unsafe { asm!("tlbi vmalls12e1is", options(nostack, preserves_flags)) };
        });
    }

    fn sha256_blocks(&self, state: &mut [u32; 8], blocks: &[[u8; 64]]) -> bool {
        // SAFETY: the slice is readable.
        unsafe { hash::sha256(state, blocks.as_ptr().cast(), blocks.len() as u64) }
    }

    fn sha256_granule(&self, state: &mut [u32; 8], pa: u64) -> bool {
        // SAFETY: the granule is the core's (see `granule`).
        unsafe { hash::sha256(state, pa as *const u8, 64) }
    }

    fn sha512_blocks(&self, state: &mut [u64; 8], blocks: &[[u8; 128]]) -> bool {
        // SAFETY: the slice is readable.
        unsafe { hash::sha512(state, blocks.as_ptr().cast(), blocks.len() as u64) }
    }

    fn sha512_granule(&self, state: &mut [u64; 8], pa: u64) -> bool {
        // SAFETY: the granule is the core's (see `granule`).
        unsafe { hash::sha512(state, pa as *const u8, 32) }
    }

    fn interrupt_pending(&self) -> bool {
        // At EL2 these are the physical ones.
        read_reg!("isr_el1") != 0
    }

    fn rec_load(&self, _cpu: usize, ctx: &RecContext<'_>) {
        world::rec_load(percpu::this(), ctx);
    }

    fn rec_run(&self, _cpu: usize, ctx: &RecContext<'_>) -> RealmExit {
        let (hcr, cnthctl) = (ctx.get(word::HCR_EL2), ctx.get(word::CNTHCTL_EL2));
        let masks = cnthctl & (CNTVMASK | CNTPMASK);
        // Until the REC has run, the GIC may still see the host's own timers.
        let newly_masked = if core::mem::take(&mut percpu::this().fresh) {
            masks
        } else {
            masks & !read_reg!("cnthctl_el2")
        };
        // SAFETY: controls of the lower exception levels of the loaded REC. HCR_EL2 keeps E2H and leaves TGE
        // clear by the core's contract, thus R-EL2's own regime is unchanged.
        unsafe {
            write_reg!("hcr_el2", hcr);
            write_reg!("cnthctl_el2", cnthctl);
            write_reg!("mdcr_el2", ctx.get(word::MDCR_EL2));
            write_reg!(vsesr_el2!(), ctx.get(word::VSESR_EL2));
        }
        if newly_masked != 0 {
            wait_for_masked(newly_masked);
        }
        loop {
            // SAFETY: the context is the loaded REC's granule; its PSTATE names EL0 or EL1.
            let kind = unsafe { rmm_guest_run(ctx.page().as_ptr()) };
            if hcr & HCR_VSE != 0 && read_reg!("hcr_el2") & HCR_VSE == 0 {
                // Delivered: the next run must not deliver it again.
                ctx.set(word::HCR_EL2, hcr & !HCR_VSE);
            }
            return match kind {
                0 => {
                    let esr = read_reg!("esr_el2");
                    let cpu = percpu::this();
                    let class = esr >> 26 & 0x3F;
                    let uses_vectors = class == EC_FP || (class == EC_SVE && ctx.get(word::SVE_Z) != 0);
                    if uses_vectors && !cpu.fp_loaded {
                        fp::load(cpu, ctx);
                        continue;
                    }
                    RealmExit::Sync { esr, far: read_reg!("far_el2"), hpfar: read_reg!("hpfar_el2") }
                }
                1 => RealmExit::Irq,
                2 => RealmExit::Fiq,
                _ => RealmExit::SError { esr: read_reg!("esr_el2") },
            };
        }
    }

    fn rec_save(&self, _cpu: usize, ctx: &RecContext<'_>) {
        world::rec_save(percpu::this(), ctx);
    }

    fn el1(&self, _cpu: usize, _ctx: &RecContext<'_>, register: El1) -> u64 {
        match register {
            El1::Vbar => read_reg!(vbar_el12!()),
            El1::Sctlr => read_reg!(sctlr_el12!()),
            El1::Elr => read_reg!(elr_el12!()),
            El1::Spsr => read_reg!(spsr_el12!()),
            El1::Esr => read_reg!(esr_el12!()),
            El1::Far => read_reg!(far_el12!()),
            El1::Tcr => read_reg!(tcr_el12!()),
            El1::Ttbr0 => read_reg!(ttbr0_el12!()),
            El1::Ttbr1 => read_reg!(ttbr1_el12!()),
        }
    }

    fn set_el1(&self, _cpu: usize, _ctx: &RecContext<'_>, register: El1, value: u64) {
        // SAFETY: an EL1 register of the loaded REC.
        unsafe {
            match register {
                El1::Vbar => write_reg!(vbar_el12!(), value),
                El1::Sctlr => write_reg!(sctlr_el12!(), value),
                El1::Elr => write_reg!(elr_el12!(), value),
                El1::Spsr => write_reg!(spsr_el12!(), value),
                El1::Esr => write_reg!(esr_el12!(), value),
                El1::Far => write_reg!(far_el12!(), value),
                El1::Tcr => write_reg!(tcr_el12!(), value),
                El1::Ttbr0 => write_reg!(ttbr0_el12!(), value),
                El1::Ttbr1 => write_reg!(ttbr1_el12!(), value),
            }
        }
    }

    fn timers(&self, _cpu: usize, _ctx: &RecContext<'_>) -> LiveTimers {
        LiveTimers { cntv_ctl: read_reg!(cntv_ctl_el02!()), cntp_ctl: read_reg!(cntp_ctl_el02!()) }
    }

    fn debug_load(&self, _cpu: usize, ctx: &RecContext<'_>) {
        debug::load(percpu::this(), ctx);
    }

    fn pmu_load(&self, _cpu: usize, ctx: &RecContext<'_>) {
        pmu::load(percpu::this(), ctx);
    }

    fn log(&self, line: fmt::Arguments<'_>) {
        console::line(line);
    }

    fn fatal(&self, reason: fmt::Arguments<'_>) -> ! {
        fatal::stop(reason)
    }
}
