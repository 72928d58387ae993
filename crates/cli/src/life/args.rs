//! Flags and commands for the life of Realms.

use std::path::PathBuf;

use clap::Args;

/// What `realm run` needs to know for a Realm that others will talk to.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Life")]
pub(crate) struct LifeArgs {
    /// What the Realm is called in `realm ps`, `exec`, `cp`, `stop` and so on [default: one that is made up]
    #[arg(long, value_name = "NAME", value_parser = super::names::parse)]
    pub(crate) name: Option<String>,
    /// Leave the Realm running in the background: print its name when it runs, and return
    #[arg(long, conflicts_with_all = ["attest", "dry_run"])]
    pub(crate) detach: bool,
    /// Sockets between guest and host: the guest's address, and a UNIX socket of the host that takes `CONNECT PORT`, beside
    /// which the guest's `realm connect PORT` finds whoever listens at PATH_PORT; `off` for none [default: cid=3, without a socket, for a Realm with a name; off for others]
    #[arg(long, value_name = "cid=N,socket=PATH", value_parser = super::vsock::parse)]
    pub(crate) vsock: Option<super::vsock::VsockArg>,
    /// Serve the control API (docs/api.yaml) at this socket as well
    #[arg(long, value_name = "PATH")]
    pub(crate) api_socket: Option<PathBuf>,
    /// Say there when the Realm runs
    #[arg(long, value_name = "FD", hide = true)]
    pub(crate) ready_fd: Option<i32>,
}

impl LifeArgs {
    /// Whether somebody will want to talk to the guest.
    pub(crate) fn is_named(&self) -> bool {
        self.name.is_some() || self.detach
    }
}

/// `realm ps`.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct PsArgs {
    /// Show the ones that have ended as well
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Print them as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `realm info`.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct InfoArgs {
    /// The Realm
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// Show what has been counted instead: bytes, connections, memory
    #[arg(long)]
    pub(crate) counters: bool,
    /// Print it in one line
    #[arg(long)]
    pub(crate) json: bool,
}

/// `realm stop`.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct StopArgs {
    /// The Realms
    #[arg(value_name = "NAME", required = true)]
    pub(crate) names: Vec<String>,
    /// Do not ask the guest: end it now
    #[arg(short, long)]
    pub(crate) force: bool,
    /// How long a guest may take to switch itself off
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub(crate) timeout: u64,
}

/// `realm logs`.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct LogsArgs {
    /// The Realm
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// Go on until the Realm ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Show what `realm` said itself instead
    #[arg(long)]
    pub(crate) vmm: bool,
}

/// `realm console`.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct ConsoleArgs {
    /// The Realm
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
}

/// `realm exec`.
#[derive(Args, Debug, Clone, Default)]
#[command(
    after_help = "Exit status: the command's, 128 and the signal's number if a signal ended it; 127 if it was not \
                        found, 126 if it cannot be run, 125 if the guest could not be asked.\n\
                        The command is not passed through a shell: -- sh -c '…' does that."
)]
pub(crate) struct ExecArgs {
    /// The Realm
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Give the command no input
    #[arg(short = 'n', long)]
    pub(crate) no_stdin: bool,
    /// Set a variable of the command's environment (may be repeated)
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = variable)]
    pub(crate) env: Vec<String>,
    /// How long to wait for a guest that still starts
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(crate) wait: u64,
    /// The command and its arguments [default with -t: a shell]
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

/// `realm cp`.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct CpArgs {
    /// Copy a directory with everything in it (with `tar`, which both sides must have)
    #[arg(short, long)]
    pub(crate) recursive: bool,
    /// How long to wait for a guest that still starts
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(crate) wait: u64,
    /// What to copy: FILE, or NAME:PATH for a file in the Realm NAME
    #[arg(value_name = "FROM")]
    pub(crate) from: String,
    /// Where to: FILE, or NAME:PATH; into a directory if it is one
    #[arg(value_name = "TO")]
    pub(crate) to: String,
}

fn variable(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() && !text.contains('\0') => Ok(text.to_owned()),
        _ => Err("NAME=VALUE is expected".to_owned()),
    }
}
