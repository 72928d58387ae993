//! GSIs: what number means which interrupt (`KVM_SET_GSI_ROUTING`).

use alloc::vec::Vec;

use cca_abi::kvm::{self, event as irq};

use crate::errno::{Errno, Result};
use crate::kernel::reserve;

/// Most routes, and the first GSI that is none.
pub const MAX_ROUTES: u32 = 4096;
/// The first SPI: pin 0 of the interrupt controller.
pub(crate) const FIRST_SPI: u32 = 32;
/// Pins of the interrupt controller.
const PINS: u32 = 1020 - FIRST_SPI;

/// Where a GSI leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Nowhere.
    None,
    /// To the SPI with this INTID.
    Spi(u32),
    /// To the ITS.
    Msi(Msi),
}

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Guest physical address that it is written to.
    pub address: u64,
    /// The event.
    pub data: u32,
    /// The device, if it was named.
    pub device: Option<u32>,
}

impl Msi {
    /// From the fields of the ABI.
    pub(crate) fn new(low: u32, high: u32, data: u32, flags: u32, device: u32) -> Self {
        Self {
            address: u64::from(high) << 32 | u64::from(low),
            data,
            device: (flags & irq::MSI_VALID_DEVID != 0).then_some(device),
        }
    }
}

/// All routes of a VM.
#[derive(Debug, Default)]
pub struct Routing {
    /// Sorted by GSI. `None`: GSI n is the SPI 32 + n.
    routes: Option<Vec<(u32, Route)>>,
}

impl Routing {
    /// Routes from what user space wrote.
    ///
    /// # Errors
    /// `EINVAL` for anything that does not exist, and for a GSI that is named twice; `ENOMEM`.
    pub fn new(entries: &[kvm::IrqRoutingEntry]) -> Result<Self> {
        let mut routes = Vec::new();
        reserve(&mut routes, entries.len())?;
        for entry in entries {
            routes.push((entry.gsi, route(entry)?));
        }
        routes.sort_unstable_by_key(|(gsi, _)| *gsi);
        if routes.windows(2).any(|pair| matches!(pair, [(a, _), (b, _)] if a == b)) {
            return Err(Errno::EINVAL);
        }
        Ok(Self { routes: Some(routes) })
    }

    /// Where `gsi` leads.
    pub fn find(&self, gsi: u32) -> Route {
        let Some(routes) = &self.routes else {
            return if gsi < PINS { Route::Spi(gsi + FIRST_SPI) } else { Route::None };
        };
        let found = routes.binary_search_by_key(&gsi, |(gsi, _)| *gsi).ok().and_then(|at| routes.get(at));
        found.map_or(Route::None, |(_, route)| *route)
    }
}

fn route(entry: &kvm::IrqRoutingEntry) -> Result<Route> {
    let [first, second, third, fourth, ..] = entry.u;
    if entry.gsi >= MAX_ROUTES {
        return Err(Errno::EINVAL);
    }
    match entry.kind {
        irq::ROUTING_IRQCHIP if entry.flags == 0 && first == 0 && second < PINS => {
            Ok(Route::Spi(second + FIRST_SPI))
        }
        irq::ROUTING_MSI if entry.flags & !irq::MSI_VALID_DEVID == 0 => {
            Ok(Route::Msi(Msi::new(first, second, third, entry.flags, fourth)))
        }
        _ => Err(Errno::EINVAL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(gsi: u32, kind: u32, flags: u32, data: [u32; 4]) -> kvm::IrqRoutingEntry {
        let [a, b, c, d] = data;
        kvm::IrqRoutingEntry { gsi, kind, flags, pad: 0, u: [a, b, c, d, 0, 0, 0, 0] }
    }

    #[test]
    fn without_a_table_a_gsi_is_an_spi() {
        let routing = Routing::default();
        assert_eq!(routing.find(0), Route::Spi(32));
        assert_eq!(routing.find(987), Route::Spi(1019));
        assert_eq!(routing.find(988), Route::None);
    }

    #[test]
    fn a_table_replaces_all_there_was() {
        let routing = Routing::new(&[
            entry(7, irq::ROUTING_MSI, 1, [0x40, 1, 5, 8]),
            entry(3, irq::ROUTING_IRQCHIP, 0, [0, 9, 0, 0]),
        ])
        .unwrap();
        assert_eq!(routing.find(3), Route::Spi(41));
        assert_eq!(routing.find(7), Route::Msi(Msi { address: 1 << 32 | 0x40, data: 5, device: Some(8) }));
        assert_eq!(routing.find(4), Route::None);
        assert_eq!(Routing::new(&[]).unwrap().find(0), Route::None);
    }

    #[test]
    fn what_does_not_exist_is_refused() {
        let one = entry(1, irq::ROUTING_IRQCHIP, 0, [0, 1, 0, 0]);
        for bad in [
            entry(4096, irq::ROUTING_IRQCHIP, 0, [0, 1, 0, 0]),
            entry(2, irq::ROUTING_IRQCHIP, 1, [0, 1, 0, 0]),
            entry(2, irq::ROUTING_IRQCHIP, 0, [1, 1, 0, 0]),
            entry(2, irq::ROUTING_IRQCHIP, 0, [0, 988, 0, 0]),
            entry(2, irq::ROUTING_MSI, 2, [0, 0, 0, 0]),
            entry(2, 3, 0, [0; 4]),
            one,
        ] {
            assert_eq!(Routing::new(&[one, bad]).unwrap_err(), Errno::EINVAL);
        }
    }
}
