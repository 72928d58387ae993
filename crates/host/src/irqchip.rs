//! The VM's interrupts: [`crate::vgic`], this VM's vCPUs, and the numbers by which user space names interrupts, brought
//! together. Everything that may come from an eventfd's waker works in any context.

use alloc::sync::Arc;
use alloc::vec::Vec;

use cca_abi::kvm::{self, event};
use spin::Once;

use crate::errno::{Errno, Result};
use crate::kernel::{EventFd, Kernel, SpinLock, read_user, reserve};
use crate::vcpu::Vcpu;
use crate::vgic::{AttrError, Its, Limits, SpiList, VcpuSet, Vgic};
use crate::vm::Vm;

impl From<AttrError> for Errno {
    fn from(error: AttrError) -> Self {
        Self::from_raw(error.errno())
    }
}

/// A vGIC whose vCPU numbers are those of the VM's table.
pub(crate) type VmVgic<K> = Vgic<<K as Kernel>::RawSpinLock>;
/// The ITS in front of it.
pub(crate) type VmIts<K> = Its<<K as Kernel>::RawSpinLock, <K as Kernel>::RawMutex>;

/// Entries of a GSI routing table.
pub const MAX_ROUTES: u32 = 4096;
/// The first SPI: pin 0 of the interrupt controller.
const FIRST_SPI: u32 = 32;

/// A message of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    address: u64,
    data: u32,
    /// Which device, if it is known.
    device: Option<u32>,
}

/// What a GSI stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// A pin of the interrupt controller: SPI number minus 32.
    Pin(u32),
    Message(Message),
}

/// Two irqfds with one GSI share its line; the end of the interrupt lowers it and tells all of them.
struct Resampler<K: Kernel> {
    gsi: u32,
    event: K::EventFd,
}

/// Interrupts of one VM.
pub struct Irqs<K: Kernel> {
    /// vCPUs in the order of their creation, which is also how the vGIC numbers them.
    pub(crate) vcpus: Vec<Once<Arc<Vcpu<K>>>>,
    pub(crate) vgic: Once<Arc<VmVgic<K>>>,
    pub(crate) its: Once<Arc<VmIts<K>>>,
    /// Sorted by GSI. Until user space has set one, GSI n is pin n.
    routes: SpinLock<K, Option<Vec<(u32, Route)>>>,
    resamplers: SpinLock<K, Vec<Resampler<K>>>,
    shared_bit: u64,
}

impl<K: Kernel> Irqs<K> {
    pub(crate) fn new(max_vcpus: usize, shared_bit: u64) -> Result<Self> {
        let mut vcpus = Vec::new();
        reserve(&mut vcpus, max_vcpus)?;
        vcpus.resize_with(max_vcpus, Once::new);
        Ok(Self {
            vcpus,
            vgic: Once::new(),
            its: Once::new(),
            routes: SpinLock::<K, _>::new(None),
            resamplers: SpinLock::<K, _>::new(Vec::new()),
            shared_bit,
        })
    }

    /// Makes these vCPUs look at their interrupts. Any context.
    pub fn kick(&self, vcpus: &VcpuSet) {
        for index in vcpus.iter() {
            if let Some(vcpu) = self.vcpus.get(index).and_then(Once::get) {
                vcpu.kick();
            }
        }
    }

    /// Whether messages can be delivered.
    pub(crate) fn has_its(&self) -> bool {
        self.its.get().is_some_and(|its| its.address().is_some())
    }

    fn ready(&self) -> Result<&VmVgic<K>> {
        self.vgic.get().filter(|vgic| vgic.is_initialised()).map(AsRef::as_ref).ok_or(Errno::ENXIO)
    }

    /// Drives a GSI. Any context. Whether somebody listens.
    ///
    /// # Errors
    /// `ENXIO` without an interrupt controller, `EINVAL` without such an interrupt.
    pub(crate) fn set_gsi(&self, gsi: u32, level: bool) -> Result<bool> {
        let vgic = self.ready()?;
        let route = match &*self.routes.lock() {
            None => Some(Route::Pin(gsi)),
            Some(routes) => routes
                .binary_search_by_key(&gsi, |entry| entry.0)
                .ok()
                .and_then(|at| routes.get(at))
                .map(|e| e.1),
        };
        match route.ok_or(Errno::EINVAL)? {
            Route::Pin(pin) => {
                let intid = pin.checked_add(FIRST_SPI).ok_or(Errno::EINVAL)?;
                self.kick(&vgic.set_spi(intid, level).ok_or(Errno::EINVAL)?);
                Ok(true)
            }
            Route::Message(message) if level => self.message(&message),
            Route::Message(_) => Ok(true),
        }
    }

    /// Delivers a message. Any context. Whether somebody listens.
    ///
    /// # Errors
    /// `ENXIO` without an interrupt controller, `EINVAL` if it has no ITS, the address is not its, or the device
    /// unknown.
    pub(crate) fn message(&self, message: &Message) -> Result<bool> {
        let vgic = self.ready()?;
        let its = self.its.get().ok_or(Errno::EINVAL)?;
        let device = message.device.ok_or(Errno::EINVAL)?;
        // The guest may have written either alias.
        if !its.owns_doorbell(message.address & !self.shared_bit) {
            return Err(Errno::EINVAL);
        }
        let Some(kicked) = its.signal(vgic, device, message.data) else { return Ok(false) };
        self.kick(&kicked);
        Ok(true)
    }

    /// The guest has ended these level-triggered interrupts: lowers the lines of irqfds, which may raise them again.
    pub(crate) fn ended(&self, spis: &SpiList) {
        for intid in spis.iter() {
            let Some(pin) = intid.checked_sub(FIRST_SPI) else { continue };
            let gsi = match &*self.routes.lock() {
                None => Some(pin),
                Some(routes) => {
                    routes.iter().find(|(_, route)| *route == Route::Pin(pin)).map(|(gsi, _)| *gsi)
                }
            };
            let Some(gsi) = gsi else { continue };
            let resamplers = self.resamplers.lock();
            if !resamplers.iter().any(|resampler| resampler.gsi == gsi) {
                continue;
            }
            if let Some(kicked) = self.vgic.get().and_then(|vgic| vgic.set_spi(intid, false)) {
                self.kick(&kicked);
            }
            for resampler in resamplers.iter().filter(|resampler| resampler.gsi == gsi) {
                resampler.event.signal();
            }
        }
    }

    /// Adds an eventfd to be told of the end of `gsi`. Calls come one after the other.
    pub(crate) fn add_resampler(&self, gsi: u32, event: K::EventFd) -> Result<()> {
        let mut list = Vec::new();
        let len = self.resamplers.lock().len();
        reserve(&mut list, len + 1)?;
        let mut resamplers = self.resamplers.lock();
        list.append(&mut resamplers);
        list.push(Resampler { gsi, event });
        core::mem::swap(&mut *resamplers, &mut list);
        drop(resamplers);
        // The old, empty list is freed here, without the lock.
        drop(list);
        Ok(())
    }

    /// Takes an eventfd out again.
    pub(crate) fn remove_resampler(&self, gsi: u32, event: &K::EventFd) {
        let mut resamplers = self.resamplers.lock();
        let at = resamplers.iter().position(|entry| entry.gsi == gsi && entry.event.is_same(event));
        let gone = at.map(|at| resamplers.swap_remove(at));
        drop(resamplers);
        drop(gone);
    }
}

const TYPE_SPI: u32 = 1;
const TYPE_PPI: u32 = 2;

impl<K: Kernel> Vm<K> {
    /// A vGIC with all vCPUs that exist. Under the control lock.
    pub(crate) fn new_vgic(&self) -> Result<Arc<VmVgic<K>>> {
        // Frames lie where memory slots do: in the lower half.
        let vgic = Vgic::new(Limits { ipa_bits: self.geometry.ipa_bits - 1 });
        for vcpu in self.vcpus() {
            add_vcpu::<K>(&vgic, vcpu)?;
        }
        Ok(Arc::new(vgic))
    }

    /// `KVM_IRQ_LINE`.
    pub(crate) fn irq_line(&self, line: &kvm::IrqLevel) -> Result {
        let vgic = self.irqs.ready()?;
        let number = line.irq & 0xFFFF;
        let level = line.level != 0;
        let kicked = match (line.irq >> 24) & 0xF {
            TYPE_SPI if number >= FIRST_SPI => vgic.set_spi(number, level),
            TYPE_PPI if (16..32).contains(&number) => {
                let id = (line.irq >> 16) & 0xFF | (line.irq >> 28) << 8;
                let vcpu = self.vcpus().find(|vcpu| vcpu.id == id).ok_or(Errno::EINVAL)?;
                vgic.set_ppi(vcpu.index, number, level)
            }
            TYPE_SPI | TYPE_PPI => None,
            _ => return Err(Errno::ENXIO),
        };
        self.irqs.kick(&kicked.ok_or(Errno::EINVAL)?);
        Ok(0)
    }

    /// `KVM_SIGNAL_MSI`: 1 if it was delivered, 0 if the guest does not listen.
    pub(crate) fn signal_msi(&self, msi: &kvm::Msi) -> Result {
        if msi.flags & !event::MSI_VALID_DEVID != 0 || msi.pad != [0; 12] {
            return Err(Errno::EINVAL);
        }
        let message = message(msi.address_lo, msi.address_hi, msi.data, msi.flags, msi.devid);
        self.irqs.message(&message).map(i64::from)
    }

    /// `KVM_SET_GSI_ROUTING`: replaces the whole table.
    pub(crate) fn set_gsi_routing(&self, argument: u64) -> Result {
        let header: kvm::IrqRouting = read_user(&self.kernel, argument)?;
        if header.nr > MAX_ROUTES || header.flags != 0 {
            return Err(Errno::EINVAL);
        }
        if self.vgic().is_none() {
            return Err(Errno::EINVAL);
        }
        let mut routes = Vec::new();
        reserve(&mut routes, usize::try_from(header.nr).map_err(|_| Errno::EINVAL)?)?;
        let mut at = argument.checked_add(8).ok_or(Errno::EFAULT)?;
        for _ in 0..header.nr {
            let entry: kvm::IrqRoutingEntry = read_user(&self.kernel, at)?;
            at = at.checked_add(48).ok_or(Errno::EFAULT)?;
            routes.push((entry.gsi, route(&entry)?));
        }
        routes.sort_unstable_by_key(|(gsi, _)| *gsi);
        if routes.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            return Err(Errno::EINVAL);
        }
        let old = self.irqs.routes.lock().replace(routes);
        drop(old);
        Ok(0)
    }
}

fn message(low: u32, high: u32, data: u32, flags: u32, device: u32) -> Message {
    let address = u64::from(high) << 32 | u64::from(low);
    Message { address, data, device: (flags & event::MSI_VALID_DEVID != 0).then_some(device) }
}

fn route(entry: &kvm::IrqRoutingEntry) -> Result<Route> {
    let [first, second, third, fourth, ..] = entry.u;
    match (entry.kind, entry.flags) {
        (event::ROUTING_IRQCHIP, 0) if first == 0 && second < 1020 - FIRST_SPI => Ok(Route::Pin(second)),
        (event::ROUTING_MSI, 0 | event::MSI_VALID_DEVID) => {
            Ok(Route::Message(message(first, second, third, entry.flags, fourth)))
        }
        _ => Err(Errno::EINVAL),
    }
}

/// Adds the vCPU that was created last.
pub(crate) fn add_vcpu<K: Kernel>(vgic: &VmVgic<K>, vcpu: &Vcpu<K>) -> Result<()> {
    let index = vgic.vcpu_added(vcpu.mpidr())?;
    if index == vcpu.index { Ok(()) } else { Err(Errno::EIO) }
}
