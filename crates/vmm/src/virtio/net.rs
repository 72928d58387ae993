//! A network card. Its frames go to a [`Link`]: a tap interface, or a socket that a user-mode network such as passt
//! listens on.
//!
//! No offload is offered: every frame is whole, with its checksums, and nothing in it is interpreted here.

use std::io::{Read as _, Write as _};

use super::{Active, Device, Served, reader, writer};
use crate::link::Link;

const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE: u16 = 64;
/// `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;
/// Where the number of buffers of a frame stands: always one.
const NUM_BUFFERS: usize = 10;
/// The longest frame: 64 KiB and an Ethernet header.
const LONGEST: usize = 65_550;
/// Frames that are received before somebody else gets a turn.
const BURST: usize = 64;

/// The device.
#[derive(Debug)]
pub struct Net {
    link: Link,
    mac: [u8; 6],
    name: String,
    /// The guest has no place for another frame.
    starved: bool,
}

impl Net {
    /// A card with an address of its own.
    #[must_use]
    pub fn new(link: Link, mac: [u8; 6], number: usize) -> Self {
        Self { link, mac, name: format!("virtio-net{number}"), starved: false }
    }

    fn receive(&mut self, active: &mut Active) -> Served {
        let mut received = false;
        for _ in 0..BURST {
            if !active.has_next(RECEIVE)? {
                self.starved = true;
                break;
            }
            let Some(frame) = self.link.receive() else { break };
            let Some(chain) = active.next(RECEIVE)? else { break };
            let memory = active.memory.clone();
            let mut buffer = writer(&memory, &chain)?;
            let mut used = 0;
            // A frame that the guest has no room for is lost, as on any wire.
            if buffer.available_bytes() >= HEADER + frame.len() {
                let mut header = [0; HEADER];
                header[NUM_BUFFERS] = 1;
                buffer.write_all(&header)?;
                buffer.write_all(&frame)?;
                used = HEADER + frame.len();
            }
            active.used(RECEIVE, chain.head_index(), used)?;
            received = true;
        }
        if received { active.notify(RECEIVE) } else { Ok(()) }
    }
}

impl Device for Net {
    fn id(&self) -> u16 {
        1
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn features(&self) -> u64 {
        F_MAC | F_STATUS
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE, QUEUE]
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.to_vec();
        // The link is up.
        config.extend([1, 0, 0, 0, 0, 0]);
        config
    }

    fn activate(&mut self, _: &mut Active) -> Served {
        self.starved = false;
        Ok(())
    }

    fn queue(&mut self, index: usize, active: &mut Active) -> Served {
        match index {
            RECEIVE => {
                self.starved = false;
                self.receive(active)
            }
            TRANSMIT => {
                let link = &mut self.link;
                active.serve(TRANSMIT, &mut |memory, chain| {
                    let mut buffer = reader(memory, &chain)?;
                    let len = buffer.available_bytes().checked_sub(HEADER);
                    let Some(len) = len.filter(|len| *len <= LONGEST) else {
                        return Err("a frame is too short for its header, or too long".into());
                    };
                    buffer.read_exact(&mut [0; HEADER])?;
                    let mut frame = vec![0; len];
                    buffer.read_exact(&mut frame)?;
                    link.send(&frame);
                    Ok(0)
                })
            }
            _ => Ok(()),
        }
    }

    fn wait_for(&self, _: &Active) -> Vec<libc::pollfd> {
        let fd = if self.starved { -1 } else { self.link.fd() };
        vec![libc::pollfd { fd, events: libc::POLLIN, revents: 0 }]
    }

    fn ready(&mut self, _: usize, active: &mut Active) -> Served {
        self.receive(active)
    }
}
