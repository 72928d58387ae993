//! Scripted guests: what runs inside a Realm's vCPU.
//!
//! A script is a Rust closure that calls [`Guest`]'s methods. It runs on a thread of its own and hands each operation
//! to the simulated CPU, which executes it when (and only when) the RMM has entered the REC, retries it when the RMM
//! re-enters after a fault, and delivers an exception if the RMM injected one. So a script reads like the program that
//! a guest would be, and the RMM sees what hardware would show it. Where threads are not wanted, a guest can be
//! [`Steps`]: a function that says one operation after the other.

use crate::vmm::{DEVICE, SHARED};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};

/// One operation: one instruction of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Load of `size` bytes from `ipa` into `x0`.
    Read {
        /// Address.
        ipa: u64,
        /// 1, 2, 4 or 8.
        size: u64,
    },
    /// Store of `size` bytes of `value` from `x0` to `ipa`.
    Write {
        /// Address.
        ipa: u64,
        /// 1, 2, 4 or 8.
        size: u64,
        /// What is stored.
        value: u64,
    },
    /// `LDP` of 16 bytes: an access that the syndrome of an abort does not describe.
    Pair {
        /// Address.
        ipa: u64,
    },
    /// Instruction fetch from `ipa`.
    Execute {
        /// Address.
        ipa: u64,
    },
    /// `SMC #0` with these in `x0`...
    Smc([u64; 12]),
    /// `HVC #0`.
    Hvc,
    /// `WFI`.
    Wfi,
    /// `MSR` of `value` to a system register, by its ISS encoding without direction and Rt.
    WriteSysreg {
        /// op0, op2, op1, CRn, CRm as in `ESR_EL2.ISS`.
        iss: u64,
        /// What is written.
        value: u64,
    },
    /// `MRS` of a trapped register into `x0`.
    ReadSysreg {
        /// op0, op2, op1, CRn, CRm as in `ESR_EL2.ISS`.
        iss: u64,
    },
    /// Sets the virtual timer: `CNTV_CVAL_EL0` and `CNTV_CTL_EL0`.
    SetTimer {
        /// Compare value.
        cval: u64,
        /// Control.
        ctl: u64,
    },
    /// `MRS` of `ICC_IAR1_EL1`.
    Acknowledge,
    /// `MSR` to `ICC_EOIR1_EL1`.
    EndOfInterrupt {
        /// What was acknowledged.
        intid: u64,
    },
    /// `MRS` of `CNTVCT_EL0`.
    Counter,
}

impl Op {
    /// `SMC #0` with these in `x0`..., and zero in the others.
    #[must_use]
    pub fn smc(arguments: &[u64]) -> Self {
        let mut registers = [0; 12];
        registers[..arguments.len()].copy_from_slice(arguments);
        Self::Smc(registers)
    }
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Retired; `x0`..`x17` afterwards.
    Done([u64; 18]),
    /// The vCPU took an exception to EL1 instead.
    Exception(Exception),
}

/// An exception to EL1 as the guest's handler sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// `ESR_EL1`.
    pub esr: u64,
    /// `FAR_EL1`.
    pub far: u64,
}

/// Thrown through a script when its REC is gone.
struct Gone;

/// The vCPU, seen from its script.
pub struct Guest {
    pub(crate) ops: SyncSender<Op>,
    pub(crate) outcomes: Receiver<Outcome>,
    /// `x0` at entry: the argument from the host's parameters, or the context of `CPU_ON`.
    pub x0: u64,
}

impl Guest {
    /// Executes one operation.
    ///
    /// # Errors
    /// The exception that it caused.
    pub fn execute(&self, op: Op) -> Result<[u64; 18], Exception> {
        let outcome = self.ops.send(op).ok().and_then(|()| self.outcomes.recv().ok());
        match outcome {
            Some(Outcome::Done(registers)) => Ok(registers),
            Some(Outcome::Exception(exception)) => Err(exception),
            None => std::panic::resume_unwind(Box::new(Gone)),
        }
    }

    pub(crate) fn expect(&self, op: Op) -> [u64; 18] {
        self.execute(op).unwrap_or_else(|exception| panic!("guest: {op:x?} took {exception:x?}"))
    }

    /// Loads 8 bytes.
    #[must_use]
    pub fn read(&self, ipa: u64) -> u64 {
        self.expect(Op::Read { ipa, size: 8 })[0]
    }

    /// Stores 8 bytes.
    pub fn write(&self, ipa: u64, value: u64) {
        self.expect(Op::Write { ipa, size: 8, value });
    }

    /// Stores `size` bytes through the shared alias, as a driver does.
    pub fn store(&self, ipa: u64, size: u64, value: u64) {
        self.expect(Op::Write { ipa: ipa | SHARED, size, value });
    }

    /// Says something to the VMM's device.
    pub fn tell(&self, value: u64) {
        self.store(DEVICE, 8, value);
    }

    /// `SMC` with `x0`...; returns `x0`...
    pub fn smc(&self, args: &[u64]) -> [u64; 18] {
        self.expect(Op::smc(args))
    }

    /// Waits for an interrupt.
    pub fn wfi(&self) {
        self.expect(Op::Wfi);
    }

    /// Waits until an interrupt can be acknowledged, ends it, and returns its INTID.
    pub fn take_interrupt(&self) -> u64 {
        loop {
            let intid = self.expect(Op::Acknowledge)[0];
            if !(1020..8192).contains(&intid) {
                self.expect(Op::EndOfInterrupt { intid });
                return intid;
            }
            self.wfi();
        }
    }

    /// The counter.
    #[must_use]
    pub fn counter(&self) -> u64 {
        self.expect(Op::Counter)[0]
    }

    /// Asks for a range of RIPAS, as Linux does: until the whole range is done.
    ///
    /// # Errors
    /// The RSI status and the response, if the RMM or the host refused.
    pub fn ipa_state_set(&self, base: u64, top: u64, ram: bool, destroyed: bool) -> Result<(), (u64, u64)> {
        let mut at = base;
        while at < top {
            let out =
                self.smc(&[cca_abi::rsi::fid::IPA_STATE_SET, at, top, u64::from(ram), u64::from(destroyed)]);
            if out[0] != 0 || out[2] != cca_abi::rsi::ACCEPT || out[1] <= at {
                return Err((out[0], out[2]));
            }
            at = out[1];
        }
        Ok(())
    }

    /// `PSCI_CPU_ON`.
    pub fn cpu_on(&self, mpidr: u64, entry: u64, context: u64) -> u64 {
        self.smc(&[cca_abi::psci::fid::CPU_ON_64, mpidr, entry, context])[0]
    }

    /// `PSCI_SYSTEM_OFF`; does not return.
    pub fn system_off(&self) -> ! {
        self.smc(&[cca_abi::psci::fid::SYSTEM_OFF]);
        panic!("guest: SYSTEM_OFF returned");
    }
}

/// A guest program with a thread of its own.
pub(crate) type Script = std::sync::Arc<dyn Fn(&Guest) + Send + Sync>;

/// A guest without a thread: told how its last operation ended, it says the next one. For ever: the last should end the
/// guest.
pub type Steps = Box<dyn FnMut(Option<Outcome>) -> Op + Send>;

/// What lies at an entry point.
#[derive(Clone)]
pub(crate) enum Program {
    Script(Script),
    Steps(std::sync::Arc<dyn Fn() -> Steps + Send + Sync>),
}

/// Where the operations of a running guest come from.
pub(crate) enum Source {
    Thread {
        ops: Receiver<Op>,
        outcomes: SyncSender<Outcome>,
        /// Set when the script panicked with a message.
        failed: std::sync::Arc<std::sync::Mutex<Option<String>>>,
    },
    Steps {
        next: Steps,
        last: Option<Outcome>,
    },
}

/// What a running guest does next.
pub(crate) enum Next {
    Op(Op),
    /// Its thread has not said yet.
    NotYet,
    /// It has ended in a way that a program cannot end.
    Failed(String),
}

impl Source {
    pub(crate) fn next(&mut self) -> Next {
        match self {
            Self::Steps { next, last } => Next::Op(next(last.take())),
            Self::Thread { ops, failed, .. } => match ops.try_recv() {
                Ok(op) => Next::Op(op),
                Err(TryRecvError::Empty) => Next::NotYet,
                Err(TryRecvError::Disconnected) => {
                    let text = failed.lock().unwrap().take();
                    Next::Failed(text.unwrap_or_else(|| "guest script ended".into()))
                }
            },
        }
    }

    pub(crate) fn tell(&mut self, outcome: Outcome) {
        match self {
            Self::Steps { last, .. } => *last = Some(outcome),
            Self::Thread { outcomes, .. } => drop(outcomes.send(outcome)),
        }
    }
}

/// The CPU's end of a running guest.
pub(crate) struct Running {
    pub(crate) source: Source,
    /// The operation under way and the PC at which it was issued.
    pub(crate) pending: Option<(Op, u64)>,
    /// PC of the next operation.
    pub(crate) pc: u64,
}

impl Running {
    /// Starts `program` at `pc` with `x0`.
    pub(crate) fn start(program: Program, pc: u64, x0: u64) -> Self {
        let source = match program {
            Program::Script(script) => Self::thread(script, x0),
            Program::Steps(start) => Source::Steps { next: start(), last: None },
        };
        Self { source, pending: None, pc }
    }

    fn thread(script: Script, x0: u64) -> Source {
        let (op_sender, ops) = std::sync::mpsc::sync_channel(0);
        let (outcomes, outcome_receiver) = std::sync::mpsc::sync_channel(1);
        let failed = std::sync::Arc::new(std::sync::Mutex::new(None));
        let report = failed.clone();
        std::thread::spawn(move || {
            let guest = Guest { ops: op_sender, outcomes: outcome_receiver, x0 };
            let Err(payload) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                script(&guest);
                guest.system_off()
            }));
            if !payload.is::<Gone>() {
                let text = payload
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| payload.downcast_ref::<&str>().map(ToString::to_string))
                    .unwrap_or_else(|| "guest script panicked".into());
                *report.lock().unwrap() = Some(text);
            }
        });
        Source::Thread { ops, outcomes, failed }
    }
}
