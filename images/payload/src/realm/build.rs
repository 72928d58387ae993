//! Realms made of this image, for the suites: building, entering, taking apart.

use core::mem::offset_of;
use core::ops::ControlFlow;

use cca_abi::rmi::{self, ExitReason, RealmParams, RecEnter, RecExit, RecParams, RecRun, fid};

use super::guest::{self, CALLS, FREE, RAM_END, S2SZ, STACK_PAGES, STACKS, call};
use crate::entry::smc;
use crate::{GRANULE, check};

/// Most RECs of a Realm.
const RECS: usize = 2;
/// Granules for each Realm.
const SLOT: u64 = 128;
/// IPA covered by a level 3 table.
const TABLE_SPAN: u64 = 0x20_0000;

unsafe extern "C" {
    static __image_start: u8;
    static __bss_end: u8;
    static __realm_pool: u8;
}

/// A program: a function of this image that runs in the Realm.
pub(super) type Program = extern "C" fn(argument: u64);

/// What a Realm is to be like.
#[derive(Clone, Copy, Default)]
pub(super) struct Wish {
    /// Which of the two sets of granules, and the VMID.
    pub(super) slot: u64,
    /// `sve_vl` of a Realm with SVE.
    pub(super) sve_vl: Option<u64>,
    /// Event counters of a Realm with PMU.
    pub(super) counters: Option<u64>,
    /// Breakpoints and watchpoints, minus one each; zero: as many as there are.
    pub(super) debug: u64,
}

/// A Realm.
pub(super) struct Realm {
    base: u64,
    used: u64,
    rd: u64,
    recs: [u64; RECS],
    runs: [u64; RECS],
}

/// How a REC left, apart from failed checks, which are reported on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The program is at this step, with two values.
    Step(u64, [u64; 2]),
    /// It is done, after so many checks.
    Done(u64),
    /// Something else.
    Exit(ExitReason),
}

fn poke(pa: u64, offset: usize, value: u64) {
    // SAFETY: a granule of the pool, which is no Rust object.
    unsafe { core::ptr::with_exposed_provenance_mut::<u64>(pa as usize + offset).write_volatile(value) };
}

fn peek(pa: u64, offset: usize) -> u64 {
    // SAFETY: as for `poke`.
    unsafe { core::ptr::with_exposed_provenance::<u64>(pa as usize + offset).read_volatile() }
}

fn rmi(fid: u64, args: [u64; 5]) -> ControlFlow<(), u64> {
    let answer = crate::entry::smc_timed(fid, args);
    if answer.x[0] == 0 {
        return ControlFlow::Continue(answer.x[1]);
    }
    check("suite-realm", Err(format_args!("{} gave {:#x}", rmi::name(fid).unwrap_or("?"), answer.x[0])));
    ControlFlow::Break(())
}

impl Realm {
    fn granule(&mut self) -> u64 {
        let pa = self.base + self.used * GRANULE;
        self.used += 1;
        pa
    }

    fn delegated(&mut self) -> ControlFlow<(), u64> {
        let pa = self.granule();
        rmi(fid::GRANULE_DELEGATE, [pa, 0, 0, 0, 0])?;
        ControlFlow::Continue(pa)
    }

    /// Builds an active Realm with two RECs, the second one off, of which the first runs `program`.
    pub(super) fn new(wish: Wish, program: Program, argument: u64) -> ControlFlow<(), Self> {
        let pool = ((&raw const __realm_pool).addr() as u64 + GRANULE - 1) & !(GRANULE - 1);
        let base = pool + wish.slot * SLOT * GRANULE;
        let mut realm = Self { base, used: 0, rd: 0, recs: [0; RECS], runs: [0; RECS] };
        let params = realm.granule();
        for word in 0..GRANULE as usize / 8 {
            poke(params, word * 8, 0);
        }
        realm.rd = realm.delegated()?;
        let rd = realm.rd;
        let start = realm.delegated()?;
        let features = rmi::Features0(smc(fid::FEATURES, 0, 0, 0)[1]);
        let mut flags = 0;
        if let Some(vl) = wish.sve_vl {
            flags |= rmi::realm_flags::SVE;
            poke(params, offset_of!(RealmParams, sve_vl), vl);
        }
        if let Some(counters) = wish.counters {
            flags |= rmi::realm_flags::PMU;
            poke(params, offset_of!(RealmParams, pmu_num_ctrs), counters);
        }
        let or = |wanted, most| if wanted == 0 { most } else { wanted };
        poke(params, offset_of!(RealmParams, flags), flags);
        poke(params, offset_of!(RealmParams, s2sz), S2SZ);
        poke(params, offset_of!(RealmParams, num_bps), or(wish.debug, features.num_bps()));
        poke(params, offset_of!(RealmParams, num_wps), or(wish.debug, features.num_wps()));
        poke(params, offset_of!(RealmParams, vmid), 32 + wish.slot);
        poke(params, offset_of!(RealmParams, rtt_base), start);
        poke(params, offset_of!(RealmParams, rtt_level_start), 1);
        poke(params, offset_of!(RealmParams, rtt_num_start), 1);
        rmi(fid::REALM_CREATE, [rd, params, 0, 0, 0])?;

        let image = (&raw const __image_start).addr() as u64;
        let end = ((&raw const __bss_end).addr() as u64).next_multiple_of(GRANULE);
        let table = realm.delegated()?;
        rmi(fid::RTT_CREATE, [rd, table, image & !(0x4000_0000 - 1), 2, 0])?;
        let table = realm.delegated()?;
        rmi(fid::RTT_CREATE, [rd, table, image & !(TABLE_SPAN - 1), 3, 0])?;
        rmi(fid::RTT_INIT_RIPAS, [rd, FREE, RAM_END, 0, 0])?;
        for page in (image..end).step_by(GRANULE as usize) {
            let data = realm.delegated()?;
            rmi(fid::DATA_CREATE, [rd, data, page, page, 0])?;
        }
        let empty = realm.granule();
        for word in 0..GRANULE as usize / 8 {
            poke(empty, word * 8, 0);
        }
        let recs = RECS as u64;
        let stacks = (0..recs * STACK_PAGES).map(|n| STACKS + n * GRANULE);
        for page in stacks.chain((0..recs).map(|n| CALLS + n * GRANULE)) {
            let data = realm.delegated()?;
            rmi(fid::DATA_CREATE, [rd, data, page, empty, 0])?;
        }
        let auxes = rmi(fid::REC_AUX_COUNT, [rd, 0, 0, 0, 0])?;
        for n in 0..RECS {
            for word in 0..GRANULE as usize / 8 {
                poke(params, word * 8, 0);
            }
            poke(params, offset_of!(RecParams, flags), if n == 0 { rmi::REC_RUNNABLE } else { 0 });
            poke(params, offset_of!(RecParams, mpidr), n as u64);
            poke(params, offset_of!(RecParams, pc), guest::realm_start as *const () as u64);
            poke(params, offset_of!(RecParams, gprs), program as *const () as u64);
            poke(params, offset_of!(RecParams, gprs) + 8, argument);
            poke(params, offset_of!(RecParams, num_aux), auxes);
            for aux in 0..auxes as usize {
                let granule = realm.delegated()?;
                poke(params, offset_of!(RecParams, aux) + 8 * aux, granule);
            }
            realm.recs[n] = realm.delegated()?;
            realm.runs[n] = realm.granule();
            for word in 0..GRANULE as usize / 8 {
                poke(realm.runs[n], word * 8, 0);
            }
            rmi(fid::REC_CREATE, [rd, realm.recs[n], params, 0, 0])?;
        }
        rmi(fid::REALM_ACTIVATE, [rd, 0, 0, 0, 0])?;
        ControlFlow::Continue(realm)
    }

    /// Enters the REC and says how it left.
    pub(super) fn enter(&self, rec: usize) -> ControlFlow<(), Event> {
        loop {
            rmi(fid::REC_ENTER, [self.recs[rec], self.runs[rec], 0, 0, 0])?;
            poke(self.runs[rec], offset_of!(RecEnter, flags), 0);
            poke(self.runs[rec], offset_of!(RecEnter, gicv3_lrs), 0);
            let Ok(reason) = ExitReason::try_from((self.exit(rec, 0) & 0xFF) as u8) else {
                check("suite-realm", Err(format_args!("unknown exit reason")));
                return ControlFlow::Break(());
            };
            if reason != ExitReason::HostCall {
                return ControlFlow::Continue(Event::Exit(reason));
            }
            let [what, a, b, c, d] = core::array::from_fn(|n| self.exit_gpr(rec, n));
            match what {
                call::STEP => return ControlFlow::Continue(Event::Step(a, [b, c])),
                call::DONE => return ControlFlow::Continue(Event::Done(a)),
                _ => failed_in_realm(a, b, c, d),
            }
        }
    }

    /// Enters until the program is at a step, and gives its number and values; interrupts on the way are not looked at.
    pub(super) fn step(&self, rec: usize) -> ControlFlow<(), (u64, [u64; 2])> {
        loop {
            match self.enter(rec)? {
                Event::Step(number, values) => return ControlFlow::Continue((number, values)),
                Event::Exit(ExitReason::Irq) => {}
                other => {
                    check(
                        "suite-realm",
                        Err(format_args!("{other:x?} instead of a step: {:#x}", self.exit(rec, 0x100))),
                    );
                    return ControlFlow::Break(());
                }
            }
        }
    }

    /// Enters until the program is done; says so under `name`.
    pub(super) fn finish(&self, rec: usize, name: &str) -> ControlFlow<()> {
        loop {
            match self.enter(rec)? {
                Event::Done(0) => check(name, Err(format_args!("nothing was checked"))),
                Event::Done(_) => check(name, Ok(())),
                Event::Exit(ExitReason::Irq) => continue,
                other => {
                    check(name, Err(format_args!("{other:x?} at the end: {:#x}", self.exit(rec, 0x100))));
                    return ControlFlow::Break(());
                }
            }
            return ControlFlow::Continue(());
        }
    }

    /// The flags of the next entry.
    pub(super) fn set_flags(&self, rec: usize, flags: u64) {
        poke(self.runs[rec], offset_of!(RecEnter, flags), flags);
    }

    /// A pending virtual interrupt for the next entry.
    pub(super) fn inject(&self, rec: usize, intid: u64) {
        let pending = 1 << 62 | 1 << 60 | 0x80 << 48 | intid;
        poke(self.runs[rec], offset_of!(RecEnter, gicv3_lrs), pending);
    }

    /// The word at `offset` of the exit record.
    pub(super) fn exit(&self, rec: usize, offset: usize) -> u64 {
        peek(self.runs[rec], offset_of!(RecRun, exit) + offset)
    }

    pub(super) fn exit_gpr(&self, rec: usize, n: usize) -> u64 {
        self.exit(rec, offset_of!(RecExit, gprs) + 8 * n)
    }

    /// The address of a REC, or of the RD.
    pub(super) fn rec(&self, rec: usize) -> u64 {
        self.recs[rec]
    }

    /// The run page of a REC.
    pub(super) fn run(&self, rec: usize) -> u64 {
        self.runs[rec]
    }

    /// The granule that was delegated last.
    pub(super) fn last(&self) -> u64 {
        self.base + (self.used - 1) * GRANULE
    }

    /// Puts a page behind [`FREE`] + `n` pages.
    pub(super) fn map_free(&mut self, n: u64) -> ControlFlow<()> {
        let data = self.delegated()?;
        rmi(fid::DATA_CREATE_UNKNOWN, [self.rd, data, FREE + n * GRANULE, 0, 0])?;
        ControlFlow::Continue(())
    }

    /// Takes it apart; every granule must come back.
    pub(super) fn destroy(self) -> ControlFlow<()> {
        let image = (&raw const __image_start).addr() as u64;
        for page in (image..RAM_END).step_by(GRANULE as usize) {
            smc(fid::DATA_DESTROY, self.rd, page, 0);
        }
        for rec in self.recs {
            rmi(fid::REC_DESTROY, [rec, 0, 0, 0, 0])?;
        }
        rmi(fid::RTT_DESTROY, [self.rd, image & !(TABLE_SPAN - 1), 3, 0, 0])?;
        rmi(fid::RTT_DESTROY, [self.rd, image & !(0x4000_0000 - 1), 2, 0, 0])?;
        rmi(fid::REALM_DESTROY, [self.rd, 0, 0, 0, 0])?;
        for n in 0..self.used {
            let pa = self.base + n * GRANULE;
            // Parameters and run pages were never delegated.
            if smc(fid::GRANULE_UNDELEGATE, pa, 0, 0)[0] == 0
                && (0..GRANULE as usize / 8).any(|word| peek(pa, word * 8) != 0)
            {
                check("suite-realm", Err(format_args!("granule {n} came back with something in it")));
            }
        }
        ControlFlow::Continue(())
    }
}

fn failed_in_realm(name: u64, len: u64, seen: u64, wanted: u64) {
    let image = (&raw const __image_start).addr() as u64;
    let end = (&raw const __bss_end).addr() as u64;
    let known = name >= image && name < end && len < 100;
    let text = if known {
        // SAFETY: a string of the image, which has the same address here as in the Realm.
        unsafe {
            let bytes = core::slice::from_raw_parts(
                core::ptr::with_exposed_provenance::<u8>(name as usize),
                len as usize,
            );
            core::str::from_utf8(bytes).unwrap_or("?")
        }
    } else {
        "?"
    };
    check(text, Err(format_args!("in the Realm: got {seen:#x}, expected {wanted:#x}")));
}
