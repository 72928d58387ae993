//! A small host: hands out granules, issues commands, builds Realms.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use std::boxed::Box;
use std::vec::Vec;

use cca_abi::rmi::{RecExit, Status, fid};
use zerocopy::{FromBytes, IntoBytes};

use super::std;
use crate::context::RecContext;
use crate::platform::RealmExit;
use crate::test_platform::{BASE, GRANULES, HIGH, TestPlatform, new_rmm};
use crate::{GranuleState, Rmm};

pub(super) struct Host {
    pub(super) rmm: Rmm<'static, TestPlatform>,
    next: AtomicU64,
    end: u64,
    next_high: AtomicU64,
}

/// A Realm as its host knows it: 34-bit IPA space from level 1, so that one start table is enough.
pub(super) struct TestRealm {
    pub(super) rd: u64,
    pub(super) rtt: u64,
}

pub(super) struct TestRec {
    pub(super) rec: u64,
    pub(super) aux: u64,
    pub(super) auxes: Vec<u64>,
    pub(super) run: u64,
}

/// IPA width of test Realms.
pub(super) const WIDTH: u64 = 34;
/// First unprotected byte.
pub(super) const SHARED: u64 = 1 << (WIDTH - 1);

impl Host {
    pub(super) fn new() -> Self {
        Self::with_granules(GRANULES)
    }

    /// A machine of this size.
    pub(super) fn with_granules(granules: usize) -> Self {
        Self {
            rmm: new_rmm(granules),
            next: AtomicU64::new(BASE),
            end: BASE + granules as u64 * 4096,
            next_high: AtomicU64::new(HIGH),
        }
    }

    /// A fresh delegated granule whose address needs LPA2.
    pub(super) fn high(&self) -> u64 {
        let pa = self.next_high.fetch_add(4096, Relaxed);
        self.ok(fid::GRANULE_DELEGATE, &[pa]);
        pa
    }

    /// A fresh NS granule.
    pub(super) fn alloc(&self) -> u64 {
        let pa = self.next.fetch_add(4096, Relaxed);
        assert!(pa < self.end, "test machine is out of memory");
        pa
    }

    /// A fresh granule, aligned to `align` bytes.
    pub(super) fn alloc_aligned(&self, align: u64) -> u64 {
        let pa = self.next.load(Relaxed).next_multiple_of(align);
        self.next.store(pa + 4096, Relaxed);
        pa
    }

    /// A fresh delegated granule.
    pub(super) fn delegated(&self) -> u64 {
        let pa = self.alloc();
        self.ok(fid::GRANULE_DELEGATE, &[pa]);
        pa
    }

    pub(super) fn registers(&self, fid: u64, args: &[u64]) -> [u64; 8] {
        let mut regs = [0u64; 8];
        regs[0] = fid;
        regs[1..=args.len()].copy_from_slice(args);
        self.rmm.handle_rmi(0, &mut regs);
        regs
    }

    pub(super) fn status(&self, fid: u64, args: &[u64]) -> Status {
        Status::from_register(self.registers(fid, args)[0]).unwrap()
    }

    /// Issues a command that must succeed; returns X1–X4.
    pub(super) fn ok(&self, fid: u64, args: &[u64]) -> [u64; 4] {
        let regs = self.registers(fid, args);
        assert_eq!(Status::from_register(regs[0]), Some(Status::Success), "{:?}", cca_abi::rmi::name(fid));
        [regs[1], regs[2], regs[3], regs[4]]
    }

    /// Fills an NS granule.
    pub(super) fn write_ns(&self, pa: u64, bytes: &[u8]) {
        for (word, chunk) in self.rmm.platform().raw(pa).iter().zip(bytes.chunks(8)) {
            let mut value = [0u8; 8];
            value[..chunk.len()].copy_from_slice(chunk);
            word.store(u64::from_le_bytes(value), Relaxed);
        }
    }

    pub(super) fn write_ns_word(&self, pa: u64, offset: usize, value: u64) {
        self.rmm.platform().raw(pa)[offset / 8].store(value, Relaxed);
    }

    pub(super) fn state(&self, pa: u64) -> GranuleState {
        self.rmm.granule_state(pa).unwrap()
    }

    /// Realm parameters as raw words: (offset, value).
    pub(super) fn params(&self, words: &[(usize, u64)]) -> u64 {
        let pa = self.alloc();
        for &(offset, value) in words {
            self.write_ns_word(pa, offset, value);
        }
        pa
    }

    /// The default parameters of a test Realm.
    pub(super) fn realm_words(rtt: u64, hash: u64, vmid: u64) -> Vec<(usize, u64)> {
        [
            (0x8, WIDTH),
            (0x18, 5),
            (0x20, 3),
            (0x30, hash),
            (0x400, 0x1122),
            (0x800, vmid),
            (0x808, rtt),
            (0x810, 1),
            (0x818, 1),
        ]
        .to_vec()
    }

    pub(super) fn realm_with(&self, hash: u64, vmid: u64) -> TestRealm {
        let (rd, rtt) = (self.delegated(), self.delegated());
        let params = self.params(&Self::realm_words(rtt, hash, vmid));
        self.ok(fid::REALM_CREATE, &[rd, params]);
        TestRealm { rd, rtt }
    }

    /// A Realm with other parameters: (offset, value), on top of the default ones.
    pub(super) fn realm_of(&self, words: &[(usize, u64)]) -> TestRealm {
        let (rd, rtt) = (self.delegated(), self.delegated());
        let mut all = Self::realm_words(rtt, 0, 7);
        all.extend_from_slice(words);
        self.ok(fid::REALM_CREATE, &[rd, self.params(&all)]);
        TestRealm { rd, rtt }
    }

    pub(super) fn realm(&self) -> TestRealm {
        self.realm_with(0, 7)
    }

    /// Creates the tables down to `level` for `ipa`.
    pub(super) fn tables(&self, realm: &TestRealm, ipa: u64, level: u64) {
        for level in 2..=level {
            let span = cca_abi::rmi::entry_span(level as i64 - 1);
            let rtt = self.delegated();
            let base = ipa & !(span - 1);
            if self.status(fid::RTT_CREATE, &[realm.rd, rtt, base, level]) != Status::Success {
                self.ok(fid::GRANULE_UNDELEGATE, &[rtt]);
            }
        }
    }

    /// Puts a RAM page at `ipa`.
    pub(super) fn page(&self, realm: &TestRealm, ipa: u64) -> u64 {
        self.tables(realm, ipa, 3);
        let data = self.delegated();
        let src = self.alloc();
        self.write_ns_word(src, 0, ipa ^ 0x5A5A);
        self.ok(fid::DATA_CREATE, &[realm.rd, data, ipa, src, 0]);
        data
    }

    /// The default parameters of a REC.
    pub(super) fn rec_words(auxes: &[u64], mpidr: u64) -> Vec<(usize, u64)> {
        let mut words = [(0x100, mpidr), (0x200, 0x1000), (0x300, 0xA0), (0x338, 0xA7)].to_vec();
        words.push((0x800, auxes.len() as u64));
        words.extend((0x808..).step_by(8).zip(auxes.iter().copied()));
        words
    }

    pub(super) fn rec(&self, realm: &TestRealm, mpidr: u64, runnable: bool) -> TestRec {
        let [aux_count, ..] = self.ok(fid::REC_AUX_COUNT, &[realm.rd]);
        let (rec, run) = (self.delegated(), self.alloc());
        let auxes: Vec<u64> = (0..aux_count).map(|_| self.delegated()).collect();
        let mut words = Self::rec_words(&auxes, mpidr);
        words.push((0x0, u64::from(runnable)));
        self.ok(fid::REC_CREATE, &[realm.rd, rec, self.params(&words)]);
        TestRec { rec, aux: auxes[0], auxes, run }
    }

    pub(super) fn activate(&self, realm: &TestRealm) {
        self.ok(fid::REALM_ACTIVATE, &[realm.rd]);
    }

    /// A Realm with one runnable REC, active.
    pub(super) fn active(&self) -> (TestRealm, TestRec) {
        let realm = self.realm();
        let rec = self.rec(&realm, 0, true);
        self.activate(&realm);
        (realm, rec)
    }

    /// Adds to what the guest will do.
    pub(super) fn guest(&self, step: impl FnOnce(&RecContext<'_>) -> RealmExit + Send + 'static) {
        self.rmm.platform().script.lock().unwrap().push_back(Box::new(step));
    }

    /// The guest calls `fid` with the given X1….
    pub(super) fn guest_smc(&self, fid: u64, args: &[u64]) {
        let args = args.to_vec();
        self.guest(move |ctx| {
            ctx.set_gpr(0, fid);
            for (n, &value) in args.iter().enumerate() {
                ctx.set_gpr(n + 1, value);
            }
            RealmExit::Sync { esr: 0x17 << 26 | 1 << 25, far: 0, hpfar: 0 }
        });
    }

    pub(super) fn enter(&self, rec: &TestRec) -> Status {
        self.status(fid::REC_ENTER, &[rec.rec, rec.run])
    }

    /// Enters and returns the exit record.
    pub(super) fn enter_ok(&self, rec: &TestRec) -> RecExit {
        assert_eq!(self.enter(rec), Status::Success);
        let words: Vec<u64> =
            self.rmm.platform().raw(rec.run)[256..].iter().map(|word| word.load(Relaxed)).collect();
        RecExit::read_from_bytes(words.as_bytes()).unwrap()
    }

    /// The REC's context.
    pub(super) fn ctx(&self, rec: &TestRec) -> RecContext<'_> {
        RecContext::new(self.rmm.platform().raw(rec.aux))
    }

    pub(super) fn read_entry(&self, realm: &TestRealm, ipa: u64, level: u64) -> [u64; 4] {
        self.ok(fid::RTT_READ_ENTRY, &[realm.rd, ipa, level])
    }

    /// Sets a flag word for the next entry.
    pub(super) fn flags(&self, rec: &TestRec, flags: u64) {
        self.write_ns_word(rec.run, 0, flags);
    }
}
