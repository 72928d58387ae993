//! What the run reports while it goes on: one JSON object per line.

use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::json;

/// The reports' destination. Clones write to the same one.
#[derive(Debug, Clone)]
pub(crate) struct Events(Option<Arc<Mutex<File>>>);

impl Events {
    /// Reports to a descriptor that the caller gave us; to nobody without one.
    pub(crate) fn new(fd: Option<RawFd>) -> Self {
        // SAFETY: the descriptor was opened for this purpose by whoever started us; `dup` makes it our own, and
        // refuses a number that is none.
        let file = fd.map(|fd| unsafe { libc::dup(fd) }).filter(|fd| *fd >= 0).map(|fd| {
            // SAFETY: the descriptor has just been made, and only we know it.
            unsafe { File::from_raw_fd(fd) }
        });
        Self(file.map(|file| Arc::new(Mutex::new(file))))
    }

    /// A stage has been reached, now.
    pub(crate) fn stage(&self, stage: &str) {
        self.write(&json!({ "stage": stage, "ns": now() }));
    }

    /// The command has ended, and everything that it printed is on standard output: whoever waits for no more than
    /// that need not wait for the Realm to be taken down.
    pub(crate) fn command_done(&self, status: u8, printed: u64) {
        self.write(
            &json!({ "stage": "command-done", "ns": now(), "status": status, "stdout_bytes": printed }),
        );
    }

    /// What this process takes of memory now.
    pub(crate) fn memory(&self) {
        // Nobody fails because of this.
        let Ok(found) = vmm::footprint::Footprint::now() else { return };
        self.write(&json!({ "memory": {
            "vmm_bytes": found.own,
            "guest_shared_bytes": found.guest,
            "guest_mappings": found.mappings,
            "guest_mapped_bytes": found.mapped,
        }}));
    }

    /// The guest's answer to a request for a token: in base64, or why there is none.
    pub(crate) fn token(&self, answer: Result<&str, &str>) {
        self.write(&match answer {
            Ok(token) => json!({ "token": token }),
            Err(why) => json!({ "no_token": why }),
        });
    }

    /// The run failed.
    pub(crate) fn error(&self, layer: &str, error: &str) {
        self.write(&json!({ "error": error, "layer": layer, "ns": now() }));
    }

    fn write(&self, event: &serde_json::Value) {
        if let Some(file) = &self.0 {
            let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
            // A reader that has gone away does not end the run.
            let _ = file.write_all(format!("{event}\n").as_bytes());
        }
    }
}

/// Nanoseconds since the host kernel started.
pub(crate) fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a valid structure.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}
