//! A 16550A serial port, as far as Linux's `8250` driver uses one.
//!
//! Every register access costs the guest an exit to user space, and in a Realm an exit is dear. The transmitter
//! is therefore always empty, so that the driver never waits for it, and the device tree promises a deep queue,
//! so that the driver writes long bursts between two looks at the line status.

use std::collections::VecDeque;

/// Receiver buffer when read, transmitter holding when written; divisor's low byte when DLAB is set.
const RBR_THR: u8 = 0;
/// Interrupt enable; divisor's high byte when DLAB is set.
const IER: u8 = 1;
/// Interrupt identification when read, queue control when written.
const IIR_FCR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
const MSR: u8 = 6;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER_EMPTY: u8 = 1 << 1;
const IER_MASK: u8 = 0xf;
const IIR_NONE: u8 = 1;
const IIR_TRANSMITTER_EMPTY: u8 = 2;
const IIR_RECEIVED: u8 = 4;
const IIR_QUEUES: u8 = 0xc0;
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
const LCR_DLAB: u8 = 1 << 7;
const MCR_LOOPBACK: u8 = 1 << 4;
const MCR_MASK: u8 = 0x1f;
const LSR_DATA_READY: u8 = 1 << 0;
const LSR_TRANSMITTER_EMPTY: u8 = (1 << 5) | (1 << 6);
/// Clear to send, data set ready, carrier detected.
const MSR_CONNECTED: u8 = 0xb0;

/// Output is handed on at the latest when this much has gathered.
const OUTPUT_BURST: usize = 1024;

/// What a guest that talks to itself can make us keep.
const LOOPBACK_QUEUE: usize = 1024;

/// One serial port.
#[derive(Debug, Default)]
pub struct Serial {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: [u8; 2],
    /// The transmitter became empty and the guest has not been told yet.
    transmitter_event: bool,
    input: VecDeque<u8>,
    output: Vec<u8>,
    /// The guest did something other than writing another byte: its burst is over.
    burst_over: bool,
}

impl Serial {
    /// A port after reset.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The guest reads register `offset`.
    pub fn read(&mut self, offset: u8) -> u8 {
        self.burst_over = true;
        match offset {
            RBR_THR if self.dlab() => self.divisor[0],
            RBR_THR => self.input.pop_front().unwrap_or(0),
            IER if self.dlab() => self.divisor[1],
            IER => self.ier,
            IIR_FCR => {
                let cause = self.cause();
                if cause == IIR_TRANSMITTER_EMPTY {
                    self.transmitter_event = false;
                }
                cause | if self.fcr & FCR_ENABLE != 0 { IIR_QUEUES } else { 0 }
            }
            LCR => self.lcr,
            MCR => self.mcr,
            LSR => LSR_TRANSMITTER_EMPTY | if self.input.is_empty() { 0 } else { LSR_DATA_READY },
            MSR if self.loopback() => {
                // In loopback the modem outputs come back as inputs: RTS as CTS, DTR as DSR, OUT1 as RI, OUT2 as DCD.
                (self.mcr & 2) << 3 | (self.mcr & 1) << 5 | (self.mcr & 4) << 4 | (self.mcr & 8) << 4
            }
            MSR => MSR_CONNECTED,
            _ => self.scratch,
        }
    }

    /// The guest writes `value` to register `offset`.
    pub fn write(&mut self, offset: u8, value: u8) {
        self.burst_over = offset != RBR_THR || self.dlab();
        match offset {
            RBR_THR if self.dlab() => self.divisor[0] = value,
            RBR_THR => {
                if !self.loopback() {
                    self.output.push(value);
                } else if self.input.len() < LOOPBACK_QUEUE {
                    self.input.push_back(value);
                }
                self.transmitter_event = true;
            }
            IER if self.dlab() => self.divisor[1] = value,
            IER => {
                let newly = value & !self.ier;
                self.ier = value & IER_MASK;
                if newly & IER_TRANSMITTER_EMPTY != 0 {
                    self.transmitter_event = true;
                }
            }
            IIR_FCR => {
                if value & FCR_CLEAR_RECEIVER != 0 {
                    self.input.clear();
                }
                self.fcr = value;
            }
            LCR => self.lcr = value,
            MCR => self.mcr = value & MCR_MASK,
            LSR | MSR => {}
            _ => self.scratch = value,
        }
    }

    /// Puts bytes into the receiver's queue.
    pub fn receive(&mut self, bytes: &[u8]) {
        if !self.loopback() {
            self.input.extend(bytes);
        }
    }

    /// What the guest has written, once its burst is over.
    pub fn take_output(&mut self) -> Option<Vec<u8>> {
        let due = !self.output.is_empty() && (self.burst_over || self.output.len() >= OUTPUT_BURST);
        due.then(|| std::mem::take(&mut self.output))
    }

    /// What the guest has written, whether or not its burst is over.
    pub fn drain_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// The level of the interrupt line.
    #[must_use]
    pub fn interrupt(&self) -> bool {
        self.cause() != IIR_NONE
    }

    fn cause(&self) -> u8 {
        if self.ier & IER_RECEIVED != 0 && !self.input.is_empty() {
            IIR_RECEIVED
        } else if self.ier & IER_TRANSMITTER_EMPTY != 0 && self.transmitter_event {
            IIR_TRANSMITTER_EMPTY
        } else {
            IIR_NONE
        }
    }

    fn dlab(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn loopback(&self) -> bool {
        self.mcr & MCR_LOOPBACK != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_handed_on_when_the_guest_looks_at_another_register() {
        let mut port = Serial::new();
        for byte in b"hello" {
            port.write(RBR_THR, *byte);
            assert_eq!(port.take_output(), None);
        }
        assert_eq!(port.read(LSR), LSR_TRANSMITTER_EMPTY);
        assert_eq!(port.take_output().unwrap(), b"hello");
        assert_eq!(port.take_output(), None);
    }

    #[test]
    fn a_long_burst_does_not_grow_without_bound() {
        let mut port = Serial::new();
        for _ in 0..OUTPUT_BURST {
            port.write(RBR_THR, b'x');
        }
        assert_eq!(port.take_output().unwrap().len(), OUTPUT_BURST);
    }

    #[test]
    fn a_guest_that_talks_to_itself_does_not_fill_our_memory() {
        let mut port = Serial::new();
        port.write(MCR, MCR_LOOPBACK);
        for _ in 0..3 * LOOPBACK_QUEUE {
            port.write(RBR_THR, b'x');
        }
        assert_eq!(port.input.len(), LOOPBACK_QUEUE);
        assert_eq!(port.take_output(), None);
    }

    #[test]
    fn input_raises_the_line_until_it_has_been_read() {
        let mut port = Serial::new();
        port.receive(b"ab");
        assert!(!port.interrupt());
        port.write(IER, IER_RECEIVED);
        assert!(port.interrupt());
        assert_eq!(port.read(IIR_FCR), IIR_RECEIVED);
        assert_eq!(port.read(LSR) & LSR_DATA_READY, LSR_DATA_READY);
        assert_eq!((port.read(RBR_THR), port.read(RBR_THR)), (b'a', b'b'));
        assert_eq!(port.read(LSR) & LSR_DATA_READY, 0);
        assert!(!port.interrupt());
    }

    #[test]
    fn the_empty_transmitter_is_announced_once_per_write_or_enable() {
        let mut port = Serial::new();
        port.write(IER, IER_TRANSMITTER_EMPTY);
        assert!(port.interrupt());
        assert_eq!(port.read(IIR_FCR), IIR_TRANSMITTER_EMPTY);
        assert!(!port.interrupt());
        assert_eq!(port.read(IIR_FCR), IIR_NONE);
        port.write(RBR_THR, b'x');
        assert!(port.interrupt());
        port.write(IER, 0);
        assert!(!port.interrupt());
        port.write(IER, IER_TRANSMITTER_EMPTY);
        assert!(port.interrupt());
    }

    #[test]
    fn the_divisor_hides_behind_its_latch() {
        let mut port = Serial::new();
        port.write(LCR, LCR_DLAB | 3);
        port.write(RBR_THR, 1);
        port.write(IER, 2);
        assert_eq!((port.read(RBR_THR), port.read(IER)), (1, 2));
        port.write(LCR, 3);
        assert_eq!(port.read(IER), 0);
        assert!(port.drain_output().is_empty());
    }

    #[test]
    fn loopback_answers_with_its_own_modem_lines_and_data() {
        let mut port = Serial::new();
        assert_eq!(port.read(MSR), MSR_CONNECTED);
        port.write(MCR, MCR_LOOPBACK | 0xa);
        assert_eq!(port.read(MSR), 0x90);
        port.write(RBR_THR, b'z');
        assert_eq!(port.read(RBR_THR), b'z');
        assert!(port.drain_output().is_empty());
    }

    #[test]
    fn clearing_the_queue_drops_input_and_every_register_can_be_read() {
        let mut port = Serial::new();
        port.receive(b"x");
        port.write(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVER);
        assert_eq!(port.read(LSR) & LSR_DATA_READY, 0);
        assert_eq!(port.read(IIR_FCR), IIR_NONE | IIR_QUEUES);
        for offset in 0..=u8::MAX {
            port.write(offset, 0xff);
            let _ = port.read(offset);
        }
    }
}
