//! What the two halves of `realm` say to each other on the control port: one JSON object per line.
//!
//! The half on the developer's machine sends [`Request`]s, the agent on the emulated host answers with
//! [`Event`]s. The port is a serial line between two programs of one build: there is no versioning.

use serde::{Deserialize, Serialize};

/// Names of the virtio-serial ports.
pub(crate) mod port {
    /// The guest's console, raw, both ways.
    pub(crate) const CONSOLE: &str = "org.kvm-realm.console";
    /// Requests and events.
    pub(crate) const CONTROL: &str = "org.kvm-realm.control";
    /// What a command reads, raw.
    pub(crate) const STDIN: &str = "org.kvm-realm.stdin";
    /// What a command prints, raw.
    pub(crate) const STDOUT: &str = "org.kvm-realm.stdout";
    /// Connections to the VMM's control socket: see `life::tunnel`.
    pub(crate) const TUNNEL: &str = "org.kvm-realm.tunnel";

    /// The way to a shared folder, one frame after the other.
    pub(crate) fn share(index: usize) -> String {
        format!("org.kvm-realm.share{index}")
    }
}

/// The program's file descriptor for the verdict on its Realm's token.
pub(crate) const VERDICT_FD: i32 = 4;

/// From the developer's machine to the agent.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Start a program; there is one at a time.
    Start {
        /// The program and its arguments.
        argv: Vec<String>,
        /// What its standard streams are.
        io: Io,
        /// Whether to load the kernel module first.
        module: bool,
        /// Whether to pass `--events-fd` and relay what comes from there, with [`VERDICT_FD`] as the way back.
        events: bool,
        /// Rows and columns of the user's terminal.
        size: Option<(u16, u16)>,
    },
    /// The Realm that the program runs is the right one.
    Go,
    /// Switch the machine off now.
    PowerOff,
}

/// Where a program's standard streams lead.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Io {
    /// Standard input is the stdin port, standard output goes to the stdout port, standard error to the log.
    Exec,
    /// Standard input and output are the console port, standard error goes to the log.
    Console,
    /// Everything is the terminal /dev/hvc0.
    Terminal,
    /// No agent is there: standard output is what comes on UART0.
    Uart,
}

/// From the agent to the developer's machine.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum Event {
    /// The agent runs.
    Hello {
        /// The host kernel's release.
        kernel: String,
    },
    /// The module is loaded and its device is there.
    Module,
    /// The program reported a stage.
    Stage {
        /// Its name.
        stage: String,
        /// CLOCK_MONOTONIC of the emulated host.
        ns: u64,
    },
    /// The program reported something else worth keeping.
    Note {
        /// As it came.
        value: serde_json::Value,
    },
    /// A line of the program's standard error.
    Log {
        /// Without its line end.
        text: String,
    },
    /// Something failed, with the layer to blame.
    Error {
        /// Which layer.
        layer: String,
        /// What happened.
        error: String,
    },
    /// The guest's command ended and its output is complete; the program still takes the Realm down.
    Result {
        /// The command's status.
        status: u8,
        /// How much goes to the stdout port.
        stdout_bytes: u64,
    },
    /// The program ended.
    Exit {
        /// As a shell would give it: 128 and the signal's number for a signal.
        status: u8,
        /// How much went to the stdout port, so that nothing is lost between the two ports.
        stdout_bytes: u64,
    },
}

/// One line as it travels.
pub(crate) fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Collects bytes into whole lines.
#[derive(Default)]
pub(crate) struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    /// Adds bytes and takes the lines that are complete now.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for &byte in bytes {
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&self.partial);
                lines.push(line.trim_end_matches('\r').to_owned());
                self.partial.clear();
            } else {
                self.partial.push(byte);
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_single_lines_that_come_back_equal() {
        let request = Request::Start {
            argv: vec!["/bin/sh".into(), "-c".into(), "echo 'a\nb'".into()],
            io: Io::Exec,
            module: true,
            events: false,
            size: Some((24, 80)),
        };
        let line = encode(&request);
        assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1);
        assert_eq!(serde_json::from_slice::<Request>(&line).unwrap(), request);
        let event = Event::Exit { status: 7, stdout_bytes: 12 };
        assert_eq!(serde_json::from_slice::<Event>(&encode(&event)).unwrap(), event);
    }

    #[test]
    fn lines_come_whole_and_without_their_end() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"one\r\ntw"), ["one"]);
        assert_eq!(lines.push(b"o\n\n"), ["two", ""]);
        assert_eq!(lines.push(b"end"), Vec::<String>::new());
    }
}
