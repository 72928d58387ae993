//! Which Realms there are.
//!
//! Each has a directory of its own in `$XDG_RUNTIME_DIR/kvm-realm`, or in the cache where there is no such place:
//!
//! | file | content |
//! |---|---|
//! | `lock` | locked by its process for as long as that lives: the kernel knows who holds it, so nothing can be stale |
//! | `info.json` | what was started |
//! | `status.json` | what became of it |
//! | `api.sock` | the control socket |
//! | `console.log`, `program.log` | of a detached one: the guest's console and its command's output; what `realm` said |
//!
//! The directory of one that was started in the foreground goes with it; the last of the others stay to be looked at.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::names;

/// How many of those that have ended are kept.
const KEPT: usize = 10;
/// How long a file of messages may become before its end is set aside.
const LONGEST_LOG: u64 = 8 << 20;
/// How often its length is looked at.
const LOG_WATCH: Duration = Duration::from_millis(200);

/// What was started.
#[derive(Serialize, Deserialize, Debug, Clone, Default)]
pub(crate) struct Info {
    /// Its name.
    pub(crate) name: String,
    /// Seconds since 1970.
    pub(crate) started: u64,
    /// `device`, or `emulated machine`.
    pub(crate) place: String,
    /// The guest's CPUs.
    pub(crate) cpus: u32,
    /// The guest's memory.
    pub(crate) memory_mib: u64,
    /// The command that it was started for.
    pub(crate) command: Option<String>,
    /// Whether it runs in the background.
    pub(crate) detached: bool,
    /// Where its console is written, if anywhere.
    pub(crate) log: Option<PathBuf>,
    /// Its initial measurement in hexadecimal digits, once its token had the predicted one.
    pub(crate) measurement: Option<String>,
}

/// What became of it.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub(crate) enum Status {
    /// It is being built or booted.
    Starting,
    /// Its CPUs run.
    Running,
    /// It ended by itself, or somebody ended it.
    Ended {
        /// The exit status of `realm run`.
        status: u8,
        /// What went wrong.
        error: Option<String>,
    },
    /// Its process is gone without a word.
    Vanished,
}

impl Status {
    /// One word, or a few.
    pub(crate) fn shown(&self) -> String {
        match self {
            Self::Starting => "starting".into(),
            Self::Running => "running".into(),
            Self::Ended { status, .. } => format!("ended ({status})"),
            Self::Vanished => "vanished".into(),
        }
    }
}

/// The place where Realms are written down.
pub(crate) struct Registry(PathBuf);

/// A Realm as others see it.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    /// Its directory.
    pub(crate) directory: PathBuf,
    /// What was started.
    pub(crate) info: Info,
    /// What became of it.
    pub(crate) status: Status,
    /// Its process, while it lives.
    pub(crate) pid: Option<libc::pid_t>,
}

/// A Realm as its own process holds it.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Its directory.
    pub(crate) directory: PathBuf,
    /// What was started.
    pub(crate) info: Info,
    /// Never opened a second time here: closing that one would give up the lock.
    _lock: File,
}

impl Registry {
    /// The user's registry.
    pub(crate) fn open() -> Result<Self> {
        let root = match std::env::var_os("XDG_RUNTIME_DIR").filter(|path| Path::new(path).is_dir()) {
            Some(path) => PathBuf::from(path).join("kvm-realm"),
            None => crate::paths::cache()?.join("realms"),
        };
        Self::at(root)
    }

    fn at(root: PathBuf) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&root)
            .with_context(|| format!("cannot make {}", root.display()))?;
        Ok(Self(root))
    }

    /// Takes a name: the wanted one, or one that is free.
    pub(crate) fn claim(&self, name: Option<&str>, mut info: Info) -> Result<Entry> {
        // One after the other, so that nobody takes an unfinished directory for one that was left behind.
        let claiming = File::create(self.0.join(".lock"))?;
        // SAFETY: no pointers; the lock ends with the file, at the end of this function.
        unsafe { libc::flock(claiming.as_raw_fd(), libc::LOCK_EX) };
        self.forget_old();
        let name = match name {
            Some(name) => name.to_owned(),
            None => (0..1000)
                .map(names::made_up)
                .find(|name| !self.0.join(name).exists())
                .context("there is no name left")?,
        };
        let directory = self.0.join(&name);
        if directory.exists() {
            if let Some(pid) = holder(&directory) {
                bail!(
                    "a Realm is called {name} already (process {pid}): `realm stop {name}`, or another --name"
                );
            }
            std::fs::remove_dir_all(&directory)
                .with_context(|| format!("cannot remove {}", directory.display()))?;
        }
        DirBuilder::new().mode(0o700).create(&directory)?;
        let mut options = OpenOptions::new();
        let lock = options.write(true).create_new(true).mode(0o600).open(directory.join("lock"))?;
        let mut request = whole_file();
        // SAFETY: one `flock`.
        let locked = unsafe { libc::fcntl(lock.as_raw_fd(), libc::F_SETLK, &raw mut request) } == 0;
        anyhow::ensure!(locked, "cannot lock {}: {}", directory.display(), std::io::Error::last_os_error());
        (info.name, info.started) = (name, now());
        write_json(&directory.join("info.json"), &info)?;
        let entry = Entry { directory, info, _lock: lock };
        entry.set(&Status::Starting);
        Ok(entry)
    }

    /// All of them in the order of their names.
    pub(crate) fn list(&self) -> Vec<Found> {
        let Ok(entries) = std::fs::read_dir(&self.0) else { return Vec::new() };
        let mut list: Vec<Found> = entries.flatten().filter_map(|entry| found(entry.path())).collect();
        list.sort_by(|a, b| a.info.name.cmp(&b.info.name));
        list
    }

    /// The one with this name, alive or not.
    pub(crate) fn find(&self, name: &str) -> Result<Found> {
        let name = names::parse(name).map_err(anyhow::Error::msg)?;
        found(self.0.join(&name)).with_context(|| format!("no Realm is called {name}: see `realm ps --all`"))
    }

    /// The one with this name, which must be alive.
    pub(crate) fn find_alive(&self, name: &str) -> Result<Found> {
        let found = self.find(name)?;
        if found.pid.is_none() {
            bail!(
                "{name} does not run any more ({}): `realm logs {name}` shows what it said",
                found.status.shown()
            );
        }
        Ok(found)
    }

    fn forget_old(&self) {
        let dead: Vec<Found> = self.list().into_iter().filter(|found| found.pid.is_none()).collect();
        // One that was ended in the foreground had no time to clean up.
        let (kept, mut surplus): (Vec<Found>, Vec<Found>) =
            dead.into_iter().partition(|found| found.info.detached);
        let mut dead = kept;
        dead.sort_by_key(|found| found.info.started);
        surplus.extend(dead.drain(..dead.len().saturating_sub(KEPT)));
        for old in &surplus {
            let _ = std::fs::remove_dir_all(&old.directory);
        }
    }
}

impl Found {
    /// Its control socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.join("api.sock")
    }

    /// Whether its process still lives.
    pub(crate) fn is_alive(&self) -> bool {
        holder(&self.directory).is_some()
    }
}

impl Entry {
    /// Writes down what has become of it.
    pub(crate) fn set(&self, status: &Status) {
        // Whoever reads it sees less then; the Realm runs on.
        let _ = write_json(&self.directory.join("status.json"), status);
    }

    /// Says where the console is written.
    pub(crate) fn set_log(&mut self, log: PathBuf) {
        self.info.log = Some(log);
        let _ = write_json(&self.directory.join("info.json"), &self.info);
    }

    /// Says what its token's measurement was, which is the predicted one.
    pub(crate) fn set_measurement(&mut self, measurement: String) {
        self.info.measurement = Some(measurement);
        let _ = write_json(&self.directory.join("info.json"), &self.info);
    }

    /// The end: one that ran in the background is kept for those who want to know.
    pub(crate) fn end(self, status: u8, error: Option<String>) {
        let _ = std::fs::remove_file(self.directory.join("api.sock"));
        if self.info.detached {
            self.set(&Status::Ended { status, error });
        } else {
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }

    /// Sends what this process prints from now on into a file of the directory, which never becomes long.
    pub(crate) fn redirect(&self, descriptor: libc::c_int, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        let file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&path)?;
        // SAFETY: no pointers.
        let status = unsafe { libc::dup2(file.as_raw_fd(), descriptor) };
        anyhow::ensure!(status >= 0, "cannot redirect output: {}", std::io::Error::last_os_error());
        let older = crate::log::older(&path);
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(LOG_WATCH);
                let _ = shorten(&file, &older, LONGEST_LOG);
            }
        });
        Ok(path)
    }
}

/// Sets the end of a file aside that has become too long. Everybody appends to it, so the next byte comes at its new beginning.
fn shorten(mut file: &File, older: &Path, longest: u64) -> std::io::Result<()> {
    let len = file.metadata()?.len();
    if len > longest {
        file.seek(SeekFrom::Start(len - longest))?;
        std::io::copy(&mut file.take(longest), &mut File::create(older)?)?;
        file.set_len(0)?;
    }
    Ok(())
}

fn found(directory: PathBuf) -> Option<Found> {
    let info: Info = read_json(&directory.join("info.json"))?;
    let status = read_json(&directory.join("status.json")).unwrap_or(Status::Starting);
    let pid = holder(&directory);
    let status = match status {
        ended @ Status::Ended { .. } => ended,
        _ if pid.is_none() => Status::Vanished,
        status => status,
    };
    Some(Found { directory, info, status, pid })
}

/// The process that holds a directory's lock.
fn holder(directory: &Path) -> Option<libc::pid_t> {
    let lock = OpenOptions::new().write(true).open(directory.join("lock")).ok()?;
    let mut request = whole_file();
    // SAFETY: one `flock`.
    let asked = unsafe { libc::fcntl(lock.as_raw_fd(), libc::F_GETLK, &raw mut request) } == 0;
    (asked && libc::c_int::from(request.l_type) != libc::F_UNLCK).then_some(request.l_pid)
}

fn whole_file() -> libc::flock {
    // SAFETY: a zeroed `flock` is valid: from the beginning to the end.
    let mut request: libc::flock = unsafe { std::mem::zeroed() };
    request.l_type = libc::c_short::try_from(libc::F_WRLCK).unwrap_or(1);
    request
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Whole, so that nobody reads half of it.
fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let partial = path.with_extension("partial");
    std::fs::write(&partial, serde_json::to_vec_pretty(value)?)?;
    Ok(std::fs::rename(&partial, path)?)
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn scratch(name: &str) -> Registry {
        let root = std::env::temp_dir().join(format!("realm-registry-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&root);
        Registry::at(root).unwrap()
    }

    /// Holds an entry in a process of its own: a lock is not seen by the one that holds it.
    fn hold(registry: &Registry, name: &str) -> std::process::Child {
        let directory = registry.0.join(name);
        std::fs::create_dir_all(&directory).unwrap();
        let info = Info { name: name.into(), detached: true, ..Info::default() };
        write_json(&directory.join("info.json"), &info).unwrap();
        let script = "import fcntl,sys,time\nf=open(sys.argv[1],'w')\nfcntl.lockf(f,fcntl.LOCK_EX)\n\
                      print('locked',flush=True)\ntime.sleep(100)";
        let mut child = std::process::Command::new("python3")
            .args(["-c", script])
            .arg(directory.join("lock"))
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        child
    }

    #[test]
    fn a_name_is_taken_while_its_process_lives_and_free_afterwards() {
        let registry = scratch("taken");
        let mut child = hold(&registry, "web");
        let pid = libc::pid_t::try_from(child.id()).unwrap();
        let found = registry.find_alive("web").unwrap();
        assert_eq!((found.pid, found.status), (Some(pid), Status::Starting));
        let refused = registry.claim(Some("web"), Info::default()).unwrap_err().to_string();
        assert!(refused.contains("realm stop web"), "{refused}");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(registry.find("web").unwrap().status, Status::Vanished);
        assert!(registry.find_alive("web").is_err());
        let entry = registry.claim(Some("web"), Info { detached: true, ..Info::default() }).unwrap();
        entry.set(&Status::Running);
        entry.end(3, Some("why".into()));
        let ended = registry.find("web").unwrap();
        assert_eq!(ended.status, Status::Ended { status: 3, error: Some("why".into()) });
        std::fs::remove_dir_all(&registry.0).unwrap();
    }

    #[test]
    fn what_ran_in_the_foreground_leaves_nothing_and_the_rest_is_bounded() {
        let registry = scratch("bounded");
        registry.claim(None, Info::default()).unwrap().end(0, None);
        assert!(registry.list().is_empty());
        for number in 0..KEPT + 5 {
            let info = Info { detached: true, ..Info::default() };
            registry.claim(Some(&format!("r{number}")), info).unwrap().end(0, None);
        }
        assert!(registry.list().len() <= KEPT + 1);
        assert!(registry.find("../x").is_err() && registry.find("nobody").is_err());
        std::fs::remove_dir_all(&registry.0).unwrap();
    }

    #[test]
    fn a_log_that_others_append_to_becomes_no_longer_than_it_may() {
        let registry = scratch("log");
        let path = registry.0.join("console.log");
        let older = crate::log::older(&path);
        let open = || OpenOptions::new().read(true).append(true).create(true).open(&path).unwrap();
        let (mut writer, watcher) = (open(), open());
        for round in 0..100 {
            writer.write_all(format!("{round:09}\n").repeat(5).as_bytes()).unwrap();
            shorten(&watcher, &older, 100).unwrap();
            assert!(path.metadata().unwrap().len() <= 100);
        }
        let kept = std::fs::read_to_string(&older).unwrap() + &std::fs::read_to_string(&path).unwrap();
        assert!(kept.len() > 100 && kept.ends_with("000000099\n"), "{kept}");
        std::fs::remove_dir_all(&registry.0).unwrap();
    }
}
