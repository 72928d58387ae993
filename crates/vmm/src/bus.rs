//! The devices that this process emulates, and the guest physical addresses at which they answer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Result;
use crate::layout::UART_SIZE;
use crate::serial::Serial;

/// Takes what the guest wrote to a port, and returns what the port receives in answer.
pub type Sink = Box<dyn FnMut(&[u8]) -> Vec<u8> + Send>;

/// Sets the level of an interrupt line: the shared peripheral interrupt's number and the level.
pub type SetLine = Arc<dyn Fn(u32, bool) -> Result<()> + Send + Sync>;

/// Something that answers at guest physical addresses. Any CPU may ask at any time, for any bytes.
pub trait Mmio: Send + Sync {
    /// The guest reads; what is not a register reads as ones, which is what `data` holds already.
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<()>;
    /// The guest writes.
    fn write(&self, offset: u64, data: &[u8]) -> Result<()>;
}

/// All emulated devices.
#[derive(Default)]
pub struct Bus {
    devices: Vec<(u64, u64, Arc<dyn Mmio>)>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bus").finish_non_exhaustive()
    }
}

impl Bus {
    /// Connects a device.
    pub fn add(&mut self, base: u64, size: u64, device: Arc<dyn Mmio>) {
        self.devices.push((base, size, device));
    }

    /// The guest reads `len` bytes; an address without a device reads as ones.
    pub fn read(&self, address: u64, len: usize) -> Result<[u8; 8]> {
        let mut data = [0; 8];
        let wanted = &mut data[..len.min(8)];
        wanted.fill(0xff);
        if let Some((device, offset)) = self.find(address, wanted.len()) {
            device.read(offset, wanted)?;
        }
        Ok(data)
    }

    /// The guest writes; an address without a device swallows it.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<()> {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.write(offset, data),
            None => Ok(()),
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(&dyn Mmio, u64)> {
        let len = u64::try_from(len).ok()?;
        self.devices.iter().find_map(|(base, size, device)| {
            let offset = address.checked_sub(*base)?;
            (offset.checked_add(len)? <= *size).then_some((&**device, offset))
        })
    }
}

struct Wired {
    serial: Serial,
    sink: Sink,
    line: bool,
}

/// A serial port with what is connected to it.
pub struct SerialPort {
    wired: Mutex<Wired>,
    spi: u32,
    set_line: SetLine,
}

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl SerialPort {
    /// A port whose output goes to `sink`.
    #[must_use]
    pub fn new(sink: Sink, spi: u32, set_line: SetLine) -> Self {
        Self { wired: Mutex::new(Wired { serial: Serial::new(), sink, line: false }), spi, set_line }
    }

    /// Sends bytes to the guest.
    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        let mut wired = self.lock();
        wired.serial.receive(bytes);
        self.settle(&mut wired)
    }

    /// Hands on what is left, when the guest will not run again.
    pub fn flush(&self) {
        let mut wired = self.lock();
        let rest = wired.serial.drain_output();
        if !rest.is_empty() {
            let _ = (wired.sink)(&rest);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Wired> {
        // A panic elsewhere leaves the registers of a port as valid as before.
        self.wired.lock().unwrap_or_else(PoisonError::into_inner)
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
            (self.set_line)(self.spi, level)?;
        }
        Ok(())
    }
}

impl Mmio for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        if let (Some(offset), Some(first)) = (register(offset), data.first_mut()) {
            let mut wired = self.lock();
            *first = wired.serial.read(offset);
            self.settle(&mut wired)?;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        if let (Some(offset), Some(value)) = (register(offset), data.first()) {
            let mut wired = self.lock();
            wired.serial.write(offset, *value);
            self.settle(&mut wired)?;
        }
        Ok(())
    }
}

fn register(offset: u64) -> Option<u8> {
    u8::try_from(offset).ok().filter(|offset| u64::from(*offset) < UART_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::UART0_BASE;

    #[test]
    fn a_port_reaches_its_sink_and_its_line() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (to_seen, to_lines) = (seen.clone(), lines.clone());
        let sink: Sink = Box::new(move |bytes| {
            to_seen.lock().unwrap().push(bytes.to_vec());
            b"ok".to_vec()
        });
        let line: SetLine = Arc::new(move |spi, level| {
            to_lines.lock().unwrap().push((spi, level));
            Ok(())
        });
        let port = Arc::new(SerialPort::new(sink, 1, line));
        let mut bus = Bus::default();
        bus.add(UART0_BASE, UART_SIZE, port.clone());
        bus.write(UART0_BASE + 1, &[1]).unwrap();
        bus.write(UART0_BASE, b"hi").unwrap();
        assert_eq!(bus.read(UART0_BASE + 5, 1).unwrap()[0], 0x60);
        assert_eq!(*seen.lock().unwrap(), [b"h".to_vec()]);
        assert_eq!(*lines.lock().unwrap(), [(1, true)]);
        assert_eq!(bus.read(UART0_BASE, 1).unwrap()[0], b'o');
        assert_eq!(bus.read(UART0_BASE, 1).unwrap()[0], b'k');
        assert_eq!(*lines.lock().unwrap(), [(1, true), (1, false)]);
        bus.write(UART0_BASE, b"x").unwrap();
        port.flush();
        assert_eq!(seen.lock().unwrap().last(), Some(&b"x".to_vec()));
    }

    #[test]
    fn nothing_answers_elsewhere() {
        let port = SerialPort::new(Box::new(|_| vec![]), 0, Arc::new(|_, _| Ok(())));
        let mut bus = Bus::default();
        bus.add(UART0_BASE, UART_SIZE, Arc::new(port));
        assert_eq!(bus.read(UART0_BASE + 8, 4).unwrap(), [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        assert_eq!(bus.read(UART0_BASE + 7, 2).unwrap()[..2], [0xff, 0xff]);
        assert_eq!(bus.read(u64::MAX, 64).unwrap(), [0xff; 8]);
        bus.write(0, &[1]).unwrap();
        bus.write(UART0_BASE, &[]).unwrap();
    }
}
