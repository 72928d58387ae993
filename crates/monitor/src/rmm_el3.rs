//! The RMM-EL3 interface: booting the RMM, and the services that it gets from EL3.

use cca_abi::rmm_el3::{BootStatus, CURVE_P384, Status, fid};
use cca_abi::smccc;

use crate::Monitor;
use crate::attest;
use crate::gpt::TransitionError;
use crate::interface::Interface;
use crate::manifest::Bank;
use crate::platform::{Action, GRANULE_SIZE, MAX_CPUS, Platform, Regs};
use crate::sync::{AtomicBool, AtomicU8, AtomicU64, Ordering};

/// Where the RMM stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RmmState {
    /// None was loaded.
    Absent = 0,
    /// Its cold boot has not completed.
    Booting = 1,
    /// It takes calls.
    Ready = 2,
    /// It refused to boot on some CPU and is never entered again.
    Dead = 3,
}

impl From<TransitionError> for Status {
    fn from(error: TransitionError) -> Self {
        match error {
            TransitionError::BadAddress => Self::BadAddress,
            TransitionError::BadPas => Self::BadPas,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Rmm {
    state: AtomicU8,
    interface: Interface,
    /// How a command ends.
    completion: Action,
    /// What each CPU's RMM left at its last boot, to be handed back at its next one.
    tokens: [AtomicU64; MAX_CPUS],
    /// Which CPUs are on their way through the RMM's boot.
    booting: [AtomicBool; MAX_CPUS],
}

impl Rmm {
    pub(crate) fn new(present: bool, interface: Interface) -> Self {
        let state = if present { RmmState::Booting } else { RmmState::Absent };
        Self {
            state: AtomicU8::new(state as u8),
            interface,
            completion: if interface.is_2() { Action::ToNormal } else { Action::ToNormalFive },
            tokens: core::array::from_fn(|_| AtomicU64::new(0)),
            booting: core::array::from_fn(|_| AtomicBool::new(false)),
        }
    }

    #[inline]
    pub(crate) fn state(&self) -> RmmState {
        match self.state.load(Ordering::Acquire) {
            0 => RmmState::Absent,
            1 => RmmState::Booting,
            2 => RmmState::Ready,
            _ => RmmState::Dead,
        }
    }

    #[inline(always)]
    pub(crate) fn is_ready(&self) -> bool {
        self.state.load(Ordering::Acquire) == RmmState::Ready as u8
    }

    #[inline(always)]
    pub(crate) fn completion(&self) -> Action {
        self.completion
    }

    pub(crate) fn interface(&self) -> Interface {
        self.interface
    }

    /// The token for a boot; an RMM of family 0.x leaves whatever its register held, and expects zero.
    fn token(&self, cpu: usize) -> u64 {
        let kept = self.tokens.get(cpu).map_or(0, |t| t.load(Ordering::Relaxed));
        if self.interface.is_2() { kept } else { 0 }
    }

    pub(crate) fn cold_boot(&self, cpu: usize, cpus: usize, shared_page: u64) -> Option<[u64; 8]> {
        let version = self.interface.version();
        let args = [cpu as u64, version, cpus as u64, shared_page, self.token(cpu), 0, 0, 0];
        self.boot(cpu, self.state() == RmmState::Booting).then_some(args)
    }

    pub(crate) fn warm_boot(&self, cpu: usize) -> Option<[u64; 8]> {
        let args = [cpu as u64, self.token(cpu), 0, 0, 0, 0, 0, 0];
        self.boot(cpu, self.is_ready()).then_some(args)
    }

    fn boot(&self, cpu: usize, begins: bool) -> bool {
        if let Some(booting) = self.booting.get(cpu) {
            booting.store(begins, Ordering::Relaxed);
        }
        begins
    }

    /// Whether the RMM boots on this CPU; from now on it does not any more.
    fn take_boot(&self, cpu: usize) -> bool {
        self.booting.get(cpu).is_some_and(|booting| booting.swap(false, Ordering::Relaxed))
    }

    /// The boot on some CPU is over; whether the RMM became ready by this.
    fn booted(&self, cpu: usize, success: bool, token: u64) -> bool {
        if !success {
            // For good: no other CPU's success may bring it back.
            self.state.store(RmmState::Dead as u8, Ordering::Release);
            return false;
        }
        if let Some(slot) = self.tokens.get(cpu) {
            slot.store(token, Ordering::Relaxed);
        }
        let (booting, ready) = (RmmState::Booting as u8, RmmState::Ready as u8);
        self.state.compare_exchange(booting, ready, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

impl Monitor {
    /// A call of the RMM other than RMM_RMI_REQ_COMPLETE.
    pub(crate) fn rmm_call(
        &self,
        platform: &impl Platform,
        cpu: usize,
        function: u64,
        regs: &mut Regs,
    ) -> Action {
        let result = match function {
            fid::GTSI_DELEGATE => self.gpt.delegate(platform, regs[1]).map_err(Status::from),
            fid::GTSI_UNDELEGATE => self.gtsi_undelegate(platform, regs[1]),
            fid::BOOT_COMPLETE if self.rmm.take_boot(cpu) => return self.boot_complete(platform, cpu, regs),
            fid::ATTEST_GET_REALM_KEY => self.realm_key(platform, regs),
            fid::ATTEST_GET_PLAT_TOKEN => self.platform_token(platform, regs),
            fid::EL3_FEATURES if self.rmm.interface().since(4) => match regs[1] {
                0 => {
                    regs[1] = 0;
                    Ok(())
                }
                _ => Err(Status::Invalid),
            },
            fid::MEC_REFRESH if self.mec && self.rmm.interface().since(8) => mec_refresh(regs[1]),
            fid::RESERVE_MEMORY if self.rmm.interface().since(7) => {
                self.reserve_memory(regs[1], regs[2]).map(|pa| regs[1] = pa)
            }
            _ => {
                regs[0] = smccc::NOT_SUPPORTED;
                return Action::Resume;
            }
        };
        regs[0] = result.map_or_else(Status::to_register, |()| 0);
        Action::Resume
    }

    fn gtsi_undelegate(&self, platform: &impl Platform, pa: u64) -> Result<(), Status> {
        let within = |bank: &Bank| pa.wrapping_sub(bank.base) < bank.size;
        if within(&self.carve_out) || within(&self.reserve) {
            // The RMM's own memory and the shared page are Realm memory for the life of the system.
            return Err(Status::BadPas);
        }
        Ok(self.gpt.undelegate(platform, pa)?)
    }

    /// The offset in the shared page of a buffer that the RMM named.
    fn buffer(&self, pa: u64, size: u64) -> Result<(usize, usize), Status> {
        let offset = pa.wrapping_sub(self.shared_page);
        if offset >= GRANULE_SIZE {
            return Err(Status::BadAddress);
        }
        if size == 0 || size > GRANULE_SIZE - offset {
            return Err(Status::Invalid);
        }
        // Both are at most 4096.
        Ok((usize::try_from(offset).unwrap_or(0), usize::try_from(size).unwrap_or(0)))
    }

    /// RMM_ATTEST_GET_REALM_KEY: x1 buffer, x2 its size, x3 curve.
    fn realm_key(&self, platform: &impl Platform, regs: &mut Regs) -> Result<(), Status> {
        let (offset, size) = self.buffer(regs[1], regs[2])?;
        if regs[3] != CURVE_P384 {
            return Err(Status::Invalid);
        }
        if size < attest::KEY_SIZE {
            return Err(Status::Unknown);
        }
        // The lock keeps two CPUs' use of the page apart.
        let _pending = self.token.lock();
        platform.shared_page_write(offset, &attest::realm_key(&self.measured.rmm));
        regs[1] = attest::KEY_SIZE as u64;
        Ok(())
    }

    /// RMM_ATTEST_GET_PLAT_TOKEN: x1 buffer, x2 its size, x3 size of the challenge in it, or 0 for the next
    /// piece of the token that the last challenge started.
    fn platform_token(&self, platform: &impl Platform, regs: &mut Regs) -> Result<(), Status> {
        let (offset, size) = self.buffer(regs[1], regs[2])?;
        let challenge_size = match regs[3] {
            0 => 0,
            32 => 32,
            48 => 48,
            64 => 64,
            _ => return Err(Status::Invalid),
        };
        let mut pending = self.token.lock();
        if challenge_size != 0 {
            let mut challenge = [0; 64];
            let challenge = challenge.get_mut(..challenge_size).ok_or(Status::Invalid)?;
            if challenge_size > size {
                return Err(Status::Invalid);
            }
            platform.shared_page_read(offset, challenge);
            if !pending.start(&self.measured, challenge) {
                return Err(Status::Unknown);
            }
        }
        let (hunk, remaining) = pending.next(size).ok_or(Status::Invalid)?;
        platform.shared_page_write(offset, hunk);
        regs[1] = hunk.len() as u64;
        regs[2] = remaining as u64;
        Ok(())
    }

    fn boot_complete(&self, platform: &impl Platform, cpu: usize, regs: &Regs) -> Action {
        let status = i64::from_ne_bytes(regs[1].to_ne_bytes());
        if self.rmm.booted(cpu, status == 0, regs[2]) {
            platform.print(format_args!("stage rmm-ready cntpct={}", platform.counter()));
        }
        if status != 0 {
            platform.print(format_args!(
                "the RMM refused to boot on CPU {cpu}: {} ({status}); every RMI call returns -1",
                BootStatus::describe(status)
            ));
        }
        self.psci.set_on(cpu);
        Action::BootNormal
    }

    /// Gives away memory for good; bump allocation downwards, without a lock.
    fn reserve_memory(&self, size: u64, flags: u64) -> Result<u64, Status> {
        let align_bits = flags >> 56;
        // Bit 0 asks for memory near the calling CPU; here all of it is.
        if flags & 0x00FF_FFFF_FFFF_FFFE != 0 || size == 0 || size % GRANULE_SIZE != 0 || align_bits > 47 {
            return Err(Status::Invalid);
        }
        let align = (1_u64 << align_bits).max(GRANULE_SIZE);
        let fit = |top: u64| {
            let base = top.checked_sub(size)? & !(align - 1);
            (base >= self.reserve.base).then_some(base)
        };
        match self.reserve_top.fetch_update(Ordering::AcqRel, Ordering::Acquire, fit) {
            Ok(top) => fit(top).ok_or(Status::NoMemory),
            Err(_) => Err(Status::NoMemory),
        }
    }
}

/// RMM_MEC_REFRESH: x1 the MECID in bits 47:32, bit 0 whether it is given up. This machine does not encrypt, so
/// there is no key to change.
fn mec_refresh(request: u64) -> Result<(), Status> {
    if request & 0xFFFF_0000_FFFF_FFFE != 0 { Err(Status::Invalid) } else { Ok(()) }
}
