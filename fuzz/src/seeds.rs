//! Where fuzzing begins: one good input for each target that would take long to find one by itself.

use std::io::Write as _;
use std::path::Path;

use vmm::fdt::{Conduit, build};
use vmm::layout::{Contents, Layout};

/// Writes the seeds of each target into a directory of its name.
pub fn write(directory: &Path) -> std::io::Result<()> {
    let put = |target: &str, name: &str, bytes: &[u8]| {
        std::fs::create_dir_all(directory.join(target))?;
        std::fs::write(directory.join(target).join(name), bytes)
    };
    let token = include_bytes!("../../crates/attest/tests/stock-guest.token");
    put("token", "stock-guest", &attest::text::token_bytes(token))?;

    let contents =
        Contents { kernel_file: 1 << 20, kernel_image: 1 << 20, text_offset: 0, initrd: Some(1 << 20) };
    let layout = Layout::new(256 << 20, 2, contents, None).map_err(std::io::Error::other)?;
    let tree = build(&layout, "console=ttyS0", Conduit::Smc, true).map_err(std::io::Error::other)?;
    put("device_tree", "guest", &tree)?;

    let image = directory.join("image");
    vmm::disk::create_qcow2(&image, 1 << 20).map_err(std::io::Error::other)?;
    put("qcow2", "empty", &std::fs::read(&image)?)?;
    std::fs::remove_file(image)?;

    let mut kernel = vec![0; 128];
    kernel[16..24].copy_from_slice(&(1u64 << 20).to_le_bytes());
    kernel[56..60].copy_from_slice(b"ARM\x64");
    put("kernel", "image", &kernel)?;
    let mut zip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    zip.write_all(&kernel)?;
    let zipped = zip.finish()?;
    put("kernel", "gzip", &zipped)?;
    let mut zboot = b"MZ\0\0zimg".to_vec();
    zboot.extend(64u32.to_le_bytes());
    zboot.extend(u32::try_from(zipped.len()).unwrap_or(0).to_le_bytes());
    zboot.resize(24, 0);
    zboot.extend(b"gzip\0\0\0\0");
    zboot.resize(64, 0);
    zboot.extend(&zipped);
    put("kernel", "zboot", &zboot)?;

    put("control", "conversation", b"kvm-realm-init 2\nstatus 7\n")?;

    // Scripts of a guest: features, then chains on a queue. 128 and more is room for the device.
    let script = |chains: &[(u8, &[&[u8]])]| {
        let mut script = vec![0xff; 8];
        for (queue, parts) in chains {
            script.extend([6 + 10 * queue, u8::try_from(parts.len()).unwrap_or(0)]);
            for part in *parts {
                script.extend(*part);
            }
        }
        script
    };
    let part = |bytes: &[u8]| [&[u8::try_from(bytes.len()).unwrap_or(0)], bytes].concat();
    let room = |sixteens: u8| [127 + sixteens];
    let block = |kind: u8| part(&[kind, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let sector = part(&[7; 64]);
    for target in ["block", "qcow2_device"] {
        let write =
            script(&[(0, &[&block(1), &sector, &sector, &room(1)]), (0, &[&block(0), &room(32), &room(1)])]);
        put(target, "write-and-read", &write)?;
        let range = part(&[1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        let zero = script(&[(0, &[&block(13), &range, &room(1)]), (0, &[&block(11), &range, &room(1)])]);
        put(target, "zero-and-forget", &zero)?;
    }
    let message = |port: u8, event: u8| part(&[port, 0, 0, 0, event, 0, 1, 0]);
    let (hear, hello, ready, words) = (room(4), message(0, 0), message(0, 3), part(b"words"));
    let talk: [(u8, &[&[u8]]); 4] = [(2, &[&hear]), (3, &[&hello]), (3, &[&ready]), (5, &[&words])];
    put("console", "introduction", &script(&talk))?;
    let frame = [&part(&[0; 12])[..], &part(&[9; 60])];
    put("net", "frame", &script(&[(1, &frame), (0, &[&room(100)])]))?;
    put("rng", "bytes", &script(&[(0, &[&room(4)])]))?;
    // Ask for a connection to the host's port 80, say something, grant more credit; answer the host's own connection.
    let packet = |from: u8, to: u8, op: u8, data: &[u8]| {
        let mut header = vec![3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, from, 0, 0, 0, to, 0, 0, 0];
        header.extend(u32::try_from(data.len()).unwrap_or(0).to_le_bytes());
        header.extend([1, 0, op, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]);
        [part(&header), if data.is_empty() { Vec::new() } else { part(data) }].concat()
    };
    let mut talk = vec![0xff; 8];
    talk.extend(b"CONNECT 7\n          ");
    for (op, data) in [(1, &b""[..]), (5, b"words"), (6, b""), (2, b""), (4, b""), (3, b"")] {
        let count = if data.is_empty() { 1 } else { 2 };
        talk.extend([16, count]);
        talk.extend(packet(9, 80, op, data));
        talk.extend([6, 1, 130]);
    }
    put("vsock", "conversation", &talk)?;
    let lookup =
        [&[45, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0][..], &[0; 20], b"file\0"].concat();
    put("fs", "look-up", &script(&[(1, &[&part(&lookup), &room(10)])]))?;
    put("share_frames", "look-up", &[&[45, 0, 0, 0, 200, 0, 0, 0], &lookup[..]].concat())?;

    // Length, opcode, node, body: look up, open, write, read, list, make, rename, remove.
    let ask = |opcode: u8, node: u8, body: &[u8]| {
        [&[u8::try_from(body.len()).unwrap_or(0), opcode, node], body].concat()
    };
    let numbers =
        |numbers: &[u64]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>();
    let all = [
        ask(1, 1, b"file\0"),
        ask(1, 1, b"inner\0"),
        ask(14, 2, &[2, 0, 0, 0, 0, 0, 0, 0]),
        ask(16, 2, &[&numbers(&[4, 0, 5, 0, 0])[..], b"bytes"].concat()),
        ask(15, 2, &numbers(&[4, 0, 64, 0, 0])),
        ask(27, 3, &numbers(&[0])),
        ask(28, 3, &numbers(&[5, 0, 512, 0, 0])),
        ask(35, 3, &[&[1, 0, 0, 0, 0xa4, 1, 0, 0][..], &[0; 8], b"new\0"].concat()),
        ask(4, 6, &[&[8, 0, 0, 0, 0, 0, 0, 0][..], &[0; 80]].concat()),
        ask(45, 3, &[&numbers(&[1, 0])[..], b"new\0old\0"].concat()),
        ask(10, 1, b"old\0"),
        ask(6, 1, b"link\0../secret\0"),
        ask(2, 2, &numbers(&[1])),
    ];
    put("share", "a-bit-of-all", &all.concat())
}
