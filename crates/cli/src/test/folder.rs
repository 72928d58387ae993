//! A folder of this machine that a Realm shares, while somebody here uses it as well.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Result, ensure};

use crate::command;
use crate::run::shares::ShareArg;

/// What the guest does with the folder: it asks, and reads the answer, which comes while it runs, through another share of the
/// folder that it may only look into.
pub(super) const COMMANDS: &str = "cat /mnt/both/here; cp -r /mnt/both/here /mnt/both/copy\n\
     echo question >/mnt/both/question\n\
     for try in $(seq 300); do [ -e /mnt/look/answer ] && break; sleep 0.1; done; cat /mnt/look/answer\n\
     { echo no >/mnt/look/here; } 2>&1 | grep -o Read-only; rm /mnt/both/answer\n\
     dd if=/dev/urandom of=/tmp/f bs=300k count=3 2>/dev/null\n\
     cat /tmp/f >/mnt/both/f; md5sum </tmp/f >/mnt/both/sum; date +%s >/mnt/both/now\n";
/// What that prints.
pub(super) const PRINTED: &str = "from here\nan answer\nRead-only\n";

/// How many seconds the guest's clock may differ from this machine's: that of an emulated machine that counts
/// instructions falls behind while this one is busy. What it must not be is another year's, or another time zone's.
const CLOCKS_APART: u64 = 900;

/// The folder.
pub(super) struct Folder {
    directory: PathBuf,
    over: Arc<AtomicBool>,
}

impl Folder {
    /// Makes it, and answers in it.
    pub(super) fn start() -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("realm-folder-{}", std::process::id()));
        std::fs::create_dir_all(&directory)?;
        std::fs::write(directory.join("here"), "from here\n")?;
        let over = Arc::new(AtomicBool::new(false));
        let (place, ended) = (directory.clone(), over.clone());
        std::thread::spawn(move || {
            while !place.join("question").exists() && !ended.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(50));
            }
            // Whole from the moment at which it has its name.
            let _ = std::fs::write(place.join("answer.new"), "an answer\n");
            let _ = std::fs::rename(place.join("answer.new"), place.join("answer"));
        });
        Ok(Self { directory, over })
    }

    /// The flags of a Realm that shares it.
    pub(super) fn flags(&self) -> Vec<ShareArg> {
        let share =
            |tag: &str, read_only| ShareArg { path: self.directory.clone(), tag: tag.to_owned(), read_only };
        vec![share("both", false), share("look", true)]
    }

    /// What the guest left behind is what it should be.
    pub(super) fn check(&self) -> Result<()> {
        let read = |name: &str| std::fs::read(self.directory.join(name));
        ensure!(read("here")? == read("copy")?, "the guest's copy of a file is another one");
        ensure!(read("answer").is_err(), "the guest could not remove a file");
        let sum = command::output(
            std::process::Command::new("sh").arg("-c").arg("md5sum <f").current_dir(&self.directory),
        )?;
        ensure!(sum.as_bytes() == read("sum")?, "a long file came out differently");
        let written = self.directory.join("now").metadata()?.modified()?.duration_since(UNIX_EPOCH)?;
        let now: u64 = String::from_utf8(read("now")?)?.trim().parse()?;
        let apart = now.abs_diff(written.as_secs());
        ensure!(
            apart <= CLOCKS_APART,
            "the guest's clock says {now} and is {apart} s away from this machine's"
        );
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
