//! How a device reaches the guest's interrupt controller, and the guest's stores reach a device.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::Result;
use crate::eventfd::EventFd;
use crate::kvm::{Message, Vm};

/// The machine, as its devices see it. Any thread may call.
pub trait Wiring: Send + Sync {
    /// Sets the level of a shared peripheral interrupt, counted from 0.
    fn set_line(&self, spi: u32, level: bool) -> Result<()>;
    /// Whether devices may send messages instead: there is an ITS.
    fn has_messages(&self) -> bool;
    /// Says which message a global interrupt (GSI) is.
    fn route(&self, gsi: u32, message: Message) -> Result<()>;
    /// Makes an event raise a global interrupt whenever it is signalled.
    fn connect(&self, gsi: u32, event: &EventFd) -> Result<()>;
    /// Makes the guest's stores to an address signal an event, or no longer. `false`: it could not be done, and the
    /// stores end up in this process, which is slower and nothing else.
    fn doorbell(&self, address: u64, event: &EventFd, there: bool) -> bool;
}

/// The kernel's.
pub struct KvmWiring {
    vm: Arc<Vm>,
    /// The bit that makes an address a shared one. The kernel knows addresses without it.
    alias: u64,
    has_its: bool,
    routes: Mutex<BTreeMap<u32, Message>>,
}

impl std::fmt::Debug for KvmWiring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmWiring").finish_non_exhaustive()
    }
}

impl KvmWiring {
    /// The wiring of `vm`; `alias` is the bit that makes an address a shared one, 0 where there is none.
    #[must_use]
    pub fn new(vm: Arc<Vm>, alias: u64, has_its: bool) -> Self {
        Self { vm, alias, has_its, routes: Mutex::default() }
    }
}

impl Wiring for KvmWiring {
    fn set_line(&self, spi: u32, level: bool) -> Result<()> {
        self.vm.set_spi(spi, level)
    }

    fn has_messages(&self) -> bool {
        self.has_its
    }

    fn route(&self, gsi: u32, message: Message) -> Result<()> {
        // A table that is whole after every single change; the kernel takes it whole, one at a time.
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        routes.insert(gsi, Message { address: message.address & !self.alias, ..message });
        self.vm.set_message_routes(routes.iter().map(|(gsi, message)| (*gsi, *message)))
    }

    fn connect(&self, gsi: u32, event: &EventFd) -> Result<()> {
        self.vm.connect_interrupt(gsi, event.fd())
    }

    fn doorbell(&self, address: u64, event: &EventFd, there: bool) -> bool {
        self.vm.set_doorbell(address, event.fd(), there).is_ok()
    }
}
