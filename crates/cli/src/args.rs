//! The command line: every command and flag of `realm`, and nothing else.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::setup::Series;

/// Runs Linux VMs that the host cannot read (Arm CCA Realms) on stock Linux.
#[derive(Parser, Debug)]
#[command(
    name = "realm",
    version,
    about = "Run Linux VMs that the host cannot read: Arm CCA Realms on stock Linux",
    after_help = "Exit status: that of the command given with --exec; 125 when realm itself, or a layer below \
                  the guest, failed.\nEverything that is fetched or built outside the checkout lies in \
                  $XDG_CACHE_HOME/kvm-realm (default ~/.cache/kvm-realm)."
)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Run a Linux Realm: an interactive shell, or one command
    Run(Box<RunArgs>),
    /// Record a run, and show where its time went: a timeline for Perfetto and a page with plots
    Trace(Box<crate::trace::TraceArgs>),
    /// List the Realms that run
    Ps(crate::life::args::PsArgs),
    /// Run a command in a Realm that runs
    Exec(crate::life::args::ExecArgs),
    /// Copy files into a Realm or out of it
    Cp(crate::life::args::CpArgs),
    /// Attach to a Realm's terminal; Ctrl-A D detaches
    Console(crate::life::args::ConsoleArgs),
    /// Show what a Realm in the background has printed
    Logs(crate::life::args::LogsArgs),
    /// Switch Realms off
    Stop(crate::life::args::StopArgs),
    /// Show what a Realm was started with, and what has been counted, as JSON
    Info(crate::life::args::InfoArgs),
    /// Verify an attestation token: signatures, key binding, nonce, measurements
    Verify(VerifyArgs),
    /// Predict a Realm's initial measurement from its launch manifest, without starting anything
    Measure(MeasureArgs),
    /// Show what a Realm can have on this machine: vector lengths, counters, hashes, address bits
    Capabilities(CapabilitiesArgs),
    /// Make disks with a system to boot
    Image(crate::image::ImageArgs),
    /// Boot the emulated CCA machine to a shell on the host, where `realm run` starts Realms
    Lab(LabArgs),
    /// Fetch and install what is missing (every command does this by itself)
    Setup(SetupArgs),
    /// Report each prerequisite with its version and, where it is missing, the remedy
    Doctor(DoctorArgs),
    /// Build firmware, module, initramfs images and the arm64 `realm`
    Build(BuildArgs),
    /// Run all tests
    Test(TestArgs),
    /// Count instructions and calls, and print the tables of docs/performance.md
    Bench(BenchArgs),
    /// Remove the run directories and, with --all, the whole cache
    Clean(CleanArgs),
    /// Print a script that completes commands and flags in a shell
    Completions(crate::cmdline::CompletionsArgs),
    /// Print a manual page, or write all of them
    Man(crate::cmdline::ManArgs),
    /// The lab's first program on the host kernel (started by the host initramfs)
    #[command(hide = true)]
    LabAgent,
    /// The guest's part of the bench: touch fresh pages and count
    #[command(hide = true)]
    Touch {
        /// Pages of 4 KiB
        pages: usize,
    },
    /// The guest's part of a test: let a counter overflow and count the signals
    #[command(hide = true)]
    CountOverflows {
        /// How often
        times: u64,
    },
    /// The guest's part of the bench: system calls, switches, disk and device accesses
    #[command(hide = true)]
    Probe,
}

/// What shapes a Realm, wherever it runs.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct RunArgs {
    /// Take flags from a TOML file, in which their names are keys: `memory = 1024`, `disk = ["a.img", "b.img,ro"]`,
    /// `detach = true`. What is said here as well counts here
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Run COMMAND with the guest's shell, print its output alone on stdout, exit with its status
    #[arg(long, value_name = "COMMAND")]
    pub(crate) exec: Option<String>,
    /// The guest's kernel (arm64 Image, or a compressed form of it)
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// The guest's initramfs
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Take kernel and initramfs from the first disk's /boot (ext4, the newest kernel there)
    #[arg(long, requires = "disks", conflicts_with_all = ["kernel", "initrd", "attest"])]
    pub(crate) kernel_from_disk: bool,
    /// Words to add to the guest kernel's command line
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub(crate) cmdline: Option<String>,
    /// The guest's memory in MiB
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<u64>,
    /// The guest's CPUs
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,
    /// A disk: an image's path, then `,ro` if the guest may only read it, and `,format=raw` or `,format=qcow2` where
    /// the file's name does not say it (may be repeated)
    #[arg(long = "disk", value_name = "FILE[,ro][,format=F]", value_parser = crate::run::disks::parse)]
    pub(crate) disks: Vec<crate::run::disks::DiskArg>,
    /// Network cards
    #[command(flatten)]
    pub(crate) nets: crate::run::nets::NetArgs,
    /// A folder that the guest shares, at /mnt/NAME in the default guest (`mount -t virtiofs NAME DIR` in others); NAME is
    /// the folder's own unless `,tag=` says another one; with `,ro` the guest may only read (may be repeated)
    #[arg(long = "share", value_name = "DIR[,tag=NAME][,ro]", value_parser = crate::run::shares::parse)]
    pub(crate) shares: Vec<crate::run::shares::ShareArg>,
    /// Names, background, sockets
    #[command(flatten)]
    pub(crate) life: crate::life::args::LifeArgs,
    /// What the Realm is created with
    #[command(flatten)]
    pub(crate) realm: RealmArgs,
    /// What is known of its measurement
    #[command(flatten)]
    pub(crate) launch: crate::run::launch::LaunchArgs,
    /// Show every world's console on stderr
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// Print how long each stage took
    #[arg(long)]
    pub(crate) timings: bool,
    /// Write the stages, the measurements and the result as JSON to FILE, or to stdout if that is -
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write stage events as JSON lines to this file descriptor
    #[arg(long, value_name = "FD", hide = true)]
    pub(crate) events_fd: Option<i32>,
    /// With --report: read from this file descriptor whether the Realm may go on
    #[arg(long, value_name = "FD", hide = true)]
    pub(crate) verdict_fd: Option<i32>,
    /// With --exec: write the guest's console to this file, up to 64 MiB
    #[arg(long, value_name = "FILE")]
    pub(crate) console_log: Option<PathBuf>,
    /// The KVM device to use
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) device: Option<PathBuf>,
    /// Let the VMM's threads make any system call, to debug it: without this, one that a thread does not need ends the run
    #[arg(long)]
    pub(crate) no_seccomp: bool,
    /// Run the same guest as an ordinary VM on /dev/kvm instead of a Realm: to debug it, or to see what protection costs
    #[arg(long)]
    pub(crate) plain: bool,
    /// The emulated machine, where no /dev/kvm-realm exists
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// What is expected of a token.
#[derive(Args, Debug, Clone)]
#[command(
    after_help = "Exit status: 0 when every check holds, 1 when one fails, 125 when nothing could be checked. What no \
                  flag says is not checked, and the report says so.\nA token comes from `realm report --nonce NONCE` \
                  in a Realm; `realm run --attest` does both."
)]
pub(crate) struct VerifyArgs {
    /// The token: a file, or - for stdin; as it is, base64, or hexadecimal
    #[arg(value_name = "TOKEN")]
    pub(crate) token: PathBuf,
    /// The nonce that the Realm was given: text, or an even number of hexadecimal digits; hex:, text: and base64: say
    /// which. Up to 64 bytes, zeroes follow
    #[arg(long, value_name = "NONCE")]
    pub(crate) nonce: Option<String>,
    /// The Realm Initial Measurement
    #[arg(long, value_name = "HEX")]
    pub(crate) rim: Option<String>,
    /// The launch manifest, which predicts the initial measurement and has the personalization value
    #[arg(long, value_name = "FILE", conflicts_with = "rim")]
    pub(crate) manifest: Option<PathBuf>,
    /// A Realm Extensible Measurement, 0 to 3 (may be repeated)
    #[arg(long = "rem", value_name = "INDEX=HEX")]
    pub(crate) rems: Vec<String>,
    /// The Realm Personalization Value, written as a nonce is
    #[arg(long, value_name = "VALUE")]
    pub(crate) rpv: Option<String>,
    /// A P-384 public key that may sign platform tokens: PEM, DER, or a point (may be repeated) [default: the
    /// development root, which proves nothing about a real machine]
    #[arg(long = "platform-key", value_name = "FILE")]
    pub(crate) platform_keys: Vec<PathBuf>,
    /// A measurement of the platform's software, e.g. rmm=HEX (may be repeated)
    #[arg(long, value_name = "NAME=HEX")]
    pub(crate) software: Vec<String>,
    /// Accept platforms whose life cycle is not "secured"
    #[arg(long)]
    pub(crate) any_lifecycle: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a Realm is created with. Each of these but the personalization value changes the initial measurement.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Realm")]
pub(crate) struct RealmArgs {
    /// The hash of the measurement [default: sha256]
    #[arg(long, value_name = "ALGORITHM", value_parser = ["sha256", "sha512"])]
    pub(crate) hash: Option<String>,
    /// Up to 64 bytes that the token shows beside the measurement: `text:WORDS`, `hex:DIGITS`, `base64:DIGITS` or
    /// `file:PATH`
    #[arg(long, value_name = "VALUE", value_parser = crate::run::options::personalization)]
    pub(crate) personalization: Option<Personalization>,
    /// Give the Realm SVE with vectors of at most BITS bits [default: no SVE]
    #[arg(long, value_name = "BITS")]
    pub(crate) sve: Option<u32>,
    /// Give the Realm a PMU with N event counters [default: no PMU]
    #[arg(long, value_name = "N")]
    pub(crate) pmu: Option<u32>,
    /// Hardware breakpoints [default: 6]
    #[arg(long, value_name = "N")]
    pub(crate) breakpoints: Option<u32>,
    /// Hardware watchpoints [default: 4]
    #[arg(long, value_name = "N")]
    pub(crate) watchpoints: Option<u32>,
    /// Width of guest physical addresses [default: one bit more than memory needs, at least 33]
    #[arg(long, value_name = "BITS")]
    pub(crate) ipa_bits: Option<u32>,
}

/// `realm capabilities`.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct CapabilitiesArgs {
    /// Print them as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The emulated machine, where no /dev/kvm-realm exists
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// A personalization value, padded with zeroes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Personalization(pub(crate) [u8; 64]);

/// `realm measure`.
#[derive(Args, Debug, Clone)]
pub(crate) struct MeasureArgs {
    /// A launch manifest, as `realm run --manifest` or `--dry-run` writes it; `-` is standard input
    #[arg(value_name = "MANIFEST")]
    pub(crate) manifest: PathBuf,
    /// Print the measurement and what it is made of as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// What shapes the emulated machine. Meaningless where `/dev/kvm-realm` is used directly.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Emulated machine")]
pub(crate) struct MachineArgs {
    /// Which kernel is the host's; others than the default are fetched, or built, when they are first asked for
    /// [default: 6.12]
    #[arg(long, value_name = "SERIES", value_enum)]
    pub(crate) host: Option<Series>,
    /// Another kernel for the host; the module is built for that of --host
    #[arg(long, value_name = "FILE")]
    pub(crate) host_kernel: Option<PathBuf>,
    /// Words to add to the host kernel's command line
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub(crate) host_cmdline: Option<String>,
    /// The machine's CPUs [default: the guest's, at least 1]
    #[arg(long, value_name = "N")]
    pub(crate) host_cpus: Option<u32>,
    /// The machine's memory in MiB [default: the guest's and 768 more]
    #[arg(long, value_name = "MIB")]
    pub(crate) host_memory: Option<u64>,
    /// The RMM's image [default: ours]
    #[arg(long, value_name = "FILE")]
    pub(crate) rmm: Option<PathBuf>,
    /// The EL3 firmware's image [default: our monitor]; `none` boots the host kernel without EL3 and RMM
    #[arg(long, value_name = "FILE")]
    pub(crate) firmware: Option<PathBuf>,
    /// Which RMM-EL3 interface the monitor offers the RMM: `0.x` or `2.0` [default: the RMM's own choice, else 2.0]
    #[arg(long, value_name = "FAMILY", value_parser = ["0.x", "2.0"])]
    pub(crate) rmm_el3: Option<String>,
    /// A property of QEMU's CPU model, e.g. sve=off (may be repeated)
    #[arg(long = "cpu-option", value_name = "KEY=VALUE", value_parser = option)]
    pub(crate) cpu_options: Vec<String>,
    /// A property of QEMU's `virt` machine, e.g. iommu=smmuv3 (may be repeated)
    #[arg(long = "machine-option", value_name = "KEY=VALUE", value_parser = option)]
    pub(crate) machine_options: Vec<String>,
    /// QEMU's accelerator, e.g. tcg,thread=multi [default: one thread, with a clock that counts instructions]
    #[arg(long, value_name = "ACCEL")]
    pub(crate) accel: Option<String>,
    /// One more argument for QEMU (may be repeated)
    #[arg(long = "qemu-arg", value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) qemu_args: Vec<String>,
    /// The QEMU to run [default: qemu-system-aarch64]
    #[arg(long, value_name = "FILE", env = "REALM_QEMU")]
    pub(crate) qemu: Option<PathBuf>,
    /// Multiply every time limit by this (slow or busy machines)
    #[arg(long, value_name = "FACTOR", env = "REALM_PATIENCE")]
    pub(crate) patience: Option<f64>,
}

/// `realm lab`.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct LabArgs {
    /// Run COMMAND with the host's shell instead, print its output on stdout, exit with its status
    #[arg(long, value_name = "COMMAND")]
    pub(crate) exec: Option<String>,
    /// Boot a bare-metal program (arm64 Image or raw binary) at NS-EL2 in the host kernel's place; what it prints on
    /// UART0 comes on stdout, and the status is 0 when it ends with PSCI SYSTEM_OFF
    #[arg(long, value_name = "FILE[@ADDRESS]", conflicts_with_all = ["exec", "no_module", "files", "kernel", "initrd"])]
    pub(crate) payload: Option<String>,
    /// Let the payload use semihosting: exit with a status, and read and write this machine's files
    #[arg(long, requires = "payload")]
    pub(crate) semihosting: bool,
    /// Stop what --exec or --payload started after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(crate) timeout: u64,
    /// Do not load the kernel module
    #[arg(long)]
    pub(crate) no_module: bool,
    /// Put FILE into the host's root directory (may be repeated)
    #[arg(long = "file", value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// The guest's kernel, as /guest/kernel on the host
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// The guest's initramfs, as /guest/initrd on the host
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Show every world's console on stderr
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// Print how long each stage took
    #[arg(long)]
    pub(crate) timings: bool,
    /// The emulated machine
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// `realm setup`.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct SetupArgs {
    /// Ask the archive again which versions are the newest
    #[arg(long)]
    pub(crate) update: bool,
}

/// `realm doctor`.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct DoctorArgs {
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `realm build`.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct BuildArgs {
    /// Build only this: monitor, rmm, payload, module, realm, agent, initramfs (may be repeated)
    #[arg(long, value_name = "PART")]
    pub(crate) only: Vec<String>,
    /// Print where the products are as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `realm test`.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct TestArgs {
    /// Leave out what needs QEMU
    #[arg(long)]
    pub(crate) quick: bool,
    /// Run the long tests as well
    #[arg(long, conflicts_with = "quick")]
    pub(crate) full: bool,
    /// Run only the tests whose name contains NAME, long ones too (may be repeated)
    #[arg(long, value_name = "NAME")]
    pub(crate) only: Vec<String>,
    /// Run this many tests at a time: by default as many as there are CPUs, up to 4; each emulated machine takes one CPU and
    /// up to 3 GiB of memory
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) jobs: Option<u32>,
    /// List the tests' names
    #[arg(long)]
    pub(crate) list: bool,
    /// With --list: print them as JSON
    #[arg(long, requires = "list")]
    pub(crate) json: bool,
}

/// `realm bench`.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct BenchArgs {
    /// Print the results as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `realm clean`.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct CleanArgs {
    /// Also remove packages, libraries and images: the next command sets everything up again
    #[arg(long)]
    pub(crate) all: bool,
}

/// `KEY=VALUE` as QEMU takes it between two commas.
fn option(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((key, _)) if !key.is_empty() && !text.contains(',') => Ok(text.to_owned()),
        _ => Err("one KEY=VALUE, without a comma, is expected".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(words: &[&str]) -> String {
        Cli::try_parse_from(words).unwrap_err().to_string()
    }

    #[test]
    fn a_payload_excludes_what_needs_a_kernel() {
        assert!(refused(&["realm", "lab", "--payload", "a", "--exec", "b"]).contains("cannot be used with"));
        assert!(refused(&["realm", "lab", "--semihosting"]).contains("--payload"));
        Cli::try_parse_from(["realm", "lab", "--payload", "a@0x50000000", "--semihosting"]).unwrap();
    }

    #[test]
    fn properties_are_single_assignments() {
        assert!(refused(&["realm", "lab", "--cpu-option", "sve"]).contains("KEY=VALUE"));
        assert!(refused(&["realm", "lab", "--cpu-option", "sve=off,x-rme=off"]).contains("KEY=VALUE"));
        assert!(refused(&["realm", "lab", "--rmm-el3", "1.0"]).contains("0.x"));
        Cli::try_parse_from(["realm", "lab", "--cpu-option", "sve=off", "--machine-option", "iommu=smmuv3"])
            .unwrap();
    }
}
