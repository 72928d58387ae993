//! Realm EL2 and below: the RMM's platform, with a CPU that executes scripted guests.

use crate::guest::{Exception, Next, Op, Outcome, Program, Running};
use crate::machine::Machine;
use crate::memory::Pas;
use crate::stage2::{Stage2Fault, check_access};
use cca_abi::rmm_el3;
use rmm::context::{RecContext, word};
use rmm::platform::{El1, El3Refused, Facts, LiveTimers, NsFault, Page, Platform, RealmExit};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

const EC_WFX: u64 = 0x01;
const EC_HVC: u64 = 0x16;
const EC_SMC: u64 = 0x17;
const EC_SYSREG: u64 = 0x18;
const EC_IABT: u64 = 0x20;
const EC_DABT: u64 = 0x24;
const IL: u64 = 1 << 25;

const HCR_TWI: u64 = 1 << 13;
const CNTHCTL_CNTVMASK: u64 = 1 << 18;

const CTL_ENABLE: u64 = 1;
const CTL_IMASK: u64 = 2;
const CTL_ISTATUS: u64 = 4;

/// What R-EL2 sees of the machine.
#[derive(Clone)]
pub struct RealmWorld {
    machine: Arc<Machine>,
    facts: Facts,
}

/// How one operation of a guest went.
enum Step {
    Retired,
    Exit(RealmExit),
}

impl RealmWorld {
    /// The platform for `machine`, with feature registers like those of QEMU's `max`.
    #[must_use]
    pub fn new(machine: Arc<Machine>, list_registers: u64) -> Self {
        let mut facts = Facts {
            num_cpus: machine.cpus(),
            ich_vtr: 0x9034_0000 | (list_registers - 1),
            sve_lengths: 0xFFFF,
            pmu_counters: 6,
            ..Facts::default()
        };
        facts.id.id_aa64pfr0 = 0x1311_0011_2111_2222;
        facts.id.id_aa64pfr1 = 0x0000_0010_0100_0121;
        facts.id.id_aa64dfr0 = 0x1000_0000_1030_560A;
        facts.id.id_aa64isar0 = 0x1221_1111_1021_2120;
        facts.id.id_aa64isar1 = 0x0111_2111_1021_1502;
        facts.id.id_aa64isar2 = 0x0000_0000_0011_0012;
        facts.id.id_aa64mmfr0 = 0x2100_0323_1020_1126;
        facts.id.id_aa64mmfr1 = 0x0110_1120_1031_2122;
        facts.id.id_aa64mmfr2 = 0x1221_0111_1201_1011;
        Self { machine, facts }
    }

    fn service(&self, fid: u64, pa: u64) -> Result<(), El3Refused> {
        let mut registers = [0; 18];
        registers[0] = fid;
        registers[1] = pa;
        self.machine.realm_smc(&mut registers);
        if registers[0] == 0 { Ok(()) } else { Err(El3Refused) }
    }

    fn abort(ec: u64, ipa: u64, fault: Stage2Fault, iss: u64) -> RealmExit {
        RealmExit::Sync { esr: ec << 26 | IL | iss | fault.fsc, far: ipa, hpfar: (ipa >> 12) << 4 }
    }

    /// Translates and checks one access; gives the physical address of its first byte.
    fn reach(&self, ctx: &RecContext<'_>, ipa: u64, write: bool, execute: bool) -> Result<u64, Stage2Fault> {
        let memory = self.machine.memory();
        let (vttbr, vtcr) = (ctx.get(word::VTTBR_EL2), ctx.get(word::VTCR_EL2));
        let found = self.machine.tlb().translate(memory, vttbr, vtcr, ipa)?;
        check_access(memory, found, write, execute)?;
        Ok(found.pa | (ipa & 0xFFF))
    }

    fn data(&self, ctx: &RecContext<'_>, ipa: u64, size: u64, write: Option<u64>) -> Step {
        match self.reach(ctx, ipa, write.is_some(), false) {
            Ok(pa) => {
                let cell = self.machine.memory().raw_word(pa).expect("reach() found memory");
                let shift = (pa & 7) * 8;
                let mask = if size == 8 { u64::MAX } else { (1 << (size * 8)) - 1 };
                match write {
                    Some(value) => {
                        let old = cell.load(Relaxed);
                        cell.store(old & !(mask << shift) | (value & mask) << shift, Relaxed);
                    }
                    None => ctx.set_gpr(0, (cell.load(Relaxed) >> shift) & mask),
                }
                Step::Retired
            }
            Err(fault) => {
                let sas = size.trailing_zeros();
                let sixty_four = u64::from(size == 8);
                let iss = 1 << 24 | u64::from(sas) << 22 | sixty_four << 15 | u64::from(write.is_some()) << 6;
                Step::Exit(Self::abort(EC_DABT, ipa, fault, iss))
            }
        }
    }

    /// The virtual timer's control register with the status bit as it is now.
    fn live_ctl(&self, ctl: u64, cval: u64) -> u64 {
        let fired = self.machine.counter() >= cval;
        let ctl = ctl & (CTL_ENABLE | CTL_IMASK);
        if ctl & CTL_ENABLE != 0 && fired { ctl | CTL_ISTATUS } else { ctl }
    }

    fn timer_line(&self, ctx: &RecContext<'_>) -> bool {
        self.live_ctl(ctx.get(word::CNTV_CTL), ctx.get(word::CNTV_CVAL))
            & (CTL_ENABLE | CTL_IMASK | CTL_ISTATUS)
            == CTL_ENABLE | CTL_ISTATUS
    }

    /// The list register that would be signalled: pending, highest priority.
    fn best_lr(ctx: &RecContext<'_>) -> Option<usize> {
        (0..16)
            .filter(|&n| ctx.get(word::ICH_LR + n) >> 62 & 1 != 0 && ctx.get(word::ICH_HCR) & 1 != 0)
            .min_by_key(|&n| ctx.get(word::ICH_LR + n) >> 48 & 0xFF)
    }

    fn step(&self, ctx: &RecContext<'_>, op: Op) -> Step {
        match op {
            Op::Read { ipa, size } => self.data(ctx, ipa, size, None),
            Op::Write { ipa, size, value } => {
                ctx.set_gpr(0, value);
                self.data(ctx, ipa, size, Some(value))
            }
            Op::Pair { ipa } => match self.reach(ctx, ipa, false, false) {
                Ok(_) => Step::Retired,
                Err(fault) => Step::Exit(Self::abort(EC_DABT, ipa, fault, 0)),
            },
            Op::Execute { ipa } => match self.reach(ctx, ipa, false, true) {
                Ok(_) => Step::Retired,
                Err(fault) => Step::Exit(Self::abort(EC_IABT, ipa, fault, 0)),
            },
            Op::Smc(registers) => {
                for (n, value) in registers.into_iter().enumerate() {
                    ctx.set_gpr(n, value);
                }
                Step::Exit(RealmExit::Sync { esr: EC_SMC << 26 | IL, far: 0, hpfar: 0 })
            }
            Op::Hvc => {
                // The hardware's return address of an HVC is the next instruction.
                ctx.advance_pc();
                Step::Exit(RealmExit::Sync { esr: EC_HVC << 26 | IL, far: 0, hpfar: 0 })
            }
            Op::Wfi => {
                if Self::best_lr(ctx).is_some() {
                    Step::Retired
                } else if ctx.get(word::HCR_EL2) & HCR_TWI != 0 {
                    Step::Exit(RealmExit::Sync { esr: EC_WFX << 26 | IL, far: 0, hpfar: 0 })
                } else {
                    // Nothing else happens on this CPU until an interrupt: let time pass.
                    self.machine.advance(1000);
                    std::thread::yield_now();
                    Step::Retired
                }
            }
            Op::WriteSysreg { iss, value } => {
                ctx.set_gpr(0, value);
                Step::Exit(RealmExit::Sync { esr: EC_SYSREG << 26 | IL | iss, far: 0, hpfar: 0 })
            }
            Op::ReadSysreg { iss } => {
                Step::Exit(RealmExit::Sync { esr: EC_SYSREG << 26 | IL | iss | 1, far: 0, hpfar: 0 })
            }
            Op::SetTimer { cval, ctl } => {
                ctx.set(word::CNTV_CVAL, cval);
                ctx.set(word::CNTV_CTL, ctl);
                Step::Retired
            }
            Op::Acknowledge => {
                let intid = Self::best_lr(ctx).map_or(1023, |n| {
                    let lr = ctx.get(word::ICH_LR + n);
                    ctx.set(word::ICH_LR + n, lr & !(3 << 62) | 2 << 62);
                    lr & 0xFFFF_FFFF
                });
                ctx.set_gpr(0, intid);
                Step::Retired
            }
            Op::EndOfInterrupt { intid } => {
                for n in 0..16 {
                    let lr = ctx.get(word::ICH_LR + n);
                    if lr >> 63 != 0 && lr & 0xFFFF_FFFF == intid {
                        ctx.set(word::ICH_LR + n, lr & !(1 << 63));
                    }
                }
                Step::Retired
            }
            Op::Counter => {
                ctx.set_gpr(0, self.machine.counter());
                Step::Retired
            }
        }
    }

    /// What the script behind `running` must be told before it goes on: the end of the operation under way.
    fn settle(ctx: &RecContext<'_>, running: &mut Running) {
        let Some((_, at)) = running.pending else { return };
        let next = at.wrapping_add(4);
        if ctx.pc() == at {
            return;
        }
        let outcome = if ctx.pc() == next {
            Outcome::Done(std::array::from_fn(|n| ctx.gpr(n)))
        } else {
            // The RMM sent it to the vector. The script is its own handler and goes on behind the instruction.
            ctx.set(word::PC, next);
            ctx.set(word::PSTATE, ctx.get(word::SPSR_EL1));
            Outcome::Exception(Exception { esr: ctx.get(word::ESR_EL1), far: ctx.get(word::FAR_EL1) })
        };
        running.pending = None;
        running.pc = next;
        running.source.tell(outcome);
    }

    fn program_at(&self, ctx: &RecContext<'_>) -> Program {
        self.machine
            .program(ctx.pc())
            .unwrap_or_else(|| panic!("no guest program at entry point {:#x}", ctx.pc()))
    }

    fn run_script(&self, cpu: usize, ctx: &RecContext<'_>, running: &mut Running) -> RealmExit {
        loop {
            Self::settle(ctx, running);
            crate::sync::interleave();
            if self.machine.take_interrupt(cpu) {
                return RealmExit::Irq;
            }
            if self.timer_line(ctx) && ctx.get(word::CNTHCTL_EL2) & CNTHCTL_CNTVMASK == 0 {
                return RealmExit::Irq;
            }
            self.machine.advance(1);
            let op = match running.pending {
                Some((op, _)) => op,
                None => match running.source.next() {
                    Next::Op(op) => op,
                    Next::NotYet => {
                        std::thread::yield_now();
                        continue;
                    }
                    Next::Failed(text) => {
                        self.machine.report_guest_failure(text);
                        // A dead guest can only wait. The test sees the report.
                        return RealmExit::Sync { esr: EC_WFX << 26 | IL, far: 0, hpfar: 0 };
                    }
                },
            };
            let at = running.pc;
            ctx.set(word::PC, at);
            running.pending = Some((op, at));
            match self.step(ctx, op) {
                Step::Retired => ctx.advance_pc(),
                Step::Exit(exit) => return exit,
            }
        }
    }
}

impl Platform for RealmWorld {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn granule(&self, pa: u64) -> &Page {
        self.machine
            .memory()
            .page(Pas::Realm, pa)
            .unwrap_or_else(|fault| panic!("RMM touched {pa:#x}: {fault:x?}"))
    }

    fn zero(&self, pa: u64) {
        for cell in self.granule(pa) {
            cell.store(0, Relaxed);
        }
    }

    fn ns_read(&self, pa: u64, buf: &mut [u64]) -> Result<(), NsFault> {
        let page = self.machine.memory().page(Pas::NonSecure, pa).map_err(|_| NsFault)?;
        let first = (pa as usize & 0xFFF) / 8;
        for (n, to) in buf.iter_mut().enumerate() {
            *to = page[first + n].load(Relaxed);
        }
        Ok(())
    }

    fn ns_write(&self, pa: u64, words: &[u64]) -> Result<(), NsFault> {
        let page = self.machine.memory().page(Pas::NonSecure, pa).map_err(|_| NsFault)?;
        let first = (pa as usize & 0xFFF) / 8;
        for (n, from) in words.iter().enumerate() {
            page[first + n].store(*from, Relaxed);
        }
        Ok(())
    }

    fn ns_copy_granule(&self, src: u64, dst: u64) -> Result<(), NsFault> {
        let from = self.machine.memory().page(Pas::NonSecure, src).map_err(|_| NsFault)?;
        for (to, from) in self.granule(dst).iter().zip(from) {
            to.store(from.load(Relaxed), Relaxed);
        }
        Ok(())
    }

    fn delegate(&self, pa: u64) -> Result<(), El3Refused> {
        self.service(rmm_el3::fid::GTSI_DELEGATE, pa)
    }

    fn undelegate(&self, pa: u64) -> Result<(), El3Refused> {
        self.service(rmm_el3::fid::GTSI_UNDELEGATE, pa)
    }

    fn publish_table_writes(&self) {}

    fn tlbi_ipa(&self, vttbr: u64, _vtcr: u64, ipa: u64, level: i64) {
        self.machine.tlb().invalidate(vttbr, ipa, level);
    }

    fn tlbi_vmid(&self, vttbr: u64, _vtcr: u64) {
        self.machine.tlb().invalidate_vmid(vttbr);
    }

    fn rec_load(&self, _cpu: usize, _ctx: &RecContext<'_>) {}

    fn rec_run(&self, cpu: usize, ctx: &RecContext<'_>) -> RealmExit {
        // The core clears the platform's words at REC_CREATE, so a new REC never meets an old one's script.
        let id = ctx.get(word::PLATFORM);
        let resumed = self.machine.take_running(id).filter(|running| {
            // After a CPU_ON the REC starts anew.
            running.pending.is_some_and(|(_, at)| ctx.pc() == at || ctx.pc() == at.wrapping_add(4))
                || (running.pending.is_none() && running.pc == ctx.pc())
                || ctx.pc() == ctx.get(word::VBAR_EL1).wrapping_add(0x200)
        });
        let mut running = resumed.unwrap_or_else(|| {
            // Scripts begin with interrupts of both groups enabled at the CPU interface, and none masked.
            ctx.set(word::ICH_VMCR, 0xF8 << 24 | 0b11);
            Running::start(self.program_at(ctx), ctx.pc(), ctx.gpr(0))
        });
        let exit = self.run_script(cpu, ctx, &mut running);
        ctx.set(word::PLATFORM, self.machine.put_running(id, running));
        exit
    }

    fn rec_save(&self, _cpu: usize, ctx: &RecContext<'_>) {
        ctx.set(word::CNTV_CTL, self.live_ctl(ctx.get(word::CNTV_CTL), ctx.get(word::CNTV_CVAL)));
        ctx.set(word::CNTP_CTL, self.live_ctl(ctx.get(word::CNTP_CTL), ctx.get(word::CNTP_CVAL)));
    }

    fn el1(&self, _cpu: usize, ctx: &RecContext<'_>, register: El1) -> u64 {
        ctx.get(el1_word(register))
    }

    fn set_el1(&self, _cpu: usize, ctx: &RecContext<'_>, register: El1, value: u64) {
        ctx.set(el1_word(register), value);
    }

    fn timers(&self, _cpu: usize, ctx: &RecContext<'_>) -> LiveTimers {
        LiveTimers {
            cntv_ctl: self.live_ctl(ctx.get(word::CNTV_CTL), ctx.get(word::CNTV_CVAL)),
            cntp_ctl: self.live_ctl(ctx.get(word::CNTP_CTL), ctx.get(word::CNTP_CVAL)),
        }
    }

    fn debug_load(&self, _cpu: usize, _ctx: &RecContext<'_>) {}

    fn pmu_load(&self, _cpu: usize, _ctx: &RecContext<'_>) {}

    fn log(&self, line: fmt::Arguments<'_>) {
        self.machine.log(format!("RMM: {line}"));
    }

    fn fatal(&self, reason: fmt::Arguments<'_>) -> ! {
        panic!("RMM: fatal: {reason}");
    }
}

fn el1_word(register: El1) -> usize {
    match register {
        El1::Vbar => word::VBAR_EL1,
        El1::Sctlr => word::SCTLR_EL1,
        El1::Elr => word::ELR_EL1,
        El1::Spsr => word::SPSR_EL1,
        El1::Esr => word::ESR_EL1,
        El1::Far => word::FAR_EL1,
        El1::Tcr => word::TCR_EL1,
        El1::Ttbr0 => word::TTBR0_EL1,
        El1::Ttbr1 => word::TTBR1_EL1,
    }
}
