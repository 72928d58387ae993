//! A recording: frames, each a line that says what follows, and that many bytes. It grows while the run goes on, and a
//! recording that was cut off is one up to there.

use std::io::Write;

use anyhow::{Result, bail, ensure};

/// The longest frame that is read.
const LONGEST: usize = 16 << 20;
/// What a recording begins with.
const MAGIC: &[u8] = b"kvm-realm recording 1\n";

/// One piece of a recording.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// What the kernel says about the shape of an event.
    Format(String),
    /// A page of a CPU's trace buffer.
    Page(u32, Vec<u8>),
    /// What the run reported: a line of JSON.
    Event(String),
    /// The module's counters at a time.
    Counters(u64, String),
    /// The same moment on the machine's counter and on the kernel's clock, and the counter's frequency.
    Clock(u64, u64, u64),
    /// Events that the kernel had no room for.
    Lost(u64),
    /// The end, with the run's status.
    End(u64),
}

impl Frame {
    /// Writes it.
    pub(crate) fn write(&self, to: &mut dyn Write) -> std::io::Result<()> {
        let (head, body): (String, &[u8]) = match self {
            Self::Format(text) => ("format".into(), text.as_bytes()),
            Self::Page(cpu, bytes) => (format!("page {cpu}"), bytes),
            Self::Event(text) => ("event".into(), text.as_bytes()),
            Self::Counters(ns, text) => (format!("counters {ns}"), text.as_bytes()),
            Self::Clock(counter, ns, frequency) => (format!("clock {counter} {ns} {frequency}"), &[]),
            Self::Lost(events) => (format!("lost {events}"), &[]),
            Self::End(status) => (format!("end {status}"), &[]),
        };
        // One call for each frame: a port's writer is woken once.
        let mut bytes = format!("{head} {}\n", body.len()).into_bytes();
        bytes.extend_from_slice(body);
        to.write_all(&bytes)
    }
}

/// Begins a recording.
pub(crate) fn begin(to: &mut dyn Write) -> std::io::Result<()> {
    to.write_all(MAGIC)
}

/// Takes a recording apart. What was cut off at the end is left out.
pub(crate) fn parse(bytes: &[u8]) -> Result<Vec<Frame>> {
    let Some(mut rest) = bytes.strip_prefix(MAGIC) else {
        bail!("this is no recording: nothing was recorded, or by another version");
    };
    let mut frames = Vec::new();
    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        let head = String::from_utf8_lossy(&rest[..end]).into_owned();
        let words: Vec<&str> = head.split(' ').collect();
        let length =
            words.last().and_then(|word| word.parse::<usize>().ok()).filter(|length| *length <= LONGEST);
        let Some(length) = length else { bail!("a recording's frame begins with {head:?}") };
        let Some(body) = rest.get(end + 1..end + 1 + length) else { break };
        rest = &rest[end + 1 + length..];
        frames.push(frame(&words[..words.len() - 1], body)?);
    }
    Ok(frames)
}

fn frame(words: &[&str], body: &[u8]) -> Result<Frame> {
    let number = |index: usize| words.get(index).and_then(|word| word.parse::<u64>().ok());
    let text = || String::from_utf8_lossy(body).into_owned();
    let frame = match (words.first().copied(), number(1), number(2), number(3)) {
        (Some("format"), ..) => Some(Frame::Format(text())),
        (Some("page"), Some(cpu), ..) => u32::try_from(cpu).ok().map(|cpu| Frame::Page(cpu, body.to_vec())),
        (Some("event"), ..) => Some(Frame::Event(text())),
        (Some("counters"), Some(ns), ..) => Some(Frame::Counters(ns, text())),
        (Some("clock"), Some(counter), Some(ns), Some(frequency)) => {
            Some(Frame::Clock(counter, ns, frequency))
        }
        (Some("lost"), Some(events), ..) => Some(Frame::Lost(events)),
        (Some("end"), Some(status), ..) => Some(Frame::End(status)),
        _ => None,
    };
    ensure!(frame.is_some(), "a recording's frame is called {words:?}");
    frame.ok_or_else(|| anyhow::anyhow!("no frame"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all() -> Vec<Frame> {
        vec![
            Frame::Format("name: rmi\n".into()),
            Frame::Page(3, vec![0, b'\n', 255]),
            Frame::Event("{\"stage\":\"populated\",\"ns\":7}".into()),
            Frame::Counters(8, "exit_irq 1\n".into()),
            Frame::Clock(1, 2, 3),
            Frame::Lost(4),
            Frame::End(0),
        ]
    }

    fn written(frames: &[Frame]) -> Vec<u8> {
        let mut bytes = Vec::new();
        begin(&mut bytes).unwrap();
        frames.iter().for_each(|frame| frame.write(&mut bytes).unwrap());
        bytes
    }

    #[test]
    fn frames_come_back_as_they_went() {
        assert_eq!(parse(&written(&all())).unwrap(), all());
        assert!(parse(b"").is_err());
    }

    #[test]
    fn a_recording_that_was_cut_off_is_read_up_to_there() {
        let bytes = written(&all());
        for end in MAGIC.len()..bytes.len() {
            let frames = parse(&bytes[..end]).unwrap();
            assert_eq!(frames, all()[..frames.len()]);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&[MAGIC, &bytes].concat());
        }
    }
}
