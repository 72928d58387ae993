//! Random calls from all CPUs at once: neither monitor nor RMM may stop, and every one of their answers must be one
//! that the interface knows. Real locks, TLBs and protection tables take part, unlike in the core's own tests.
//!
//! No Realm is ever activated: what a REC would run is as random as the rest.

use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use cca_abi::rmi::{RealmParams, RecParams, Status, fid};
use cca_abi::smccc;

use crate::entry::smc_timed;
use crate::{GRANULE, check, line, pool};

/// Granules that are given away and changed, and after them four per CPU that the host keeps for itself.
const FIRST: u64 = 400;
const GRANULES: u64 = 16;
/// The first of them are where Realm descriptors may be.
const RDS: u64 = 2;
const CALLS: u64 = 5000;
/// IPA width of the Realms.
const S2SZ: u64 = 36;

static SUCCEEDED: AtomicU64 = AtomicU64::new(0);

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn granule(&mut self) -> u64 {
        pool(FIRST + self.below(GRANULES))
    }

    fn ipa(&mut self) -> u64 {
        const OFFSETS: [u64; 4] = [0, 0, GRANULE, 0x20_0000];
        self.below(2) << (S2SZ - 1) | OFFSETS[self.below(4) as usize]
    }

    /// A number that is anything.
    fn wild(&mut self) -> u64 {
        match self.below(5) {
            0 => self.next(),
            1 => self.granule(),
            2 => self.granule() | self.below(GRANULE),
            3 => 0_u64.wrapping_sub(self.below(3) * GRANULE),
            _ => 1 << self.below(64),
        }
    }

    /// A command with arguments that often make sense. `own`: the host's pages.
    fn call(&mut self, own: [u64; 3]) -> (u64, [u64; 5]) {
        let [realm_params, rec_params, source] = own;
        let (rd, page, ipa) = (pool(FIRST + self.below(RDS)), self.granule(), self.ipa());
        let level = 1 + self.below(3);
        match self.below(18) {
            0 | 1 => (fid::GRANULE_DELEGATE, [page, 0, 0, 0, 0]),
            2 => (fid::GRANULE_UNDELEGATE, [page, 0, 0, 0, 0]),
            3 | 4 => {
                write(realm_params, offset_of!(RealmParams, vmid), 0x80 + self.below(8));
                let table = self.granule();
                write(realm_params, offset_of!(RealmParams, rtt_base), table);
                (fid::REALM_CREATE, [rd, realm_params, 0, 0, 0])
            }
            5 => (fid::REALM_DESTROY, [rd, 0, 0, 0, 0]),
            6 => {
                write(rec_params, offset_of!(RecParams, mpidr), self.below(3));
                let aux = self.granule();
                write(rec_params, offset_of!(RecParams, aux), aux);
                (fid::REC_CREATE, [rd, page, rec_params, 0, 0])
            }
            7 => (fid::REC_DESTROY, [page, 0, 0, 0, 0]),
            8 => (fid::REC_ENTER, [page, source, 0, 0, 0]),
            9 | 10 => (fid::RTT_CREATE, [rd, page, ipa, level, 0]),
            11 => (fid::RTT_DESTROY, [rd, ipa, level, 0, 0]),
            12 => (fid::RTT_FOLD, [rd, ipa, level, 0, 0]),
            13 => (fid::DATA_CREATE, [rd, page, ipa, source, self.below(2)]),
            14 => (fid::DATA_CREATE_UNKNOWN, [rd, page, ipa, 0, 0]),
            15 => (fid::DATA_DESTROY, [rd, ipa, 0, 0, 0]),
            16 => (fid::RTT_INIT_RIPAS, [rd, ipa, ipa + self.below(4) * GRANULE, 0, 0]),
            _ => (fid::RTT_MAP_UNPROTECTED, [rd, ipa, level, page | 0b110 << 2, 0]),
        }
    }
}

fn write(page: u64, offset: usize, value: u64) {
    // SAFETY: a granule of the pool that this CPU keeps, and no Rust object.
    unsafe {
        core::ptr::with_exposed_provenance_mut::<u64>(page as usize + offset).write_volatile(value);
    }
}

/// One CPU's part.
pub(crate) fn storm(cpu: u64) {
    let mut random = Random(0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(cpu + 1));
    let own: [u64; 3] = core::array::from_fn(|n| pool(FIRST + GRANULES + 3 * cpu + n as u64));
    let features = cca_abi::rmi::Features0(smc_timed(fid::FEATURES, [0; 5]).x[1]);
    write(own[0], offset_of!(RealmParams, s2sz), S2SZ);
    write(own[0], offset_of!(RealmParams, num_bps), features.num_bps());
    write(own[0], offset_of!(RealmParams, num_wps), features.num_wps());
    write(own[0], offset_of!(RealmParams, rtt_level_start), 1);
    write(own[0], offset_of!(RealmParams, rtt_num_start), 1);
    write(own[1], offset_of!(RecParams, num_aux), 1);
    for n in 0..CALLS {
        let (mut function, mut args) = random.call(own);
        // Something is wrong with every fourth call.
        if random.below(4) == 0 {
            let which = random.below(6) as usize;
            match args.get_mut(which) {
                Some(arg) => *arg = random.wild(),
                None => function = smccc::standard_fid(0x140 + random.below(0x1A0) as u16),
            }
        }
        if function == fid::REALM_ACTIVATE {
            continue;
        }
        let answer = smc_timed(function, args).x[0];
        if answer == 0 {
            SUCCEEDED.fetch_add(1, Relaxed);
        }
        if answer != smccc::NOT_SUPPORTED && Status::from_register(answer).is_none() {
            check(
                "random-calls",
                Err(format_args!("CPU {cpu} call {n}: {function:#x} {args:#x?} gave {answer:#x}")),
            );
            return;
        }
    }
}

/// After all CPUs have done theirs.
pub(crate) fn report(cpus: u64) {
    let succeeded = SUCCEEDED.load(Relaxed);
    line(format_args!("random-calls: {succeeded} of {} succeeded", cpus * CALLS));
    // About one in twenty does, more or less by how the CPUs get into each other's way.
    if succeeded > cpus * CALLS / 100 {
        check("random-calls", Ok(()));
    } else {
        check("random-calls", Err(format_args!("too few succeeded to test much")));
    }
}
