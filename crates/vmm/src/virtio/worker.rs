//! A device's thread, and what it shares with the CPUs' threads.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use virtio_queue::{Queue, QueueT};

use super::{Active, Device, F_EVENT_IDX, Served};
use crate::bus::SetLine;
use crate::mailbox::{Receiver, Sender, mailbox};
use crate::memory::GuestView;
use crate::{Error, Result};

/// Hears about guests that break the rules.
pub type Report = Arc<dyn Fn(&str) + Send + Sync>;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// The interrupt line of a device, level-triggered: high while there is a cause that the driver has not read.
pub struct Interrupt {
    state: Mutex<Line>,
    spi: u32,
    set_line: SetLine,
}

#[derive(Default)]
struct Line {
    isr: u8,
    disabled: bool,
    level: bool,
}

impl Interrupt {
    /// A quiet line.
    #[must_use]
    pub fn new(spi: u32, set_line: SetLine) -> Self {
        Self { state: Mutex::default(), spi, set_line }
    }

    fn change(&self, change: impl FnOnce(&mut Line)) -> Result<()> {
        let mut line = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut line);
        let level = line.isr != 0 && !line.disabled;
        if level != line.level {
            line.level = level;
            (self.set_line)(self.spi, level)?;
        }
        Ok(())
    }

    /// Something has been given back.
    pub fn queue(&self) -> Result<()> {
        self.change(|line| line.isr |= ISR_QUEUE)
    }

    /// The device's state has changed.
    pub fn config(&self) -> Result<()> {
        self.change(|line| line.isr |= ISR_CONFIG)
    }

    /// The driver reads the causes, which clears them.
    pub fn take(&self) -> Result<u8> {
        let mut isr = 0;
        self.change(|line| isr = std::mem::take(&mut line.isr))?;
        Ok(isr)
    }

    /// The guest forbids or allows the line.
    pub fn disable(&self, disabled: bool) -> Result<()> {
        self.change(|line| line.disabled = disabled)
    }
}

/// What a device's thread and the CPUs' threads both touch.
pub struct Shared {
    /// The driver has notified these queues.
    kicks: AtomicU64,
    /// A command waits: stop serving queues.
    pub attention: AtomicBool,
    /// The driver has broken the rules, and has not reset the device since.
    pub broken: AtomicBool,
    /// The interrupt line.
    pub interrupt: Interrupt,
}

enum Command {
    Activate { features: u64, queues: Vec<Option<Queue>> },
    Reset(mpsc::Sender<()>),
    Stop,
}

/// The CPUs' end of a device's thread.
pub struct Worker {
    /// What both touch.
    pub shared: Arc<Shared>,
    commands: Sender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Worker {
    /// Starts a device's thread.
    pub fn start(
        device: Box<dyn Device>,
        memory: Arc<GuestView>,
        interrupt: Interrupt,
        report: Report,
    ) -> Result<Self> {
        let (commands, inbox) = mailbox()?;
        let shared = Arc::new(Shared {
            kicks: AtomicU64::new(0),
            attention: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            interrupt,
        });
        let mut thread = Thread { device, memory, shared: shared.clone(), report, active: None };
        let thread = std::thread::Builder::new()
            .name(thread.device.name())
            .spawn(move || thread.run(&inbox))
            .map_err(|error| Error::os("starting a device's thread", &error))?;
        Ok(Self { shared, commands, thread: Mutex::new(Some(thread)) })
    }

    /// The driver notifies a queue.
    pub fn kick(&self, queue: u16) {
        if queue < 64 {
            self.shared.kicks.fetch_or(1 << queue, Ordering::AcqRel);
            self.commands.wake();
        }
    }

    /// The driver is ready.
    pub fn activate(&self, features: u64, queues: Vec<Option<Queue>>) {
        self.commands.send(Command::Activate { features, queues });
    }

    /// The driver resets the device; when this returns, the device has let go of the guest's memory.
    pub fn reset(&self) {
        let (done, wait) = mpsc::channel();
        self.shared.attention.store(true, Ordering::Release);
        self.commands.send(Command::Reset(done));
        let _ = wait.recv();
    }

    /// Ends the thread; what the guest has written before is served first.
    pub fn stop(&self) {
        self.commands.send(Command::Stop);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
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
    active: Option<Active>,
}

impl Thread {
    fn run(&mut self, inbox: &Receiver<Command>) {
        loop {
            let mut fds = vec![libc::pollfd { fd: inbox.fd(), events: libc::POLLIN, revents: 0 }];
            if let Some(active) = &self.active {
                fds.extend(self.device.wait_for(active));
            }
            let count = libc::nfds_t::try_from(fds.len()).unwrap_or(0);
            // SAFETY: the vector is valid for its length.
            unsafe { libc::poll(fds.as_mut_ptr(), count, -1) };
            let commands = inbox.drain();
            self.shared.attention.store(false, Ordering::Release);
            let mut stop = false;
            for command in commands {
                match command {
                    Command::Activate { features, queues } => self.activate(features, queues),
                    Command::Reset(done) => {
                        self.active = None;
                        self.device.reset();
                        self.shared.broken.store(false, Ordering::Release);
                        let _ = done.send(());
                    }
                    Command::Stop => stop = true,
                }
            }
            if let Err(broken) = self.serve(&fds[1..]) {
                self.fail(&broken.0);
            }
            if stop {
                return;
            }
        }
    }

    fn serve(&mut self, fds: &[libc::pollfd]) -> Served {
        let kicks = self.shared.kicks.swap(0, Ordering::AcqRel);
        let Some(active) = &mut self.active else { return Ok(()) };
        for index in (0..64).filter(|index| kicks >> index & 1 != 0) {
            self.device.queue(index, active)?;
        }
        for (index, _) in fds.iter().enumerate().filter(|(_, fd)| fd.revents != 0) {
            self.device.ready(index, active)?;
        }
        Ok(())
    }

    fn activate(&mut self, features: u64, mut queues: Vec<Option<Queue>>) {
        for (index, queue) in queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            queue.set_event_idx(features & F_EVENT_IDX != 0);
            if !queue.is_valid(&*self.memory) {
                return self.fail(&format!("the rings of queue {index} are not in shared memory"));
            }
            // What the driver has put there before needs no further notification.
            self.shared.kicks.fetch_or(1 << index, Ordering::AcqRel);
        }
        let memory = self.memory.clone();
        let mut active = Active { memory, features, queues, shared: self.shared.clone() };
        match self.device.activate(&mut active) {
            Ok(()) => self.active = Some(active),
            Err(broken) => self.fail(&broken.0),
        }
    }

    fn fail(&mut self, what: &str) {
        (self.report)(&format!("{}: {what}", self.device.name()));
        self.active = None;
        self.shared.broken.store(true, Ordering::Release);
        if let Err(error) = self.shared.interrupt.config() {
            (self.report)(&error.to_string());
        }
    }
}
