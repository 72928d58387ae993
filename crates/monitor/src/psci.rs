//! PSCI 1.1 for the host: the state of every CPU and the calls that change it.
//!
//! `Off -> OnPending -> On -> Off`. CPU_ON claims a target by compare-and-exchange, so exactly one caller may
//! write its entry; the target itself moves to `On` when the RMM has booted on it, right before it enters the
//! Normal world.

use cca_abi::psci::{AFFINITY_OFF, AFFINITY_ON, AFFINITY_ON_PENDING, Code};

use crate::platform::MAX_CPUS;
use crate::sync::{AtomicU8, AtomicU64, Ordering};

/// A CPU's power state, numbered like the results of AFFINITY_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CpuState {
    /// Runs in the Normal world or below EL3 on its behalf.
    On = AFFINITY_ON as u8,
    /// Parked.
    Off = AFFINITY_OFF as u8,
    /// Released, on its way.
    OnPending = AFFINITY_ON_PENDING as u8,
}

#[derive(Debug)]
struct Cpu {
    state: AtomicU8,
    entry: AtomicU64,
    context: AtomicU64,
}

/// All CPUs.
#[derive(Debug)]
pub struct Psci {
    cpus: [Cpu; MAX_CPUS],
    count: usize,
}

/// The CPU's number from the affinity fields of an MPIDR: Aff1 * 16 + Aff0, as QEMU's virt machine numbers
/// them. `None` for what names no CPU.
pub const fn cpu_index(mpidr: u64) -> Option<usize> {
    const AFFINITY: u64 = 0xFF_00FF_FFFF;
    let affinity = mpidr & AFFINITY;
    let (aff1, aff0) = (affinity >> 8 & 0xFF, affinity & 0xFF);
    let index = aff1 * 16 + aff0;
    if affinity >> 16 != 0 || aff0 >= 16 || index >= MAX_CPUS as u64 { None } else { Some(index as usize) }
}

impl Psci {
    /// `count` CPUs, all off but the first.
    pub fn new(count: usize) -> Self {
        let cpu = |i| Cpu {
            state: AtomicU8::new(if i == 0 { CpuState::On as u8 } else { CpuState::Off as u8 }),
            entry: AtomicU64::new(0),
            context: AtomicU64::new(0),
        };
        Self { cpus: core::array::from_fn(cpu), count: count.min(MAX_CPUS) }
    }

    /// Number of CPUs in the machine.
    pub fn count(&self) -> usize {
        self.count
    }

    fn target(&self, mpidr: u64) -> Result<(usize, &Cpu), Code> {
        // Bits outside the affinity fields must be zero in the argument.
        let index = if mpidr & !0xFF_00FF_FFFF == 0 { cpu_index(mpidr) } else { None };
        let index = index.filter(|&i| i < self.count).ok_or(Code::InvalidParameters)?;
        Ok((index, self.cpus.get(index).ok_or(Code::InvalidParameters)?))
    }

    /// The first half of CPU_ON: claims the target and leaves it its entry. The caller then releases the CPU
    /// whose number is returned.
    pub fn cpu_on(&self, mpidr: u64, entry: u64, context: u64) -> Result<usize, Code> {
        let (index, cpu) = self.target(mpidr)?;
        let off = CpuState::Off as u8;
        match cpu.state.compare_exchange(off, CpuState::OnPending as u8, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => {
                cpu.entry.store(entry, Ordering::Relaxed);
                cpu.context.store(context, Ordering::Release);
                Ok(index)
            }
            Err(now) if now == CpuState::On as u8 => Err(Code::AlreadyOn),
            Err(_) => Err(Code::OnPending),
        }
    }

    /// Entry address and context id that CPU_ON left for this CPU.
    pub fn entry(&self, cpu: usize) -> (u64, u64) {
        self.cpus.get(cpu).map_or((0, 0), |cpu| {
            let context = cpu.context.load(Ordering::Acquire);
            (cpu.entry.load(Ordering::Relaxed), context)
        })
    }

    /// The CPU enters the Normal world.
    pub fn set_on(&self, cpu: usize) {
        self.set(cpu, CpuState::On);
    }

    /// The CPU is done with everything but waiting.
    pub fn set_off(&self, cpu: usize) {
        self.set(cpu, CpuState::Off);
    }

    fn set(&self, cpu: usize, state: CpuState) {
        if let Some(cpu) = self.cpus.get(cpu) {
            cpu.state.store(state as u8, Ordering::Release);
        }
    }

    /// CPU_SUSPEND's power state: only standby, in the original format, of this CPU alone. State 1 is the shallow
    /// state's customary number.
    pub fn is_standby(power_state: u64) -> bool {
        matches!(power_state, 0 | 1)
    }

    /// AFFINITY_INFO.
    pub fn affinity_info(&self, mpidr: u64, level: u64) -> Result<u64, Code> {
        if level != 0 {
            return Err(Code::InvalidParameters);
        }
        let (_, cpu) = self.target(mpidr)?;
        Ok(u64::from(cpu.state.load(Ordering::Acquire)))
    }
}
