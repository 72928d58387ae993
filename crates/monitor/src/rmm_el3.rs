//! The RMM-EL3 interface: booting the RMM, and the services that it gets from EL3.

use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use cca_abi::rmm_el3::{BootStatus, CURVE_P384, Status, VERSION_2_0, fid};
use cca_abi::smccc;

use crate::Monitor;
use crate::attest;
use crate::gpt::TransitionError;
use crate::platform::{Action, GRANULE_SIZE, MAX_CPUS, Platform, Regs};

/// The version offered: 2.0. Eight result registers go back to the host, and the RMM, not EL3, keeps the
/// host's ICC_SRE_EL2, ICH_HCR_EL2 and ICH_VMCR_EL2.
pub const INTERFACE_VERSION: u64 = VERSION_2_0;

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
    /// What each CPU's RMM left at its last boot, to be handed back at its next one.
    tokens: [AtomicU64; MAX_CPUS],
}

impl Rmm {
    pub(crate) fn new(present: bool) -> Self {
        let state = if present { RmmState::Booting } else { RmmState::Absent };
        Self { state: AtomicU8::new(state as u8), tokens: [const { AtomicU64::new(0) }; MAX_CPUS] }
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

    fn token(&self, cpu: usize) -> u64 {
        self.tokens.get(cpu).map_or(0, |t| t.load(Ordering::Relaxed))
    }

    pub(crate) fn cold_boot(&self, cpu: usize, cpus: usize, shared_page: u64) -> Option<[u64; 8]> {
        let args = [cpu as u64, INTERFACE_VERSION, cpus as u64, shared_page, self.token(cpu), 0, 0, 0];
        (self.state() == RmmState::Booting).then_some(args)
    }

    pub(crate) fn warm_boot(&self, cpu: usize) -> Option<[u64; 8]> {
        let args = [cpu as u64, self.token(cpu), 0, 0, 0, 0, 0, 0];
        (self.state() == RmmState::Ready).then_some(args)
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
            fid::BOOT_COMPLETE => return self.boot_complete(platform, cpu, regs),
            fid::ATTEST_GET_REALM_KEY => self.realm_key(platform, regs),
            fid::ATTEST_GET_PLAT_TOKEN => self.platform_token(platform, regs),
            fid::EL3_FEATURES => match regs[1] {
                0 => {
                    regs[1] = 0;
                    Ok(())
                }
                _ => Err(Status::Invalid),
            },
            fid::RESERVE_MEMORY => self.reserve_memory(regs[1], regs[2]).map(|pa| regs[1] = pa),
            _ => {
                regs[0] = smccc::NOT_SUPPORTED;
                return Action::Resume;
            }
        };
        regs[0] = result.map_or_else(Status::to_register, |()| 0);
        Action::Resume
    }

    fn gtsi_undelegate(&self, platform: &impl Platform, pa: u64) -> Result<(), Status> {
        if pa.wrapping_sub(self.carve_out.base) < self.carve_out.size {
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
        if status == 0 {
            if let Some(token) = self.rmm.tokens.get(cpu) {
                token.store(regs[2], Ordering::Relaxed);
            }
            if self.rmm.state() == RmmState::Booting {
                self.rmm.state.store(RmmState::Ready as u8, Ordering::Release);
                platform.print(format_args!("stage rmm-ready cntpct={}", platform.counter()));
            }
        } else {
            self.rmm.state.store(RmmState::Dead as u8, Ordering::Release);
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
            (base >= self.reserve_base).then_some(base)
        };
        match self.reserve_top.fetch_update(Ordering::AcqRel, Ordering::Acquire, fit) {
            Ok(top) => fit(top).ok_or(Status::NoMemory),
            Err(_) => Err(Status::NoMemory),
        }
    }
}
