//! What host and agent say to each other: frames on a stream.
//!
//! A frame is its kind in one byte, the length of its contents in three, the least significant first, and the contents. The
//! agent begins with [`kind::HELLO`]; the host answers with one request, and a session of that request follows. Numbers
//! are little-endian, texts end with a zero byte.
//!
//! | kind | from | contents | |
//! |---|---|---|---|
//! | `H` | agent | version, 4 bytes | the agent is there |
//! | `E` | host | flags 1, rows 2, columns 2, count 2, texts | run: so many arguments, then variables `NAME=VALUE` |
//! | `P` | host | mode 4, path, name | write the file `path`, or `name` in the directory `path` |
//! | `G` | host | path | read a file |
//! | `Q` | host | | switch the machine off |
//! | `I` | host | bytes | input of the command or of the file; none is the end |
//! | `W` | host | rows 2, columns 2 | the terminal has another size |
//! | `S` | host | signal 1 | to the command and everything in its session |
//! | `C` | agent | count 4 | the command took so much input; the host may send as much more |
//! | `M` | agent | mode 4, size 8 | the file that was asked for |
//! | `O` | agent | bytes | output of the command, or of the file |
//! | `R` | agent | bytes | the command's standard error |
//! | `X` | agent | status 1, signal 1 | the end: exit status, or the signal that ended the command |
//! | `F` | agent | errno 4, text | the end: what could not be done |
//!
//! A host may send [`WINDOW`] bytes of input to a command before the first `C`. A file's input has no window: the stream's
//! own flow control is enough where nothing else has to get through.

/// The agent's port.
pub const PORT: u32 = 1024;
/// The version that is described here.
pub const VERSION: u32 = 1;
/// Bytes of input that a command may be behind.
pub const WINDOW: usize = 64 << 10;
/// The most bytes in a frame.
pub const LONGEST: usize = 64 << 10;
/// A flag of `E`: the command has a terminal.
pub const TERMINAL: u8 = 1;

/// Kinds of frames.
#[allow(missing_docs, reason = "the table above says it")]
pub mod kind {
    pub const HELLO: u8 = b'H';
    pub const EXEC: u8 = b'E';
    pub const PUT: u8 = b'P';
    pub const GET: u8 = b'G';
    pub const POWER_OFF: u8 = b'Q';
    pub const INPUT: u8 = b'I';
    pub const SIZE: u8 = b'W';
    pub const SIGNAL: u8 = b'S';
    pub const CREDIT: u8 = b'C';
    pub const META: u8 = b'M';
    pub const OUTPUT: u8 = b'O';
    pub const ERROR: u8 = b'R';
    pub const EXIT: u8 = b'X';
    pub const FAILURE: u8 = b'F';
}

/// A frame's first four bytes.
#[must_use]
pub const fn header(kind: u8, len: usize) -> [u8; 4] {
    let [a, b, c, ..] = len.to_le_bytes();
    [kind, a, b, c]
}

/// Kind and length of a frame, from its first four bytes; `None` if it is longer than any.
#[must_use]
pub const fn parse([kind, a, b, c]: [u8; 4]) -> Option<(u8, usize)> {
    let len = usize::from_le_bytes([a, b, c, 0, 0, 0, 0, 0]);
    if len <= LONGEST { Some((kind, len)) } else { None }
}
