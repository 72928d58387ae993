//! What each fuzz target does with its bytes. docs/fuzzing.md says how to run them.
//!
//! | target | what the bytes are |
//! |---|---|
//! | [`console`], [`block`], [`qcow2_device`], [`net`], [`rng`], [`fs`], [`vsock`] | what a guest does to the device: registers, configuration space, rings, chains |
//! | [`serial`] | accesses to the serial port |
//! | [`share`] | FUSE requests for a shared folder |
//! | [`share_frames`], [`net_frames`] | what comes from the other end of a stream |
//! | [`control`] | what the guest's init says |
//! | [`kernel`], [`qcow2`] | a file |
//! | [`device_tree`] | the machine's device tree, and what the monitor adds to it |
//! | [`device_tree_writer`] | the shape of a guest, whose device tree must be readable again |
//! | [`token`] | an attestation token |
//!
//! A target fails by a panic, by an error that the sanitizer finds, by taking too long or too much memory.

pub mod seeds;

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use vmm::bus::{Bus, SerialPort};
use vmm::disk::{Disk, Format};
use vmm::link::Link;
use vmm::mailbox::mailbox;
use vmm::share::folder::Folder;
use vmm::share::{Serve, remote};
use vmm::virtio::testing::{Driver, Script};
use vmm::virtio::{Device, block::Block, console as terminal, fs::Fs, net::Net, rng::Rng, vsock::Vsock};

/// A directory of this process's own for files. Whoever starts a fuzzer says with TMPDIR where, and cleans up.
fn with_scratch<T>(work: impl FnOnce(&Path) -> T) -> T {
    static SCRATCH: OnceLock<PathBuf> = OnceLock::new();
    work(SCRATCH.get_or_init(|| {
        let directory = std::env::temp_dir().join(format!("realm-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory for files");
        directory
    }))
}

/// A guest does what the script says; then the device must still start.
fn play(device: Box<dyn Device>, data: &[u8]) {
    let mut driver = Driver::new(device);
    let mut script = Script(data);
    driver.start(script.number::<8>() | vmm::virtio::REQUIRED_FEATURES);
    driver.play(&mut script);
    driver.start(u64::MAX);
    assert_eq!(driver.status(), 15, "the device comes back");
}

/// A console of two ports.
pub fn console(data: &[u8]) {
    let (sizes, changes) = mailbox().expect("an eventfd");
    let (mut keyboard, typed) = UnixStream::pair().expect("sockets");
    let mut typed = Some(typed.into());
    let ports = ["", "stream"].map(|name| {
        let sink = Box::new(|bytes: &[u8]| bytes.to_vec());
        terminal::Port { name, sink, source: typed.take() }
    });
    sizes.send((24, 80));
    keyboard.write_all(b"typed").expect("room for some keys");
    play(Box::new(terminal::Console::new(ports.into(), changes, Some((24, 80)))), data);
}

fn disk(format: Format, data: &[u8]) {
    with_scratch(|directory| {
        let path = directory.join("disk");
        match format {
            Format::Raw => std::fs::write(&path, vec![0; 64 << 10]).expect("a file"),
            Format::Qcow2 => vmm::disk::create_qcow2(&path, 1 << 20).expect("an image"),
        }
        let disk = Disk::open(&path, format, false).expect("a disk");
        play(Box::new(Block::new(disk, 0)), data);
    });
}

/// A raw disk.
pub fn block(data: &[u8]) {
    disk(Format::Raw, data);
}

/// A disk that allocates.
pub fn qcow2_device(data: &[u8]) {
    disk(Format::Qcow2, data);
}

/// A network card.
pub fn net(data: &[u8]) {
    let (near, mut far) = UnixStream::pair().expect("sockets");
    far.write_all(b"\0\0\0\x05frame").expect("room for a frame");
    let link = Link::stream(near).expect("a link");
    play(Box::new(Net::new(link, [2; 6], 0)), data);
}

/// The source of entropy.
pub fn rng(data: &[u8]) {
    play(Box::new(Rng), data);
}

/// The guest's sockets: somebody on the host connects, somebody there listens, and all talk at once.
pub fn vsock(data: &[u8]) {
    with_scratch(|directory| {
        let path = directory.join("vsock");
        let served = directory.join("vsock_80");
        let _ = std::fs::remove_file(&served);
        let service = UnixListener::bind(&served).expect("a socket");
        service.set_nonblocking(true).expect("a socket that nobody waits for");
        let (device, handle) = Vsock::new(3, Some(&path)).expect("a device");
        let mut driver = Driver::new(Box::new(device));
        let mut script = Script(data);
        driver.start(script.number::<8>() | vmm::virtio::REQUIRED_FEATURES);
        let (near, far) = UnixStream::pair().expect("sockets");
        handle.connect(7, near, b"+", b"-");
        let mut greeter = UnixStream::connect(&path).expect("the device listens");
        let _ = greeter.write_all(script.bytes(20));
        let mut peers = vec![far, greeter];
        let len = script.0.len();
        for part in 0..4 {
            driver.play(&mut Script(script.bytes(len.div_ceil(4))));
            peers.extend(service.accept().ok().map(|(stream, _)| stream));
            for peer in &mut peers {
                peer.set_nonblocking(true).expect("a socket that nobody waits for");
                let _ = peer.read(&mut [0; 300]);
                let _ = peer.write(&[b'x'; 500]);
            }
            if part == 2 {
                peers.pop();
            }
        }
        driver.start(u64::MAX);
        assert_eq!(driver.status(), 15, "the device comes back");
    });
}

/// Makes the folder what it is at each beginning, with something beside it.
fn folder(directory: &Path) -> Folder {
    let shared = directory.join("shared");
    let _ = std::fs::remove_dir_all(&shared);
    std::fs::create_dir_all(shared.join("inner")).expect("a folder");
    std::fs::write(shared.join("file"), "hello").expect("a file");
    std::fs::write(directory.join("secret"), "secret").expect("a file");
    std::os::unix::fs::symlink("../secret", shared.join("out")).expect("a link");
    Folder::open(&shared, false).expect("the folder")
}

/// What lies beside the folder is as it was.
fn untouched(directory: &Path) {
    let names = std::fs::read_dir(directory).expect("the directory").count();
    let secret = std::fs::read(directory.join("secret")).expect("the file beside");
    assert!(names == 2 && secret == b"secret", "the guest left the folder");
}

/// A shared folder, through its queues.
pub fn fs(data: &[u8]) {
    with_scratch(|directory| {
        play(Box::new(Fs::new("tag", Box::new(folder(directory))).expect("a device")), data);
        untouched(directory);
    });
}

/// Requests for a shared folder: length, opcode, node, and the rest of each.
pub fn share(data: &[u8]) {
    with_scratch(|directory| {
        let mut folder = folder(directory);
        let mut script = Script(data);
        while let Some(len) = script.byte() {
            let (opcode, node) = (script.number::<1>() % 64, script.number::<1>());
            let body = script.bytes(len.into());
            let mut request = u32::try_from(40 + body.len()).unwrap_or(0).to_le_bytes().to_vec();
            request.extend(u32::try_from(opcode).unwrap_or(0).to_le_bytes());
            request.extend([0; 8]);
            request.extend(node.to_le_bytes());
            request.extend([0; 16]);
            request.extend(body);
            assert!(folder.serve(&request, 4096).len() <= 4096);
        }
        untouched(directory);
    });
}

/// Both ends of a shared folder's stream.
pub fn share_frames(data: &[u8]) {
    struct Stream<'a>(&'a [u8]);
    impl std::io::Read for Stream<'_> {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(into)
        }
    }
    impl std::io::Write for Stream<'_> {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    with_scratch(|directory| {
        let _ = remote::serve(Stream(data), &mut folder(directory));
        untouched(directory);
    });
    let mut far = remote::Remote::new(Stream(data));
    let mut request = vec![0; 40];
    request[..8].copy_from_slice(&[40, 0, 0, 0, 3, 0, 0, 0]);
    for _ in 0..4 {
        assert!(far.serve(&request, 200).len() <= 200);
    }
}

/// A user-mode network's frames.
pub fn net_frames(data: &[u8]) {
    let (near, mut far) = UnixStream::pair().expect("sockets");
    let mut link = Link::stream(near).expect("a link");
    for piece in data.chunks(1 << 10) {
        far.write_all(piece).expect("a socket that is read");
        while link.receive().is_some() {}
    }
}

/// The serial port, and whatever else answers beside it: nothing.
pub fn serial(data: &[u8]) {
    let seen = Arc::new(Mutex::new(0));
    let sink = seen.clone();
    let port = Arc::new(SerialPort::new(
        Box::new(move |bytes| {
            *sink.lock().expect("nobody panicked") += bytes.len();
            b"answer".to_vec()
        }),
        0,
        Arc::new(|_, _| Ok(())),
    ));
    let mut bus = Bus::default();
    bus.add(0, 8, port.clone());
    let mut script = Script(data);
    while let Some(what) = script.byte() {
        let (address, len) = (u64::from(what >> 4), usize::from(what >> 1 & 7) + 1);
        if what & 1 == 0 {
            bus.read(address, len).expect("a read");
        } else {
            bus.write(address, script.bytes(len)).expect("a write");
        }
    }
    port.flush();
}

/// A kernel's file.
pub fn kernel(data: &[u8]) {
    let _ = vmm::image::Image::parse(data.to_vec());
}

/// The machine's device tree as the monitor reads and amends it.
pub fn device_tree(data: &[u8]) {
    use monitor::dtb::Dtb;
    use monitor::manifest::{Bank, MAX_BANKS};
    let mut bytes = data.to_vec();
    // QEMU leaves room behind the tree.
    bytes.resize(data.len() + 4096, 0);
    let Ok(mut tree) = Dtb::new(&mut bytes) else { return };
    let mut banks = [Bank::default(); MAX_BANKS];
    let _ = tree.memory(&mut banks);
    let _ = tree.cpu_count();
    let _ = tree.add_psci();
    let _ = tree.reserve(b"rmm@40100000", Bank { base: 0x4010_0000, size: 0x10_0000 });
    let _ = tree.set_initrd(1, 2);
}

/// Any shape of a guest is an error, or has a device tree that says the same.
pub fn device_tree_writer(data: &[u8]) {
    use monitor::dtb::Dtb;
    use monitor::manifest::{Bank, MAX_BANKS};
    use vmm::fdt::{Conduit, build};
    use vmm::layout::{Contents, Layout, RAM_BASE};
    let mut script = Script(data);
    let (ram, cpus) = (script.number::<3>() << 20, u32::try_from(script.number::<1>()).unwrap_or(0));
    let contents = Contents {
        kernel_file: script.number::<4>(),
        kernel_image: script.number::<4>(),
        text_offset: script.number::<3>(),
        initrd: script.byte().map(|_| script.number::<4>()),
    };
    let Ok(layout) = Layout::new(ram, cpus, contents, None) else { return };
    let cmdline = String::from_utf8_lossy(script.bytes(4096)).into_owned();
    let Ok(mut bytes) = build(&layout, &cmdline, Conduit::Smc, true) else { return };
    let tree = Dtb::new(&mut bytes).expect("a device tree");
    let mut banks = [Bank::default(); MAX_BANKS];
    assert_eq!(tree.memory(&mut banks), Ok(1));
    assert_eq!((banks[0].base, banks[0].size), (RAM_BASE, layout.ram_size));
    assert_eq!(tree.cpu_count(), Ok(usize::try_from(layout.cpus).unwrap_or(0)));
    let chosen = tree.find(&[b"chosen"]).expect("/chosen");
    let said = tree.property(chosen, b"bootargs").expect("a command line");
    assert_eq!(said, [cmdline.as_bytes(), &[0]].concat());
}

/// A qcow2 image, opened and used.
pub fn qcow2(data: &[u8]) {
    with_scratch(|directory| {
        let path = directory.join("image");
        std::fs::write(&path, data).expect("a file");
        let Ok(mut disk) = Disk::open(&path, Format::Qcow2, false) else { return };
        let size = disk.size();
        let places = [0, 0x1_0000, 0x8_0000, size.saturating_sub(4096)];
        for at in places.into_iter().filter(|at| at.checked_add(4096).is_some_and(|end| end <= size)) {
            let _ = disk.read(&mut [0; 4096], at);
            let _ = disk.write(&[1; 512], at);
            let _ = disk.write_zeroes(at, 4096);
            let _ = disk.discard(at, 4096);
        }
        let _ = disk.flush();
    });
}

/// A token from whomever: taken apart, verified, and written out.
pub fn token(data: &[u8]) {
    let bytes = attest::text::token_bytes(data);
    let _ = attest::CcaToken::parse(&bytes);
    let report = attest::verify(&bytes, &attest::Policy::default());
    let _ = report.failures().count();
    let _ = report.to_string();
}

/// What the guest's init says.
pub fn control(data: &[u8]) {
    use vmm::control::{Control, Request};
    let mut control = Control::new(Request::Exec("true".into()));
    for piece in data.chunks(7) {
        let _ = control.receive(piece);
    }
}
