//! The devices that this process emulates, and the guest physical addresses at which they answer.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Result;
use crate::layout::{UART_SIZE, UART_SPI, UART0_BASE, UART1_BASE};
use crate::serial::Serial;

/// Takes what the guest wrote to a port, and returns what the port receives in answer.
pub type Sink = Box<dyn FnMut(&[u8]) -> Vec<u8> + Send>;

/// Sets the level of an interrupt line: the shared peripheral interrupt's number and the level.
pub type SetLine = Box<dyn Fn(u32, bool) -> Result<()> + Send + Sync>;

/// One of the two serial ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// The console.
    Console,
    /// The control channel.
    Control,
}

struct Wired {
    serial: Serial,
    sink: Sink,
    spi: u32,
    line: bool,
}

/// All emulated devices.
pub struct Bus {
    ports: [Mutex<Wired>; 2],
    set_line: SetLine,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bus").finish_non_exhaustive()
    }
}

impl Bus {
    /// Connects the two ports.
    #[must_use]
    pub fn new(console: Sink, control: Sink, set_line: SetLine) -> Self {
        let wire = |sink, spi| Mutex::new(Wired { serial: Serial::new(), sink, spi, line: false });
        Self { ports: [wire(console, UART_SPI[0]), wire(control, UART_SPI[1])], set_line }
    }

    /// The guest reads `len` bytes; an address without a device reads as ones.
    pub fn read(&self, address: u64, len: usize) -> Result<[u8; 8]> {
        let mut data = [0; 8];
        match decode(address) {
            Some((port, offset)) => {
                let mut wired = self.lock(port);
                data[0] = wired.serial.read(offset);
                self.settle(&mut wired)?;
            }
            None => data[..len.min(8)].fill(0xff),
        }
        Ok(data)
    }

    /// The guest writes; an address without a device swallows it.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<()> {
        if let (Some((port, offset)), Some(value)) = (decode(address), data.first()) {
            let mut wired = self.lock(port);
            wired.serial.write(offset, *value);
            self.settle(&mut wired)?;
        }
        Ok(())
    }

    /// Sends bytes to the guest.
    pub fn send(&self, port: Port, bytes: &[u8]) -> Result<()> {
        let mut wired = self.lock(port);
        wired.serial.receive(bytes);
        self.settle(&mut wired)
    }

    /// Hands on what is left, when the guest will not run again.
    pub fn flush(&self) {
        for port in [Port::Console, Port::Control] {
            let mut wired = self.lock(port);
            let rest = wired.serial.drain_output();
            if !rest.is_empty() {
                let _ = (wired.sink)(&rest);
            }
        }
    }

    fn lock(&self, port: Port) -> MutexGuard<'_, Wired> {
        let index = match port {
            Port::Console => 0,
            Port::Control => 1,
        };
        // A panic elsewhere leaves the registers of a port as valid as before.
        self.ports[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settle(&self, wired: &mut Wired) -> Result<()> {
        if let Some(output) = wired.serial.take_output() {
            let answer = (wired.sink)(&output);
            if !answer.is_empty() {
                wired.serial.receive(&answer);
            }
        }
        let level = wired.serial.interrupt();
        if level != wired.line {
            wired.line = level;
            (self.set_line)(wired.spi, level)?;
        }
        Ok(())
    }
}

fn decode(address: u64) -> Option<(Port, u8)> {
    for (base, port) in [(UART0_BASE, Port::Console), (UART1_BASE, Port::Control)] {
        if let Some(offset) = address.checked_sub(base).filter(|offset| *offset < UART_SIZE) {
            return u8::try_from(offset).ok().map(|offset| (port, offset));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    type Seen = Arc<Mutex<Vec<(&'static str, Vec<u8>)>>>;

    #[test]
    fn ports_reach_their_sinks_and_their_lines() {
        let seen = Seen::default();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = |name: &'static str, seen: &Seen| -> Sink {
            let seen = seen.clone();
            Box::new(move |bytes| {
                seen.lock().unwrap().push((name, bytes.to_vec()));
                b"ok".to_vec()
            })
        };
        let line = {
            let lines = lines.clone();
            Box::new(move |spi, level| {
                lines.lock().unwrap().push((spi, level));
                Ok(())
            })
        };
        let bus = Bus::new(sink("console", &seen), sink("control", &seen), line);
        bus.write(UART1_BASE + 1, &[1]).unwrap();
        bus.write(UART1_BASE, b"hi").unwrap();
        assert_eq!(bus.read(UART1_BASE + 5, 1).unwrap()[0], 0x60);
        assert_eq!(*seen.lock().unwrap(), [("control", b"h".to_vec())]);
        assert_eq!(*lines.lock().unwrap(), [(1, true)]);
        assert_eq!(bus.read(UART1_BASE, 1).unwrap()[0], b'o');
        assert_eq!(bus.read(UART1_BASE, 1).unwrap()[0], b'k');
        assert_eq!(*lines.lock().unwrap(), [(1, true), (1, false)]);
        bus.write(UART0_BASE, b"x").unwrap();
        bus.flush();
        assert_eq!(seen.lock().unwrap().last(), Some(&("console", b"x".to_vec())));
    }

    #[test]
    fn nothing_answers_elsewhere() {
        let bus = Bus::new(Box::new(|_| vec![]), Box::new(|_| vec![]), Box::new(|_, _| Ok(())));
        assert_eq!(bus.read(UART0_BASE + 8, 4).unwrap(), [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        assert_eq!(bus.read(u64::MAX, 64).unwrap(), [0xff; 8]);
        bus.write(0, &[1]).unwrap();
        bus.write(UART0_BASE, &[]).unwrap();
    }
}
