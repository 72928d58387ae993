//! The conversation with the guest's init over the console's port for it.
//!
//! | direction | line |
//! |---|---|
//! | init → VMM | `kvm-realm-init 3`: init runs and listens |
//! | VMM → init | if somebody wants to know: `report NONCE`, in hexadecimal digits |
//! | init → VMM | `token TOKEN`, in base64, or `no-token REASON`; then it waits for the verdict, which is the next line |
//! | VMM → init | `exec COMMAND`, in base64, or `shell`; `off` if the token was all that was wanted |
//! | init → VMM | `status N`: the command ended, and everything that it printed is on its way |
//! | VMM → init | `off`: everything has arrived, the machine may go |
//!
//! The command's input, output and errors have ports of their own, so that nothing has to be framed.

/// The ports of the console in their order: terminal, the command's streams, this conversation. The last one comes last
/// on purpose: what a command printed has arrived before its status.
pub const PORTS: [&str; 5] =
    ["", "kvm-realm.stdin", "kvm-realm.stdout", "kvm-realm.stderr", "kvm-realm.control"];

/// What init says first.
const GREETING: &[u8] = b"kvm-realm-init 3";
/// The longest line that is listened to: a token of a machine with long certificates fits.
const LONGEST_LINE: usize = 32 << 10;

/// The longest command: what a shell takes as one line without trouble.
pub const MAX_COMMAND: usize = 96 << 10;

/// What init is asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Run a command with `sh -c`.
    Exec(String),
    /// Run a shell on the terminal.
    Shell,
    /// Switch the machine off.
    Off,
}

/// What init did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Init runs.
    Ready,
    /// The Realm's attestation token in base64, or why there is none.
    Token(Result<String, String>),
    /// The command ended.
    Status(u8),
}

/// One side of the conversation: bytes in, events and bytes out.
#[derive(Debug)]
pub struct Control {
    request: Request,
    /// The nonce of a report that is to be asked for.
    nonce: Option<String>,
    /// Whether it was, and has not come yet.
    reporting: bool,
    ready: bool,
    done: bool,
    line: Vec<u8>,
}

impl Control {
    /// Starts a conversation that will ask for `request`.
    #[must_use]
    pub fn new(request: Request) -> Self {
        Self { request, nonce: None, reporting: false, ready: false, done: false, line: Vec::new() }
    }

    /// Has the Realm report first, with a nonce in hexadecimal digits.
    #[must_use]
    pub fn with_report(self, nonce: Option<String>) -> Self {
        Self { nonce, ..self }
    }

    /// Takes what the guest wrote; returns what it means, and what to answer.
    pub fn receive(&mut self, bytes: &[u8]) -> (Vec<Event>, Vec<u8>) {
        let (mut events, mut reply) = (Vec::new(), Vec::new());
        for byte in bytes {
            if *byte != b'\n' {
                if self.line.len() < LONGEST_LINE {
                    self.line.push(*byte);
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            if !self.ready && line == GREETING {
                self.ready = true;
                events.push(Event::Ready);
                if let Some(nonce) = &self.nonce {
                    self.reporting = true;
                    reply.extend(format!("report {nonce}\n").into_bytes());
                } else {
                    reply.extend(self.request.line());
                }
            } else if let (true, Some(answer)) = (self.reporting, token(&line)) {
                self.reporting = false;
                events.push(Event::Token(answer));
            } else if let (true, false, Some(status)) = (self.ready, self.done, line.strip_prefix(b"status "))
            {
                self.done = true;
                let status = std::str::from_utf8(status).ok().and_then(|text| text.parse().ok());
                // A status that cannot be read is a failure, never a success.
                events.push(Event::Status(status.unwrap_or(255)));
                reply.extend_from_slice(b"off\n");
            }
        }
        (events, reply)
    }
}

impl Request {
    /// The line that asks for it: what init gets when it has greeted or, if it was to report, when its token was judged.
    #[must_use]
    pub fn line(&self) -> Vec<u8> {
        match self {
            Self::Exec(command) => format!("exec {}\n", base64(command.as_bytes())),
            Self::Shell => "shell\n".to_owned(),
            Self::Off => "off\n".to_owned(),
        }
        .into_bytes()
    }
}

/// What a line says about a token.
fn token(line: &[u8]) -> Option<Result<String, String>> {
    let text = String::from_utf8_lossy(line);
    match text.split_once(' ').unwrap_or((&text, "")) {
        ("token", token) => Some(Ok(token.trim().to_owned())),
        ("no-token", why) => Some(Err(why.chars().filter(|c| !c.is_control()).take(200).collect())),
        _ => None,
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let mut group = [0; 4];
        group[1..=chunk.len()].copy_from_slice(chunk);
        let group = u32::from_be_bytes(group);
        for place in 0..4 {
            if place <= chunk.len() {
                let digit = usize::try_from(group >> (18 - 6 * place) & 63).unwrap_or(0);
                text.push(char::from(DIGITS[digit]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exec() -> Control {
        Control::new(Request::Exec("uname -a".into()))
    }

    #[test]
    fn base64_is_the_usual_one() {
        for (plain, coded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("uname -a", "dW5hbWUgLWE=")]
        {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn a_command_is_sent_after_the_greeting_and_its_status_comes_back() {
        let mut control = exec();
        assert_eq!(control.receive(b"status 3\nkvm-realm-in"), (vec![], vec![]));
        assert_eq!(control.receive(b"it 3\n"), (vec![Event::Ready], b"exec dW5hbWUgLWE=\n".to_vec()));
        assert_eq!(control.receive(b"status 7"), (vec![], vec![]));
        assert_eq!(control.receive(b"\n"), (vec![Event::Status(7)], b"off\n".to_vec()));
        assert_eq!(control.receive(b"status 8\nmore"), (vec![], vec![]));
    }

    #[test]
    fn a_report_comes_first_and_the_command_is_left_to_who_judges_it() {
        for (line, answer) in
            [("token AAAA", Ok("AAAA".to_owned())), ("no-token no driver", Err("no driver".to_owned()))]
        {
            let mut control = exec().with_report(Some("c0ffee".into()));
            assert_eq!(control.receive(b"token early\n"), (vec![], vec![]));
            let greeted = control.receive(b"kvm-realm-init 3\n");
            assert_eq!(greeted, (vec![Event::Ready], b"report c0ffee\n".to_vec()));
            let reported = control.receive(format!("{line}\n").as_bytes());
            assert_eq!(reported, (vec![Event::Token(answer)], vec![]));
            assert_eq!(control.receive(b"token again\n"), (vec![], vec![]));
            assert_eq!(control.receive(b"status 0\n").0, [Event::Status(0)]);
        }
    }

    #[test]
    fn a_status_that_is_none_is_a_failure() {
        for text in ["", "-1", "256", "x"] {
            let mut control = exec();
            let events = control.receive(format!("kvm-realm-init 3\nstatus {text}\n").as_bytes()).0;
            assert_eq!(events.last(), Some(&Event::Status(255)));
        }
    }

    #[test]
    fn noise_is_not_kept() {
        let mut control = exec();
        for _ in 0..100 {
            control.receive(&[b'x'; 1000]);
        }
        assert!(control.line.len() <= LONGEST_LINE);
        assert_eq!(control.receive(b"\nkvm-realm-init 3\n").0, [Event::Ready]);
    }
}
