//! A Realm's life: configured, created, activated, destroyed.

use alloc::vec::Vec;
use core::mem::offset_of;

use cca_abi::kvm::{self, rme, vcpu_feature};
use cca_abi::rmi::{HashAlgorithm, RealmParams, realm_flags};

use crate::errno::{Errno, Result};
use crate::granule::Delegated;
use crate::kernel::{Fill, Kernel, Page, read_user, reserve};
use crate::rec;
use crate::rtt::Rtt;
use crate::vm::Vm;

/// How far a Realm's life has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RealmState {
    /// The RMM knows nothing of it.
    None,
    /// Being built.
    New,
    /// Its vCPUs can run.
    Active,
    /// Torn down.
    Dead,
}

impl RealmState {
    pub(crate) const fn to_u8(self) -> u8 {
        match self {
            Self::None => 0,
            Self::New => 1,
            Self::Active => 2,
            Self::Dead => 3,
        }
    }

    pub(crate) const fn from_u8(value: u8) -> Self {
        match value {
            0 => Self::None,
            1 => Self::New,
            2 => Self::Active,
            _ => Self::Dead,
        }
    }
}

/// Under the control lock.
pub struct Control<K: Kernel> {
    hash: HashAlgorithm,
    rpv: [u8; 64],
    realm: Option<Realm<K>>,
}

/// What all vCPUs of a Realm have alike: vector length in units of 128 bits (`None` without SVE), and whether there is
/// a PMU.
pub(crate) type Extras = (Option<u8>, bool);

impl<K: Kernel> Default for Control<K> {
    fn default() -> Self {
        Self { hash: HashAlgorithm::Sha256, rpv: [0; 64], realm: None }
    }
}

/// What the RMM holds for the Realm as such.
struct Realm<K: Kernel> {
    rd: Delegated<K>,
    start_tables: Vec<Delegated<K>>,
    vmid: u16,
    aux_count: usize,
}

impl<K: Kernel> Vm<K> {
    /// `KVM_ENABLE_CAP`: only `KVM_CAP_ARM_RME` and its sub-commands.
    pub(crate) fn enable_cap(&self, cap: &kvm::EnableCap) -> Result {
        if cap.cap != self.system.generation().cap_arm_rme || cap.flags != 0 {
            return Err(Errno::EINVAL);
        }
        match cap.args[0] {
            rme::CONFIG_REALM => self.configure(&read_user(&self.kernel, cap.args[1])?),
            rme::CREATE_RD => self.create_rd(),
            rme::INIT_IPA_REALM => {
                let args: kvm::RmeInitIpa = read_user(&self.kernel, cap.args[1])?;
                if args.reserved != [0; 4] {
                    return Err(Errno::EINVAL);
                }
                let _control = self.control.lock();
                self.expect_new()?;
                self.init_ripas(args.base, args.size)
            }
            rme::POPULATE_REALM => {
                let args: kvm::RmePopulate = read_user(&self.kernel, cap.args[1])?;
                if args.reserved != [0; 3] || args.flags & !rme::POPULATE_FLAGS_MEASURE != 0 {
                    return Err(Errno::EINVAL);
                }
                let _control = self.control.lock();
                self.expect_new()?;
                self.populate(args.base, args.size, args.flags & rme::POPULATE_FLAGS_MEASURE != 0)
            }
            rme::ACTIVATE_REALM => self.activate(),
            _ => Err(Errno::EINVAL),
        }
    }

    fn expect_new(&self) -> Result<()> {
        if self.realm_state() == RealmState::New { Ok(()) } else { Err(Errno::EINVAL) }
    }

    fn configure(&self, item: &kvm::RmeConfigItem) -> Result {
        let mut control = self.control.lock();
        if self.realm_state() != RealmState::None {
            return Err(if self.system.generation().version < 5 { Errno::EINVAL } else { Errno::EBUSY });
        }
        let (used, reserved) = match item.cfg {
            rme::CFG_RPV => item.data.split_at(64),
            rme::CFG_HASH_ALGO => item.data.split_at(4),
            _ => return Err(Errno::EINVAL),
        };
        if reserved.iter().any(|byte| *byte != 0) {
            return Err(Errno::EINVAL);
        }
        if item.cfg == rme::CFG_RPV {
            control.rpv.copy_from_slice(used);
            return Ok(0);
        }
        let number = u32::from_ne_bytes(used.try_into().map_err(|_| Errno::EINVAL)?);
        let hash = u8::try_from(number)
            .ok()
            .and_then(|number| HashAlgorithm::try_from(number).ok())
            .filter(|hash| self.system.features().hash(*hash))
            .ok_or(Errno::EINVAL)?;
        control.hash = hash;
        Ok(0)
    }

    fn create_rd(&self) -> Result {
        let mut control = self.control.lock();
        if self.realm_state() != RealmState::None {
            return Err(Errno::EEXIST);
        }
        let extras = self.choose_extras()?;
        let vmid = self.system.vmids.lock().take().ok_or(Errno::ENOSPC)?;
        let created = self.build_rd(&control, vmid, extras);
        match created {
            Ok(realm) => {
                self.memory.lock().set_rtt(Rtt::new(realm.rd.pa(), self.geometry));
                control.realm = Some(realm);
                self.set_realm_extras(extras);
                self.set_realm_state(RealmState::New);
                Ok(0)
            }
            Err((errno, clean)) => {
                if clean {
                    self.system.vmids.lock().give_back(vmid);
                }
                Err(errno)
            }
        }
    }

    /// The vCPUs that exist must agree, and have finished choosing.
    fn choose_extras(&self) -> Result<Extras> {
        let mut chosen = None;
        for vcpu in self.vcpus() {
            let state = vcpu.state.lock();
            if state.features.is_none() {
                continue;
            }
            let own = (state.sve_choice(), state.has(vcpu_feature::PMU_V3));
            let ready = own.0.is_none() || state.sve_finalized;
            if !ready || *chosen.get_or_insert(own) != own {
                self.log_error(format_args!(
                    "vcpu: {} has another vector length or PMU than others, or SVE is not finalized",
                    vcpu.id
                ));
                return Err(Errno::EINVAL);
            }
        }
        Ok(chosen.unwrap_or((None, false)))
    }

    /// The error says whether the RMM has forgotten the VMID.
    fn build_rd(
        &self,
        control: &Control<K>,
        vmid: u16,
        (sve_vq, pmu): Extras,
    ) -> core::result::Result<Realm<K>, (Errno, bool)> {
        let clean = |errno| (errno, true);
        let geometry = &self.geometry;
        let s2sz = u8::try_from(geometry.ipa_bits).map_err(|_| clean(Errno::EINVAL))?;
        let rtt_num_start = u32::try_from(geometry.start_tables).map_err(|_| clean(Errno::EINVAL))?;
        let params_page = self.kernel.alloc_page(Fill::Zeroed).map_err(clean)?;
        let pages = self.kernel.alloc_contiguous(geometry.start_tables).map_err(clean)?;
        let rtt_base = pages.first().map(Page::pa).ok_or(clean(Errno::ENOMEM))?;
        let mut start_tables = Vec::new();
        reserve(&mut start_tables, pages.len()).map_err(clean)?;
        let rd = self.rmi.new_delegated().map_err(clean)?;

        let mut refused = None;
        for page in pages {
            // Pages after a refused one are simply dropped.
            if refused.is_none() {
                match self.rmi.delegate(page) {
                    Ok(granule) => start_tables.push(granule),
                    Err(error) => refused = Some(error),
                }
            }
        }
        let debug = self.debug_counts.load(crate::sync::Ordering::Relaxed).to_le_bytes();
        // Field by field: a structure of 4 KiB is too much for a kernel stack.
        let mut flags = 0;
        if let Some(vq) = sve_vq {
            flags |= realm_flags::SVE;
            params_page.store_u8(offset_of!(RealmParams, sve_vl), vq.saturating_sub(1));
        }
        if pmu {
            flags |= realm_flags::PMU;
            let counters = self.pmu_counters.load(crate::sync::Ordering::Relaxed);
            params_page.store_u8(offset_of!(RealmParams, pmu_num_ctrs), counters.to_le_bytes()[0]);
        }
        params_page.store_u64(offset_of!(RealmParams, flags), flags);
        params_page.store_u8(offset_of!(RealmParams, s2sz), s2sz);
        params_page.store_u8(offset_of!(RealmParams, num_bps), debug[0]);
        params_page.store_u8(offset_of!(RealmParams, num_wps), debug[1]);
        params_page.store_u8(offset_of!(RealmParams, hash_algo), control.hash as u8);
        params_page.store_bytes(offset_of!(RealmParams, rpv), &control.rpv);
        params_page.store_bytes(offset_of!(RealmParams, vmid), &vmid.to_le_bytes());
        params_page.store_u64(offset_of!(RealmParams, rtt_base), rtt_base);
        let start_level = geometry.start_level.to_le_bytes();
        params_page.store_bytes(offset_of!(RealmParams, rtt_level_start), &start_level);
        params_page.store_u32(offset_of!(RealmParams, rtt_num_start), rtt_num_start);

        let created = match refused {
            None => self.rmi.realm_create(rd.pa(), params_page.pa()),
            Some(error) => Err(error),
        };
        if let Err(error) = created {
            self.rmi.log("create the Realm", error);
            self.undelegate_all(start_tables);
            drop(self.rmi.undelegate(rd));
            return Err(clean(error.into()));
        }
        let realm = Realm { rd, start_tables, vmid, aux_count: 0 };
        match self.rmi.rec_aux_count(realm.rd.pa()) {
            Ok(count) if count <= 16 => {
                Ok(Realm { aux_count: usize::try_from(count).unwrap_or(16), ..realm })
            }
            answer => {
                if let Err(error) = answer {
                    self.rmi.log("count auxiliary granules", error);
                }
                let clean = self.destroy_realm(realm);
                Err((Errno::ENXIO, clean))
            }
        }
    }

    fn undelegate_all(&self, granules: Vec<Delegated<K>>) {
        for granule in granules {
            drop(self.rmi.undelegate(granule));
        }
    }

    /// Returns whether it is gone. If not, everything it holds is lost.
    fn destroy_realm(&self, realm: Realm<K>) -> bool {
        match self.rmi.realm_destroy(realm.rd.pa()) {
            Ok(()) => {
                self.undelegate_all(realm.start_tables);
                drop(self.rmi.undelegate(realm.rd));
                true
            }
            Err(error) => {
                for granule in realm.start_tables {
                    self.rmi.leak(granule, error);
                }
                self.rmi.leak(realm.rd, error);
                false
            }
        }
    }

    /// Creates the RECs, in the ascending order of MPIDR that the RMM demands whatever order they were finalized in,
    /// and freezes the measurement. What was created stays if a later step fails; activation can be tried again.
    fn activate(&self) -> Result {
        let control = self.control.lock();
        self.expect_new()?;
        let realm = control.realm.as_ref().ok_or(Errno::EINVAL)?;
        let mut vcpus = Vec::new();
        reserve(&mut vcpus, self.vcpus().count())?;
        vcpus.extend(self.vcpus());
        vcpus.sort_unstable_by_key(|vcpu| vcpu.id);
        let mut next = 0;
        for vcpu in vcpus {
            let mut state = vcpu.state.lock();
            if !state.finalized {
                continue;
            }
            if vcpu.id != next {
                self.log_error(format_args!("vcpu: {} is finalized but {next} is not", vcpu.id));
                return Err(Errno::EINVAL);
            }
            next += 1;
            if state.rec.is_none() {
                let rec = rec::create(self, realm.rd.pa(), realm.aux_count, vcpu, &state)?;
                vcpu.set_rec(Some(rec.pa()));
                state.rec = Some(rec);
            }
        }
        self.rmi.realm_activate(realm.rd.pa()).map_err(|error| {
            self.rmi.log("activate the Realm", error);
            Errno::from(error)
        })?;
        self.set_realm_state(RealmState::Active);
        Ok(0)
    }

    /// Takes everything back from the RMM, in the order that it demands. Nobody else refers to the VM any more. What
    /// the RMM keeps is lost; the VMID of a Realm that could not be destroyed is never used again.
    pub(crate) fn teardown(&self) {
        let mut control = self.control.lock();
        let Some(realm) = control.realm.take() else { return };
        self.set_realm_state(RealmState::Dead);
        for vcpu in self.vcpus() {
            let mut state = vcpu.state.lock();
            vcpu.set_rec(None);
            if let Some(rec) = state.rec.take() {
                rec::destroy(&self.rmi, rec);
            }
        }
        self.memory.lock().teardown(&self.rmi);
        let vmid = realm.vmid;
        if self.destroy_realm(realm) {
            self.system.vmids.lock().give_back(vmid);
        }
    }
}
