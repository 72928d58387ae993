//! Drives a machine that runs: follows its consoles, talks to the agent, moves bytes, keeps the time limits.
//!
//! One thread, one poll loop. Every wait is bounded: by the next milestone's limit, or by the job's own.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use super::complaints;
use super::machine::{Follow, Machine, log};
use super::protocol::{Event, Io, Lines, Request, encode};
use super::report::{Failure, fatal};
use super::stages::{self, Milestone, Timeline};
use super::terminal::{Escape, EscapeKind, RawMode};
use crate::life::owner::Owner;
use crate::log::Ring;
use crate::run::launch::{self, Check, Verdict};
use crate::ui;

/// How often the consoles' files are looked at.
const TICK: libc::c_int = 20;
/// What is kept of input that nobody in the machine takes.
const INPUT: usize = 64 << 10;
/// How long to collect more output after a fatal line.
const AFTERMATH: Duration = Duration::from_millis(700);
/// How long the machine may take to switch itself off. Nothing of it is kept, so there is no point in patience.
const POWER_OFF: Duration = Duration::from_secs(2);

/// What to do with the machine.
pub(crate) struct Job {
    /// The program on the host; none for a payload that ends by itself.
    pub(crate) argv: Option<Vec<String>>,
    /// Its streams.
    pub(crate) io: Io,
    /// Load the module first.
    pub(crate) module: bool,
    /// It takes --events-fd.
    pub(crate) events: bool,
    /// The stages to come, in their order.
    pub(crate) milestones: Vec<Milestone>,
    /// A limit for everything after the last milestone.
    pub(crate) timeout: Option<Duration>,
    /// Multiplies every limit.
    pub(crate) patience: f64,
    /// Show all consoles on stderr.
    pub(crate) verbose: bool,
    /// Say when stages are reached.
    pub(crate) progress: bool,
    /// Keep what the program prints instead of printing it.
    pub(crate) capture: bool,
    /// What the Realm's token is held against, if it is to report.
    pub(crate) check: Option<Check>,
}

/// How it went.
pub(crate) struct Outcome {
    /// The program's status.
    pub(crate) status: u8,
    /// What it printed, with `capture`.
    pub(crate) stdout: Vec<u8>,
    /// What it reported beside stages.
    pub(crate) notes: Vec<serde_json::Value>,
    /// The lines in which the host kernel complained.
    pub(crate) complaints: Vec<String>,
}

struct Session<'a> {
    job: &'a Job,
    machine: Machine,
    timeline: &'a mut Timeline,
    expected: VecDeque<Milestone>,
    deadline: Option<Instant>,
    control_lines: Lines,
    programs: Ring,
    guest_log: Ring,
    input: Vec<u8>,
    outcome: Outcome,
    watch: complaints::Watch,
    stdout_bytes: u64,
    exit: Option<(u8, u64)>,
    failure: Option<(Instant, String, String)>,
    raw: Option<RawMode>,
    quit: bool,
    owner: Option<&'a mut Owner>,
}

/// Does the job and ends the machine. A failure of the machine is a [`Failure`] inside the error.
///
/// A Realm's owner is told when it runs, and its sockets lead into the machine.
pub(crate) fn run<'a>(
    mut machine: Machine,
    job: &'a Job,
    timeline: &'a mut Timeline,
    mut owner: Option<&'a mut Owner>,
) -> Result<Outcome> {
    let directory = machine.directory.clone();
    if let Some(owner) = &mut owner {
        owner.logs_to(directory.join(log::GUEST));
        if let Some(port) = machine.tunnel.take() {
            crate::life::owner::forward(&owner.sockets(), port)?;
        }
    }
    let create = |name: &str| {
        Ring::create(directory.join(name))
            .with_context(|| format!("cannot write {name} in {}", directory.display()))
    };
    let mut session = Session {
        job,
        timeline,
        expected: job.milestones.iter().copied().collect(),
        deadline: None,
        control_lines: Lines::default(),
        programs: create(log::PROGRAM)?,
        guest_log: create(log::GUEST)?,
        input: Vec::new(),
        outcome: Outcome { status: 125, stdout: Vec::new(), notes: Vec::new(), complaints: Vec::new() },
        watch: complaints::Watch::default(),
        stdout_bytes: 0,
        exit: None,
        failure: None,
        raw: None,
        quit: false,
        owner,
        machine,
    };
    session.restart_deadline();
    let result = session.work();
    session.raw = None;
    result.map(|()| session.outcome)
}

impl Session<'_> {
    fn work(&mut self) -> Result<()> {
        let mut host = Follow::new(self.machine.directory.join(log::HOST));
        let mut el3 = Follow::new(self.machine.directory.join(log::EL3));
        let escape_kind =
            if self.job.io == Io::Terminal { EscapeKind::CtrlBracket } else { EscapeKind::CtrlA };
        let escape = Escape::new(escape_kind);
        let interactive = matches!(self.job.io, Io::Console | Io::Terminal);
        let forwards = self.job.io == Io::Exec && !self.job.capture;
        let mut stdin_open = interactive || forwards;
        let mut escape = if forwards { None } else { Some(escape) };
        loop {
            let ready = self.poll(stdin_open && self.wants_input());
            if ready.stdin {
                stdin_open = self.read_stdin(escape.as_mut())?;
            }
            self.flush_input();
            if !stdin_open && self.input.is_empty() {
                // The program sees the end of its input.
                self.machine.stdin = None;
            }
            self.read_stdout()?;
            self.read_console()?;
            self.read_terminal()?;
            self.read_control()?;
            self.consoles(&mut el3, &mut host)?;
            if self.quit {
                self.outcome.status = 0;
                // The shell that started us wants to begin at the left.
                self.show(b"\r\n")?;
                let _ = self.send(&Request::PowerOff);
                self.machine.finish(Duration::from_secs(2));
                return Ok(());
            }
            if let Some((status, bytes)) = self.exit {
                if self.stdout_bytes >= bytes && self.failure.is_none() {
                    self.outcome.status = status;
                    self.read_console()?;
                    let _ = self.send(&Request::PowerOff);
                    self.machine.finish(POWER_OFF);
                    self.consoles(&mut el3, &mut host)?;
                    return Ok(());
                }
            }
            if let Some((since, layer, sentence)) = &self.failure {
                if since.elapsed() > AFTERMATH {
                    return Err(self.fail(layer, sentence));
                }
            }
            if let Some(status) = self.machine.ended() {
                // What QEMU wrote last is still to be read.
                self.consoles(&mut el3, &mut host)?;
                self.read_stdout()?;
                self.read_console()?;
                self.read_terminal()?;
                self.read_control()?;
                return self.after_the_end(status);
            }
            self.check_deadline()?;
        }
    }

    /// QEMU has ended: as it should, or not.
    fn after_the_end(&mut self, status: std::process::ExitStatus) -> Result<()> {
        if let Some((_, layer, sentence)) = &self.failure {
            return Err(self.fail(layer, sentence));
        }
        if let Some((status, _)) = self.exit {
            self.outcome.status = status;
            return Ok(());
        }
        if self.job.argv.is_none() || (self.job.io == Io::Terminal && self.expected.is_empty()) {
            self.outcome.status = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(125);
            return Ok(());
        }
        let layer = self.expected.front().map_or("host", |milestone| milestone.layer);
        if status.success() {
            return Err(self.fail(layer, "the machine switched itself off before the work was done"));
        }
        if status.code().is_none() {
            return Err(self.fail("QEMU", &format!("somebody ended it before the work was done ({status})")));
        }
        let said = std::fs::read_to_string(self.machine.directory.join(log::QEMU)).unwrap_or_default();
        if self.timeline.stages.iter().all(|stage| stage.name != "monitor") && !said.trim().is_empty() {
            return Err(self.fail("QEMU", "it ended before the first instruction's trace"));
        }
        Err(self.fail(layer, &format!("QEMU ended before the work was done ({status})")))
    }

    fn fail(&self, layer: &str, sentence: &str) -> anyhow::Error {
        anyhow!(Failure::new(layer, sentence, &self.machine.directory))
    }

    fn check_deadline(&self) -> Result<()> {
        let Some(deadline) = self.deadline else { return Ok(()) };
        if Instant::now() < deadline {
            return Ok(());
        }
        if let Some((status, _)) = self.exit {
            let sentence = format!("the program ended with {status}, but its output did not arrive");
            return Err(self.fail("host", &sentence));
        }
        Err(match self.expected.front() {
            Some(milestone) => {
                let last = self.timeline.stages.last().map_or("start", |stage| stages::title(&stage.name));
                let mut failure = Failure::new(
                    milestone.layer,
                    format!(
                        "\"{}\" was not reached within {:.0} s after \"{last}\"",
                        milestone.title,
                        milestone.limit.mul_f64(self.job.patience).as_secs_f64(),
                    ),
                    &self.machine.directory,
                );
                failure.log = milestone.log;
                anyhow!(failure)
            }
            None if self.job.argv.is_none() => self.fail("payload", "it did not end in time"),
            None => self.fail("host", "the program did not end in time"),
        })
    }

    fn restart_deadline(&mut self) {
        let limit = match self.expected.front() {
            // The program's own time begins here.
            Some(milestone) if ["command-done", "done"].contains(&milestone.name) => self.job.timeout,
            Some(milestone) => Some(milestone.limit),
            None => self.job.timeout,
        };
        self.deadline = limit.map(|limit| Instant::now() + limit.mul_f64(self.job.patience));
    }

    fn reached(&mut self, name: &str) {
        self.timeline.mark(name);
        if let (stages::RUNS, Some(owner)) = (name, &mut self.owner) {
            owner.running();
        }
        if let Some(position) = self.expected.iter().position(|milestone| milestone.name == name) {
            self.expected.drain(..=position);
            self.restart_deadline();
        }
        if self.job.progress {
            ui::say(&format!(
                "{} after {}",
                stages::title(name),
                ui::seconds(self.machine.started.elapsed())
            ));
        }
    }

    fn consoles(&mut self, el3: &mut Follow, host: &mut Follow) -> Result<()> {
        let (_, lines) = el3.poll();
        lines.iter().for_each(|line| self.console_line(log::EL3, "el3", line));
        let (bytes, lines) = host.poll();
        lines.iter().for_each(|line| self.console_line(log::HOST, "host", line));
        if self.job.io == Io::Uart { self.show(&bytes) } else { Ok(()) }
    }

    fn console_line(&mut self, file: &str, who: &str, line: &str) {
        if self.job.verbose && !(file == log::HOST && self.job.io == Io::Uart) {
            ui::line(who, line);
        }
        // A payload in the kernel's place has its own words.
        if file == log::HOST && self.job.io != Io::Uart && self.watch.sees(line) {
            self.outcome.complaints.push(line.to_owned());
        }
        if file == log::EL3 {
            if let Some(stage) = stages::from_monitor(line) {
                self.reached(stage);
            }
        }
        if self.failure.is_none() {
            if let Some((layer, sentence)) = fatal(file, line) {
                self.failure = Some((Instant::now(), layer.to_owned(), sentence));
            }
        }
    }

    fn read_control(&mut self) -> Result<()> {
        let bytes = drain(&mut self.machine.control);
        for line in self.control_lines.push(&bytes) {
            match serde_json::from_str::<Event>(&line) {
                Ok(event) => self.event(event)?,
                Err(_) => ui::say(&format!("the lab's agent said something unknown: {line}")),
            }
        }
        Ok(())
    }

    fn event(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Hello { .. } => {
                self.reached("host-init");
                if let Some(argv) = self.job.argv.clone() {
                    self.send(&Request::Start {
                        argv,
                        io: self.job.io,
                        module: self.job.module,
                        events: self.job.events,
                        size: super::terminal::size(),
                    })?;
                    if self.job.io != Io::Exec {
                        self.raw = RawMode::enter()?;
                    }
                }
            }
            Event::Module => self.reached("module"),
            Event::Stage { stage, .. } => self.reached(&stage),
            Event::Note { value } => {
                self.judge(&value)?;
                self.outcome.notes.push(value);
            }
            Event::Log { text } => {
                let _ = writeln!(self.programs, "{text}");
                // A program that was asked for on the host speaks to the user.
                if !self.job.events && !self.job.capture {
                    ui::line("host", &text);
                } else if !self.job.capture && !text.starts_with("realm: error") {
                    // What the command in the guest says; failures of the run come as events.
                    eprintln!("{text}");
                }
            }
            Event::Error { layer, error } => {
                let _ = writeln!(self.programs, "{layer}: {error}");
                if self.failure.is_none() {
                    // Some errors begin with their layer's name themselves.
                    let error = error.strip_prefix(&format!("{layer}: ")).unwrap_or(&error).to_owned();
                    self.failure = Some((Instant::now(), layer, error));
                }
            }
            // The first of the two counts: the machine ends with the command, and with it what the program would
            // still clean up.
            Event::Result { .. } | Event::Exit { .. } if self.exit.is_some() => {}
            Event::Result { status, stdout_bytes } | Event::Exit { status, stdout_bytes } => {
                self.timeline.mark("done");
                self.exit = Some((status, stdout_bytes));
                self.deadline = Some(Instant::now() + Duration::from_secs(20));
            }
        }
        Ok(())
    }

    /// Looks at the Realm's token, if that is what a note is about.
    fn judge(&mut self, note: &serde_json::Value) -> Result<()> {
        let Some(check) = &self.job.check else { return Ok(()) };
        let text = |key: &str| note.get(key).and_then(|value| value.as_str());
        let answer = match (text("token"), text("no_token")) {
            (Some(token), _) => Ok(token),
            (None, Some(why)) => Err(why),
            (None, None) => return Ok(()),
        };
        match check.judge(answer) {
            Verdict::Go { say, measured } => {
                // Not a matter of progress: scripts want to have it in their logs as well.
                if !self.job.capture {
                    launch::say(&say);
                }
                if let (Some(digits), Some(owner)) = (measured, &mut self.owner) {
                    owner.measured(digits);
                }
                return self.send(&Request::Go);
            }
            Verdict::Stop(why) if self.failure.is_none() => {
                self.failure = Some((Instant::now(), "RMM".to_owned(), why));
            }
            Verdict::Stop(_) => {}
        }
        Ok(())
    }

    fn send(&mut self, request: &Request) -> Result<()> {
        self.machine.control.set_nonblocking(false)?;
        self.machine.control.set_write_timeout(Some(Duration::from_secs(5)))?;
        let result = self.machine.control.write_all(&encode(request));
        self.machine.control.set_nonblocking(true)?;
        result.context("the lab's agent does not take requests")
    }

    fn read_stdout(&mut self) -> Result<()> {
        let bytes = drain(&mut self.machine.stdout);
        self.stdout_bytes += u64::try_from(bytes.len()).unwrap_or(0);
        self.show(&bytes)
    }

    fn read_console(&mut self) -> Result<()> {
        let bytes = drain(&mut self.machine.console);
        if bytes.is_empty() {
            return Ok(());
        }
        let _ = self.guest_log.write_all(&bytes);
        if self.job.io == Io::Console {
            return self.show(&bytes);
        }
        Ok(())
    }

    fn read_terminal(&mut self) -> Result<()> {
        let bytes = drain(&mut self.machine.terminal);
        self.show(&bytes)
    }

    fn show(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if self.job.capture {
            self.outcome.stdout.extend_from_slice(bytes);
            return Ok(());
        }
        let mut out = std::io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).context("cannot write to standard output")
    }

    /// Before the console is attached, keys belong to the shell that started us. A pipe waits until the machine takes what
    /// came before; keys do not, because some of them are for us.
    fn wants_input(&self) -> bool {
        use std::io::IsTerminal as _;
        self.raw.is_some() || (self.input.len() < INPUT && !std::io::stdin().is_terminal())
    }

    fn read_stdin(&mut self, escape: Option<&mut Escape>) -> Result<bool> {
        let mut buffer = [0; 4096];
        // SAFETY: the buffer is ours and as long as we say. (std's stdin would buffer what poll cannot see.)
        let count = unsafe { libc::read(0, buffer.as_mut_ptr().cast(), buffer.len()) };
        let Ok(count) = usize::try_from(count) else {
            return match std::io::Error::last_os_error() {
                error if error.kind() == std::io::ErrorKind::Interrupted => Ok(true),
                error if error.kind() == std::io::ErrorKind::WouldBlock => Ok(true),
                error => Err(error).context("cannot read standard input"),
            };
        };
        if count == 0 {
            return Ok(false);
        }
        let typed = &buffer[..count];
        let (passed, quit) = escape.map_or_else(|| (typed.to_vec(), false), |escape| escape.filter(typed));
        // Keys that nobody takes are lost, as they are where a terminal's own buffer is full.
        if self.input.len() < INPUT {
            self.input.extend(passed);
        }
        self.quit |= quit;
        Ok(true)
    }

    fn flush_input(&mut self) {
        if self.input.is_empty() {
            return;
        }
        let Some(mut target) = self.input_socket() else { return self.input.clear() };
        match target.write(&self.input) {
            Ok(count) => drop(self.input.drain(..count)),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            // Whoever read it is gone.
            Err(_) => self.input.clear(),
        }
    }

    /// Where the user's input goes.
    fn input_socket(&self) -> Option<&UnixStream> {
        match self.job.io {
            Io::Exec => self.machine.stdin.as_ref(),
            Io::Terminal => Some(&self.machine.terminal),
            Io::Console | Io::Uart => Some(&self.machine.console),
        }
    }

    fn poll(&self, stdin: bool) -> Ready {
        let descriptor = |fd, events| libc::pollfd { fd, events, revents: 0 };
        let input = self.input_socket().filter(|_| !self.input.is_empty());
        let mut set = [
            descriptor(self.machine.control.as_raw_fd(), libc::POLLIN),
            descriptor(self.machine.stdout.as_raw_fd(), libc::POLLIN),
            descriptor(self.machine.console.as_raw_fd(), libc::POLLIN),
            descriptor(self.machine.terminal.as_raw_fd(), libc::POLLIN),
            descriptor(input.map_or(-1, |socket| socket.as_raw_fd()), libc::POLLOUT),
            descriptor(if stdin { 0 } else { -1 }, libc::POLLIN),
        ];
        // SAFETY: an array of pollfd with its length.
        let count = unsafe { libc::poll(set.as_mut_ptr(), 6, TICK) };
        // A socket whose other end is gone is always ready: QEMU has ended, which the loop sees by itself.
        if set[..4].iter().any(|entry| entry.revents & libc::POLLHUP != 0) {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ready { stdin: count > 0 && set[5].revents != 0 }
    }
}

struct Ready {
    stdin: bool,
}

/// Everything that can be read without waiting.
fn drain(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 16 * 1024];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        bytes.extend_from_slice(&buffer[..count]);
        if bytes.len() > 1024 * 1024 {
            break;
        }
    }
    bytes
}
