//! A shared folder: virtio-fs. The device moves FUSE requests and answers; what they mean is [`crate::share`]'s.

use std::io::{Read as _, Write as _};

use super::{Active, Chain, Device, Served, reader, writer};
use crate::memory::GuestView;
use crate::seccomp::Call;
use crate::share::{MAX_MESSAGE, Serve};
use crate::{Error, Result};

/// One queue for what must not wait behind other requests, and one for those.
const QUEUE: u16 = 128;
/// The longest tag.
const TAG: usize = 36;

/// The device.
pub struct Fs {
    tag: String,
    server: Box<dyn Serve>,
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fs").field("tag", &self.tag).finish_non_exhaustive()
    }
}

impl Fs {
    /// A device whose folder the guest mounts by its `tag`.
    pub fn new(tag: &str, server: Box<dyn Serve>) -> Result<Self> {
        if tag.is_empty() || tag.len() > TAG || tag.contains('\0') {
            return Err(Error::vmm(format!("`{tag}` is no tag: 1 to {TAG} bytes are")));
        }
        Ok(Self { tag: tag.to_owned(), server })
    }

    fn request(&mut self, memory: &GuestView, chain: &Chain) -> Served<usize> {
        let mut from = reader(memory, chain)?;
        let mut to = writer(memory, chain)?;
        let len = from.available_bytes();
        if len > MAX_MESSAGE {
            return Err("a request is longer than was agreed on".into());
        }
        let mut request = vec![0; len];
        from.read_exact(&mut request)?;
        let room = to.available_bytes().min(MAX_MESSAGE);
        let answer = self.server.serve(&request, room);
        if answer.len() > room {
            return Err("a request has no place for its answer".into());
        }
        to.write_all(&answer)?;
        Ok(answer.len())
    }
}

impl Device for Fs {
    fn id(&self) -> u16 {
        26
    }

    fn name(&self) -> String {
        format!("fs-{}", self.tag)
    }

    fn system_calls(&self) -> &'static [Call] {
        self.server.system_calls()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE, QUEUE]
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.tag.as_bytes().to_vec();
        config.resize(TAG, 0);
        // One queue for requests.
        config.extend(1u32.to_le_bytes());
        config
    }

    fn reset(&mut self) {
        self.server.reset();
    }

    fn queue(&mut self, index: usize, active: &mut Active) -> Served {
        // Each answer is told at once: somebody may be waiting for it while the next request takes its time.
        while let Some(chain) = active.next_or_rearm(index)? {
            let memory = active.memory.clone();
            let len = self.request(&memory, &chain)?;
            active.used(index, chain.head_index(), len)?;
            active.notify(index)?;
        }
        Ok(())
    }
}
