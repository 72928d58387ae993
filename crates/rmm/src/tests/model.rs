//! The specification as a program: what every RMI command does to plain data, and which statuses it may give.
//!
//! It shares nothing with the RMM but the numbers of the interface. Where the specification orders two failures, only
//! the first is allowed; where it does not, either. [`super::fuzz`] compares the RMM with it after every command.

use std::collections::BTreeMap;
use std::string::String;
use std::vec;
use std::vec::Vec;

use cca_abi::psci;
use cca_abi::rmi::fid;

use super::host::{Host, SHARED, WIDTH};
use super::std;
use crate::GranuleState as State;
use crate::entry::{Entry, Format};
use crate::level::Level;
use crate::platform::Page;

const INPUT: u64 = 1;
const REALM: u64 = 2;
const REC: u64 = 3;
const EMPTY: u8 = 0;
const RAM: u8 = 1;
const DESTROYED: u8 = 2;

/// An RTT entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rtte {
    Unassigned(u8),
    Assigned(u64, u8),
    UnassignedNs,
    AssignedNs(u64),
    Table(u64),
}

use Rtte::{Assigned, AssignedNs, Table, Unassigned, UnassignedNs};

impl Rtte {
    fn live(self) -> bool {
        matches!(self, Assigned(..) | AssignedNs(_) | Table(_))
    }

    fn keeps_alive(self) -> bool {
        matches!(self, Assigned(..) | Table(_))
    }

    fn ripas(self) -> Option<u8> {
        match self {
            Unassigned(ripas) | Assigned(_, ripas) => Some(ripas),
            _ => None,
        }
    }

    fn with_ripas(self, ripas: u8) -> Self {
        match self {
            Unassigned(_) => Unassigned(ripas),
            Assigned(pa, _) => Assigned(pa, ripas),
            other => other,
        }
    }

    fn plus(self, offset: u64) -> Self {
        match self {
            Assigned(pa, ripas) => Assigned(pa + offset, ripas),
            AssignedNs(desc) => AssignedNs(desc + offset),
            other => other,
        }
    }
}

#[derive(Clone)]
struct Rtt {
    level: u64,
    base: u64,
    entries: Vec<Rtte>,
}

fn span(level: u64) -> u64 {
    1 << (12 + 9 * (3 - level))
}

impl Rtt {
    fn index(&self, ipa: u64) -> usize {
        usize::try_from((ipa - self.base) / span(self.level)).unwrap()
    }

    fn live(&self) -> bool {
        self.entries.iter().any(|entry| entry.keeps_alive())
    }

    /// RttSkipNonLiveEntries.
    fn skip(&self, ipa: u64) -> u64 {
        let from = self.index(ipa);
        match self.entries[from..].iter().position(|entry| entry.live()) {
            Some(0) => ipa,
            Some(n) => self.base + (from + n) as u64 * span(self.level),
            None => self.base + 512 * span(self.level),
        }
    }
}

#[derive(Clone)]
struct Realm {
    /// 0 NEW, 1 ACTIVE, 2 SYSTEM_OFF.
    state: u8,
    vmid: u64,
    start: u64,
    tables: BTreeMap<u64, Rtt>,
    rec_index: u64,
    num_recs: u16,
}

struct Walk {
    table: u64,
    level: u64,
    entry: Rtte,
}

impl Realm {
    fn walk(&self, ipa: u64, level: u64) -> Walk {
        let mut table = self.start;
        loop {
            let rtt = &self.tables[&table];
            let entry = rtt.entries[rtt.index(ipa)];
            match entry {
                Table(next) if rtt.level < level => table = next,
                _ => return Walk { table, level: rtt.level, entry },
            }
        }
    }

    fn set(&mut self, table: u64, ipa: u64, entry: Rtte) {
        let rtt = self.tables.get_mut(&table).unwrap();
        let index = rtt.index(ipa);
        rtt.entries[index] = entry;
    }

    fn skip(&self, walk: &Walk, ipa: u64) -> u64 {
        self.tables[&walk.table].skip(ipa)
    }

    /// The IPAs of the entries of the walked table from `base` up to `top`, whole ones only.
    fn entries(&self, walk: &Walk, base: u64, top: u64) -> Vec<(u64, Rtte)> {
        let rtt = &self.tables[&walk.table];
        let step = span(walk.level);
        (rtt.index(base)..512)
            .map(|n| (rtt.base + n as u64 * step, rtt.entries[n]))
            .take_while(|(ipa, _)| ipa + step <= top)
            .collect()
    }
}

#[derive(Clone)]
struct Rec {
    rd: u64,
    aux: Vec<u64>,
    index: u64,
    runnable: bool,
    /// (function, target)
    psci: Option<(u64, u64)>,
    /// (base, top, value, change destroyed)
    ripas: Option<(u64, u64, u8, bool)>,
}

/// What a REC does when it is entered.
#[derive(Clone, Copy, Debug)]
pub(super) enum Action {
    Irq,
    StateSet { base: u64, top: u64, ripas: u64, flags: u64 },
    Touch { ipa: u64 },
    CpuOn { target: u64 },
    CpuOff,
    SystemOff,
}

/// A command with what it finds in memory.
#[derive(Clone, Debug)]
pub(super) struct Command {
    pub(super) fid: u64,
    pub(super) args: [u64; 5],
    /// REALM_CREATE: table, VMID; REC_CREATE: runnable, MPIDR, auxiliary granules.
    pub(super) params: Vec<u64>,
    pub(super) action: Action,
}

/// What a command may answer: a status of the list if it is not empty, else success; the outputs X1…X4.
pub(super) struct Verdict {
    pub(super) allowed: Vec<u64>,
    pub(super) outputs: [u64; 4],
    /// The exit reason of REC_ENTER.
    pub(super) exit: Option<u8>,
}

/// The whole machine.
#[derive(Clone)]
pub(super) struct Model {
    granules: BTreeMap<u64, State>,
    realms: BTreeMap<u64, Realm>,
    recs: BTreeMap<u64, Rec>,
}

fn ok(outputs: [u64; 4]) -> Verdict {
    Verdict { allowed: vec![], outputs, exit: None }
}

fn fail(allowed: Vec<u64>) -> Verdict {
    Verdict { allowed, outputs: [0; 4], exit: None }
}

fn rtt(level: u64) -> u64 {
    level << 8 | 4
}

/// The statuses of the conditions that hold.
fn those<const N: usize>(conditions: [(bool, u64); N]) -> Vec<u64> {
    conditions.into_iter().filter(|(holds, _)| *holds).map(|(_, status)| status).collect()
}

impl Model {
    pub(super) fn new(pool: impl Iterator<Item = u64>) -> Self {
        Self {
            granules: pool.map(|pa| (pa, State::Undelegated)).collect(),
            realms: BTreeMap::new(),
            recs: BTreeMap::new(),
        }
    }

    fn is(&self, pa: u64, state: State) -> bool {
        self.granules.get(&pa) == Some(&state)
    }

    fn set(&mut self, pa: u64, state: State) {
        self.granules.insert(pa, state);
    }

    /// All granules in a state; for a generator that wants to hit.
    pub(super) fn all(&self, state: State) -> Vec<u64> {
        self.granules.iter().filter(|(_, is)| **is == state).map(|(pa, _)| *pa).collect()
    }

    /// The base of the Realm's RIPAS request of a REC, and its end.
    pub(super) fn request(&self, rec: u64) -> Option<(u64, u64, u64)> {
        let rec = self.recs.get(&rec)?;
        rec.ripas.map(|(base, top, ..)| (rec.rd, base, top))
    }

    /// The index of the Realm's next REC.
    pub(super) fn next_index(&self, rd: u64) -> Option<u64> {
        self.realms.get(&rd).map(|realm| realm.rec_index)
    }

    /// A REC that waits for PSCI_COMPLETE, and one that could be its target.
    pub(super) fn pending(&self, rec: u64) -> Option<u64> {
        let (_, target) = self.recs.get(&rec)?.psci?;
        self.recs.iter().find(|(_, rec)| rec.index == target).map(|(pa, _)| *pa)
    }

    /// Does the command, if it can be done.
    pub(super) fn run(&mut self, command: &Command) -> Verdict {
        let [a, b, c, d, _] = command.args;
        match command.fid {
            fid::GRANULE_DELEGATE => {
                if !self.is(a, State::Undelegated) {
                    return fail(vec![INPUT]);
                }
                self.set(a, State::Delegated);
                ok([0; 4])
            }
            fid::GRANULE_UNDELEGATE => {
                if !self.is(a, State::Delegated) {
                    return fail(vec![INPUT]);
                }
                self.set(a, State::Undelegated);
                ok([0; 4])
            }
            fid::REALM_CREATE => self.realm_create(a, b, &command.params),
            fid::REC_CREATE => self.rec_create(a, b, c, &command.params),
            fid::REC_DESTROY => {
                if !self.is(a, State::Rec) {
                    return fail(vec![INPUT]);
                }
                let rec = self.recs.remove(&a).unwrap();
                self.realms.get_mut(&rec.rd).unwrap().num_recs -= 1;
                rec.aux.into_iter().chain([a]).for_each(|pa| self.set(pa, State::Delegated));
                ok([0; 4])
            }
            fid::REC_ENTER => self.rec_enter(a, b, command.action),
            fid::PSCI_COMPLETE => self.psci_complete(a, b, c),
            _ if !self.is(a, State::Rd) => {
                // rec_owner has no order with rd_state.
                let rec = command.fid == fid::RTT_SET_RIPAS && self.is(b, State::Rec);
                fail(if rec { vec![INPUT, REC] } else { vec![INPUT] })
            }
            fid::REALM_ACTIVATE => {
                let realm = self.realms.get_mut(&a).unwrap();
                if realm.state != 0 {
                    return fail(vec![REALM]);
                }
                realm.state = 1;
                ok([0; 4])
            }
            fid::REALM_DESTROY => {
                let realm = &self.realms[&a];
                if realm.num_recs != 0 || realm.tables[&realm.start].live() {
                    return fail(vec![REALM]);
                }
                let start = realm.start;
                self.realms.remove(&a);
                self.set(start, State::Delegated);
                self.set(a, State::Delegated);
                ok([0; 4])
            }
            fid::DATA_CREATE => self.data_create(a, b, c, Some(d)),
            fid::DATA_CREATE_UNKNOWN => self.data_create(a, b, c, None),
            fid::DATA_DESTROY => self.data_destroy(a, b),
            fid::RTT_CREATE => self.rtt_create(a, b, c, d),
            fid::RTT_DESTROY => self.rtt_destroy(a, b, c),
            fid::RTT_FOLD => self.rtt_fold(a, b, c),
            fid::RTT_MAP_UNPROTECTED => self.map(a, b, c, Some(d)),
            fid::RTT_UNMAP_UNPROTECTED => self.map(a, b, c, None),
            fid::RTT_READ_ENTRY => self.read_entry(a, b, c),
            fid::RTT_INIT_RIPAS => self.init_ripas(a, b, c),
            fid::RTT_SET_RIPAS => self.set_ripas(a, b, c, d),
            other => panic!("{other:#x} is not in the model"),
        }
    }

    fn realm_create(&mut self, rd: u64, ptr: u64, params: &[u64]) -> Verdict {
        let [start, vmid] = [params[0], params[1]];
        let fine = self.is(ptr, State::Undelegated)
            && self.is(rd, State::Delegated)
            && self.is(start, State::Delegated)
            && rd != start
            && self.realms.values().all(|realm| realm.vmid != vmid);
        if !fine {
            return fail(vec![INPUT]);
        }
        let entries = (0..512u64)
            .map(|n| if n * span(1) < SHARED { Unassigned(EMPTY) } else { UnassignedNs })
            .collect();
        let table = Rtt { level: 1, base: 0, entries };
        let tables = BTreeMap::from([(start, table)]);
        self.realms.insert(rd, Realm { state: 0, vmid, start, tables, rec_index: 0, num_recs: 0 });
        self.set(rd, State::Rd);
        self.set(start, State::Rtt);
        ok([0; 4])
    }

    fn rec_create(&mut self, rd: u64, rec: u64, ptr: u64, params: &[u64]) -> Verdict {
        let ([runnable, mpidr], aux) = ([params[0], params[1]], &params[2..]);
        if !self.is(rd, State::Rd) {
            return fail(vec![INPUT]);
        }
        let realm = &self.realms[&rd];
        let aliased = aux.iter().enumerate().any(|(n, pa)| *pa == rec || aux[..n].contains(pa));
        let input = !self.is(ptr, State::Undelegated)
            || !self.is(rec, State::Delegated)
            || !aux.iter().all(|&pa| self.is(pa, State::Delegated))
            || aliased
            || mpidr != realm.rec_index;
        let allowed = those([(input, INPUT), (realm.state != 0, REALM)]);
        if !allowed.is_empty() {
            return fail(allowed);
        }
        let realm = self.realms.get_mut(&rd).unwrap();
        realm.rec_index += 1;
        realm.num_recs += 1;
        let object =
            Rec { rd, aux: aux.to_vec(), index: mpidr, runnable: runnable != 0, psci: None, ripas: None };
        self.recs.insert(rec, object);
        self.set(rec, State::Rec);
        aux.iter().for_each(|&pa| self.set(pa, State::RecAux));
        ok([0; 4])
    }

    fn rec_enter(&mut self, pa: u64, run: u64, action: Action) -> Verdict {
        if !self.is(pa, State::Rec) || !self.is(run, State::Undelegated) {
            return fail(vec![INPUT]);
        }
        let mut rec = self.recs[&pa].clone();
        let realm = self.realms.get_mut(&rec.rd).unwrap();
        let allowed = those([
            (realm.state == 0, REALM),
            (realm.state == 2, 0x102),
            (!rec.runnable, REC),
            (rec.psci.is_some(), REC),
        ]);
        if !allowed.is_empty() {
            return fail(allowed);
        }
        rec.ripas = None;
        let exit = match action {
            Action::Irq => 1,
            Action::StateSet { base, top, ripas, flags } => {
                if (base | top) % 4096 != 0 || top <= base || top > SHARED || ripas > 1 {
                    1
                } else {
                    rec.ripas = Some((base, top, u8::try_from(ripas).unwrap(), flags & 1 != 0));
                    4
                }
            }
            Action::Touch { ipa } => match realm.walk(ipa, 3).entry {
                // SEA, or retried: then the guest is interrupted.
                Unassigned(EMPTY) | Assigned(_, EMPTY | RAM) => 1,
                _ => 0,
            },
            Action::CpuOn { target } if target == rec.index || target >= realm.rec_index => 1,
            Action::CpuOn { target } => {
                rec.psci = Some((psci::fid::CPU_ON_64, target));
                3
            }
            Action::CpuOff => {
                rec.runnable = false;
                3
            }
            Action::SystemOff => {
                realm.state = 2;
                3
            }
        };
        self.recs.insert(pa, rec);
        Verdict { exit: Some(exit), ..ok([0; 4]) }
    }

    fn psci_complete(&mut self, calling: u64, target: u64, status: u64) -> Verdict {
        if calling == target || !self.is(calling, State::Rec) || !self.is(target, State::Rec) {
            return fail(vec![INPUT]);
        }
        let (caller, object) = (&self.recs[&calling], &self.recs[&target]);
        let denied = status == psci::Code::Denied.to_register() && !object.runnable;
        let fine = caller.rd == object.rd
            && caller.psci.is_some_and(|(_, wanted)| wanted == object.index)
            && (status == 0 || denied);
        if !fine {
            return fail(vec![INPUT]);
        }
        self.recs.get_mut(&calling).unwrap().psci = None;
        if status == 0 {
            self.recs.get_mut(&target).unwrap().runnable = true;
        }
        ok([0; 4])
    }

    fn data_create(&mut self, rd: u64, data: u64, ipa: u64, src: Option<u64>) -> Verdict {
        let realm = &self.realms[&rd];
        let bound = ipa >= SHARED;
        let input = bound
            || ipa % 4096 != 0
            || !self.is(data, State::Delegated)
            || src.is_some_and(|src| !self.is(src, State::Undelegated));
        let walk = (!bound).then(|| realm.walk(ipa, 3));
        let table = walk.as_ref().is_some_and(|walk| walk.level < 3 || !matches!(walk.entry, Unassigned(_)));
        let level = walk.as_ref().map_or(0, |walk| walk.level);
        let allowed =
            those([(input, INPUT), (src.is_some() && realm.state != 0, REALM), (table, rtt(level))]);
        let (Some(walk), []) = (walk, &allowed[..]) else { return fail(allowed) };
        let ripas = if src.is_some() { RAM } else { walk.entry.ripas().unwrap() };
        self.realms.get_mut(&rd).unwrap().set(walk.table, ipa, Assigned(data, ripas));
        self.set(data, State::Data);
        ok([0; 4])
    }

    fn data_destroy(&mut self, rd: u64, ipa: u64) -> Verdict {
        if ipa >= SHARED || ipa % 4096 != 0 {
            let status = if ipa < SHARED { vec![INPUT, rtt(1), rtt(2), rtt(3)] } else { vec![INPUT] };
            return fail(status);
        }
        let realm = self.realms.get_mut(&rd).unwrap();
        let walk = realm.walk(ipa, 3);
        let Assigned(pa, ripas) = walk.entry else {
            let outputs = [0, realm.skip(&walk, ipa), 0, 0];
            return Verdict { allowed: vec![rtt(walk.level)], outputs, exit: None };
        };
        if walk.level < 3 {
            return Verdict { allowed: vec![rtt(walk.level)], outputs: [0, ipa, 0, 0], exit: None };
        }
        realm.set(walk.table, ipa, Unassigned(if ripas == EMPTY { EMPTY } else { DESTROYED }));
        let top = realm.skip(&walk, ipa);
        self.set(pa, State::Delegated);
        ok([pa, top, 0, 0])
    }

    /// level_bound, ipa_bound (which come first) and ipa_align of a command on the table at `level`.
    fn table_argument(ipa: u64, level: u64) -> Option<Verdict> {
        let bound = !(2..=3).contains(&level) || ipa >> WIDTH != 0;
        (bound || ipa % span(level - 1) != 0).then(|| fail(vec![INPUT]))
    }

    fn rtt_create(&mut self, rd: u64, pa: u64, ipa: u64, level: u64) -> Verdict {
        if let Some(verdict) = Self::table_argument(ipa, level) {
            return verdict;
        }
        let realm = &self.realms[&rd];
        let walk = realm.walk(ipa, level - 1);
        let table = walk.level < level - 1 || matches!(walk.entry, Table(_));
        let allowed = those([(!self.is(pa, State::Delegated), INPUT), (table, rtt(walk.level))]);
        if !allowed.is_empty() {
            return fail(allowed);
        }
        let entries = (0..512u64).map(|n| walk.entry.plus(n * span(level))).collect();
        let realm = self.realms.get_mut(&rd).unwrap();
        realm.tables.insert(pa, Rtt { level, base: ipa, entries });
        realm.set(walk.table, ipa, Table(pa));
        self.set(pa, State::Rtt);
        ok([0; 4])
    }

    fn rtt_destroy(&mut self, rd: u64, ipa: u64, level: u64) -> Verdict {
        if let Some(verdict) = Self::table_argument(ipa, level) {
            return verdict;
        }
        let realm = self.realms.get_mut(&rd).unwrap();
        let walk = realm.walk(ipa, level - 1);
        let Table(pa) = walk.entry else {
            let outputs = [0, realm.skip(&walk, ipa), 0, 0];
            return Verdict { allowed: vec![rtt(walk.level)], outputs, exit: None };
        };
        if realm.tables[&pa].live() {
            return Verdict { allowed: vec![rtt(level)], outputs: [0, ipa, 0, 0], exit: None };
        }
        realm.tables.remove(&pa);
        realm.set(walk.table, ipa, if ipa < SHARED { Unassigned(DESTROYED) } else { UnassignedNs });
        let top = realm.skip(&walk, ipa);
        self.set(pa, State::Delegated);
        ok([pa, top, 0, 0])
    }

    fn rtt_fold(&mut self, rd: u64, ipa: u64, level: u64) -> Verdict {
        if let Some(verdict) = Self::table_argument(ipa, level) {
            return verdict;
        }
        let realm = self.realms.get_mut(&rd).unwrap();
        let walk = realm.walk(ipa, level - 1);
        let Table(pa) = walk.entry else { return fail(vec![rtt(walk.level)]) };
        let child = &realm.tables[&pa];
        let first = child.entries[0];
        let same = child.entries.iter().zip(0u64..).all(|(entry, n)| *entry == first.plus(n * span(level)));
        let aligned = match first {
            Assigned(pa, _) => pa % span(level - 1) == 0,
            AssignedNs(desc) => (desc & !0xFFF) % span(level - 1) == 0,
            Table(_) => false,
            _ => true,
        };
        if !same || !aligned {
            return fail(vec![rtt(level)]);
        }
        realm.tables.remove(&pa);
        realm.set(walk.table, ipa, first);
        self.set(pa, State::Delegated);
        ok([pa, 0, 0, 0])
    }

    fn map(&mut self, rd: u64, ipa: u64, level: u64, desc: Option<u64>) -> Verdict {
        let bound = !(1..=3).contains(&level) || ipa >> WIDTH != 0 || ipa < SHARED;
        let attributes = desc.is_some_and(|desc| desc & !0x0000_FFFF_FFFF_F0DC != 0 || desc >> 2 & 7 == 4);
        if bound || attributes || ipa % span(level) != 0 {
            return fail(vec![INPUT]);
        }
        let realm = self.realms.get_mut(&rd).unwrap();
        let walk = realm.walk(ipa, level);
        let unaligned = desc.is_some_and(|desc| (desc & !0xFFF) % span(level) != 0);
        let wrong = match walk.entry {
            UnassignedNs => desc.is_none(),
            AssignedNs(_) => desc.is_some(),
            _ => true,
        };
        let allowed = those([(unaligned, INPUT), (walk.level < level || wrong, rtt(walk.level))]);
        if !allowed.is_empty() {
            let top = if desc.is_none() { realm.skip(&walk, ipa) } else { 0 };
            return Verdict { allowed, outputs: [top, 0, 0, 0], exit: None };
        }
        realm.set(walk.table, ipa, desc.map_or(UnassignedNs, AssignedNs));
        let top = if desc.is_none() { realm.skip(&walk, ipa) } else { 0 };
        ok([top, 0, 0, 0])
    }

    fn read_entry(&self, rd: u64, ipa: u64, level: u64) -> Verdict {
        if !(1..=3).contains(&level) || ipa >> WIDTH != 0 || ipa % span(level) != 0 {
            return fail(vec![INPUT]);
        }
        let walk = self.realms[&rd].walk(ipa, level);
        let (state, desc) = match walk.entry {
            Unassigned(_) | UnassignedNs => (0, 0),
            Assigned(pa, _) => (1, pa),
            AssignedNs(desc) => (1, desc),
            Table(pa) => (2, pa),
        };
        ok([walk.level, state, desc, u64::from(walk.entry.ripas().unwrap_or(0))])
    }

    fn init_ripas(&mut self, rd: u64, base: u64, top: u64) -> Verdict {
        let realm = self.realms.get_mut(&rd).unwrap();
        let input = top <= base || top % 4096 != 0 || top > SHARED;
        let walk = (base < SHARED).then(|| realm.walk(base, 3));
        let table = walk.as_ref().is_some_and(|walk| {
            base % span(walk.level) != 0
                || !matches!(walk.entry, Unassigned(_))
                || realm.entries(walk, base, top).is_empty()
        });
        let level = walk.as_ref().map_or(0, |walk| walk.level);
        // top_gran_align precedes no_progress, size_valid and top_bound have no order.
        let allowed = those([
            (input, INPUT),
            (realm.state != 0, REALM),
            (table && (!input || base % span(level) != 0), rtt(level)),
        ]);
        let (Some(walk), []) = (walk, &allowed[..]) else { return fail(allowed) };
        let mut end = base;
        for (ipa, entry) in realm.entries(&walk, base, top) {
            // The reading chosen: it stops at whatever is not UNASSIGNED.
            let Unassigned(_) = entry else { break };
            realm.set(walk.table, ipa, Unassigned(RAM));
            end = ipa + span(walk.level);
        }
        ok([end, 0, 0, 0])
    }

    fn set_ripas(&mut self, rd: u64, pa: u64, base: u64, top: u64) -> Verdict {
        let Some(rec) = self.recs.get(&pa) else { return fail(vec![INPUT]) };
        let (from, to, value, destroyed) = rec.ripas.unwrap_or((0, 0, EMPTY, false));
        let input = top <= base || base != from || top > to || top % 4096 != 0;
        let allowed = those([(rec.rd != rd, REC), (input, INPUT)]);
        if !allowed.is_empty() {
            return fail(allowed);
        }
        let realm = self.realms.get_mut(&rd).unwrap();
        let walk = realm.walk(base, 3);
        let mut end = base;
        if base % span(walk.level) == 0 {
            for (ipa, entry) in realm.entries(&walk, base, top) {
                match entry.ripas() {
                    None => break,
                    Some(DESTROYED) if !destroyed => break,
                    Some(_) => realm.set(walk.table, ipa, entry.with_ripas(value)),
                }
                end = ipa + span(walk.level);
            }
        }
        if end == base {
            return fail(vec![rtt(walk.level)]);
        }
        self.recs.get_mut(&pa).unwrap().ripas = Some((end, to, value, destroyed));
        ok([end, 0, 0, 0])
    }

    /// Compares every granule, count and entry.
    pub(super) fn check(&self, host: &Host) {
        if let Some(difference) = self.difference(host) {
            panic!("{difference}");
        }
    }

    /// Whether the machine is in this state.
    #[cfg(feature = "explore")]
    pub(super) fn matches(&self, host: &Host) -> bool {
        self.difference(host).is_none()
    }

    fn difference(&self, host: &Host) -> Option<String> {
        for (&pa, &state) in &self.granules {
            if host.state(pa) != state {
                return Some(std::format!("{pa:#x} is {:?}, not {state:?}", host.state(pa)));
            }
            let expected = match state {
                State::Rd => self.realms[&pa].num_recs,
                State::Rtt => {
                    let realm = self.realms.values().find(|realm| realm.tables.contains_key(&pa));
                    let rtt = &realm.expect("every table is some Realm's").tables[&pa];
                    if !rtt.equals(host.rmm.platform().raw(pa)) {
                        return Some(std::format!("entries of {pa:#x}"));
                    }
                    u16::try_from(rtt.entries.iter().filter(|entry| entry.keeps_alive()).count()).unwrap()
                }
                _ => 0,
            };
            let count = host.rmm.granules.raw(pa) & 0xFFF;
            if count != expected {
                return Some(std::format!("{pa:#x} counts {count}, not {expected}"));
            }
        }
        None
    }
}

impl Rtt {
    fn equals(&self, page: &Page) -> bool {
        let level = Level::from_number(self.level).unwrap();
        page.iter().zip(&self.entries).all(|(word, entry)| {
            let raw = word.load(core::sync::atomic::Ordering::Relaxed);
            let is = match Entry::decode(raw, level, Format::Bits48) {
                Entry::Unassigned(ripas) => Unassigned(ripas as u8),
                Entry::Assigned(pa, ripas) => Assigned(pa, ripas as u8),
                Entry::UnassignedNs => UnassignedNs,
                Entry::AssignedNs(desc) => AssignedNs(desc.bits(Format::Bits48)),
                Entry::Table(pa) => Table(pa),
            };
            is == *entry
        })
    }
}
