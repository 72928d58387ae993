//! A Realm's own process: its name, its socket, its place in the background.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, Result};

use super::api;
use super::args::LifeArgs;
use super::registry::{Entry, Info, Registry, Status};
use super::tunnel::Tunnel;

/// Where the VMM on the emulated machine serves its API, for the agent there.
pub(crate) const INNER_SOCKET: &str = "/run/kvm-realm.sock";

/// The name that a run has, for as long as it lives.
pub(crate) struct Owner {
    entry: Option<Entry>,
    ready: Option<OwnedFd>,
    /// Where else the API is wanted.
    api_socket: Option<PathBuf>,
}

impl Owner {
    /// Takes a name. A run that was given none goes on without if there is no place to write it down.
    pub(crate) fn claim(args: &LifeArgs, mut info: Info) -> Result<Self> {
        info.detached = args.ready_fd.is_some();
        let claimed = Registry::open().and_then(|registry| registry.claim(args.name.as_deref(), info));
        let entry = match claimed {
            Err(error) if args.is_named() => return Err(error),
            claimed => claimed.ok(),
        };
        // SAFETY: whoever started us opened the descriptor for this. No program that we start needs it.
        let ready = args.ready_fd.map(|fd| unsafe {
            libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
            OwnedFd::from_raw_fd(fd)
        });
        let mut owner = Self { entry, ready, api_socket: args.api_socket.clone() };
        if let (Some(entry), true) = (&mut owner.entry, args.ready_fd.is_some()) {
            let log = entry.redirect(1, "console.log")?;
            entry.set_log(log);
        }
        Ok(owner)
    }

    /// Of a run that nobody will ask for.
    #[cfg(test)]
    pub(crate) fn nobody() -> Self {
        Self { entry: None, ready: None, api_socket: None }
    }

    /// Where the console is written if that is not already known.
    pub(crate) fn logs_to(&mut self, path: PathBuf) {
        if let Some(entry) = self.entry.as_mut().filter(|entry| entry.info.log.is_none()) {
            entry.set_log(path);
        }
    }

    /// The sockets to serve the API at.
    pub(crate) fn sockets(&self) -> Vec<PathBuf> {
        let own = self.entry.as_ref().map(|entry| entry.directory.join("api.sock"));
        own.into_iter().chain(self.api_socket.clone()).collect()
    }

    /// Its name, if it has one.
    pub(crate) fn name(&self) -> Option<&str> {
        self.entry.as_ref().map(|entry| entry.info.name.as_str())
    }

    /// The Realm runs: whoever waits for that is told, and our messages go to a file from now on.
    pub(crate) fn running(&mut self) {
        let Some(entry) = &self.entry else { return };
        entry.set(&Status::Running);
        if let Some(ready) = self.ready.take() {
            let _ = entry.redirect(2, "program.log");
            let _ = File::from(ready).write_all(format!("{}\n", entry.info.name).as_bytes());
        }
    }

    /// The Realm's token has the measurement that was predicted.
    pub(crate) fn measured(&mut self, measurement: String) {
        if let Some(entry) = &mut self.entry {
            entry.set_measurement(measurement);
        }
    }

    /// The run has ended.
    pub(crate) fn end(self, result: &Result<u8>) {
        if let Some(socket) = &self.api_socket {
            let _ = std::fs::remove_file(socket);
        }
        if let Some(entry) = self.entry {
            match result {
                Ok(status) => entry.end(*status, None),
                Err(error) => entry.end(crate::FAILURE, Some(format!("{error:#}"))),
            }
        }
    }
}

/// Serves the sockets of a Realm on the emulated machine: every connection is carried to the VMM there.
pub(crate) fn forward(sockets: &[PathBuf], port: UnixStream) -> Result<()> {
    port.set_nonblocking(false)?;
    let tunnel = Tunnel::start(port.try_clone()?, port, None);
    for path in sockets {
        let listener = api::listen(path)?;
        let tunnel: Arc<Tunnel> = tunnel.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                tunnel.open(stream);
            }
        });
    }
    Ok(())
}

/// `realm run --detach`: starts the same command in the background, and returns when its Realm runs.
pub(crate) fn detach() -> Result<u8> {
    let (ready, writer) = UnixStream::pair()?;
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    // Before a command's words, if there are any.
    let place = arguments.iter().position(|argument| argument == "run").map_or(0, |place| place + 1);
    let descriptor = writer.as_raw_fd();
    arguments.insert(place, format!("--ready-fd={descriptor}").into());
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: between fork and exec only async-signal-safe calls; the descriptor lives until then.
    unsafe {
        command.pre_exec(move || {
            if libc::setsid() < 0 || libc::fcntl(descriptor, libc::F_SETFD, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command.spawn().context("cannot start a process in the background")?;
    drop(writer);
    let mut messages = child.stderr.take().context("no messages of the process in the background")?;
    let relay = std::thread::spawn(move || std::io::copy(&mut messages, &mut std::io::stderr()));
    let mut name = String::new();
    BufReader::new(ready).read_line(&mut name)?;
    if name.is_empty() {
        // It has said why.
        let status = child.wait()?;
        let _ = relay.join();
        return Ok(status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .filter(|code| *code != 0)
            .unwrap_or(crate::FAILURE));
    }
    print!("{name}");
    Ok(0)
}
