//! A device's interrupts: messages where the guest has enabled MSI-X, else one line.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Result;
use crate::layout::PCI_FIRST_SPI;
use crate::msix::{Msix, NO_VECTOR};
use crate::wiring::Wiring;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What CPUs' threads set up and the device's thread raises.
pub struct Interrupt {
    state: Mutex<State>,
    wiring: Arc<dyn Wiring>,
    spi: u32,
}

struct State {
    /// The causes that the driver has not read.
    isr: u8,
    line_disabled: bool,
    /// The line is level-triggered: high while there is a cause.
    level: bool,
    msix: Option<Msix>,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

impl Interrupt {
    /// The interrupts of a function with so many queues, all quiet.
    pub fn new(slot: u32, queues: usize, wiring: Arc<dyn Wiring>) -> Result<Self> {
        // One for each queue and one for the configuration.
        let msix = wiring.has_messages().then(|| Msix::new(slot, queues + 1, wiring.clone())).transpose()?;
        let state = State {
            isr: 0,
            line_disabled: false,
            level: false,
            msix,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; queues],
        };
        Ok(Self { state: Mutex::new(state), wiring, spi: PCI_FIRST_SPI.saturating_add(slot) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole after every single change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the line to where it belongs.
    fn settle(&self, state: &mut State) -> Result<()> {
        let messages = state.msix.as_ref().is_some_and(Msix::enabled);
        let level = state.isr != 0 && !state.line_disabled && !messages;
        if level != state.level {
            state.level = level;
            self.wiring.set_line(self.spi, level)?;
        }
        Ok(())
    }

    fn raise(&self, cause: u8, vector: impl Fn(&State) -> u16) -> Result<()> {
        let state = &mut *self.lock();
        let vector = vector(state);
        match &mut state.msix {
            Some(msix) if msix.enabled() => {
                msix.raise(vector);
                Ok(())
            }
            _ => {
                state.isr |= cause;
                self.settle(state)
            }
        }
    }

    /// Something in a queue has been given back.
    pub fn queue(&self, index: usize) -> Result<()> {
        self.raise(ISR_QUEUE, |state| state.queue_vectors.get(index).copied().unwrap_or(NO_VECTOR))
    }

    /// The device's state has changed.
    pub fn config(&self) -> Result<()> {
        self.raise(ISR_CONFIG, |state| state.config_vector)
    }

    /// The driver reads the line's causes, which clears them.
    pub fn take(&self) -> Result<u8> {
        let state = &mut *self.lock();
        let isr = std::mem::take(&mut state.isr);
        self.settle(state)?;
        Ok(isr)
    }

    /// The device has been reset: nothing is pending.
    pub fn clear(&self) -> Result<()> {
        let state = &mut *self.lock();
        state.isr = 0;
        if let Some(msix) = &mut state.msix {
            msix.forget();
        }
        self.settle(state)
    }

    /// The guest has written the function's configuration space: it allows the line or not, and has written this into
    /// MSI-X's control word.
    pub fn configure(&self, line_disabled: bool, control: u16) -> Result<()> {
        let state = &mut *self.lock();
        state.line_disabled = line_disabled;
        if let Some(msix) = &mut state.msix {
            msix.control(control)?;
        }
        self.settle(state)
    }

    /// The vectors of configuration and of a queue.
    #[must_use]
    pub fn vectors(&self, queue: u16) -> (u16, u16) {
        let state = self.lock();
        let queue = state.queue_vectors.get(usize::from(queue)).copied().unwrap_or(NO_VECTOR);
        (state.config_vector, queue)
    }

    /// The driver chooses the vector of the configuration, or of a queue. A vector that there is not is none.
    pub fn set_vector(&self, queue: Option<u16>, vector: u16) {
        let state = &mut *self.lock();
        let valid = state.msix.as_ref().is_some_and(|msix| msix.has(vector));
        let vector = if valid { vector } else { NO_VECTOR };
        match queue {
            None => state.config_vector = vector,
            Some(queue) => {
                if let Some(place) = state.queue_vectors.get_mut(usize::from(queue)) {
                    *place = vector;
                }
            }
        }
    }

    /// The driver resets the device: no vector belongs to anything.
    pub fn forget_vectors(&self) {
        let state = &mut *self.lock();
        state.config_vector = NO_VECTOR;
        state.queue_vectors.fill(NO_VECTOR);
    }

    /// Looks at the table of messages, where there is one.
    pub fn with_msix<T>(&self, look: impl FnOnce(&mut Msix) -> T) -> Option<T> {
        self.lock().msix.as_mut().map(look)
    }
}
