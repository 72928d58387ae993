//! Entropy: the host kernel's random bytes.

use std::io::Write as _;

use super::{Active, Device, Served, writer};
use crate::seccomp::Call;

/// The most bytes for one request.
const LIMIT: usize = 4096;

/// The device.
#[derive(Debug, Default)]
pub struct Rng;

impl Device for Rng {
    fn id(&self) -> u16 {
        4
    }

    fn name(&self) -> String {
        "virtio-rng".into()
    }

    fn system_calls(&self) -> &'static [Call] {
        &[]
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![8]
    }

    fn queue(&mut self, index: usize, active: &mut Active) -> Served {
        active.serve(index, &mut |memory, chain| {
            let mut buffer = writer(memory, &chain)?;
            let mut bytes = vec![0u8; buffer.available_bytes().min(LIMIT)];
            // SAFETY: the buffer is as long as the call is told.
            let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
            let got = usize::try_from(got).unwrap_or(0).min(bytes.len());
            buffer.write_all(&bytes[..got])?;
            Ok(got)
        })
    }
}
