//! The control socket of a Realm's VMM: HTTP/1.1 with JSON on a UNIX socket, as docs/api.yaml describes it.
//!
//! The spelling is Cloud Hypervisor's where both have the same thing. Who may open the socket may do everything with the
//! Realm, so the file is its owner's alone; even so, requests are bounded in size, number and time.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use vmm::seccomp::Confinement;
use vmm::virtio::vsock;

use super::agent;
use super::http::{self, Request, Response};
use super::hub::Hub;

/// Connections at a time.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);

/// What can be asked for: method and path.
pub(crate) const ROUTES: &[(&str, &str)] = &[
    ("GET", "/api/v1/vmm.ping"),
    ("GET", "/api/v1/vm.info"),
    ("GET", "/api/v1/vm.counters"),
    ("PUT", "/api/v1/vm.power-button"),
    ("PUT", "/api/v1/vm.shutdown"),
    ("GET", "/api/v1/vm.console"),
    ("PUT", "/api/v1/vm.console-size"),
    ("GET", "/api/v1/vm.vsock"),
];

/// What the socket's requests are about.
pub(crate) struct Machine {
    /// What was started, for `vm.info`.
    pub(crate) config: Value,
    /// The guest's memory in bytes.
    pub(crate) memory: u64,
    /// The terminal.
    pub(crate) hub: Arc<Hub>,
    /// The way to the guest's sockets, if it has any.
    pub(crate) vsock: Option<vsock::Handle>,
    /// Ends the run.
    pub(crate) stop: Box<dyn Fn() + Send + Sync>,
}

/// Serves a socket from a thread of its own, for as long as the process lives.
///
/// It and its clients' threads are confined as the main thread is: a guest's agent answers to them.
pub(crate) fn serve(path: &Path, machine: Arc<Machine>, confinement: Confinement) -> Result<()> {
    let listener = listen(path)?;
    let filter = confinement.main()?;
    let serving = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new().name("api".into()).spawn(move || {
        if let Err(error) = filter.enter() {
            return eprintln!("realm: no control socket: {error}");
        }
        for stream in listener.incoming().flatten() {
            if serving.fetch_add(1, Ordering::SeqCst) >= MAX_CONNECTIONS {
                serving.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let (machine, counter) = (machine.clone(), serving.clone());
            let served = std::thread::Builder::new().name("api client".into()).spawn(move || {
                // Nobody minds a client that went away.
                let _ = machine.client(stream);
                counter.fetch_sub(1, Ordering::SeqCst);
            });
            if served.is_err() {
                serving.fetch_sub(1, Ordering::SeqCst);
            }
        }
    })?;
    Ok(())
}

/// A socket that its owner alone may open, from its first moment.
pub(crate) fn listen(path: &Path) -> Result<UnixListener> {
    let _ = std::fs::remove_file(path);
    // SAFETY: no pointers.
    let before = unsafe { libc::umask(0o177) };
    let listener = super::socket::bind(path);
    // SAFETY: no pointers.
    unsafe { libc::umask(before) };
    listener.with_context(|| format!("cannot listen at {}", path.display()))
}

impl Machine {
    fn client(&self, mut stream: UnixStream) -> Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let request = match http::read_request(&mut stream) {
            Ok(request) => request,
            Err(refusal) => return Ok(stream.write_all(&refusal.bytes())?),
        };
        let known: Vec<&str> =
            ROUTES.iter().filter(|(_, path)| *path == request.path).map(|(method, _)| *method).collect();
        if known.is_empty() {
            return Ok(stream.write_all(&Response::error(404, "there is no such path").bytes())?);
        }
        if !known.contains(&request.method.as_str()) {
            let text = format!("{} is expected", known.join(" or "));
            return Ok(stream.write_all(&Response::error(405, &text).bytes())?);
        }
        match request.path.trim_start_matches("/api/v1/") {
            "vm.console" | "vm.vsock" if !request.upgrade => {
                let text = "this is a stream: `Upgrade: realm-stream` is expected";
                Ok(stream.write_all(&Response::error(426, text).bytes())?)
            }
            "vm.console" => {
                stream.write_all(&Response::switching())?;
                stream.set_read_timeout(None)?;
                self.resize(&request);
                self.hub.attach(stream)
            }
            "vm.vsock" => self.connect(&request, stream),
            name => Ok(stream.write_all(&self.answer(name, &request).bytes())?),
        }
    }

    fn answer(&self, name: &str, request: &Request) -> Response {
        match name {
            "vmm.ping" => Response::value(&json!({
                "build_version": env!("CARGO_PKG_VERSION"),
                "version": env!("CARGO_PKG_VERSION"),
                "pid": std::process::id(),
                "features": [],
            })),
            "vm.info" => Response::value(&json!({
                "config": self.config,
                "state": "Running",
                "memory_actual_size": self.memory,
            })),
            "vm.counters" => Response::value(&self.counters()),
            "vm.power-button" => match self.power_off() {
                Ok(()) => Response::done(),
                Err(error) => Response::error(503, &format!("{error:#}")),
            },
            "vm.shutdown" => {
                (self.stop)();
                Response::done()
            }
            "vm.console-size" if self.resize(request) => Response::done(),
            "vm.console-size" => Response::error(400, "?rows=N&cols=N is expected"),
            _ => Response::error(404, "there is no such path"),
        }
    }

    fn resize(&self, request: &Request) -> bool {
        let size = (request.number("rows"), request.number("cols"));
        let (Some(rows), Some(columns)) = size else { return false };
        self.hub.resize(rows, columns);
        true
    }

    /// The client's own socket becomes the guest's connection.
    fn connect(&self, request: &Request, mut stream: UnixStream) -> Result<()> {
        let refusal = match (&self.vsock, request.number("port")) {
            (None, _) => Response::error(
                404,
                "this Realm has no vsock: it was started without --name, or with --vsock off",
            ),
            (_, None) => Response::error(400, "?port=N is expected"),
            (Some(vsock), Some(port)) => {
                let refused = Response::error(503, "nobody listens at that port in the guest");
                stream.set_read_timeout(None)?;
                stream.set_write_timeout(None)?;
                vsock.connect(port, stream, &Response::switching(), &refused.bytes());
                return Ok(());
            }
        };
        Ok(stream.write_all(&refusal.bytes())?)
    }

    /// Has the guest's agent switch the guest off.
    fn power_off(&self) -> Result<()> {
        let vsock = self.vsock.as_ref().context("this Realm has no vsock, and so no agent")?;
        let (near, mut far) = UnixStream::pair()?;
        far.set_read_timeout(Some(PATIENCE))?;
        vsock.connect(agent::PORT, near, b"+", b"-");
        let mut answer = [0];
        far.read_exact(&mut answer).context("the guest does not answer")?;
        anyhow::ensure!(answer == *b"+", "no agent runs in the guest that could switch it off");
        agent::power_off(&mut far)
    }

    fn counters(&self) -> Value {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let number = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0)
        };
        let mut counters = json!({
            "vmm": {
                "threads": number("Threads:"),
                "rss_anon_kib": number("RssAnon:"),
                "rss_shared_memory_kib": number("RssShmem:"),
            },
            "console": {
                "printed_bytes": self.hub.printed.load(Ordering::Relaxed),
                "typed_bytes": self.hub.typed.load(Ordering::Relaxed),
            },
        });
        if let Some(vsock) = &self.vsock {
            let counted = vsock.counters();
            counters["vsock"] = json!({
                "connections": counted.connections.load(Ordering::Relaxed),
                "from_guest_bytes": counted.from_guest.load(Ordering::Relaxed),
                "to_guest_bytes": counted.to_guest.load(Ordering::Relaxed),
            });
        }
        counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Arc<Machine> {
        let (sizes, _) = vmm::mailbox::mailbox().unwrap();
        let (keyboard, _) = UnixStream::pair().unwrap();
        Arc::new(Machine {
            config: json!({"cpus": {"boot_vcpus": 1}}),
            memory: 1 << 29,
            hub: Arc::new(Hub::new(keyboard, sizes).unwrap()),
            vsock: None,
            stop: Box::new(|| {}),
        })
    }

    fn ask(machine: &Arc<Machine>, text: &str) -> String {
        let (near, mut far) = UnixStream::pair().unwrap();
        let machine = machine.clone();
        let thread = std::thread::spawn(move || machine.client(near));
        far.write_all(text.as_bytes()).unwrap();
        let _ = far.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        far.read_to_string(&mut answer).unwrap();
        thread.join().unwrap().unwrap();
        answer
    }

    #[test]
    fn every_route_answers_and_nothing_else_does() {
        let machine = machine();
        for (method, path) in ROUTES {
            let answer = ask(&machine, &format!("{method} {path} HTTP/1.1\r\n\r\n"));
            assert!(
                !answer.starts_with("HTTP/1.1 404") && !answer.starts_with("HTTP/1.1 405"),
                "{path}: {answer}"
            );
            let answer = ask(&machine, &format!("DELETE {path} HTTP/1.1\r\n\r\n"));
            assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
        }
        assert!(
            ask(&machine, "GET /api/v1/vm.info HTTP/1.1\r\n\r\n")
                .contains("\"memory_actual_size\":536870912")
        );
        assert!(ask(&machine, "GET /api/v1/vm.create HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(ask(&machine, "nonsense\r\n\r\n").starts_with("HTTP/1.1 400"));
        let upgrade = "GET /api/v1/vm.vsock?port=1 HTTP/1.1\r\nUpgrade: realm-stream\r\n\r\n";
        assert!(ask(&machine, upgrade).contains("no vsock"));
        let console = "GET /api/v1/vm.console HTTP/1.1\r\nUpgrade: realm-stream\r\n\r\n";
        assert!(ask(&machine, console).starts_with("HTTP/1.1 101"));
    }

    #[test]
    fn a_socket_is_its_owners_alone() {
        let path = std::env::temp_dir().join(format!("realm-api-{}.sock", std::process::id()));
        serve(&path, machine(), Confinement::On).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        let mut stream = UnixStream::connect(&path).unwrap();
        assert_eq!(http::call(&mut stream, "GET", "/api/v1/vmm.ping").unwrap().status, 200);
        std::fs::remove_file(path).unwrap();
    }

    /// The document's paths with their methods, by its indentation.
    fn documented() -> Vec<(String, String)> {
        let text =
            std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/api.yaml")).unwrap();
        let (mut found, mut path) = (Vec::new(), String::new());
        let paths = text.lines().skip_while(|line| *line != "paths:").skip(1);
        for line in paths.take_while(|line| line.is_empty() || line.starts_with(' ')) {
            if let Some(name) = line.strip_prefix("  /").and_then(|rest| rest.strip_suffix(':')) {
                path = format!("/{name}");
            } else if let Some(method) = line.strip_prefix("    ").and_then(|rest| rest.strip_suffix(':')) {
                if !method.starts_with(' ') {
                    found.push((method.to_ascii_uppercase(), path.clone()));
                }
            }
        }
        found
    }

    #[test]
    fn the_document_has_every_path_that_is_served_and_no_other() {
        let mut documented = documented();
        let mut served: Vec<_> =
            ROUTES.iter().map(|(method, path)| ((*method).to_owned(), (*path).to_owned())).collect();
        documented.sort();
        served.sort();
        assert_eq!(documented, served);
    }
}
