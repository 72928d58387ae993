//! What the user sees: progress on stderr, results on stdout.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// Says that something begins or is so.
pub(crate) fn say(text: &str) {
    line("realm", text);
}

/// One line on stderr with the name of who speaks. With the terminal in raw mode a line end needs its own
/// carriage return; elsewhere that would only be noise.
pub(crate) fn line(who: &str, text: &str) {
    let end = if crate::lab::terminal::is_raw() { "\r\n" } else { "\n" };
    let text = format!("{who}: {text}{end}");
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// A step that takes a while: announced at once, closed with the time it took if that was noticeable.
pub(crate) struct Step {
    what: String,
    start: Instant,
}

/// Announces a step.
pub(crate) fn step(what: &str) -> Step {
    say(&format!("{what} ..."));
    Step { what: what.to_owned(), start: Instant::now() }
}

impl Step {
    /// The step succeeded.
    pub(crate) fn done(self) {
        let took = self.start.elapsed();
        if took > Duration::from_secs(3) {
            say(&format!("{}: done in {}", self.what, seconds(took)));
        }
    }
}

/// A duration as people read it.
pub(crate) fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// A size as people read it.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1000 => format!("{bytes} B"),
        1000..1_000_000 => format!("{} kB", bytes / 1000),
        _ => format!("{}.{} MB", bytes / 1_000_000, bytes % 1_000_000 / 100_000),
    }
}

/// Writes what programs read to a file, or to standard output if that is `-`.
pub(crate) fn json(path: &std::path::Path, value: &serde_json::Value) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    if path.as_os_str() == "-" {
        std::io::stdout().lock().write_all(text.as_bytes())?;
        return Ok(());
    }
    anyhow::Context::with_context(std::fs::write(path, text), || format!("cannot write {}", path.display()))
}

/// Whether colours and the like make sense on stderr.
pub(crate) fn fancy() -> bool {
    std::io::stderr().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        assert_eq!(size(17), "17 B");
        assert_eq!(size(27_949_208), "27.9 MB");
        assert_eq!(size(822_236), "822 kB");
    }
}
