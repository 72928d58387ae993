//! The conversation with the guest's init over the second serial port.
//!
//! | direction | bytes |
//! |---|---|
//! | init → VMM | `kvm-realm-init 1` and a newline: init runs and listens |
//! | VMM → init | `exec MARK COMMAND` or `shell ROWS COLUMNS`, and a newline; the command in base64 |
//! | init → VMM | the command's output as it is, then MARK, the status in decimal, a newline |
//! | VMM → init | `off` and a newline: everything has arrived, the machine may go |
//!
//! MARK is chosen at random for each run, so output needs no framing that a shell script would have to produce.

/// What init says first.
const GREETING: &[u8] = b"kvm-realm-init 1\n";

/// The longest command: what the guest's terminal queues take without losing bytes.
pub const MAX_COMMAND: usize = 32 << 10;

/// What init is asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Run a command with `sh -c`.
    Exec {
        /// The command.
        command: String,
        /// The mark that ends its output.
        mark: String,
    },
    /// Run a shell on the console.
    Shell {
        /// Rows and columns of the terminal, if there is one.
        size: Option<(u16, u16)>,
    },
}

/// What init did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Init runs.
    Ready,
    /// The command has written this.
    Output(Vec<u8>),
    /// The command ended.
    Status(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    Output,
    Status,
    Done,
}

/// One side of the conversation: bytes in, events and bytes out.
#[derive(Debug)]
pub struct Control {
    request: Request,
    state: State,
    pending: Vec<u8>,
}

impl Control {
    /// Starts a conversation that will ask for `request`.
    #[must_use]
    pub fn new(request: Request) -> Self {
        Self { request, state: State::Greeting, pending: Vec::new() }
    }

    /// Takes what the guest wrote; returns what it means, and what to answer.
    pub fn receive(&mut self, bytes: &[u8]) -> (Vec<Event>, Vec<u8>) {
        self.pending.extend_from_slice(bytes);
        let (mut events, mut reply) = (Vec::new(), Vec::new());
        loop {
            let before = self.state;
            match self.state {
                State::Greeting => {
                    if let Some(end) = find(&self.pending, GREETING) {
                        self.pending.drain(..end + GREETING.len());
                        events.push(Event::Ready);
                        reply.extend(self.request.line());
                        self.state = State::Output;
                    } else {
                        self.keep_last(GREETING.len());
                    }
                }
                State::Output => {
                    let Request::Exec { mark, .. } = &self.request else {
                        self.pending.clear();
                        break;
                    };
                    let found = find(&self.pending, mark.as_bytes());
                    let end =
                        found.unwrap_or_else(|| self.pending.len() - partial(&self.pending, mark.as_bytes()));
                    if end > 0 {
                        events.push(Event::Output(self.pending[..end].to_vec()));
                    }
                    if found.is_some() {
                        self.pending.drain(..end + mark.len());
                        self.state = State::Status;
                    } else {
                        self.pending.drain(..end);
                    }
                }
                State::Status => {
                    if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                        let status =
                            std::str::from_utf8(&self.pending[..end]).ok().and_then(|text| text.parse().ok());
                        // A status that cannot be read is a failure, never a success.
                        events.push(Event::Status(status.unwrap_or(255)));
                        reply.extend_from_slice(b"off\n");
                        self.state = State::Done;
                    } else {
                        self.keep_last(16);
                    }
                }
                State::Done => self.pending.clear(),
            }
            if self.state == before {
                break;
            }
        }
        (events, reply)
    }

    /// Bounds what noise can make us remember.
    fn keep_last(&mut self, len: usize) {
        let surplus = self.pending.len().saturating_sub(len);
        self.pending.drain(..surplus);
    }
}

impl Request {
    fn line(&self) -> Vec<u8> {
        match self {
            Self::Exec { command, mark } => format!("exec {mark} {}\n", base64(command.as_bytes())),
            Self::Shell { size } => {
                let (rows, columns) = size.unwrap_or((0, 0));
                format!("shell {rows} {columns}\n")
            }
        }
        .into_bytes()
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// How many of the last bytes could be the beginning of `needle`.
fn partial(haystack: &[u8], needle: &[u8]) -> usize {
    let longest = haystack.len().min(needle.len().saturating_sub(1));
    (1..=longest).rev().find(|len| haystack.ends_with(&needle[..*len])).unwrap_or(0)
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
        Control::new(Request::Exec { command: "uname -a".into(), mark: "MMAMMB".into() })
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
        assert_eq!(control.receive(b"noise kvm-realm-in"), (vec![], vec![]));
        assert_eq!(control.receive(b"it 1\n"), (vec![Event::Ready], b"exec MMAMMB dW5hbWUgLWE=\n".to_vec()));
        assert_eq!(control.receive(b"Linux\n"), (vec![Event::Output(b"Linux\n".to_vec())], vec![]));
        assert_eq!(control.receive(b"MMAMMB7"), (vec![], vec![]));
        assert_eq!(control.receive(b"\n"), (vec![Event::Status(7)], b"off\n".to_vec()));
        assert_eq!(control.receive(b"more"), (vec![], vec![]));
    }

    #[test]
    fn output_survives_any_cut_and_any_byte() {
        let mut all: Vec<u8> = (0..=255).collect();
        all.extend_from_slice(b"MMAMMAMMMMAMM");
        let stream = [b"kvm-realm-init 1\n", &all[..], b"MMAMMB42\n"].concat();
        for step in 1..20 {
            let mut control = exec();
            let (mut output, mut status) = (Vec::new(), None);
            for piece in stream.chunks(step) {
                for event in control.receive(piece).0 {
                    match event {
                        Event::Output(bytes) => output.extend(bytes),
                        Event::Status(value) => status = Some(value),
                        Event::Ready => {}
                    }
                }
            }
            assert_eq!((output, status), (all.clone(), Some(42)), "cut every {step} bytes");
        }
    }

    #[test]
    fn a_status_that_is_none_is_a_failure() {
        for text in ["", "-1", "256", "x"] {
            let mut control = exec();
            let events = control.receive(format!("kvm-realm-init 1\nMMAMMB{text}\n").as_bytes()).0;
            assert_eq!(events.last(), Some(&Event::Status(255)));
        }
    }

    #[test]
    fn a_shell_is_told_the_terminals_size() {
        let mut control = Control::new(Request::Shell { size: Some((24, 80)) });
        assert_eq!(control.receive(GREETING), (vec![Event::Ready], b"shell 24 80\n".to_vec()));
        assert_eq!(control.receive(b"whatever"), (vec![], vec![]));
    }
}
