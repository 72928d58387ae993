//! Calling the RMM: one method per RMI command, with typed results. Every call is counted.

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use cca_abi::rmi::{self, Status, fid};

use crate::errno::Errno;
use crate::granule::Delegated;
use crate::kernel::{Fill, Kernel, LogLevel, Page, SmcRegs};
use crate::stats::Stats;

/// A command that the RMM did not carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RmiError {
    /// Which command.
    pub fid: u64,
    /// `x0` as it came.
    pub x0: u64,
}

impl RmiError {
    /// The decoded status; `None` for something that RMM 1.0 does not return.
    #[must_use]
    pub fn status(self) -> Option<Status> {
        Status::from_register(self.x0)
    }

    /// The level in `RMI_ERROR_RTT`.
    #[must_use]
    pub fn rtt_level(self) -> Option<i64> {
        match self.status() {
            // An unsigned byte that stands for a signed level.
            Some(Status::ErrorRtt(index)) => Some(i64::from(i8::from_ne_bytes([index]))),
            _ => None,
        }
    }
}

impl From<RmiError> for Errno {
    /// The ABI knows only `ENXIO`; telling them apart helps whoever reads a VMM's message.
    fn from(error: RmiError) -> Self {
        match error.status() {
            Some(Status::ErrorRealm(_)) => Self::EBUSY,
            Some(Status::ErrorRec) => Self::EAGAIN,
            Some(Status::ErrorRtt(_)) => Self::EEXIST,
            Some(Status::ErrorInput | Status::Success) => Self::ENXIO,
            None => Self::EIO,
        }
    }
}

impl fmt::Display for RmiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(rmi::name(self.fid).unwrap_or("unknown RMI command"))?;
        match self.status() {
            Some(status) => write!(f, ": {status}"),
            None => write!(f, ": unexpected answer {:#x}", self.x0),
        }
    }
}

/// Levels are signed in registers.
fn level_register(level: i64) -> u64 {
    u64::from_ne_bytes(level.to_ne_bytes())
}

/// Result of an RMI command.
pub type RmiResult<T = ()> = Result<T, RmiError>;

/// A failed `DATA_DESTROY` or `RTT_DESTROY` says where to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destroyed {
    /// Physical address of the granule that came free.
    pub pa: u64,
    /// Where the next live entry, or the end of the table, is.
    pub top: u64,
}

/// What `RTT_READ_ENTRY` found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RttEntry {
    /// Level at which the walk stopped.
    pub level: i64,
    /// [`rmi::rtt_entry_state`].
    pub state: u64,
    /// Descriptor: output address and host-controlled attributes.
    pub desc: u64,
    /// `RmiRipas`.
    pub ripas: u64,
}

/// The RMM, as one VM (or the system) calls it.
pub struct Rmi<K: Kernel> {
    kernel: K,
    own: Arc<Stats>,
    system: Option<Arc<Stats>>,
    limit: Arc<LogLimit>,
}

/// Keeps one VM from filling the log, and from using up what others may say.
#[derive(Debug, Default)]
struct LogLimit {
    window: AtomicU64,
    said: AtomicU64,
}

impl LogLimit {
    const LINES: u64 = 10;
    const SECONDS: u64 = 5;

    /// Whether one more line may be said at `now`; and how many were not, when a new window begins.
    fn admit(&self, now: u64, frequency: u64) -> (bool, u64) {
        let window = now / frequency.saturating_mul(Self::SECONDS).max(1) + 1;
        if self.window.swap(window, Relaxed) != window {
            let held_back = self.said.swap(1, Relaxed).saturating_sub(Self::LINES);
            return (true, held_back);
        }
        (self.said.fetch_add(1, Relaxed) < Self::LINES, 0)
    }
}

impl<K: Kernel> Clone for Rmi<K> {
    fn clone(&self) -> Self {
        Self {
            kernel: self.kernel.clone(),
            own: self.own.clone(),
            system: self.system.clone(),
            limit: self.limit.clone(),
        }
    }
}

impl<K: Kernel> Rmi<K> {
    /// For calls that belong to no VM.
    pub fn for_system(kernel: K, stats: Arc<Stats>) -> Self {
        Self { kernel, own: stats, system: None, limit: Arc::default() }
    }

    /// For one VM's calls, counted twice.
    pub fn for_vm(&self, stats: Arc<Stats>) -> Self {
        Self {
            kernel: self.kernel.clone(),
            own: stats,
            system: Some(self.own.clone()),
            limit: Arc::default(),
        }
    }

    /// The kernel under it.
    pub fn kernel(&self) -> &K {
        &self.kernel
    }

    /// Counters of this VM, or of the system.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.own
    }

    pub(crate) fn each_stats(&self, count: impl Fn(&Stats)) {
        count(&self.own);
        if let Some(system) = &self.system {
            count(system);
        }
    }

    fn finish(&self, fid: u64, regs: &SmcRegs) -> RmiResult {
        let x0 = regs[0];
        self.each_stats(|stats| stats.count_rmi(fid, x0 != 0));
        if x0 == 0 { Ok(()) } else { Err(RmiError { fid, x0 }) }
    }

    fn raw<const N: usize>(&self, fid: u64, arguments: [u64; N]) -> (RmiResult, SmcRegs) {
        let mut regs: SmcRegs = [0; 18];
        regs[0] = fid;
        for (register, argument) in regs[1..].iter_mut().zip(arguments) {
            *register = argument;
        }
        self.kernel.smc(&mut regs);
        (self.finish(fid, &regs), regs)
    }

    fn call<const N: usize>(&self, fid: u64, arguments: [u64; N]) -> RmiResult {
        self.raw(fid, arguments).0
    }

    fn call1<const N: usize>(&self, fid: u64, arguments: [u64; N]) -> RmiResult<u64> {
        let (result, regs) = self.raw(fid, arguments);
        result.map(|()| regs[1])
    }

    /// Writes a failed command to the log.
    pub fn log(&self, what: &str, error: RmiError) {
        self.say(LogLevel::Warn, format_args!("rmm: {what}: {error}"));
    }

    /// A line in the kernel's log on behalf of this VM, unless it has said too much lately.
    pub fn say(&self, level: LogLevel, line: fmt::Arguments<'_>) {
        let (admitted, held_back) = self.limit.admit(self.kernel.counter(), self.kernel.counter_frequency());
        if held_back != 0 {
            self.kernel.log(level, format_args!("vm: {held_back} lines were held back"));
        }
        if admitted {
            self.kernel.log(level, line);
        }
    }

    /// Asks for a version; the answer is the lower and the higher one that the RMM speaks, and whether it agrees.
    pub fn version(&self, requested: u64) -> (RmiResult, u64, u64) {
        let (result, regs) = self.raw(fid::VERSION, [requested]);
        (result, regs[1], regs[2])
    }

    /// Feature register `index`.
    ///
    /// # Errors
    /// What the RMM answered, as for all methods here.
    pub fn features(&self, index: u64) -> RmiResult<u64> {
        self.call1(fid::FEATURES, [index])
    }

    /// Allocates a page and gives it to the RMM.
    ///
    /// # Errors
    /// `ENOMEM`, or what the RMM's refusal maps to.
    pub fn new_delegated(&self) -> Result<Delegated<K>, Errno> {
        let page = self.kernel.alloc_page(Fill::Any)?;
        self.delegate(page).map_err(|error| {
            self.log("delegate", error);
            error.into()
        })
    }

    /// Gives a page to the RMM. One that is refused is freed: it has stayed with the host.
    pub fn delegate(&self, page: K::Page) -> RmiResult<Delegated<K>> {
        let pa = page.pa();
        self.call(fid::GRANULE_DELEGATE, [pa])?;
        self.each_stats(|stats| stats.count_delegated(pa));
        Ok(Delegated::new(page))
    }

    /// Takes a page back. One that the RMM keeps is lost for ever and counted.
    pub fn undelegate(&self, granule: Delegated<K>) -> Option<K::Page> {
        match self.call(fid::GRANULE_UNDELEGATE, [granule.pa()]) {
            Ok(()) => {
                self.each_stats(Stats::count_undelegated);
                Some(granule.into_page())
            }
            Err(error) => {
                self.leak(granule, error);
                None
            }
        }
    }

    /// Gives a page up because the RMM did not let go of it.
    #[allow(clippy::needless_pass_by_value, reason = "the page's owner ends here")]
    pub fn leak(&self, granule: Delegated<K>, error: RmiError) {
        self.say(LogLevel::Error, format_args!("rmm: page {:#x} is lost: {error}", granule.pa()));
        self.each_stats(Stats::count_leaked);
    }

    #[allow(missing_docs)]
    pub fn realm_create(&self, rd: u64, params: u64) -> RmiResult {
        self.call(fid::REALM_CREATE, [rd, params])
    }

    #[allow(missing_docs)]
    pub fn realm_activate(&self, rd: u64) -> RmiResult {
        self.call(fid::REALM_ACTIVATE, [rd])
    }

    #[allow(missing_docs)]
    pub fn realm_destroy(&self, rd: u64) -> RmiResult {
        self.call(fid::REALM_DESTROY, [rd])
    }

    #[allow(missing_docs)]
    pub fn rec_aux_count(&self, rd: u64) -> RmiResult<u64> {
        self.call1(fid::REC_AUX_COUNT, [rd])
    }

    #[allow(missing_docs)]
    pub fn rec_create(&self, rd: u64, rec: u64, params: u64) -> RmiResult {
        self.call(fid::REC_CREATE, [rd, rec, params])
    }

    #[allow(missing_docs)]
    pub fn rec_destroy(&self, rec: u64) -> RmiResult {
        self.call(fid::REC_DESTROY, [rec])
    }

    /// Registers for `REC_ENTER`, which the vCPU's thread makes itself.
    #[must_use]
    pub fn rec_enter_regs(rec: u64, run: u64) -> SmcRegs {
        let mut regs: SmcRegs = [0; 18];
        regs[0] = fid::REC_ENTER;
        regs[1] = rec;
        regs[2] = run;
        regs
    }

    /// The result of a `REC_ENTER` that was made with [`Self::rec_enter_regs`].
    pub fn rec_entered(&self, regs: &SmcRegs) -> RmiResult {
        self.finish(fid::REC_ENTER, regs)
    }

    #[allow(missing_docs)]
    pub fn data_create(&self, rd: u64, data: u64, ipa: u64, src: u64, flags: u64) -> RmiResult {
        self.call(fid::DATA_CREATE, [rd, data, ipa, src, flags])
    }

    #[allow(missing_docs)]
    pub fn data_create_unknown(&self, rd: u64, data: u64, ipa: u64) -> RmiResult {
        self.call(fid::DATA_CREATE_UNKNOWN, [rd, data, ipa])
    }

    #[allow(missing_docs)]
    pub fn data_destroy(&self, rd: u64, ipa: u64) -> RmiResult<Destroyed> {
        let (result, regs) = self.raw(fid::DATA_DESTROY, [rd, ipa]);
        result.map(|()| Destroyed { pa: regs[1], top: regs[2] })
    }

    #[allow(missing_docs)]
    pub fn rtt_create(&self, rd: u64, rtt: u64, ipa: u64, level: i64) -> RmiResult {
        self.call(fid::RTT_CREATE, [rd, rtt, ipa, level_register(level)])
    }

    #[allow(missing_docs)]
    pub fn rtt_destroy(&self, rd: u64, ipa: u64, level: i64) -> RmiResult<Destroyed> {
        let (result, regs) = self.raw(fid::RTT_DESTROY, [rd, ipa, level_register(level)]);
        result.map(|()| Destroyed { pa: regs[1], top: regs[2] })
    }

    /// The granule that came free.
    #[allow(missing_docs)]
    pub fn rtt_fold(&self, rd: u64, ipa: u64, level: i64) -> RmiResult<u64> {
        self.call1(fid::RTT_FOLD, [rd, ipa, level_register(level)])
    }

    /// How far it got.
    #[allow(missing_docs)]
    pub fn rtt_init_ripas(&self, rd: u64, base: u64, top: u64) -> RmiResult<u64> {
        self.call1(fid::RTT_INIT_RIPAS, [rd, base, top])
    }

    /// How far it got.
    #[allow(missing_docs)]
    pub fn rtt_set_ripas(&self, rd: u64, rec: u64, base: u64, top: u64) -> RmiResult<u64> {
        self.call1(fid::RTT_SET_RIPAS, [rd, rec, base, top])
    }

    #[allow(missing_docs)]
    pub fn rtt_map_unprotected(&self, rd: u64, ipa: u64, level: i64, desc: u64) -> RmiResult {
        self.call(fid::RTT_MAP_UNPROTECTED, [rd, ipa, level_register(level), desc])
    }

    #[allow(missing_docs)]
    pub fn rtt_unmap_unprotected(&self, rd: u64, ipa: u64, level: i64) -> RmiResult {
        self.call(fid::RTT_UNMAP_UNPROTECTED, [rd, ipa, level_register(level)])
    }

    #[allow(missing_docs)]
    pub fn rtt_read_entry(&self, rd: u64, ipa: u64, level: i64) -> RmiResult<RttEntry> {
        let (result, regs) = self.raw(fid::RTT_READ_ENTRY, [rd, ipa, level_register(level)]);
        result.map(|()| RttEntry {
            level: i64::from_ne_bytes(regs[1].to_ne_bytes()),
            state: regs[2] & 0xFF,
            desc: regs[3],
            ripas: regs[4] & 0xFF,
        })
    }

    #[allow(missing_docs)]
    pub fn psci_complete(&self, calling: u64, target: u64, status: u64) -> RmiResult {
        self.call(fid::PSCI_COMPLETE, [calling, target, status])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_says_too_much_is_held_back_and_counted() {
        let limit = LogLimit::default();
        let said = (0..100).filter(|_| limit.admit(1000, 1000).0).count();
        assert_eq!(said, 10);
        assert_eq!(limit.admit(6000, 1000), (true, 90));
        assert_eq!(limit.admit(6000, 1000), (true, 0));
    }
}
