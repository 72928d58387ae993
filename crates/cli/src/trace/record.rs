//! Records a run on the machine where it runs: the module's trace events, in a trace instance of our own, so that nobody
//! else's tracing is disturbed; its counters, sampled; and what the run reports.
//!
//! The kernel's buffers are bounded. A thread empties them every tenth of a second; what had no room in between is counted
//! by the kernel and told in the recording.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::frames::{self, Frame};
use crate::run::{self, RunOptions};

/// Where the kernel's tracer is.
const TRACEFS: &str = "/sys/kernel/tracing";
/// The module's counters.
const COUNTERS: &str = "/sys/kernel/debug/kvm-realm/stats";
/// The events that are recorded.
const EVENTS: [&str; 4] = ["rmi", "enter", "exit", "fault"];
/// The buffer of each CPU.
const BUFFER_KIB: u32 = 4096;
/// How often buffers are emptied.
const PERIOD: Duration = Duration::from_millis(100);
/// How often counters are sampled.
const SAMPLES: Duration = Duration::from_millis(500);
/// What is told at once when the command has ended: `command-done` ends the emulated machine.
pub(super) const COMMAND_ENDED: &str = "command-ended";
/// The longest page of a buffer.
const LONGEST_PAGE: usize = 64 << 10;

/// Runs and records to a file, or to a port.
pub(crate) fn run(options: &RunOptions, to: &Path) -> Result<u8> {
    let sink = OpenOptions::new().create(true).truncate(true).write(true).open(to);
    let sink = Sink(Arc::new(Mutex::new(sink.with_context(|| format!("cannot write {}", to.display()))?)));
    sink.begin()?;
    let recorder = Recorder::start(&sink)?;

    // The run's reports are recorded, and go on to whoever wants them. The end of the command is told when the recording
    // is complete: the emulated machine ends with it.
    let (reader, writer) = pipe()?;
    let mut onward = options.events_fd.map(own).transpose()?;
    let relay = {
        let sink = sink.clone();
        std::thread::spawn(move || {
            let mut held = None;
            for line in BufReader::new(File::from(reader)).lines().map_while(std::result::Result::ok) {
                sink.put(&Frame::Event(line.clone()));
                if line.contains("\"command-done\"") {
                    if let Some(file) = &mut onward {
                        let _ =
                            writeln!(file, "{{\"stage\":\"{COMMAND_ENDED}\",\"ns\":{}}}", run::events::now());
                    }
                    held = Some(line);
                } else if let Some(file) = &mut onward {
                    let _ = writeln!(file, "{line}");
                }
            }
            (held, onward)
        })
    };
    sink.put(&Frame::Event(format!("{{\"stage\":\"started\",\"ns\":{}}}", run::events::now())));
    let result = run::run_on_device(&RunOptions { events_fd: Some(writer.as_raw_fd()), ..options.clone() });
    drop(writer);
    let (held, onward) = relay.join().map_err(|_| anyhow::anyhow!("the relay of reports panicked"))?;
    recorder.finish(&sink)?;
    sink.put(&Frame::End(u64::from(*result.as_ref().unwrap_or(&crate::FAILURE))));
    sink.check()?;
    if let (Some(line), Some(mut file)) = (held, onward) {
        let _ = writeln!(file, "{line}");
    }
    result
}

/// Where frames go. A recording that cannot be written any more does not end the run, but the command.
#[derive(Clone)]
struct Sink(Arc<Mutex<File>>);

static BROKEN: AtomicBool = AtomicBool::new(false);

impl Sink {
    fn begin(&self) -> Result<()> {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        frames::begin(&mut *file).context("cannot write the recording")
    }

    fn put(&self, frame: &Frame) {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if frame.write(&mut *file).is_err() {
            BROKEN.store(true, Ordering::Relaxed);
        }
    }

    fn check(&self) -> Result<()> {
        ensure!(!BROKEN.load(Ordering::Relaxed), "the recording could not be written completely");
        Ok(())
    }
}

/// A trace instance, and the thread that empties it.
struct Recorder {
    instance: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Recorder {
    fn start(sink: &Sink) -> Result<Self> {
        let tracefs = tracefs()?;
        let instance = tracefs.join(format!("instances/kvm-realm-{}", std::process::id()));
        std::fs::create_dir(&instance)
            .with_context(|| format!("cannot make {} (are you root?)", instance.display()))?;
        // From here on the instance is removed whatever happens.
        let mut recorder = Self { instance, stop: Arc::default(), thread: None };
        let events = recorder.instance.join("events/kvm_realm");
        ensure!(events.is_dir(), "the kernel has no events of the module: is it loaded?");
        recorder.set("trace_clock", "mono")?;
        recorder.set("buffer_size_kb", &BUFFER_KIB.to_string())?;
        // What came first is kept: a time line without its beginning is none.
        recorder.set("options/overwrite", "0")?;
        for event in EVENTS {
            sink.put(&Frame::Format(read(&events.join(event).join("format"))?));
        }
        let cpus = recorder.cpus()?;
        sink.put(&clock());
        sink.put(&Frame::Counters(run::events::now(), read(Path::new(COUNTERS))?));
        for event in EVENTS {
            recorder.set(&format!("events/kvm_realm/{event}/enable"), "1")?;
        }
        let (stop, sink) = (recorder.stop.clone(), sink.clone());
        let thread = std::thread::Builder::new().name("recorder".into()).spawn(move || {
            let mut cpus = cpus;
            let mut sampled = Instant::now();
            while !stop.load(Ordering::SeqCst) {
                std::thread::sleep(PERIOD);
                empty(&mut cpus, &sink);
                if sampled.elapsed() >= SAMPLES {
                    sampled = Instant::now();
                    if let Ok(text) = read(Path::new(COUNTERS)) {
                        sink.put(&Frame::Counters(run::events::now(), text));
                    }
                }
            }
            empty(&mut cpus, &sink);
        })?;
        recorder.thread = Some(thread);
        Ok(recorder)
    }

    fn set(&self, name: &str, value: &str) -> Result<()> {
        let path = self.instance.join(name);
        std::fs::write(&path, value).with_context(|| format!("cannot write {value} to {}", path.display()))
    }

    /// The raw buffers of all CPUs.
    fn cpus(&self) -> Result<Vec<(u32, File)>> {
        let mut cpus = Vec::new();
        for entry in std::fs::read_dir(self.instance.join("per_cpu"))?.flatten() {
            let number = entry.file_name().to_str().and_then(|name| name.strip_prefix("cpu")?.parse().ok());
            let Some(number) = number else { continue };
            let path = entry.path().join("trace_pipe_raw");
            let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
            cpus.push((number, file.with_context(|| format!("cannot read {}", path.display()))?));
        }
        Ok(cpus)
    }

    /// Events for which there was no room.
    fn lost(&self) -> u64 {
        let entries = std::fs::read_dir(self.instance.join("per_cpu")).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| read(&entry.path().join("stats")).ok())
            .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .filter_map(|line| {
                let (name, value) = line.split_once(": ")?;
                let counts = ["overrun", "commit overrun", "dropped events"].contains(&name);
                if counts { value.trim().parse::<u64>().ok() } else { None }
            })
            .sum()
    }

    /// Stops recording, and writes what is still there.
    fn finish(mut self, sink: &Sink) -> Result<()> {
        self.set("tracing_on", "0")?;
        sink.put(&Frame::Counters(run::events::now(), read(Path::new(COUNTERS))?));
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow::anyhow!("the recorder panicked"))?;
        }
        sink.put(&Frame::Lost(self.lost()));
        Ok(())
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_dir(&self.instance);
    }
}

/// Takes everything that is in the buffers.
fn empty(cpus: &mut [(u32, File)], sink: &Sink) {
    let mut buffer = vec![0; LONGEST_PAGE];
    for (number, file) in cpus {
        while let Ok(count @ 1..) = file.read(&mut buffer) {
            sink.put(&Frame::Page(*number, buffer[..count].to_vec()));
        }
    }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The tracer's file system, mounted if nobody has.
fn tracefs() -> Result<PathBuf> {
    let path = PathBuf::from(TRACEFS);
    if !path.join("instances").is_dir() {
        // SAFETY: strings that live through the call, no data.
        let result = unsafe {
            libc::mount(
                c"tracefs".as_ptr(),
                c"/sys/kernel/tracing".as_ptr(),
                c"tracefs".as_ptr(),
                0,
                std::ptr::null(),
            )
        };
        let error = std::io::Error::last_os_error();
        ensure!(result == 0, "cannot mount the kernel's tracer at {TRACEFS}: {error} (are you root?)");
    }
    Ok(path)
}

/// The machine's counter and the kernel's clock at the same moment.
fn clock() -> Frame {
    let (counter, frequency) = counter();
    Frame::Clock(counter, run::events::now(), frequency)
}

#[cfg(target_arch = "aarch64")]
fn counter() -> (u64, u64) {
    let (value, frequency);
    // SAFETY: reads two registers that Linux lets programs read.
    unsafe {
        std::arch::asm!("isb", "mrs {}, cntvct_el0", "mrs {}, cntfrq_el0", out(reg) value, out(reg) frequency,
            options(nostack, nomem));
    }
    (value, frequency)
}

/// Where there is no such counter, nothing runs either.
#[cfg(not(target_arch = "aarch64"))]
fn counter() -> (u64, u64) {
    (run::events::now(), 1_000_000_000)
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: pipe2 writes two descriptors, which nobody else owns.
    unsafe {
        ensure!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) == 0, "{}", std::io::Error::last_os_error());
        Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
    }
}

/// A descriptor that somebody gave us, as a file of our own.
fn own(fd: i32) -> Result<File> {
    // SAFETY: `dup` refuses a number that is no descriptor; what it gives is ours.
    unsafe {
        let fd = libc::dup(fd);
        ensure!(fd >= 0, "--events-fd: {}", std::io::Error::last_os_error());
        Ok(File::from_raw_fd(fd))
    }
}
