//! Root file systems: `realm image build` makes a Debian disk, `--kernel-from-disk` boots one with what is in its /boot.
//!
//! | module | question it answers |
//! |---|---|
//! | [`packages`] | which packages, from where, and how do they get to the machine that installs them? |
//! | [`install`] | who installs them without being root here? (an emulated machine) |
//! | [`partitions`] | where on a disk are file systems? |
//! | [`boot`] | which kernel and initramfs does a disk boot with, and what is its root? |

pub(crate) mod boot;
mod install;
mod packages;
mod partitions;

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use attest::measure::sha256;
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use vmm::disk::{Disk, Format};

use crate::command::{find, output};
use crate::run::options::to_hex;
use crate::setup::{self, Environment, apt};
use crate::ui;

/// What must be on the machine beside apt and dpkg: a program and Debian's package of it.
const MKE2FS: (&str, &str) = ("mke2fs", "e2fsprogs");
/// The least room that a small system needs, in MiB.
const LEAST: u64 = 1024;
/// What is copied at once.
const CHUNK: usize = 1 << 20;

/// `realm image`.
#[derive(Args, Debug, Clone)]
pub(crate) struct ImageArgs {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: ImageCommand,
}

/// The commands of `realm image`.
#[derive(Subcommand, Debug, Clone)]
pub(crate) enum ImageCommand {
    /// Make a disk with Debian for arm64, from the archive that this machine's apt uses
    Build(BuildArgs),
}

/// `realm image build`.
#[derive(Args, Debug, Clone)]
#[command(after_help = "The disk is one ext4 file system with a kernel that knows Realms. Boot it with\n  \
                        realm run --disk debian.qcow2 --kernel-from-disk --net user\n\
                        root logs in on the console without a password unless --root-password sets one, and over the \
                        network only with --ssh-key.\nNo privileges are needed: an emulated machine installs the \
                        packages. The same disk comes from the cache the second time.")]
pub(crate) struct BuildArgs {
    /// Where the disk goes: qcow2 if the name ends so, else raw with holes
    #[arg(long, value_name = "FILE", default_value = "debian.qcow2")]
    pub(crate) out: PathBuf,
    /// Debian's release by its codename: one whose backports, or which itself, has a kernel from 6.13 on
    /// [default: the current stable]
    #[arg(long, value_name = "CODENAME")]
    pub(crate) suite: Option<String>,
    /// The disk's size in MiB; unused room takes none in FILE
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    pub(crate) size: u64,
    /// One more package (may be repeated)
    #[arg(long = "include", value_name = "PACKAGE")]
    pub(crate) include: Vec<String>,
    /// The machine's name
    #[arg(long, value_name = "NAME", default_value = "realm")]
    pub(crate) hostname: String,
    /// A password for root, for the console
    #[arg(long, value_name = "PASSWORD")]
    pub(crate) root_password: Option<String>,
    /// A public key that logs in as root by SSH; installs openssh-server
    #[arg(long, value_name = "FILE")]
    pub(crate) ssh_key: Option<PathBuf>,
    /// Leave out the agent that `realm exec`, `cp` and `stop` talk to: whoever has the host may use it
    #[arg(long)]
    pub(crate) no_agent: bool,
    /// Ask the archive again, instead of taking a disk that was built before
    #[arg(long)]
    pub(crate) update: bool,
    /// Print what was built as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Multiply every time limit by this (slow or busy machines)
    #[arg(long, value_name = "FACTOR", env = "REALM_PATIENCE")]
    pub(crate) patience: Option<f64>,
}

/// What is known about a disk that was built.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Built {
    suite: String,
    kernel: String,
    /// `name version` of each.
    packages: Vec<String>,
    /// Seconds that it took.
    seconds: u64,
}

/// `realm image`.
pub(crate) fn run(args: &ImageArgs) -> Result<u8> {
    let ImageCommand::Build(args) = &args.command;
    let start = Instant::now();
    check(args)?;
    let key = args.ssh_key.as_ref().map(|path| {
        std::fs::read_to_string(path).with_context(|| format!("cannot read the key {}", path.display()))
    });
    let key = key.transpose()?.unwrap_or_default();
    let environment = setup::ensure(None, false)?;
    let agent = if args.no_agent {
        Vec::new()
    } else {
        std::fs::read(crate::build::build(&environment, &["agent"])?.agent)?
    };
    let directory = crate::paths::cache()?.join("images");
    std::fs::create_dir_all(&directory)?;
    let raw = directory.join(format!("{}.img", fingerprint(args, &key, &agent)));
    let record = raw.with_extension("json");
    let known: Option<Built> = std::fs::read(&record)
        .ok()
        .filter(|_| raw.is_file() && !args.update)
        .and_then(|text| serde_json::from_slice(&text).ok());
    let cached = known.is_some();
    let built = match known {
        Some(built) => built,
        None => {
            let built = build(&environment, args, (&key, &agent), &directory, &raw)?;
            std::fs::write(&record, serde_json::to_vec_pretty(&built)?)?;
            built
        }
    };
    let format = Format::of(&args.out);
    copy(&raw, &args.out, format).with_context(|| format!("cannot write {}", args.out.display()))?;
    let size = args.out.metadata()?.blocks() * 512;
    if args.json {
        let report = serde_json::json!({
            "file": args.out,
            "format": if format == Format::Qcow2 { "qcow2" } else { "raw" },
            "disk_mib": args.size,
            "file_bytes": size,
            "suite": built.suite,
            "kernel": built.kernel,
            "packages": built.packages,
            "cached": cached,
            "seconds": start.elapsed().as_secs(),
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        let origin = if cached {
            ", built before".to_owned()
        } else {
            format!(" in {}", ui::seconds(start.elapsed()))
        };
        ui::say(&format!(
            "{}: Debian {}, {} packages, {} of {} MiB{origin}",
            args.out.display(),
            built.suite,
            built.packages.len(),
            ui::size(size),
            args.size,
        ));
        println!("{}", args.out.display());
    }
    Ok(0)
}

/// Refuses what would only fail after minutes.
fn check(args: &BuildArgs) -> Result<()> {
    ensure!(args.size >= LEAST, "a system needs {LEAST} MiB at least");
    let word = |text: &str, more: &str| {
        text.starts_with(|first: char| first.is_ascii_alphanumeric())
            && text.chars().all(|one| one.is_ascii_alphanumeric() || more.contains(one))
    };
    ensure!(
        word(&args.hostname, "-") && args.hostname.len() < 64,
        "{} cannot be a host's name",
        args.hostname
    );
    for (what, text) in
        args.include.iter().map(|name| ("package", name)).chain(args.suite.iter().map(|name| ("suite", name)))
    {
        ensure!(word(text, "+-."), "{text} cannot be a {what}'s name");
    }
    if let Some(password) = &args.root_password {
        ensure!(
            !password.is_empty() && !password.contains(['\n', '\'']),
            "a password has no quotes and no line ends"
        );
    }
    let parent = args.out.parent().filter(|parent| !parent.as_os_str().is_empty());
    ensure!(parent.is_none_or(Path::is_dir), "there is no directory for {}", args.out.display());
    Ok(())
}

/// What shapes the disk, in one word.
fn fingerprint(args: &BuildArgs, key: &str, agent: &[u8]) -> String {
    let mut include = args.include.clone();
    include.sort();
    let parts = format!(
        "{:?} {} {include:?} {} {:?} {key} {:?} {:?} {} {:?}",
        args.suite,
        args.size,
        args.hostname,
        args.root_password,
        install::SCRIPTS,
        packages::BASE,
        install::AGENT_UNIT,
        sha256(agent),
    );
    to_hex(&sha256(parts.as_bytes())[..12])
}

fn build(
    environment: &Environment,
    args: &BuildArgs,
    (key, agent): (&str, &[u8]),
    directory: &Path,
    raw: &Path,
) -> Result<Built> {
    let start = Instant::now();
    let cache = crate::paths::cache()?;
    let archive = apt::archive()?;
    if find(MKE2FS.0).is_none() {
        archive.open(apt::Suites::Install, &cache)?.install(&[MKE2FS.1], None)?;
    }
    let suite = match &args.suite {
        Some(suite) => suite.clone(),
        None => archive.current_stable(&cache)?,
    };
    let state = packages::State::open(&archive, &suite, &cache)?;
    let mut wanted = args.include.clone();
    if !key.is_empty() {
        wanted.push("openssh-server".to_owned());
    }
    let set = state.resolve(&wanted)?;
    let kernel = set.kernel()?;

    let partial = raw.with_extension(format!("partial-{}", std::process::id()));
    let stage = directory.join(format!("stage-{}", std::process::id()));
    let result = (|| {
        let settings = install::Settings {
            hostname: &args.hostname,
            password: args.root_password.as_deref().unwrap_or_default(),
            key,
            sources: &packages::sources(&archive, &suite),
            agent,
        };
        state.fetch(&set)?;
        let step = ui::step("laying the packages out");
        let stage_image = install::stage(&state, &set, &settings, &stage)?;
        step.done();
        make_file_system(&partial, args.size)?;
        let patience = args.patience.filter(|factor| factor.is_finite() && *factor > 0.0).unwrap_or(1.0);
        install::install(environment, &partial, &stage_image, patience)?;
        std::fs::rename(&partial, raw)?;
        Ok(())
    })();
    let _ = std::fs::remove_dir_all(&stage);
    let _ = std::fs::remove_file(&partial);
    result.map(|()| Built { suite, kernel, packages: set.described(), seconds: start.elapsed().as_secs() })
}

/// An empty ext4 file system in a file with holes.
fn make_file_system(path: &Path, mib: u64) -> Result<()> {
    let program = find(MKE2FS.0).context("mke2fs is not there")?;
    let mut command = Command::new(program);
    command.args(["-q", "-F", "-t", "ext4", "-L", "debian-realm", "-E", "root_owner=0:0"]).arg(path);
    output(command.arg(format!("{mib}M")))?;
    Ok(())
}

/// Copies what is in `from`, and leaves its holes out.
fn copy(from: &Path, to: &Path, format: Format) -> Result<()> {
    let source = File::open(from)?;
    let size = source.metadata()?.len();
    let partial = to.with_extension(format!("partial-{}", std::process::id()));
    let result = (|| {
        match format {
            Format::Raw => File::create(&partial)?.set_len(size)?,
            Format::Qcow2 => vmm::disk::create_qcow2(&partial, size)?,
        }
        let mut disk = Disk::open(&partial, format, false)?;
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        while at < size {
            let len = usize::try_from(size - at).unwrap_or(CHUNK).min(CHUNK);
            let chunk = buffer.get_mut(..len).context("a chunk is too long")?;
            source.read_exact_at(chunk, at)?;
            for (number, piece) in (0u64..).zip(chunk.chunks(64 << 10)) {
                if piece.iter().any(|byte| *byte != 0) {
                    disk.write(piece, at + number * (64 << 10))?;
                }
            }
            at += u64::try_from(len)?;
        }
        disk.flush()?;
        Ok(())
    })();
    if result.is_err() {
        let _ = std::fs::remove_file(&partial);
        return result;
    }
    if to.is_dir() {
        bail!("{} is a directory", to.display());
    }
    std::fs::rename(&partial, to)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    fn arguments(words: &[&str]) -> BuildArgs {
        let words = ["realm", "image", "build"].iter().chain(words);
        match crate::args::Cli::try_parse_from(words).unwrap().command {
            crate::args::Command::Image(ImageArgs { command: ImageCommand::Build(args) }) => args,
            _ => panic!("another command"),
        }
    }

    #[test]
    fn words_that_would_fail_later_are_refused_at_once() {
        check(&arguments(&["--include", "g++-14", "--suite", "trixie"])).unwrap();
        for wrong in [
            "--size=10",
            "--include=-o",
            "--include=a b",
            "--suite=../x",
            "--hostname=a_b",
            "--root-password=it's",
            "--out=/nonexistent/debian.qcow2",
        ] {
            assert!(check(&arguments(&[wrong])).is_err(), "{wrong}");
        }
    }

    #[test]
    fn other_wishes_are_another_disk() {
        let of = |words: &[&str]| fingerprint(&arguments(words), "", b"");
        assert_eq!(of(&["--include", "a", "--include", "b"]), of(&["--include", "b", "--include", "a"]));
        assert_eq!(of(&["--out", "a"]), of(&["--out", "b", "--json"]));
        assert_ne!(of(&[]), of(&["--size", "3000"]));
        assert_ne!(of(&[]), fingerprint(&arguments(&[]), "key", b""));
        assert_ne!(of(&[]), fingerprint(&arguments(&[]), "", b"agent"));
    }

    #[test]
    fn a_copy_has_the_same_bytes_in_both_formats() {
        let directory = std::env::temp_dir().join(format!("realm-copy-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let from = directory.join("from");
        let mut bytes = vec![0; 3 << 20];
        bytes[100] = 1;
        bytes[(2 << 20) + 77_000..(2 << 20) + 200_000].fill(7);
        std::fs::write(&from, &bytes).unwrap();
        for name in ["to.img", "to.qcow2"] {
            let to = directory.join(name);
            copy(&from, &to, Format::of(&to)).unwrap();
            let disk = Disk::open(&to, Format::of(&to), true).unwrap();
            let mut read = vec![1; bytes.len()];
            disk.read(&mut read, 0).unwrap();
            assert!(read == bytes, "{name}");
            assert!(to.metadata().unwrap().blocks() * 512 < 2 << 20, "{name} has no holes");
        }
        std::fs::remove_dir_all(directory).unwrap();
    }
}
