//! One Realm from creation to destruction, driven by hand: every step of a host, with what it costs.
//!
//! The Realm's program ([`realm_program`]) does one thing per host call: what the host wrote into the call's first
//! registers.

mod build;
mod counters;
mod cpu;
mod debug;
mod faults;
mod guest;
mod interrupts;
mod psci;
mod registers;
mod vectors;

use core::arch::{asm, global_asm};
use core::mem::offset_of;
use core::ops::ControlFlow;

use cca_abi::psci as host_psci;
use cca_abi::rmi::{self, ExitReason, HashAlgorithm, RealmParams, RecEnter, RecExit, RecParams, RecRun, fid};
use cca_abi::rsi::HostCall;

use crate::entry::{Answer, smc_timed};
use crate::measured::Rim;
use crate::{GRANULE, check, expect, is_gpf, line, pool, probe_read};

/// IPA width: the shared half begins at bit 35. One start table at level 1.
const S2SZ: u8 = 36;
const SHARED: u64 = 1 << (S2SZ - 1);
/// Where the program lies.
const PROGRAM: u64 = 0x8000_0000;
/// The page of its [`HostCall`].
const CALL: u64 = PROGRAM + GRANULE;
/// RAM that nobody has touched.
const FREE: u64 = PROGRAM + 4 * GRANULE;
/// End of what RIPAS calls RAM.
const TOP: u64 = PROGRAM + 16 * GRANULE;
/// A device that only the host's imagination has.
const DEVICE: u64 = SHARED | 0x0100_0000;

/// What the program is told to do, in the first register of the host call.
mod command {
    pub(super) const NOTHING: u64 = 0;
    pub(super) const TOUCH: u64 = 1;
    pub(super) const OFF: u64 = 2;
    pub(super) const FLOATING_POINT: u64 = 3;
    pub(super) const SCRIBBLE: u64 = 4;
    pub(super) const TOKEN: u64 = 5;
    pub(super) const MEASUREMENT: u64 = 6;
}

global_asm!(
    r#"
.arch_extension fp
.section .rodata.realm_program, "a"
.balign 16
.global realm_program
realm_program:
    mov     x20, #0x80000000
    add     x20, x20, #0x1000
    mov     x0, #(3 << 20)              // CPACR_EL1.FPEN
    msr     cpacr_el1, x0
    isb
    // Host call; its registers: 0 command, 1 address, 2 what was read.
1:  mov     x0, #0x0199
    movk    x0, #0xC400, lsl #16
    mov     x1, x20
    smc     #0
    ldr     x2, [x20, #8]
    cmp     x2, #1
    b.eq    2f
    cmp     x2, #2
    b.eq    3f
    cmp     x2, #4
    b.eq    4f
    cmp     x2, #5
    b.eq    5f
    cmp     x2, #6
    b.eq    7f
    cmp     x2, #3
    b.ne    1b
    fmov    d0, x2
    b       1b
    // An attestation token, into the host call's page: last status, bytes, calls.
5:  mov     x0, #0x0194
    movk    x0, #0xC400, lsl #16
    smc     #0
    mov     x21, #0
    mov     x22, #0
6:  mov     x0, #0x0195
    movk    x0, #0xC400, lsl #16
    mov     x1, x20
    mov     x2, #0x400
    mov     x3, #0xC00
    smc     #0
    add     x21, x21, x1
    add     x22, x22, #1
    cmp     x0, #3
    b.eq    6b
    stp     x0, x21, [x20, #24]
    str     x22, [x20, #40]
    b       1b
4:  mov     x3, #-1
    fmov    d0, x3
    fmov    v0.d[1], x3
    msr     tpidr_el0, x3
    msr     tpidrro_el0, x3
    msr     tpidr_el1, x3
    msr     far_el1, x3
    msr     S3_0_C2_C1_0, x3            // APIAKeyLo_EL1
    msr     cntv_cval_el0, x3
    mov     x3, #1
    msr     osdlr_el1, x3
    msr     oslar_el1, x3
    b       1b
    // The initial measurement.
7:  mov     x0, #0x0192
    movk    x0, #0xC400, lsl #16
    mov     x1, #0
    smc     #0
    stp     x1, x2, [x20, #24]
    stp     x3, x4, [x20, #40]
    stp     x5, x6, [x20, #56]
    stp     x7, x8, [x20, #72]
    b       1b
2:  ldr     x3, [x20, #16]
    ldr     x4, [x3]
    str     x4, [x20, #24]
    b       1b
3:  mov     x0, #8                      // PSCI SYSTEM_OFF
    movk    x0, #0x8400, lsl #16
    smc     #0
    b       3b
.global realm_program_end
realm_program_end:
"#
);

unsafe extern "C" {
    static realm_program: u8;
    static realm_program_end: u8;
}

/// The granules of this test, in the pool.
#[derive(Clone, Copy)]
enum Page {
    Params = 320,
    Run,
    Source,
    Rd,
    Start,
    Level2,
    Level3,
    Rec,
    Aux,
    Program,
    Call,
    Free,
}

/// What the RMM owns while the Realm lives.
const DELEGATED: [Page; 7] =
    [Page::Rd, Page::Start, Page::Level2, Page::Level3, Page::Rec, Page::Aux, Page::Program];

fn pa(page: Page) -> u64 {
    pool(page as u64)
}

fn poke(page: Page, offset: usize, value: u64) {
    // SAFETY: a granule of the pool, which is no Rust object, at an offset below its size.
    unsafe {
        core::ptr::with_exposed_provenance_mut::<u64>(pa(page) as usize + offset).write_volatile(value)
    };
}

fn peek(page: Page, offset: usize) -> u64 {
    // SAFETY: as for `poke`.
    unsafe { core::ptr::with_exposed_provenance::<u64>(pa(page) as usize + offset).read_volatile() }
}

fn clear(page: Page) {
    for word in 0..GRANULE as usize / 8 {
        poke(page, word * 8, 0);
    }
}

/// A call of the RMM; `Break` ends the test if it fails.
fn rmi(name: &str, fid: u64, args: [u64; 5]) -> ControlFlow<(), Answer> {
    let answer = smc_timed(fid, args);
    if answer.x[0] == 0 {
        ControlFlow::Continue(answer)
    } else {
        check(name, Err(format_args!("{} gave {:#x}", rmi::name(fid).unwrap_or("?"), answer.x[0])));
        ControlFlow::Break(())
    }
}

fn bench(name: &str, ticks: u64, nothing: u64) {
    line(format_args!("bench {name} {}", ticks.saturating_sub(nothing)));
}

/// Enters the REC with a command and gives how it left, with the ticks of the entry.
fn enter(what: u64, address: u64, flags: u64) -> ControlFlow<(), (ExitReason, u64)> {
    poke(Page::Run, offset_of!(RecEnter, flags), flags);
    poke(Page::Run, offset_of!(RecEnter, gprs), what);
    poke(Page::Run, offset_of!(RecEnter, gprs) + 8, address);
    poke(Page::Run, offset_of!(RecEnter, gprs) + 16, 0);
    let answer = rmi("realm-runs", fid::REC_ENTER, [pa(Page::Rec), pa(Page::Run), 0, 0, 0])?;
    match ExitReason::try_from((exit(0) & 0xFF) as u8) {
        Ok(reason) => ControlFlow::Continue((reason, answer.ticks)),
        Err(other) => {
            check("realm-runs", Err(format_args!("exit reason {other}")));
            ControlFlow::Break(())
        }
    }
}

fn exit(offset: usize) -> u64 {
    peek(Page::Run, offset_of!(RecRun, exit) + offset)
}

fn expect_exit(name: &str, got: ExitReason, wanted: ExitReason) -> ControlFlow<()> {
    if got == wanted {
        ControlFlow::Continue(())
    } else {
        check(name, Err(format_args!("left with {got:?} (ESR {:#x})", exit(offset_of!(RecExit, esr)))));
        ControlFlow::Break(())
    }
}

/// What only a running Realm can show: each suite builds Realms of its own.
pub(crate) fn suites() {
    let _ = registers::suite();
    let _ = vectors::suite();
    let _ = counters::suite();
    let _ = debug::suite();
    let _ = interrupts::suite();
    let _ = psci::suite();
    let _ = faults::suite();
}

/// The whole life.
pub(crate) fn life(nothing: u64) {
    for algorithm in [HashAlgorithm::Sha256, HashAlgorithm::Sha512] {
        let first = algorithm == HashAlgorithm::Sha256;
        let bench = |name: &str, ticks| {
            if first {
                bench(name, ticks, nothing)
            }
        };
        let ran = build(algorithm, bench).map_continue(|rim| measurement(&rim));
        let ran = match ran {
            ControlFlow::Continue(ControlFlow::Continue(())) if first => run(nothing),
            ControlFlow::Continue(ran) => ran,
            ControlFlow::Break(()) => ControlFlow::Break(()),
        };
        let ended = destroy(first);
        if ran.is_continue() && ended.is_continue() {
            check("realm-lives-and-dies", Ok(()));
        }
    }
}

/// Makes the Realm; gives what its initial measurement should be.
fn build(algorithm: HashAlgorithm, bench: impl Fn(&str, u64)) -> ControlFlow<(), Rim> {
    for page in DELEGATED {
        rmi("realm-is-made", fid::GRANULE_DELEGATE, [pa(page), 0, 0, 0, 0])?;
    }
    rmi("realm-is-made", fid::GRANULE_DELEGATE, [pa(Page::Call), 0, 0, 0, 0])?;
    clear(Page::Params);
    poke(Page::Params, offset_of!(RealmParams, s2sz), S2SZ.into());
    let features = rmi::Features0(smc_timed(fid::FEATURES, [0; 5]).x[1]);
    poke(Page::Params, offset_of!(RealmParams, num_bps), features.num_bps());
    poke(Page::Params, offset_of!(RealmParams, num_wps), features.num_wps());
    poke(Page::Params, offset_of!(RealmParams, hash_algo), algorithm as u64);
    poke(Page::Params, offset_of!(RealmParams, vmid), 7);
    poke(Page::Params, offset_of!(RealmParams, rtt_base), pa(Page::Start));
    poke(Page::Params, offset_of!(RealmParams, rtt_level_start), 1);
    poke(Page::Params, offset_of!(RealmParams, rtt_num_start), 1);
    let rd = pa(Page::Rd);
    let mut rim = Rim::new(algorithm, |n| peek(Page::Params, 8 * n));
    let create = rmi("realm-is-made", fid::REALM_CREATE, [rd, pa(Page::Params), 0, 0, 0])?;
    bench("RMI_REALM_CREATE", create.ticks);
    rmi("realm-is-made", fid::RTT_CREATE, [rd, pa(Page::Level2), PROGRAM, 2, 0])?;
    let table = rmi("realm-is-made", fid::RTT_CREATE, [rd, pa(Page::Level3), PROGRAM, 3, 0])?;
    bench("RMI_RTT_CREATE", table.ticks);
    let ripas = rmi("realm-is-made", fid::RTT_INIT_RIPAS, [rd, PROGRAM, TOP, 0, 0])?;
    bench("RMI_RTT_INIT_RIPAS of 16 pages", ripas.ticks);

    for page in (PROGRAM..TOP).step_by(GRANULE as usize) {
        rim.ripas(page);
    }

    clear(Page::Source);
    // SAFETY: the program's bytes, between its two symbols, in whole words.
    let program = unsafe {
        let (start, end) = (&raw const realm_program, &raw const realm_program_end);
        core::slice::from_raw_parts(start.cast::<u32>(), (end.addr() - start.addr()) / 4)
    };
    for (word, pair) in program.chunks(2).enumerate() {
        let high = pair.get(1).copied().unwrap_or(0);
        poke(Page::Source, word * 8, u64::from(high) << 32 | u64::from(pair[0]));
    }
    let source = pa(Page::Source);
    let measure = rmi::DATA_MEASURE_CONTENT;
    let data = rmi("realm-is-made", fid::DATA_CREATE, [rd, pa(Page::Program), PROGRAM, source, measure])?;
    bench("RMI_DATA_CREATE measured", data.ticks);
    rim.data(PROGRAM, Some(|n: usize| peek(Page::Source, 8 * n)));
    clear(Page::Source);
    let data = rmi("realm-is-made", fid::DATA_CREATE, [rd, pa(Page::Call), CALL, source, 0])?;
    bench("RMI_DATA_CREATE not measured", data.ticks);

    rim.data(CALL, None::<fn(usize) -> u64>);
    let aux = rmi("realm-is-made", fid::REC_AUX_COUNT, [rd, 0, 0, 0, 0])?.x[1];
    if aux > 1 {
        check("realm-is-made", Err(format_args!("{aux} auxiliary granules, this test has one")));
        return ControlFlow::Break(());
    }
    clear(Page::Params);
    poke(Page::Params, offset_of!(RecParams, flags), rmi::REC_RUNNABLE);
    poke(Page::Params, offset_of!(RecParams, pc), PROGRAM);
    poke(Page::Params, offset_of!(RecParams, num_aux), aux);
    poke(Page::Params, offset_of!(RecParams, aux), pa(Page::Aux));
    let rec = rmi("realm-is-made", fid::REC_CREATE, [rd, pa(Page::Rec), pa(Page::Params), 0, 0])?;
    bench("RMI_REC_CREATE", rec.ticks);
    rmi("realm-is-made", fid::REALM_ACTIVATE, [rd, 0, 0, 0, 0])?;
    rim.rec(PROGRAM);
    ControlFlow::Continue(rim)
}

/// The first entry, which comes to the first host call, and what the Realm says its initial measurement is.
fn measurement(rim: &Rim) -> ControlFlow<()> {
    clear(Page::Run);
    let (reason, _) = enter(command::NOTHING, 0, 0)?;
    expect_exit("realm-runs", reason, ExitReason::HostCall)?;
    // The command is done after this entry; what it gave comes with the next host call.
    let (reason, _) = enter(command::MEASUREMENT, 0, 0)?;
    expect_exit("realm-is-measured", reason, ExitReason::HostCall)?;
    let words = core::array::from_fn(|n| exit(offset_of!(RecExit, gprs) + 8 * (2 + n)));
    let same =
        if words == rim.value { Ok(()) } else { Err(format_args!("{words:#x?}, not {:#x?}", rim.value)) };
    check("realm-is-measured", same);
    ControlFlow::Continue(())
}

fn run(nothing: u64) -> ControlFlow<()> {
    let mut empty = u64::MAX;
    for _ in 0..8 {
        let (reason, ticks) = enter(command::NOTHING, 0, 0)?;
        expect_exit("realm-calls-its-host", reason, ExitReason::HostCall)?;
        empty = ticks.min(empty);
    }
    bench("RMI_REC_ENTER to an immediate host call", empty, nothing);
    check("realm-calls-its-host", Ok(()));
    let (reason, ticks) = enter(command::FLOATING_POINT, 0, 0)?;
    expect_exit("realm-calls-its-host", reason, ExitReason::HostCall)?;
    bench("RMI_REC_ENTER with floating point", ticks, nothing);
    scribble()?;
    token(nothing)?;
    device(nothing)?;
    first_touch(nothing)?;
    match probe_read(pa(Page::Free)) {
        Err(esr) if is_gpf(esr) => check("realm-memory-read-faults", Ok(())),
        other => check("realm-memory-read-faults", Err(format_args!("{other:#x?}"))),
    }
    let (reason, _) = enter(command::OFF, 0, 0)?;
    expect_exit("realm-switches-off", reason, ExitReason::Psci)?;
    expect("realm-switches-off", exit(offset_of!(RecExit, gprs)), host_psci::fid::SYSTEM_OFF);
    let again = smc_timed(fid::REC_ENTER, [pa(Page::Rec), pa(Page::Run), 0, 0, 0]).x[0];
    expect("realm-stays-off", again, rmi::Status::ErrorRealm(1).to_register());
    ControlFlow::Continue(())
}

/// What the Realm does to its registers is nothing to the host's, and the host's event counters see none of it.
fn scribble() -> ControlFlow<()> {
    let before = host_registers(true);
    let counted = count_el1();
    let (reason, _) = enter(command::SCRIBBLE, 0, 0)?;
    expect_exit("realm-keeps-to-its-registers", reason, ExitReason::HostCall)?;
    let after = host_registers(false);
    expect("realm-is-not-counted", count_el1(), counted);
    match (0..before.len()).find(|&n| before[n] != after[n]) {
        None => check("realm-keeps-to-its-registers", Ok(())),
        Some(n) => check(
            "realm-keeps-to-its-registers",
            Err(format_args!("register {n}: {:#x} became {:#x}", before[n], after[n])),
        ),
    }
    ControlFlow::Continue(())
}

/// Starts event counter 0 on instructions at EL1 and EL0 only, if it does not run, and gives its value.
fn count_el1() -> u64 {
    const INSTRUCTIONS: u64 = 8;
    let value;
    // SAFETY: nothing else uses the event counters.
    unsafe {
        asm!(
            "msr pmevtyper0_el0, {event}", "msr pmcntenset_el0, {one}", "msr pmcr_el0, {one}", "isb",
            "mrs {value}, pmevcntr0_el0",
            event = in(reg) INSTRUCTIONS, one = in(reg) 1_u64, value = out(reg) value, options(nostack),
        );
    }
    value
}

/// Registers that host and Realm both have; gives those a value first, if asked, that have none yet.
fn host_registers(set: bool) -> [u64; 11] {
    let mut seen = [0; 11];
    macro_rules! see {
        ($($n:literal $write:literal $read:literal)*) => {$(
            // SAFETY: registers that the payload does not depend on.
            unsafe {
                if set {
                    asm!(".arch_extension fp", $write, in("x9") 0x1111_1110_u64 * ($n + 1), options(nostack));
                }
                asm!(".arch_extension fp", $read, out("x9") seen[$n], options(nostack));
            }
        )*};
    }
    see! {
        0 "fmov d0, x9" "fmov x9, d0"
        1 "fmov v0.d[1], x9" "fmov x9, v0.d[1]"
        2 "msr tpidr_el0, x9" "mrs x9, tpidr_el0"
        3 "msr tpidrro_el0, x9" "mrs x9, tpidrro_el0"
        4 "msr tpidr_el1, x9" "mrs x9, tpidr_el1"
        5 "msr far_el1, x9" "mrs x9, far_el1"
        6 "msr S3_0_C2_C1_0, x9" "mrs x9, S3_0_C2_C1_0"
        7 "msr cntv_cval_el0, x9" "mrs x9, cntv_cval_el0"
        8 "nop" "mrs x9, osdlr_el1"
        9 "nop" "mrs x9, oslsr_el1"
        10 "nop" "mrs x9, vmpidr_el2"
    }
    seen
}

/// A whole attestation token, and how long an interrupt waits while it is signed.
fn token(nothing: u64) -> ControlFlow<()> {
    let result = || [2, 3, 4].map(|n| exit(offset_of!(RecExit, gprs) + n * 8));
    let (reason, ticks) = enter(command::TOKEN, 0, 0)?;
    expect_exit("realm-gets-a-token", reason, ExitReason::HostCall)?;
    let [status, len, calls] = result();
    expect("realm-gets-a-token", status, 0);
    expect("realm-gets-a-token-in-one-call", calls, 1);
    if !(900..0xC00).contains(&len) {
        check("realm-gets-a-token", Err(format_args!("{len} bytes")));
    }
    bench("attestation token", ticks, nothing);

    let (mut longest, mut interrupted) = (0, 0);
    for after in (50_000..ticks).step_by(37_000) {
        interrupt::arm(after);
        let (reason, spent) = enter(command::TOKEN, 0, 0)?;
        interrupt::disarm();
        if reason == ExitReason::Irq {
            interrupted += 1;
            longest = longest.max(spent.saturating_sub(after));
            let (reason, _) = enter(command::NOTHING, 0, 0)?;
            expect_exit("realm-is-interrupted-while-signing", reason, ExitReason::HostCall)?;
            let [status, again, calls] = result();
            // At the very end the signature may have been there.
            if status != 0 || again != len || calls > 2 {
                check("realm-is-interrupted-while-signing", Err(format_args!("{status} {again} {calls}")));
            }
        }
    }
    let often = if interrupted < 10 { Err(format_args!("only {interrupted} times")) } else { Ok(()) };
    check("realm-is-interrupted-while-signing", often);
    bench("longest wait of an interrupt while a token is signed", longest, nothing);
    ControlFlow::Continue(())
}

/// The hypervisor's timer as an interrupt, on the first CPU.
mod interrupt {
    use core::arch::asm;

    const GICD_CTLR: usize = 0x0800_0000;
    /// The first CPU's redistributor, frame of SGIs and PPIs.
    const GICR_ISENABLER0: usize = 0x080B_0100;
    const TIMER: u32 = 1 << 26;

    fn write(register: usize, value: u32) {
        // SAFETY: a register of the GIC, which nothing else in the payload uses.
        unsafe { core::ptr::with_exposed_provenance_mut::<u32>(register).write_volatile(value) };
    }

    /// An interrupt in `ticks`. It stays pending, because the payload takes none.
    pub(super) fn arm(ticks: u64) {
        write(GICD_CTLR, 0x12);
        write(GICR_ISENABLER0, TIMER);
        // SAFETY: the payload takes no interrupts; this only lets them become pending.
        unsafe {
            asm!(
                "msr S3_4_C12_C9_5, {sre}", "isb", "msr S3_0_C4_C6_0, {pmr}", "msr S3_0_C12_C12_7, {one}",
                "msr cnthp_tval_el2, {ticks}", "msr cnthp_ctl_el2, {one}", "isb",
                sre = in(reg) 0xF_u64, pmr = in(reg) 0xFF_u64, one = in(reg) 1_u64, ticks = in(reg) ticks,
                options(nostack),
            );
        }
    }

    /// No interrupt any more.
    pub(super) fn disarm() {
        // SAFETY: as in `arm`.
        unsafe { asm!("msr cnthp_ctl_el2, xzr", "isb", options(nostack)) };
        write(GICR_ISENABLER0 + 0x80, TIMER);
    }
}

/// A load from a device: leaves as an emulatable abort, goes on with the host's value.
fn device(nothing: u64) -> ControlFlow<()> {
    const VALUE: u64 = 0x00C0_FFEE;
    let (reason, ticks) = enter(command::TOUCH, DEVICE | 8, 0)?;
    expect_exit("realm-reaches-a-device", reason, ExitReason::Sync)?;
    bench("RMI_REC_ENTER to a device access", ticks, nothing);
    let ipa = (exit(offset_of!(RecExit, hpfar)) << 8) & !0xFFF | exit(offset_of!(RecExit, far));
    expect("realm-reaches-a-device", ipa, DEVICE | 8);
    let (reason, _) = enter(VALUE, 0, rmi::enter_flags::EMUL_MMIO)?;
    expect_exit("realm-reaches-a-device", reason, ExitReason::HostCall)?;
    let seen = exit(offset_of!(RecExit, gprs) + 2 * 8);
    expect("realm-gets-the-hosts-answer", seen, VALUE);
    ControlFlow::Continue(())
}

/// The first touch of a page: abort, delegate, map, go on.
fn first_touch(nothing: u64) -> ControlFlow<()> {
    poke(Page::Free, 0, 0xDEAD);
    let (reason, mut ticks) = enter(command::TOUCH, FREE, 0)?;
    expect_exit("realm-touches-a-page", reason, ExitReason::Sync)?;
    expect("realm-touches-a-page", (exit(offset_of!(RecExit, hpfar)) << 8) & !0xFFF, FREE);
    let rd = pa(Page::Rd);
    ticks += rmi("realm-touches-a-page", fid::GRANULE_DELEGATE, [pa(Page::Free), 0, 0, 0, 0])?.ticks;
    let data = rmi("realm-touches-a-page", fid::DATA_CREATE_UNKNOWN, [rd, pa(Page::Free), FREE, 0, 0])?;
    bench("RMI_DATA_CREATE_UNKNOWN", data.ticks, nothing);
    ticks += data.ticks;
    let (reason, rest) = enter(command::NOTHING, 0, 0)?;
    expect_exit("realm-touches-a-page", reason, ExitReason::HostCall)?;
    expect("realm-finds-nothing-of-the-host", exit(offset_of!(RecExit, gprs) + 2 * 8), 0);
    bench(
        "first touch without a kernel (2 REC_ENTER, DELEGATE, DATA_CREATE_UNKNOWN)",
        ticks + rest,
        4 * nothing,
    );
    ControlFlow::Continue(())
}

/// Takes apart whatever is there; every granule must come back empty. A Realm that ran touched a page more.
fn destroy(ran: bool) -> ControlFlow<()> {
    let rd = pa(Page::Rd);
    for (page, ipa) in [(Page::Program, PROGRAM), (Page::Call, CALL), (Page::Free, FREE)] {
        let answer = smc_timed(fid::DATA_DESTROY, [rd, ipa, 0, 0, 0]);
        if answer.x[0] == 0 {
            expect("realm-gives-its-page-back", answer.x[1], pa(page));
        }
    }
    smc_timed(fid::REC_DESTROY, [pa(Page::Rec), 0, 0, 0, 0]);
    smc_timed(fid::RTT_DESTROY, [rd, PROGRAM, 3, 0, 0]);
    smc_timed(fid::RTT_DESTROY, [rd, PROGRAM, 2, 0, 0]);
    rmi("realm-is-destroyed", fid::REALM_DESTROY, [rd, 0, 0, 0, 0])?;
    for page in DELEGATED.into_iter().chain([Page::Call]).chain(ran.then_some(Page::Free)) {
        rmi("realm-is-destroyed", fid::GRANULE_UNDELEGATE, [pa(page), 0, 0, 0, 0])?;
        if let Some(word) = (0..GRANULE as usize / 8).find(|&word| peek(page, word * 8) != 0) {
            check("realm-leaves-nothing", Err(format_args!("page {} word {word}", page as u64)));
            return ControlFlow::Break(());
        }
    }
    check("realm-leaves-nothing", Ok(()));
    ControlFlow::Continue(())
}

const _: () = assert!(offset_of!(HostCall, gprs) == 8, "the program knows it");
