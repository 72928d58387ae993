//! The commands that talk to Realms that run.

use std::fs::File;
use std::io::{IsTerminal as _, Read as _, Seek as _, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::agent::{self, Exec, Session};
use super::args::{ConsoleArgs, CpArgs, ExecArgs, InfoArgs, LogsArgs, PsArgs, StopArgs};
use super::http::{self, Response};
use super::registry::{Found, Registry, now};
use super::{keys, socket};
use crate::lab::terminal::RawMode;
use crate::ui;

/// How often something is looked at again that will happen soon.
const SOON: Duration = Duration::from_millis(300);
/// When somebody who waits is told for what.
const NOTICEABLE: Duration = Duration::from_secs(3);
/// How long a question may take that the VMM answers by itself.
const ANSWER: Duration = Duration::from_secs(30);

/// `realm ps`.
pub(crate) fn ps(args: &PsArgs) -> Result<u8> {
    let mut list = Registry::open()?.list();
    list.retain(|found| args.all || found.pid.is_some());
    if args.json {
        let list: Vec<_> = list.iter().map(described).collect();
        println!("{}", serde_json::to_string_pretty(&list)?);
        return Ok(0);
    }
    let titles = ["NAME", "STATE", "STARTED", "CPUS", "MEMORY", "MEASUREMENT", "WHERE", "PID"];
    let mut rows = vec![titles.map(str::to_owned)];
    for Found { info, status, pid, .. } in &list {
        rows.push([
            info.name.clone(),
            status.shown(),
            format!("{} ago", ago(now().saturating_sub(info.started))),
            info.cpus.to_string(),
            format!("{} MiB", info.memory_mib),
            // Enough to tell two by; all of it is in the JSON.
            info.measurement.as_ref().map_or("-".to_owned(), |digits| digits.chars().take(12).collect()),
            info.place.clone(),
            pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
        ]);
    }
    print!("{}", table(&rows));
    Ok(0)
}

fn described(found: &Found) -> serde_json::Value {
    let mut value = serde_json::to_value(&found.info).unwrap_or_default();
    let status = serde_json::to_value(&found.status).unwrap_or_default();
    if let (Some(value), Some(status)) = (value.as_object_mut(), status.as_object()) {
        value.extend(status.clone());
        value.insert("pid".into(), found.pid.into());
        value.insert("api_socket".into(), found.socket().display().to_string().into());
    }
    value
}

fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect::<Vec<_>>();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn ago(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// `realm info`.
pub(crate) fn info(args: &InfoArgs) -> Result<u8> {
    let found = Registry::open()?.find_alive(&args.name)?;
    let path = if args.counters { "/api/v1/vm.counters" } else { "/api/v1/vm.info" };
    let response = call(&found, "GET", path)?;
    ensure!(response.status == 200, "{}", response.failure());
    let value: serde_json::Value = serde_json::from_slice(&response.body)?;
    println!("{}", if args.json { value.to_string() } else { serde_json::to_string_pretty(&value)? });
    Ok(0)
}

/// `realm stop`.
pub(crate) fn stop(args: &StopArgs) -> Result<u8> {
    let registry = Registry::open()?;
    let mut failed = false;
    for name in &args.names {
        if let Err(error) = registry.find_alive(name).and_then(|found| stop_one(&found, args)) {
            ui::line("realm: error", &format!("{error:#}"));
            failed = true;
        }
    }
    Ok(if failed { crate::FAILURE } else { 0 })
}

fn stop_one(found: &Found, args: &StopArgs) -> Result<()> {
    let name = &found.info.name;
    let gone = |patience: Duration| {
        let deadline = Instant::now() + patience;
        while found.is_alive() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
        !found.is_alive()
    };
    if !args.force {
        let deadline = Duration::from_secs(args.timeout);
        let response = call(found, "PUT", "/api/v1/vm.power-button")?;
        if response.status != 204 {
            bail!("{name} could not be asked: {}; --force ends it all the same", response.failure());
        }
        ensure!(gone(deadline), "{name} has not switched itself off in {} s; --force ends it", args.timeout);
        return Ok(());
    }
    if call(found, "PUT", "/api/v1/vm.shutdown").is_ok_and(|response| response.status == 204)
        && gone(Duration::from_secs(10))
    {
        return Ok(());
    }
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        if let Some(pid) = found.pid.filter(|_| found.is_alive()) {
            // SAFETY: no pointers. The process held the lock a moment ago.
            unsafe { libc::kill(pid, signal) };
        }
        if gone(Duration::from_secs(5)) {
            return Ok(());
        }
    }
    bail!("{name} does not end")
}

/// `realm logs`.
pub(crate) fn logs(args: &LogsArgs) -> Result<u8> {
    let found = Registry::open()?.find(&args.name)?;
    let path = if args.vmm { Some(found.directory.join("program.log")) } else { found.info.log.clone() };
    let path = path.context("it prints on the terminal that started it: only --detach keeps a log")?;
    let mut out = std::io::stdout().lock();
    if let Ok(mut file) = File::open(crate::log::older(&path)) {
        std::io::copy(&mut file, &mut out)?;
    }
    let mut position = 0;
    loop {
        let alive = found.is_alive();
        if let Ok(mut file) = File::open(&path) {
            if file.metadata()?.len() < position {
                // It had become too long, and began again.
                position = 0;
            }
            file.seek(SeekFrom::Start(position))?;
            position += std::io::copy(&mut file, &mut out)?;
            out.flush()?;
        }
        if !args.follow || !alive {
            return Ok(0);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// `realm console`.
pub(crate) fn console(args: &ConsoleArgs) -> Result<u8> {
    let found = Registry::open()?.find_alive(&args.name)?;
    let size = vmm::terminal::size(1);
    let target = match size {
        Some((rows, columns)) => format!("/api/v1/vm.console?rows={rows}&cols={columns}"),
        None => "/api/v1/vm.console".to_owned(),
    };
    let mut stream = socket::connect(&found.socket()).context("the Realm does not answer")?;
    let response = http::upgrade(&mut stream, &target).context("the Realm cannot be talked to yet")?;
    ensure!(response.status == 101, "{}", response.failure());
    if std::io::stdin().is_terminal() {
        ui::say("attached; Ctrl-A D detaches");
    }
    let raw = RawMode::enter()?;
    let resized = found.clone();
    let mut keys = keys::Keys::new(&raw, move |rows, columns| {
        let _ = call(&resized, "PUT", &format!("/api/v1/vm.console-size?rows={rows}&cols={columns}"));
    })?;
    let mut typed = stream.try_clone()?;
    std::thread::spawn(move || {
        // The end of input, or the keys that detach: either way the connection's other half ends too.
        let _ = keys.copy(&mut typed);
        if keys.detached() {
            let _ = typed.shutdown(std::net::Shutdown::Both);
        }
    });
    let mut out = std::io::stdout().lock();
    let mut buffer = [0; 16 << 10];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        out.write_all(&buffer[..count])?;
        out.flush()?;
    }
    drop(raw);
    if std::io::stdin().is_terminal() {
        println!();
        ui::say(if found.is_alive() { "detached" } else { "the Realm has ended" });
    }
    Ok(0)
}

/// `realm exec`.
pub(crate) fn exec(args: &ExecArgs) -> Result<u8> {
    let found = Registry::open()?.find_alive(&args.name)?;
    let shell = ["sh".to_owned(), "-l".to_owned()];
    let command = match args.command.as_slice() {
        [] if args.tty => &shell[..],
        [] => bail!("which command? `realm exec {} -- COMMAND`, or -t for a shell", args.name),
        command => command,
    };
    let mut variables = vec!["HOME=/root".to_owned()];
    let terminal = args.tty.then(|| vmm::terminal::size(0).unwrap_or((24, 80)));
    if args.tty {
        variables.push(format!("TERM={}", std::env::var("TERM").unwrap_or_else(|_| "linux".into())));
    }
    // What comes later counts.
    let named = |variable: &str| variable.split_once('=').map(|(name, _)| name.to_owned());
    variables.retain(|variable| args.env.iter().all(|other| named(other) != named(variable)));
    variables.extend(args.env.iter().cloned());
    let stream = guest(&found, agent::PORT, Duration::from_secs(args.wait))?;
    let exec = Exec { arguments: command.iter().map(String::as_str).collect(), variables, terminal };
    let session = Session::exec(stream, &exec)?;
    let raw = if args.tty { RawMode::enter()? } else { None };
    if args.no_stdin {
        session.no_input()?;
    } else if args.tty {
        let sender = session.sender();
        let keys = keys::Keys::new(&raw, move |rows, columns| drop(sender.resize(rows, columns)))?;
        session.feed(keys.without_detaching());
    } else {
        session.feed(std::io::stdin());
    }
    let ended = session.finish(&mut std::io::stdout(), &mut std::io::stderr());
    drop(raw);
    let ended = ended?;
    if matches!(ended, agent::Ended::Failed(..)) {
        ui::line("realm: error", &format!("{:#}", ended.check().err().context("no failure")?));
    }
    Ok(ended.status())
}

/// One side of `realm cp`.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Here(&'a str),
    There(&'a str, &'a str),
}

impl<'a> Place<'a> {
    /// `NAME:PATH` is in a Realm; a path of ours that has a colon can begin with `./`.
    fn parse(text: &'a str) -> Self {
        match text.split_once(':') {
            Some((name, path)) if super::names::parse(name).is_ok() => {
                Self::There(name, if path.is_empty() { "." } else { path })
            }
            _ => Self::Here(text),
        }
    }
}

/// `realm cp`.
pub(crate) fn cp(args: &CpArgs) -> Result<u8> {
    let registry = Registry::open()?;
    let wait = Duration::from_secs(args.wait);
    match (Place::parse(&args.from), Place::parse(&args.to)) {
        (Place::Here(from), Place::There(name, to)) => {
            let realm = registry.find_alive(name)?;
            if args.recursive {
                send_tree(&realm, wait, from, to)
            } else {
                send_file(&realm, wait, from, to)
            }?;
        }
        (Place::There(name, from), Place::Here(to)) => {
            let realm = registry.find_alive(name)?;
            if args.recursive {
                fetch_tree(&realm, wait, from, to)
            } else {
                fetch_file(&realm, wait, from, to)
            }?;
        }
        _ => bail!("one of the two is a file here, the other one NAME:PATH"),
    }
    Ok(0)
}

fn send_file(realm: &Found, wait: Duration, from: &str, to: &str) -> Result<()> {
    let file = File::open(from).with_context(|| format!("cannot read {from}"))?;
    let data = file.metadata()?;
    ensure!(!data.is_dir(), "{from} is a directory: -r copies it");
    let name = Path::new(from).file_name().and_then(|name| name.to_str()).context("the file has no name")?;
    agent::put(guest(realm, agent::PORT, wait)?, data.permissions().mode(), to, name, file)
}

fn fetch_file(realm: &Found, wait: Duration, from: &str, to: &str) -> Result<()> {
    let mut target = Path::new(to).to_owned();
    if target.is_dir() {
        target.push(Path::new(from).file_name().context("the file has no name")?);
    }
    agent::get(guest(realm, agent::PORT, wait)?, from, |mode, _| {
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(mode & 0o777);
        options.open(&target).with_context(|| format!("cannot write {}", target.display()))
    })
}

fn send_tree(realm: &Found, wait: Duration, from: &str, to: &str) -> Result<()> {
    let from = std::fs::canonicalize(from).with_context(|| format!("cannot read {from}"))?;
    let (parent, name) = from.parent().zip(from.file_name()).context("the directory has no name")?;
    let mut tar = std::process::Command::new("tar");
    tar.arg("-C").arg(parent).args(["-cf", "-"]).arg(name).stdout(std::process::Stdio::piped());
    let mut tar = tar.spawn().context("cannot run tar")?;
    let exec = Exec { arguments: vec!["tar", "-C", to, "-xf", "-"], ..Exec::default() };
    let session = Session::exec(guest(realm, agent::PORT, wait)?, &exec)?;
    session.feed(tar.stdout.take().context("tar has no output")?);
    let ended = session.finish(&mut std::io::sink(), &mut std::io::stderr())?;
    let packed = tar.wait()?;
    ended.check().context("unpacking in the guest")?;
    ensure!(packed.success(), "tar ended with {packed}");
    Ok(())
}

fn fetch_tree(realm: &Found, wait: Duration, from: &str, to: &str) -> Result<()> {
    let from = from.trim_end_matches('/');
    let (parent, name) = from.rsplit_once('/').unwrap_or((".", from));
    let parent = if parent.is_empty() { "/" } else { parent };
    let exec = Exec { arguments: vec!["tar", "-C", parent, "-cf", "-", name], ..Exec::default() };
    let session = Session::exec(guest(realm, agent::PORT, wait)?, &exec)?;
    session.no_input()?;
    let mut tar = std::process::Command::new("tar");
    // What a guest packs is not to be trusted: tar refuses names that lead out of the directory.
    tar.args(["-C", to, "-xof", "-"]).stdin(std::process::Stdio::piped());
    let mut tar = tar.spawn().context("cannot run tar")?;
    let mut input = tar.stdin.take().context("tar has no input")?;
    let ended = session.finish(&mut input, &mut std::io::stderr());
    drop(input);
    let unpacked = tar.wait()?;
    ended?.check().context("packing in the guest")?;
    ensure!(unpacked.success(), "tar ended with {unpacked}");
    Ok(())
}

/// Asks a Realm's VMM.
fn call(found: &Found, method: &str, path: &str) -> Result<Response> {
    let mut stream = socket::connect(&found.socket()).context("the Realm cannot be talked to yet")?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    http::call(&mut stream, method, path).context("the Realm cannot be talked to yet")
}

/// Connects with a port of the guest, and waits for it while the guest starts.
fn guest(found: &Found, port: u32, patience: Duration) -> Result<UnixStream> {
    let start = Instant::now();
    let target = format!("/api/v1/vm.vsock?port={port}");
    let mut told = false;
    loop {
        let reason = match try_guest(found, &target)? {
            Ok(stream) => return Ok(stream),
            Err(reason) => reason,
        };
        let name = &found.info.name;
        ensure!(found.is_alive(), "{name} has ended: `realm logs {name}` shows what it said");
        ensure!(start.elapsed() < patience, "no agent answers in {name} ({reason})");
        if !told && start.elapsed() > NOTICEABLE {
            ui::say(&format!("waiting for the agent in {name} ..."));
            told = true;
        }
        std::thread::sleep(SOON);
    }
}

/// The stream, or why it is not there yet.
fn try_guest(found: &Found, target: &str) -> Result<std::result::Result<UnixStream, String>> {
    let Ok(mut stream) = socket::connect(&found.socket()) else { return Ok(Err("it starts".into())) };
    stream.set_read_timeout(Some(ANSWER))?;
    match http::upgrade(&mut stream, target) {
        Ok(Response { status: 101, .. }) => {
            stream.set_read_timeout(None)?;
            Ok(Ok(stream))
        }
        Ok(response) if response.status == 503 => Ok(Err(response.failure())),
        Ok(response) => bail!("{}", response.failure()),
        // The emulated machine is not so far yet.
        Err(_) => Ok(Err("it starts".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_here_or_in_a_realm() {
        assert_eq!(Place::parse("web:/etc/passwd"), Place::There("web", "/etc/passwd"));
        assert_eq!(Place::parse("web:"), Place::There("web", "."));
        assert_eq!(Place::parse("./web:x"), Place::Here("./web:x"));
        assert_eq!(Place::parse("/a/b"), Place::Here("/a/b"));
    }

    #[test]
    fn tables_have_columns() {
        let rows = [["a", "bcd"], ["efg", "h"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "a    bcd\nefg  h\n");
        assert_eq!(
            (ago(5), ago(130), ago(7300), ago(180_000)),
            ("5 s".into(), "2 min".into(), "2 h".into(), "2 days".into())
        );
    }
}
