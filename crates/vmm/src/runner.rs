//! Runs a machine: one thread for each CPU.

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use cca_abi::kvm::exit;

use crate::bus::{Bus, SerialPort, SetLine, Sink};
use crate::kvm::{Exit, Vcpu, Vm};
use crate::layout::{
    PCI_ECAM_BASE, PCI_ECAM_SIZE, PCI_MMIO_BASE, PCI_MMIO_SIZE, PCI_SLOTS, RTC_BASE, RTC_SIZE, UART_SIZE,
    UART_SPI, UART0_BASE,
};
use crate::machine::{Machine, Memory};
use crate::pci::{Function, Host};
use crate::rtc::Rtc;
use crate::seccomp::Confinement;
use crate::virtio::Device;
use crate::virtio::transport::VirtioPci;
use crate::virtio::worker::Report;
use crate::wiring::{KvmWiring, Wiring};
use crate::{Error, Layer, Result};

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest switched it off.
    PowerOff,
    /// The guest wants to be started again.
    Reset,
    /// The guest reports that it crashed.
    Crash,
}

/// Called once for each CPU that ends the machine; the first call counts.
pub type OnEnd = Box<dyn Fn(Result<Ending>) + Send + Sync>;

struct Shared {
    vcpus: Vec<Vcpu>,
    memory: Memory,
    vm: Arc<Vm>,
    bus: Bus,
    serial: Arc<SerialPort>,
    devices: Vec<Arc<VirtioPci>>,
    stop: AtomicBool,
    on_end: OnEnd,
}

/// A machine whose CPUs run.
pub struct Runner {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").finish_non_exhaustive()
    }
}

impl Runner {
    /// Starts the devices and the CPUs, each in a thread that can do its work and nothing else. Output of the serial port
    /// goes to `serial`; `report` hears about guests that break their devices' rules.
    pub fn start(
        machine: Machine,
        serial: Sink,
        devices: Vec<Box<dyn Device>>,
        report: Report,
        confinement: Confinement,
        on_end: OnEnd,
    ) -> Result<Self> {
        install_kick_handler()?;
        confinement.prepare()?;
        if devices.len() > PCI_SLOTS {
            return Err(Error::vmm(format!("{} devices; {PCI_SLOTS} are possible", devices.len())));
        }
        let Machine { vcpus, vm, memory, has_its } = machine;
        let vm = Arc::new(vm);
        let wiring: Arc<dyn Wiring> = Arc::new(KvmWiring::new(vm.clone(), memory.alias(), has_its));
        let lines = wiring.clone();
        let set_line: SetLine = Arc::new(move |spi, level| lines.set_line(spi, level));
        let view = Arc::new(memory.view());
        let devices = devices
            .into_iter()
            .enumerate()
            .map(|(slot, device)| {
                VirtioPci::new(slot, device, view.clone(), wiring.clone(), report.clone(), confinement)
                    .map(Arc::new)
            })
            .collect::<Result<Vec<_>>>()?;
        let pci = Host::new(devices.iter().map(|device| device.clone() as Arc<dyn Function>).collect());
        let serial = Arc::new(SerialPort::new(serial, UART_SPI, set_line));
        let mut bus = Bus::default();
        bus.add(UART0_BASE, UART_SIZE, serial.clone());
        bus.add(RTC_BASE, RTC_SIZE, Arc::new(Rtc::default()));
        bus.add(PCI_ECAM_BASE, PCI_ECAM_SIZE, pci.ecam());
        bus.add(PCI_MMIO_BASE, PCI_MMIO_SIZE, pci.registers());
        let stop = AtomicBool::new(false);
        let shared = Arc::new(Shared { vcpus, memory, vm, bus, serial, devices, stop, on_end });
        let mut runner = Self { shared, threads: Vec::new() };
        let filter = confinement.cpu()?;
        for index in 0..runner.shared.vcpus.len() {
            let (shared, filter) = (runner.shared.clone(), filter.clone());
            let thread =
                std::thread::Builder::new().name(format!("cpu{index}")).spawn(move || match filter.enter() {
                    Ok(()) => run_cpu(&shared, index),
                    Err(error) => (shared.on_end)(Err(error)),
                });
            runner.threads.push(thread.map_err(|error| Error::os("starting a CPU's thread", &error))?);
        }
        Ok(runner)
    }

    /// Types on the guest's serial port.
    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        self.shared.serial.send(bytes)
    }

    /// Stops all CPUs and waits for their threads. The machine is gone afterwards.
    pub fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for (vcpu, thread) in self.shared.vcpus.iter().zip(&self.threads) {
            vcpu.stop_soon(true);
            // SAFETY: the thread has not been joined, so its identifier is valid even if it has ended.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), KICK) };
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        for device in &self.shared.devices {
            device.stop();
        }
        self.shared.serial.flush();
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run_cpu(shared: &Shared, index: usize) {
    let vcpu = &shared.vcpus[index];
    let mut faults = Faults::default();
    while !shared.stop.load(Ordering::SeqCst) {
        match step(shared, vcpu, &mut faults) {
            Ok(None) => {}
            Ok(Some(ending)) => return (shared.on_end)(Ok(ending)),
            Err(error) => return (shared.on_end)(Err(error)),
        }
    }
}

/// Notices a CPU that asks for the same memory again and again: it waits for contents that were destroyed when it, or
/// another CPU, used the page in the other way, and which nobody can give back.
#[derive(Debug, Default)]
struct Faults {
    last: Option<Exit>,
    repeated: u32,
}

impl Faults {
    /// More than any guest asks for on purpose without doing anything else.
    const PATIENCE: u32 = 1000;

    fn check(&mut self, exit: Exit) -> Result<()> {
        let Exit::MemoryFault { address, .. } = exit else {
            // A kick says nothing about the guest.
            if exit != Exit::Interrupted {
                *self = Self::default();
            }
            return Ok(());
        };
        self.repeated = if self.last == Some(exit) { self.repeated + 1 } else { 0 };
        self.last = Some(exit);
        if self.repeated < Self::PATIENCE {
            return Ok(());
        }
        Err(Error::new(
            Layer::Guest,
            format!(
                "it waits for the memory at {address:#x}, whose contents were destroyed when it was shared"
            ),
        ))
    }
}

fn step(shared: &Shared, vcpu: &Vcpu, faults: &mut Faults) -> Result<Option<Ending>> {
    let exit = vcpu.run();
    faults.check(exit)?;
    match exit {
        Exit::Read { address, len } => vcpu.answer_read(shared.bus.read(address, len)?),
        Exit::Write { address, data, len } => shared.bus.write(address, &data[..len])?,
        Exit::MemoryFault { address, size, private } => {
            shared.memory.convert(&shared.vm, address, size, private)?
        }
        Exit::System(exit::SYSTEM_EVENT_SHUTDOWN) => return Ok(Some(Ending::PowerOff)),
        Exit::System(exit::SYSTEM_EVENT_RESET) => return Ok(Some(Ending::Reset)),
        Exit::System(exit::SYSTEM_EVENT_CRASH) => return Ok(Some(Ending::Crash)),
        Exit::System(event) => {
            return Err(Error::new(Layer::Module, format!("the unknown system event {event}")));
        }
        Exit::Interrupted => {}
        // Another CPU may be about to report that the machine is off; do not keep it from doing so.
        Exit::Again => std::thread::yield_now(),
        Exit::Broken(reason, detail) => {
            return Err(Error::new(
                Layer::Module,
                format!("the CPU cannot go on: exit reason {reason}, detail {detail:#x}"),
            ));
        }
        Exit::Refused(errno) => {
            let layer = if errno == libc::ENXIO { Layer::Rmm } else { Layer::Module };
            let error = std::io::Error::from_raw_os_error(errno);
            return Err(Error::new(
                layer,
                format!("running the CPU: {error} (the host kernel's log says more)"),
            ));
        }
    }
    Ok(None)
}

/// The signal that makes a CPU's thread come back from the kernel.
const KICK: libc::c_int = libc::SIGUSR1;

fn install_kick_handler() -> Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: a zeroed `sigaction` is a valid one; the handler does nothing, and is there so that the signal
    // interrupts system calls without ending the process.
    let status = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(KICK, &raw const action, std::ptr::null_mut())
    };
    if status != 0 {
        return Err(Error::os("installing a signal handler", &std::io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_waits_for_destroyed_memory_is_noticed_and_one_that_moves_on_is_not() {
        let fault = |address| Exit::MemoryFault { address, size: 0x1000, private: true };
        let mut faults = Faults::default();
        for n in 0..5000 {
            faults.check(fault(n % 2)).unwrap();
        }
        for _ in 0..5 {
            for _ in 0..Faults::PATIENCE {
                faults.check(fault(7)).unwrap();
                faults.check(Exit::Interrupted).unwrap();
            }
            faults.check(Exit::Again).unwrap();
        }
        let stuck = (0..5000).find(|_| faults.check(fault(7)).is_err());
        assert_eq!(stuck, Some(Faults::PATIENCE));
    }
}
