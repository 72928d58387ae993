//! Pages of the kernel's trace buffer, as `trace_pipe_raw` gives them: a header, and events that each say how much time
//! passed since the one before. What the module's own events consist of, the kernel says itself (`format`).

use std::collections::BTreeMap;

/// Bytes before the first event: the page's time and how much of it is used.
const HEADER: usize = 16;
/// The used bytes; above are flags.
const USED: u64 = (1 << 27) - 1;
/// Events were lost before this page.
const MISSED: u64 = 1 << 31;
/// Their number stands behind the last event.
const MISSED_STORED: u64 = 1 << 30;

/// One of the module's events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// An RMI command came back.
    Rmi {
        /// Its number.
        function: u64,
        /// `x0`.
        status: u64,
    },
    /// A CPU went into a Realm.
    Enter,
    /// It came back.
    Exit {
        /// Which of the Realm's.
        vcpu: u32,
        /// `RmiRecExitReason`.
        reason: u32,
        /// What the RMM tells of the syndrome.
        esr: u64,
    },
    /// A memory fault was dealt with.
    Fault {
        /// 0: resolved, 1: left to user space, 2: there is no memory but a device, 3: failed.
        outcome: u32,
        /// Whether it was in shared memory.
        shared: bool,
    },
}

/// An event with its time and its thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamped {
    /// Nanoseconds on the kernel's clock.
    pub(crate) ns: u64,
    /// The thread.
    pub(crate) thread: u32,
    /// What happened.
    pub(crate) event: Event,
}

/// Where the fields of one kind of event lie.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Shape {
    name: String,
    fields: BTreeMap<String, (usize, usize)>,
}

/// The kinds of events that a kernel knows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shapes(BTreeMap<u64, Shape>);

impl Shapes {
    /// Whether none is known.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Learns one from the text of its `format` file.
    pub(crate) fn learn(&mut self, text: &str) {
        let mut shape = Shape::default();
        let mut id = None;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("name: ") {
                name.trim().clone_into(&mut shape.name);
            } else if let Some(number) = line.strip_prefix("ID: ") {
                id = number.trim().parse().ok();
            } else if let Some((name, place)) = field(line) {
                shape.fields.insert(name, place);
            }
        }
        if let Some(id) = id {
            self.0.insert(id, shape);
        }
    }

    fn decode(&self, data: &[u8]) -> Option<(u32, Event)> {
        let shape = self.0.get(&number(data, 0, 2)?)?;
        let get = |name: &str| {
            let (offset, size) = *shape.fields.get(name)?;
            number(data, offset, size)
        };
        let short = |name: &str| get(name).and_then(|value| u32::try_from(value).ok());
        let event = match shape.name.as_str() {
            "rmi" => Event::Rmi { function: get("function")?, status: get("status")? },
            "enter" => Event::Enter,
            "exit" => Event::Exit { vcpu: short("vcpu")?, reason: short("reason")?, esr: get("esr")? },
            "fault" => Event::Fault { outcome: short("outcome")?, shared: get("shared")? != 0 },
            _ => return None,
        };
        Some((short("common_pid")?, event))
    }
}

/// `field:u64 function;\toffset:8;\tsize:8;\tsigned:0;`
fn field(line: &str) -> Option<(String, (usize, usize))> {
    let line = line.trim().strip_prefix("field:")?;
    let mut parts = line.split(';').map(str::trim);
    let name = parts.next()?.rsplit(' ').next()?.to_owned();
    let mut value = |key: &str| parts.next()?.strip_prefix(key)?.parse::<usize>().ok();
    Some((name, (value("offset:")?, value("size:")?)))
}

fn number(data: &[u8], offset: usize, size: usize) -> Option<u64> {
    let bytes = data.get(offset..offset.checked_add(size)?)?;
    let mut value = [0; 8];
    value.get_mut(..size)?.copy_from_slice(bytes);
    Some(u64::from_le_bytes(value))
}

/// What a page held.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Page {
    /// The events that are ours.
    pub(crate) events: Vec<Stamped>,
    /// Events that were lost before it; 1 if the kernel did not say how many.
    pub(crate) lost: u64,
}

/// Reads a page. What makes no sense ends it.
pub(crate) fn page(bytes: &[u8], shapes: &Shapes) -> Page {
    let mut page = Page::default();
    let (Some(mut ns), Some(commit)) = (number(bytes, 0, 8), number(bytes, 8, 8)) else { return page };
    let used = usize::try_from(commit & USED).unwrap_or(usize::MAX);
    let end = HEADER.saturating_add(used).min(bytes.len());
    if commit & MISSED != 0 {
        let stored = if commit & MISSED_STORED != 0 { number(bytes, end, 8) } else { None };
        page.lost = stored.unwrap_or(1);
    }
    let mut rest = bytes.get(HEADER..end).unwrap_or(&[]);
    while let Some(head) = number(rest, 0, 4) {
        let (kind, delta) = (head & 31, head >> 5);
        let word = number(rest, 4, 4);
        let length = match (kind, word) {
            // The rest of the page is empty, or one event was taken back.
            (29, _) if delta == 0 => break,
            (0 | 29, Some(length)) => 4 + length,
            // Much time passed; or the time is said anew, without its highest bits.
            (30, Some(high)) => {
                ns = ns.wrapping_add(high << 27).wrapping_add(delta);
                8
            }
            (31, Some(high)) => {
                ns = ns & (31 << 59) | high << 27 | delta;
                8
            }
            (1..=28, _) => 4 + 4 * kind,
            _ => break,
        };
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length < 8 && kind == 0 || length > rest.len() {
            break;
        }
        let data = match kind {
            0 => rest.get(8..length),
            1..=28 => rest.get(4..length),
            _ => None,
        };
        if kind <= 29 {
            ns = ns.wrapping_add(delta);
        }
        if let Some((thread, event)) = data.and_then(|data| shapes.decode(data)) {
            page.events.push(Stamped { ns, thread, event });
        }
        rest = &rest[length..];
    }
    page
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As the kernel prints them, of the fields that are read.
    pub(crate) const FORMATS: [&str; 4] = [
        "name: rmi\nID: 900\nformat:\n\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\
         \tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\
         \tfield:u64 function;\toffset:8;\tsize:8;\tsigned:0;\n\
         \tfield:u64 status;\toffset:40;\tsize:8;\tsigned:0;\n\nprint fmt: \"%s\", __x\n",
        "name: enter\nID: 901\nformat:\n\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\
         \tfield:u64 rec;\toffset:8;\tsize:8;\tsigned:0;\n",
        "name: exit\nID: 902\nformat:\n\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\
         \tfield:u32 vcpu;\toffset:8;\tsize:4;\tsigned:0;\n\tfield:u32 reason;\toffset:12;\tsize:4;\tsigned:0;\n\
         \tfield:u64 esr;\toffset:16;\tsize:8;\tsigned:0;\n",
        "name: fault\nID: 903\nformat:\n\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\
         \tfield:bool shared;\toffset:24;\tsize:1;\tsigned:0;\n\tfield:u32 outcome;\toffset:28;\tsize:4;\tsigned:0;\n",
    ];

    pub(crate) fn shapes() -> Shapes {
        let mut shapes = Shapes::default();
        FORMATS.iter().for_each(|text| shapes.learn(text));
        shapes
    }

    /// An event's data.
    pub(crate) fn data(thread: u32, event: Event) -> Vec<u8> {
        let mut data = vec![0; 48];
        let mut put = |offset: usize, bytes: &[u8]| data[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(4, &thread.to_le_bytes());
        let id: u16 = match event {
            Event::Rmi { function, status } => {
                put(8, &function.to_le_bytes());
                put(40, &status.to_le_bytes());
                900
            }
            Event::Enter => 901,
            Event::Exit { vcpu, reason, esr } => {
                put(8, &vcpu.to_le_bytes());
                put(12, &reason.to_le_bytes());
                put(16, &esr.to_le_bytes());
                902
            }
            Event::Fault { outcome, shared } => {
                put(24, &[u8::from(shared)]);
                put(28, &outcome.to_le_bytes());
                903
            }
        };
        put(0, &id.to_le_bytes());
        data
    }

    /// A page in which each event comes `delta` ns after the one before.
    pub(crate) fn encode(start: u64, delta: u32, events: &[(u32, Event)]) -> Vec<u8> {
        let mut body = Vec::new();
        for (thread, event) in events {
            let data = data(*thread, *event);
            body.extend((delta << 5 | u32::try_from(data.len() / 4).unwrap()).to_le_bytes());
            body.extend(data);
        }
        let mut page = start.to_le_bytes().to_vec();
        page.extend(u64::try_from(body.len()).unwrap().to_le_bytes());
        page.extend(body);
        page
    }

    const RMI: Event = Event::Rmi { function: 0xc400_0151, status: 0 };

    #[test]
    fn events_have_their_times_and_threads() {
        let exit = Event::Exit { vcpu: 1, reason: 2, esr: 0x9200_0000 };
        let fault = Event::Fault { outcome: 1, shared: true };
        let events = [(7, RMI), (8, Event::Enter), (8, exit), (8, fault)];
        let read = page(&encode(1000, 10, &events), &shapes());
        let expected: Vec<Stamped> = (1..)
            .zip(events)
            .map(|(n, (thread, event))| Stamped { ns: 1000 + 10 * n, thread, event })
            .collect();
        assert_eq!(read, Page { events: expected, lost: 0 });
    }

    #[test]
    fn long_pauses_long_events_and_gaps_are_understood() {
        let mut body = Vec::new();
        let long = data(7, RMI);
        // Much time passes; an event with its length in a word of its own; one that was taken back; the end.
        body.extend((5u32 << 5 | 30).to_le_bytes());
        body.extend(2u32.to_le_bytes());
        body.extend((1u32 << 5).to_le_bytes());
        body.extend(u32::try_from(long.len() + 4).unwrap().to_le_bytes());
        body.extend(&long);
        body.extend((3u32 << 5 | 29).to_le_bytes());
        body.extend(8u32.to_le_bytes());
        body.extend([0; 8 - 4]);
        body.extend((29u32).to_le_bytes());
        let mut bytes = 100u64.to_le_bytes().to_vec();
        bytes.extend((u64::try_from(body.len()).unwrap() | MISSED | MISSED_STORED).to_le_bytes());
        bytes.extend(&body);
        bytes.extend(42u64.to_le_bytes());
        let read = page(&bytes, &shapes());
        assert_eq!(read.lost, 42);
        assert_eq!(read.events, [Stamped { ns: 100 + (2 << 27) + 5 + 1, thread: 7, event: RMI }]);
    }

    #[test]
    fn events_of_others_are_passed_over() {
        let mut bytes = encode(0, 1, &[(7, RMI), (7, RMI)]);
        bytes[HEADER + 4] = 1;
        assert_eq!(page(&bytes, &shapes()).events.len(), 1);
    }

    proptest! {
        #[test]
        fn no_page_breaks_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..400), used in 0u64..400) {
            let mut bytes = bytes;
            if bytes.len() >= 16 {
                bytes[8..16].copy_from_slice(&used.to_le_bytes());
            }
            let _ = page(&bytes, &shapes());
        }
    }
}
