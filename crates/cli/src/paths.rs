//! Where things lie: the checkout, the cache, run directories.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};

/// How many run directories are kept.
const RUNS_KEPT: usize = 20;

/// The checkout: `$REALM_ROOT` as the `./realm` script sets it, else where this crate was compiled.
pub(crate) fn checkout() -> Result<PathBuf> {
    let root = match std::env::var_os("REALM_ROOT") {
        Some(root) => PathBuf::from(root),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."),
    };
    let root = root.canonicalize().with_context(|| format!("the checkout {} is gone", root.display()))?;
    if !root.join("crates/cli/Cargo.toml").is_file() {
        bail!("{} is not a checkout of kvm-realm: start the command with its ./realm", root.display());
    }
    Ok(root)
}

/// Cargo's target directory, for everything that is built from the checkout.
pub(crate) fn target() -> Result<PathBuf> {
    Ok(match std::env::var_os("CARGO_TARGET_DIR") {
        Some(directory) => std::path::absolute(directory)?,
        None => checkout()?.join("target"),
    })
}

/// The cache for everything that is fetched, and for run directories.
pub(crate) fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(base) => PathBuf::from(base),
        None => {
            let home = std::env::var_os("HOME")
                .context("neither XDG_CACHE_HOME nor HOME is set: no place for the cache")?;
            PathBuf::from(home).join(".cache")
        }
    };
    Ok(base.join("kvm-realm"))
}

/// The directory of a run, which nobody removes while this lives.
#[derive(Debug)]
pub(crate) struct Run {
    directory: PathBuf,
    /// Locked: the kernel takes the lock back when the process ends, however that happens.
    _lock: File,
}

impl std::ops::Deref for Run {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.directory
    }
}

/// Makes a new run directory and forgets the oldest ones.
pub(crate) fn new_run() -> Result<Run> {
    new_run_in(&cache()?.join("runs"))
}

fn new_run_in(runs: &Path) -> Result<Run> {
    std::fs::create_dir_all(runs).with_context(|| format!("cannot make {}", runs.display()))?;
    // One after the other, so that nobody takes a directory that is not locked yet for one that was left behind.
    let _making = lock(runs, libc::LOCK_EX)?;
    forget_old_runs(runs, RUNS_KEPT - 1);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map(|since| since.as_secs()).unwrap_or(0);
    for attempt in 0..1000 {
        let directory = runs.join(format!("{}-{}-{attempt}", timestamp(now), std::process::id()));
        match std::fs::create_dir(&directory) {
            Ok(()) => return Ok(Run { _lock: lock(&directory, libc::LOCK_EX)?, directory }),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("cannot make {}", directory.display())),
        }
    }
    bail!("no free name for a run directory in {}", runs.display())
}

/// Removes all but the newest `keep` run directories, and never one whose run still lives. Gives those.
pub(crate) fn forget_old_runs(runs: &Path, keep: usize) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(runs) else { return Vec::new() };
    // Names begin with the time.
    let mut names: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    names.sort();
    names.truncate(names.len().saturating_sub(keep));
    names.retain(|old| match lock(old, libc::LOCK_EX | libc::LOCK_NB) {
        Ok(_held_meanwhile) => std::fs::remove_dir_all(old).is_err() && old.exists(),
        Err(_) => true,
    });
    names
}

/// Opens a directory and locks it for as long as the file is open.
fn lock(directory: &Path, how: libc::c_int) -> Result<File> {
    let file = File::open(directory).with_context(|| format!("cannot open {}", directory.display()))?;
    // SAFETY: no pointers.
    let status = unsafe { libc::flock(file.as_raw_fd(), how) };
    let error = std::io::Error::last_os_error();
    if status < 0 {
        return Err(error).with_context(|| format!("cannot lock {}", directory.display()));
    }
    Ok(file)
}

/// `YYYYMMDD-HHMMSS` in UTC for seconds since 1970.
fn timestamp(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days to a civil date: years are counted from March, so that the leap day is the last of a year.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}{month:02}{day:02}-{:02}{:02}{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_civil_dates() {
        assert_eq!(timestamp(0), "19700101-000000");
        assert_eq!(timestamp(951_782_399), "20000228-235959");
        assert_eq!(timestamp(951_782_400), "20000229-000000");
        assert_eq!(timestamp(1_767_225_600), "20260101-000000");
    }

    #[test]
    fn a_run_that_lives_keeps_its_directory_however_many_come_later() {
        let runs = std::env::temp_dir().join(format!("realm-runs-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&runs);
        // Older by its name than all that follow.
        let old = runs.join("20000101-000000-1-0");
        std::fs::create_dir_all(&old).unwrap();
        let living = Run { _lock: lock(&old, libc::LOCK_EX).unwrap(), directory: old };
        std::fs::write(living.join("log"), "still written to").unwrap();
        let ended: Vec<PathBuf> =
            (0..3 * RUNS_KEPT).map(|_| new_run_in(&runs).unwrap().to_path_buf()).collect();
        assert!(living.join("log").is_file());
        let count = || std::fs::read_dir(&runs).unwrap().count();
        assert_eq!(count(), RUNS_KEPT + 1);
        // A child process does not hold the lock for us.
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        assert_eq!(forget_old_runs(&runs, 0), [living.to_path_buf()]);
        assert!(living.is_dir() && !ended.last().unwrap().exists());
        drop(living);
        assert!(forget_old_runs(&runs, 0).is_empty());
        assert_eq!(count(), 0);
        child.kill().unwrap();
        child.wait().unwrap();
        std::fs::remove_dir_all(&runs).unwrap();
    }
}
