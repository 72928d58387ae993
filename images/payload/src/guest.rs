//! A Realm that dirties every register it has, and tells what it finds in them.
//!
//! Its program does one thing per host call: fill its registers from a seed, or store them all into a page that it
//! shares with the host.

use core::arch::global_asm;
use core::mem::offset_of;

use cca_abi::rmi::{self, ExitReason, RealmParams, RecEnter, RecExit, RecParams, RecRun, fid};

use crate::entry::smc_timed;
use crate::{GRANULE, check, pool};

const S2SZ: u64 = 36;
const PROGRAM: u64 = 0x8000_0000;
const CALL: u64 = PROGRAM + GRANULE;
const TOP: u64 = PROGRAM + 2 * GRANULE;
/// The shared page's address in the Realm.
const SHARED: u64 = 1 << (S2SZ - 1);

/// What the program does, in the first register of the host call.
mod command {
    pub(super) const FILL: u64 = 1;
    pub(super) const DUMP: u64 = 2;
}

/// Words of a dump: system registers, then 32 vectors of 128 bits.
const REGISTERS: usize = 39;
const WORDS: usize = REGISTERS + 64;

/// A dump.
pub(crate) type Dump = [u64; WORDS];

global_asm!(
    r#"
.arch_extension fp
.macro realm_registers do
    // Those of the timers first: with no interrupt, and far in the future.
    \do cntv_cval_el0
    \do cntp_cval_el0
    \do sp_el0
    \do elr_el1
    \do spsr_el1
    \do ttbr0_el1
    \do ttbr1_el1
    \do tcr_el1
    \do esr_el1
    \do afsr0_el1
    \do afsr1_el1
    \do far_el1
    \do par_el1
    \do mair_el1
    \do amair_el1
    \do vbar_el1
    \do contextidr_el1
    \do tpidr_el1
    \do tpidr_el0
    \do tpidrro_el0
    \do cntkctl_el1
    \do fpcr
    \do fpsr
    \do S3_0_C2_C1_0
    \do S3_0_C2_C1_1
    \do S3_0_C2_C1_2
    \do S3_0_C2_C1_3
    \do S3_0_C2_C2_0
    \do S3_0_C2_C2_1
    \do S3_0_C2_C2_2
    \do S3_0_C2_C2_3
    \do S3_0_C2_C3_0
    \do S3_0_C2_C3_1
    \do dbgbvr0_el1
    \do dbgwvr0_el1
    \do dbgbvr1_el1
    \do dbgwvr1_el1
    \do S3_0_C12_C12_3
    \do S3_0_C4_C6_0
.endm
.macro fill register
    add     x3, x3, x4
    msr     \register, x3
.endm
.macro dump register
    mrs     x3, \register
    str     x3, [x5], #8
.endm

.section .rodata.dirty_program, "a"
.balign 16
.global dirty_program
dirty_program:
    mov     x20, #0x80000000
    add     x20, x20, #0x1000
    mov     x0, #(3 << 20)              // CPACR_EL1.FPEN
    msr     cpacr_el1, x0
    isb
1:  mov     x0, #0x0199                 // host call
    movk    x0, #0xC400, lsl #16
    mov     x1, x20
    smc     #0
    ldr     x2, [x20, #8]
    cmp     x2, #1
    b.eq    2f
    cmp     x2, #2
    b.eq    3f
    b       1b
2:  ldr     x3, [x20, #16]
    mov     x4, #0x7C15
    movk    x4, #0x7F4A, lsl #16
    movk    x4, #0x79B9, lsl #32
    movk    x4, #0x1E37, lsl #48
    realm_registers fill
    mov     x6, #2
    msr     cntv_ctl_el0, x6
    msr     cntp_ctl_el0, x6
.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    add     x3, x3, x4
    fmov    d\n, x3
    add     x3, x3, x4
    fmov    v\n\().d[1], x3
.endr
    isb
3:  mov     x5, #(1 << 35)
    realm_registers dump
.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    fmov    x3, d\n
    str     x3, [x5], #8
    fmov    x3, v\n\().d[1]
    str     x3, [x5], #8
.endr
    b       1b
.global dirty_program_end
dirty_program_end:
"#
);

unsafe extern "C" {
    static dirty_program: u8;
    static dirty_program_end: u8;
}

/// The granules of this test, in the pool.
#[derive(Clone, Copy)]
enum Page {
    Params = 720,
    Run,
    Source,
    Shared,
    Rd,
    Start,
    Level2,
    Level3,
    SharedLevel2,
    SharedLevel3,
    Rec,
    Program,
    Call,
    /// And up to 15 more.
    Aux,
}

const TABLES: [Page; 9] = [
    Page::Rd,
    Page::Start,
    Page::Level2,
    Page::Level3,
    Page::SharedLevel2,
    Page::SharedLevel3,
    Page::Rec,
    Page::Program,
    Page::Call,
];

fn pa(page: Page) -> u64 {
    pool(page as u64)
}

fn poke(page: Page, offset: usize, value: u64) {
    // SAFETY: a granule of the pool, which is no Rust object, at an offset below its size.
    unsafe {
        core::ptr::with_exposed_provenance_mut::<u64>(pa(page) as usize + offset).write_volatile(value);
    }
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

fn call(fid: u64, args: [u64; 5]) -> Option<u64> {
    let answer = smc_timed(fid, args);
    if answer.x[0] == 0 {
        return Some(answer.x[1]);
    }
    check("guest", Err(format_args!("{} gave {:#x}", rmi::name(fid).unwrap_or("?"), answer.x[0])));
    None
}

/// What the RMM owns while the Realm lives: its program, its registers, its tables.
pub(crate) fn private_pages() -> impl Iterator<Item = u64> {
    TABLES.into_iter().map(pa)
}

/// The Realm, while it lives.
pub(crate) struct Guest {
    aux: u64,
}

impl Guest {
    /// Makes it; `measured` is run around the creation of its program's page, which hashes that.
    pub(crate) fn new(mut measured: impl FnMut(&mut dyn FnMut())) -> Option<Self> {
        let rd = pa(Page::Rd);
        for page in TABLES {
            call(fid::GRANULE_DELEGATE, [pa(page), 0, 0, 0, 0])?;
        }
        let features = rmi::Features0(smc_timed(fid::FEATURES, [0; 5]).x[1]);
        clear(Page::Params);
        poke(Page::Params, offset_of!(RealmParams, s2sz), S2SZ);
        poke(Page::Params, offset_of!(RealmParams, num_bps), features.num_bps());
        poke(Page::Params, offset_of!(RealmParams, num_wps), features.num_wps());
        poke(Page::Params, offset_of!(RealmParams, vmid), 9);
        poke(Page::Params, offset_of!(RealmParams, rtt_base), pa(Page::Start));
        poke(Page::Params, offset_of!(RealmParams, rtt_level_start), 1);
        poke(Page::Params, offset_of!(RealmParams, rtt_num_start), 1);
        call(fid::REALM_CREATE, [rd, pa(Page::Params), 0, 0, 0])?;
        for (table, ipa, level) in [
            (Page::Level2, PROGRAM, 2),
            (Page::Level3, PROGRAM, 3),
            (Page::SharedLevel2, SHARED, 2),
            (Page::SharedLevel3, SHARED, 3),
        ] {
            call(fid::RTT_CREATE, [rd, pa(table), ipa, level, 0])?;
        }
        call(fid::RTT_INIT_RIPAS, [rd, PROGRAM, TOP, 0, 0])?;
        clear(Page::Source);
        let bytes = (&raw const dirty_program_end).addr() - (&raw const dirty_program).addr();
        for offset in (0..bytes).step_by(4) {
            // SAFETY: the program's words, between its two symbols; a granule of the pool.
            unsafe {
                let from = (&raw const dirty_program).add(offset).cast::<u32>().read();
                let to = core::ptr::with_exposed_provenance_mut::<u32>(pa(Page::Source) as usize + offset);
                to.write_volatile(from);
            }
        }
        let mut created = None;
        measured(&mut || {
            // Measured twice if it is run twice: the second time the page is there already.
            let source = [rd, pa(Page::Program), PROGRAM, pa(Page::Source), rmi::DATA_MEASURE_CONTENT];
            let answer = smc_timed(fid::DATA_CREATE, source).x[0];
            created = created.or(Some(answer));
            if answer == 0 {
                smc_timed(fid::DATA_DESTROY, [rd, PROGRAM, 0, 0, 0]);
            }
        });
        let source = [rd, pa(Page::Program), PROGRAM, pa(Page::Source), rmi::DATA_MEASURE_CONTENT];
        // What was destroyed left its address DESTROYED; before activation RIPAS can be set again.
        call(fid::RTT_INIT_RIPAS, [rd, PROGRAM, TOP, 0, 0])?;
        call(fid::DATA_CREATE, source)?;
        clear(Page::Source);
        call(fid::DATA_CREATE, [rd, pa(Page::Call), CALL, pa(Page::Source), 0])?;
        clear(Page::Shared);
        call(fid::RTT_MAP_UNPROTECTED, [rd, SHARED, 3, pa(Page::Shared) | 0b11 << 6 | 0b110 << 2, 0])?;
        let aux = call(fid::REC_AUX_COUNT, [rd, 0, 0, 0, 0])?;
        clear(Page::Params);
        for n in 0..aux {
            let page = pool(Page::Aux as u64 + n);
            call(fid::GRANULE_DELEGATE, [page, 0, 0, 0, 0])?;
            poke(Page::Params, offset_of!(RecParams, aux) + n as usize * 8, page);
        }
        poke(Page::Params, offset_of!(RecParams, flags), rmi::REC_RUNNABLE);
        poke(Page::Params, offset_of!(RecParams, pc), PROGRAM);
        poke(Page::Params, offset_of!(RecParams, num_aux), aux);
        call(fid::REC_CREATE, [rd, pa(Page::Rec), pa(Page::Params), 0, 0])?;
        call(fid::REALM_ACTIVATE, [rd, 0, 0, 0, 0])?;
        clear(Page::Run);
        let guest = Self { aux };
        guest.enter(0, 0);
        Some(guest)
    }

    /// Runs it to its next host call. Says nothing when all is well, so that registers stay as they are.
    fn enter(&self, what: u64, seed: u64) {
        poke(Page::Run, offset_of!(RecEnter, gprs), what);
        poke(Page::Run, offset_of!(RecEnter, gprs) + 8, seed);
        let status = smc_timed(fid::REC_ENTER, [pa(Page::Rec), pa(Page::Run), 0, 0, 0]).x[0];
        let exit = |offset| peek(Page::Run, offset_of!(RecRun, exit) + offset);
        if status != 0 || exit(0) & 0xFF != ExitReason::HostCall as u64 {
            let esr = exit(offset_of!(RecExit, esr));
            let far = exit(offset_of!(RecExit, far));
            check(
                "guest-runs",
                Err(format_args!("{status:#x}, exit {}, ESR {esr:#x} FAR {far:#x}", exit(0))),
            );
        }
    }

    /// Lets it fill its registers.
    pub(crate) fn fill(&self, seed: u64) -> Dump {
        self.enter(command::FILL, seed);
        Self::dumped()
    }

    /// Lets it tell what it finds in them.
    pub(crate) fn dump(&self) -> Dump {
        self.enter(command::DUMP, 0);
        Self::dumped()
    }

    fn dumped() -> Dump {
        core::array::from_fn(|n| peek(Page::Shared, n * 8))
    }

    /// Ends it.
    pub(crate) fn destroy(self) {
        let rd = pa(Page::Rd);
        let shared = [rd, SHARED, 3, 0, 0];
        let steps = [
            (fid::REC_DESTROY, [pa(Page::Rec), 0, 0, 0, 0]),
            (fid::DATA_DESTROY, [rd, PROGRAM, 0, 0, 0]),
            (fid::DATA_DESTROY, [rd, CALL, 0, 0, 0]),
            (fid::RTT_UNMAP_UNPROTECTED, shared),
            (fid::RTT_DESTROY, [rd, PROGRAM, 3, 0, 0]),
            (fid::RTT_DESTROY, [rd, PROGRAM, 2, 0, 0]),
            (fid::RTT_DESTROY, [rd, SHARED, 3, 0, 0]),
            (fid::RTT_DESTROY, [rd, SHARED, 2, 0, 0]),
            (fid::REALM_DESTROY, [rd, 0, 0, 0, 0]),
        ];
        let aux = (0..self.aux).map(|n| pool(Page::Aux as u64 + n));
        let undelegate =
            TABLES.into_iter().map(pa).chain(aux).map(|pa| (fid::GRANULE_UNDELEGATE, [pa, 0, 0, 0, 0]));
        for (fid, args) in steps.into_iter().chain(undelegate) {
            call(fid, args);
        }
    }
}
