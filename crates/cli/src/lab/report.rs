//! Failures of the emulated machine: which layer, in a sentence, with the end of the console that matters.

use std::fmt;
use std::path::{Path, PathBuf};

use super::machine::log;

/// How much of a console a report shows.
const TAIL_LINES: usize = 20;

/// A failure of the machine or of something on it.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The layer to blame.
    pub(crate) layer: String,
    /// What happened.
    pub(crate) sentence: String,
    /// The console that shows it, as a file in the run directory.
    pub(crate) log: &'static str,
    /// The run directory.
    pub(crate) directory: PathBuf,
}

impl Failure {
    /// A failure of `layer`; its console follows from the layer.
    pub(crate) fn new(layer: &str, sentence: impl Into<String>, directory: &Path) -> Self {
        Self {
            layer: layer.to_owned(),
            sentence: sentence.into(),
            log: console_of(layer),
            directory: directory.to_owned(),
        }
    }
}

/// The console that shows most about a layer.
fn console_of(layer: &str) -> &'static str {
    match layer {
        "EL3" => log::EL3,
        "guest" => log::GUEST,
        "QEMU" => log::QEMU,
        "vmm" | "VMM" => log::PROGRAM,
        _ => log::HOST,
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(formatter, "{}: {}", self.layer, self.sentence)?;
        // The layer's own console, or the host's where that one is silent.
        let said = [self.log, log::HOST].into_iter().find_map(|name| {
            let bytes = std::fs::read(self.directory.join(name)).ok()?;
            let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            (!text.is_empty()).then_some((name, text))
        });
        match said {
            Some((name, text)) => {
                writeln!(formatter, "--- the end of {name} ---")?;
                for line in crate::command::tail(&text, TAIL_LINES).lines() {
                    writeln!(formatter, "  {}", line.trim_end_matches('\r'))?;
                }
            }
            None => writeln!(formatter, "(no console said anything)")?,
        }
        write!(formatter, "all consoles: {}", self.directory.display())
    }
}

impl std::error::Error for Failure {}

/// A line that means the end of a layer.
pub(crate) fn fatal(source: &str, line: &str) -> Option<(&'static str, String)> {
    let lower = line.to_ascii_lowercase();
    if source == log::EL3 && (lower.contains("el3: fatal") || lower.contains("el3: panic")) {
        return Some(("EL3", format!("the monitor stopped the machine: {}", line.trim())));
    }
    if line.contains("RMM: fatal") || line.contains("RMM: panic") {
        return Some(("RMM", format!("the RMM gave up: {}", line.trim())));
    }
    if source == log::HOST && line.contains("Kernel panic - not syncing") {
        return Some(("host kernel", format!("the host kernel panicked: {}", line.trim())));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fatal_lines_name_their_layer() {
        assert_eq!(fatal(log::EL3, "EL3: fatal: data abort").unwrap().0, "EL3");
        assert_eq!(fatal(log::HOST, "RMM: fatal: out of paper").unwrap().0, "RMM");
        assert_eq!(fatal(log::HOST, "[ 1.0] Kernel panic - not syncing: x").unwrap().0, "host kernel");
        assert!(fatal(log::GUEST, "Kernel panic - not syncing: x").is_none());
        assert!(fatal(log::HOST, "RMM: ready").is_none());
    }

    #[test]
    fn a_report_has_layer_sentence_tail_and_directory() {
        let directory = std::env::temp_dir().join(format!("realm-report-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(log::EL3), "one\r\ntwo\r\n").unwrap();
        let text = Failure::new("EL3", "it went dark", &directory).to_string();
        assert!(text.starts_with("EL3: it went dark\n"), "{text}");
        assert!(text.contains("  two\n") && text.contains(&directory.display().to_string()), "{text}");
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
