//! A device's thread, and what it shares with the CPUs' threads.
//!
//! CPUs never wait for a device. They leave an order and go on; a driver that resets a device sees in its status
//! register when that has happened. What waits for the device's thread is bounded: one order of each kind, whatever
//! the guest does meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use virtio_queue::{Queue, QueueT};

use super::config::ConfigSpace;
use super::interrupt::Interrupt;
use super::{Active, Device, F_EVENT_IDX, Served};
use crate::eventfd::EventFd;
use crate::memory::GuestView;
use crate::seccomp::Confinement;
use crate::{Error, Result};

/// Hears about guests that break the rules.
pub type Report = Arc<dyn Fn(&str) + Send + Sync>;

/// How long a device that is stopped may be busy with what it is connected to.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// So many mistakes of a driver are reported; a guest must not fill somebody's log.
const REPORTS: u32 = 20;
/// The most queues of a device.
const MAX_QUEUES: usize = 64;

/// What a device's thread and the CPUs' threads both touch.
pub struct Shared {
    orders: Mutex<Orders>,
    /// There is an order.
    wake: EventFd,
    /// The driver has notified a queue.
    kicks: Vec<EventFd>,
    /// An order waits: stop serving queues.
    pub attention: AtomicBool,
    /// A reset has not been carried out yet.
    pub resetting: AtomicBool,
    /// The driver has broken the rules, and has not reset the device since.
    pub broken: AtomicBool,
    /// The interrupts.
    pub interrupt: Interrupt,
    /// The device's configuration space.
    pub config: ConfigSpace,
}

/// What the CPUs' threads want of the device's thread. A reset comes before an activation.
#[derive(Default)]
struct Orders {
    reset: bool,
    activate: Option<Activation>,
    config_written: bool,
    stop: bool,
}

struct Activation {
    features: u64,
    queues: Vec<Option<Queue>>,
}

impl Shared {
    fn order(&self, urgent: bool, change: impl FnOnce(&mut Orders)) {
        let mut orders = self.lock();
        change(&mut orders);
        if urgent {
            self.attention.store(true, Ordering::Release);
        }
        drop(orders);
        self.wake.signal();
    }

    fn lock(&self) -> MutexGuard<'_, Orders> {
        // Orders are valid in any combination.
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Orders {
        self.wake.take();
        let mut orders = self.lock();
        self.attention.store(false, Ordering::Release);
        std::mem::take(&mut *orders)
    }
}

/// The CPUs' end of a device's thread.
pub struct Worker {
    /// What both touch.
    pub shared: Arc<Shared>,
    name: String,
    report: Report,
    /// The thread, and what closes when it ends.
    thread: Mutex<Option<(JoinHandle<()>, mpsc::Receiver<()>)>>,
}

impl Worker {
    /// Starts a device's thread.
    pub fn start(
        device: Box<dyn Device>,
        memory: Arc<GuestView>,
        interrupt: Interrupt,
        report: Report,
        confinement: Confinement,
    ) -> Result<Self> {
        let filter = confinement.device(device.system_calls())?;
        let name = device.name();
        let queues = device.queue_sizes().len();
        assert!(queues <= MAX_QUEUES, "{name} has {queues} queues");
        let shared = Arc::new(Shared {
            orders: Mutex::default(),
            wake: EventFd::new()?,
            kicks: (0..queues).map(|_| EventFd::new()).collect::<Result<_>>()?,
            attention: AtomicBool::new(false),
            resetting: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            interrupt,
            config: ConfigSpace::new(device.config(), device.config_writable()),
        });
        let (ends, ended) = mpsc::channel();
        let (confined, is_confined) = mpsc::channel();
        let mut thread = Thread {
            device,
            memory,
            shared: shared.clone(),
            report: report.clone(),
            reports: 0,
            active: None,
        };
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || {
                let _ends: mpsc::Sender<()> = ends;
                let entered = filter.enter();
                let may_run = entered.is_ok();
                let _ = confined.send(entered);
                if may_run {
                    thread.run();
                }
            })
            .map_err(|error| Error::os("starting a device's thread", &error))?;
        is_confined.recv().unwrap_or_else(|error| Err(Error::vmm(error.to_string())))?;
        Ok(Self { shared, name, report, thread: Mutex::new(Some((thread, ended))) })
    }

    /// The driver notifies a queue.
    pub fn kick(&self, queue: usize) {
        if let Some(kick) = self.shared.kicks.get(queue) {
            kick.signal();
        }
    }

    /// What a notification of each queue signals.
    pub fn doorbells(&self) -> &[EventFd] {
        &self.shared.kicks
    }

    /// The driver is ready.
    pub fn activate(&self, features: u64, queues: Vec<Option<Queue>>) {
        self.shared.order(false, |orders| orders.activate = Some(Activation { features, queues }));
    }

    /// The driver resets the device. [`Shared::resetting`] ends when the device has let go of the guest's memory.
    pub fn reset(&self) {
        self.shared.order(true, |orders| {
            self.shared.resetting.store(true, Ordering::Release);
            (orders.reset, orders.activate) = (true, None);
        });
    }

    /// The driver has written the device's configuration space.
    pub fn config_written(&self) {
        self.shared.order(false, |orders| orders.config_written = true);
    }

    /// Ends the thread; what the guest has written before is served first. A device that is stuck is left behind.
    pub fn stop(&self) {
        self.shared.order(false, |orders| orders.stop = true);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((thread, ended)) = thread else { return };
        match ended.recv_timeout(STOP_PATIENCE) {
            Err(mpsc::RecvTimeoutError::Timeout) => (self.report)(&format!(
                "{}: it is still busy after {} s and is left behind",
                self.name,
                STOP_PATIENCE.as_secs()
            )),
            _ => drop(thread.join()),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Thread {
    device: Box<dyn Device>,
    memory: Arc<GuestView>,
    shared: Arc<Shared>,
    report: Report,
    reports: u32,
    active: Option<Active>,
}

impl Thread {
    fn run(&mut self) {
        let wait = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let queues = self.shared.kicks.len();
        let mut fds = Vec::new();
        loop {
            fds.clear();
            fds.push(wait(self.shared.wake.fd()));
            // The last queue first: they are looked at in this order, so whoever sees a queue's notification sees those
            // of earlier queues that came before it.
            fds.extend(self.shared.kicks.iter().rev().map(|kick| wait(kick.fd())));
            if let Some(active) = &self.active {
                fds.extend(self.device.wait_for(active));
            }
            let count = libc::nfds_t::try_from(fds.len()).unwrap_or(0);
            // SAFETY: the vector is valid for its length.
            unsafe { libc::poll(fds.as_mut_ptr(), count, -1) };
            let mut kicks = 0;
            for (index, kick) in self.shared.kicks.iter().enumerate() {
                if fds[queues - index].revents != 0 && kick.take() != 0 {
                    kicks |= 1 << index;
                }
            }
            let orders = self.shared.take();
            if orders.reset {
                self.reset();
            }
            if let Some(activation) = orders.activate {
                kicks |= self.activate(activation);
            }
            if let Err(broken) = self.serve(orders.config_written, kicks, &fds[1 + queues..]) {
                self.fail(&broken.0);
            }
            if orders.stop {
                return;
            }
        }
    }

    fn serve(&mut self, config_written: bool, kicks: u64, fds: &[libc::pollfd]) -> Served {
        let Some(active) = &mut self.active else { return Ok(()) };
        if config_written {
            self.device.config_written(active)?;
        }
        for index in (0..MAX_QUEUES).filter(|index| kicks >> index & 1 != 0) {
            self.device.queue(index, active)?;
        }
        for (index, _) in fds.iter().enumerate().filter(|(_, fd)| fd.revents != 0) {
            self.device.ready(index, active)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.device.reset();
        self.shared.broken.store(false, Ordering::Release);
        if let Err(error) = self.shared.interrupt.clear() {
            (self.report)(&error.to_string());
        }
        let orders = self.shared.lock();
        if !orders.reset {
            self.shared.resetting.store(false, Ordering::Release);
        }
    }

    /// Gives the queues that may hold something already.
    fn activate(&mut self, Activation { features, mut queues }: Activation) -> u64 {
        let mut kicks = 0;
        for (index, queue) in queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            queue.set_event_idx(features & F_EVENT_IDX != 0);
            if !queue.is_valid(&*self.memory) {
                self.fail(&format!("the rings of queue {index} are not in shared memory"));
                return 0;
            }
            // What the driver has put there before needs no further notification.
            kicks |= 1 << index;
        }
        let memory = self.memory.clone();
        let mut active = Active { memory, features, queues, untold: 0, shared: self.shared.clone() };
        match self.device.activate(&mut active) {
            Ok(()) => self.active = Some(active),
            Err(broken) => self.fail(&broken.0),
        }
        kicks
    }

    fn fail(&mut self, what: &str) {
        self.active = None;
        self.shared.broken.store(true, Ordering::Release);
        if self.reports < REPORTS {
            self.reports += 1;
            let last = if self.reports == REPORTS { " (nothing more is said about this device)" } else { "" };
            (self.report)(&format!("{}: {what}{last}", self.device.name()));
        }
        if let Err(error) = self.shared.interrupt.config() {
            (self.report)(&error.to_string());
        }
    }
}
