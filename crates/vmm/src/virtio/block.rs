//! Disks.

use std::io::{ErrorKind, Read as _, Write as _};

use super::{Active, Chain, Device, Served, reader, writer};
use crate::calls;
use crate::disk::Disk;
use crate::memory::GuestView;
use crate::seccomp::Call;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const FLAG_UNMAP: u32 = 1;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// The unit of all addresses and lengths.
const SECTOR: u64 = 512;
const QUEUE: u16 = 128;
/// Segments of one request: what a queue's place holds beside header and status.
const SEGMENTS: u32 = QUEUE as u32 - 2;
/// The most bytes that are copied at a time.
const PIECE: usize = 256 << 10;
/// Sectors of one discard or write-zeroes request.
const DISCARD_SECTORS: u32 = 1 << 22;
const ID_LENGTH: usize = 20;

/// The device.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    name: String,
}

impl Block {
    /// A device for `disk`, the `number`-th.
    #[must_use]
    pub fn new(disk: Disk, number: usize) -> Self {
        Self { disk, name: format!("virtio-blk{number}") }
    }

    fn request(&mut self, memory: &GuestView, chain: &Chain) -> Served<usize> {
        let mut from = reader(memory, chain)?;
        let mut to = writer(memory, chain)?;
        let Some(data_len) = to.available_bytes().checked_sub(1) else {
            return Err("a request has no place for its status".into());
        };
        let mut status = to.split_at(data_len)?;
        let mut header = [0; 16];
        from.read_exact(&mut header)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let result = match u32::from_le_bytes([t0, t1, t2, t3]) {
            T_IN => self.read(&mut to, sector),
            T_OUT => self.write(&mut from, sector),
            T_FLUSH => self.disk.flush(),
            T_GET_ID => {
                let mut id = [0; ID_LENGTH];
                let text = self.disk.id();
                let len = text.len().min(ID_LENGTH);
                id[..len].copy_from_slice(&text.as_bytes()[..len]);
                to.write_all(&id[..ID_LENGTH.min(to.available_bytes())])
            }
            T_DISCARD => self.range(&mut from, false),
            T_WRITE_ZEROES => self.range(&mut from, true),
            _ => Err(ErrorKind::Unsupported.into()),
        };
        let result = match result.map_err(|error| error.kind()) {
            Ok(()) => S_OK,
            Err(ErrorKind::Unsupported) => S_UNSUPP,
            Err(_) => S_IOERR,
        };
        status.write_all(&[result])?;
        Ok(to.bytes_written() + 1)
    }

    /// Where a transfer of `len` bytes lies; an error if any of it is outside the disk.
    fn place(&self, sector: u64, len: usize) -> std::io::Result<u64> {
        let start = sector.checked_mul(SECTOR);
        let end = start.and_then(|start| start.checked_add(u64::try_from(len).ok()?));
        match (start, end) {
            (Some(start), Some(end)) if end <= self.disk.size() && len % 512 == 0 => Ok(start),
            _ => Err(ErrorKind::InvalidInput.into()),
        }
    }

    fn read(&mut self, to: &mut virtio_queue::Writer<'_, ()>, sector: u64) -> std::io::Result<()> {
        let mut at = self.place(sector, to.available_bytes())?;
        while to.available_bytes() > 0 {
            let mut bytes = vec![0; to.available_bytes().min(PIECE)];
            self.disk.read(&mut bytes, at)?;
            to.write_all(&bytes)?;
            at += u64::try_from(bytes.len()).unwrap_or(0);
        }
        Ok(())
    }

    fn write(&mut self, from: &mut virtio_queue::Reader<'_, ()>, sector: u64) -> std::io::Result<()> {
        let mut at = self.place(sector, from.available_bytes())?;
        while from.available_bytes() > 0 {
            let mut bytes = vec![0; from.available_bytes().min(PIECE)];
            from.read_exact(&mut bytes)?;
            self.disk.write(&bytes, at)?;
            at += u64::try_from(bytes.len()).unwrap_or(0);
        }
        Ok(())
    }

    /// Discard or write-zeroes: one segment of sector, number of sectors, flags. A driver that sends several goes
    /// beyond what the configuration allows.
    fn range(&mut self, from: &mut virtio_queue::Reader<'_, ()>, zeroes: bool) -> std::io::Result<()> {
        let mut segment = [0; 16];
        from.read_exact(&mut segment)?;
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = segment;
        // "May unmap" belongs to zeroes alone, where it is a permission, of which we make no use.
        let known = if zeroes { FLAG_UNMAP } else { 0 };
        if u32::from_le_bytes([f0, f1, f2, f3]) & !known != 0 {
            return Err(ErrorKind::Unsupported.into());
        }
        let count = u32::from_le_bytes([n0, n1, n2, n3]);
        if count > DISCARD_SECTORS || from.available_bytes() > 0 {
            return Err(ErrorKind::InvalidInput.into());
        }
        let len = u64::from(count) * SECTOR;
        let start =
            self.place(u64::from_le_bytes(sector), usize::try_from(len).map_err(std::io::Error::other)?)?;
        if zeroes { self.disk.write_zeroes(start, len) } else { self.disk.discard(start, len) }
    }
}

impl Device for Block {
    fn id(&self) -> u16 {
        2
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn system_calls(&self) -> &'static [Call] {
        // What reads and writes images: at any place in a file, and at a file's end, which a qcow2 image moves.
        calls![
            fallocate, fdatasync, fstat, fstatfs, fsync, ftruncate, lseek, newfstatat, pread64, preadv,
            pwrite64, pwritev, statx,
        ]
    }

    fn features(&self) -> u64 {
        let write = F_FLUSH | F_DISCARD | F_WRITE_ZEROES;
        F_SEG_MAX | F_BLK_SIZE | if self.disk.read_only() { F_RO } else { write }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE]
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.disk.size() / SECTOR).to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &512u32.to_le_bytes());
        // Largest discard, its segments and alignment; then the same for zeroes, without alignment.
        put(36, &DISCARD_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &DISCARD_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        config
    }

    fn queue(&mut self, index: usize, active: &mut Active) -> Served {
        active.serve(index, &mut |memory, chain| self.request(memory, &chain))
    }
}
