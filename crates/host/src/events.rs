//! eventfds: as sources of interrupts (`KVM_IRQFD`), and as what a guest's store signals (`KVM_IOEVENTFD`). And the ring
//! in which user space finds stores that it need not see one by one (`KVM_REGISTER_COALESCED_MMIO`).

use alloc::boxed::Box;
use alloc::vec::Vec;

use cca_abi::kvm::{self, event, run};

use crate::errno::{Errno, Result};
use crate::kernel::{EventFd, Kernel, Mutex, Page, SpinLock, reserve};
use crate::vm::Vm;

/// Most irqfds, ioeventfds and coalesced zones of a VM, each.
const MAX_EVENTS: usize = 1000;

/// An eventfd that raises a GSI. Dropping it unhooks it.
struct Irqfd<K: Kernel> {
    event: K::EventFd,
    gsi: u32,
    resample: Option<K::EventFd>,
    watch: K::Watch,
}

/// An address that signals an eventfd.
struct Ioeventfd<K: Kernel> {
    event: K::EventFd,
    address: u64,
    /// 0: any length.
    len: u32,
    /// Only this value.
    value: Option<u64>,
}

impl<K: Kernel> Ioeventfd<K> {
    fn matches(&self, address: u64, len: usize, value: u64) -> bool {
        self.address == address
            && (self.len == 0 || usize::try_from(self.len) == Ok(len))
            && self.value.is_none_or(|wanted| wanted == value)
    }
}

/// A VM's eventfds and zones.
pub(crate) struct Events<K: Kernel> {
    irqfds: Mutex<K, Vec<Irqfd<K>>>,
    ioeventfds: SpinLock<K, Vec<Ioeventfd<K>>>,
    /// Address and size.
    zones: SpinLock<K, Vec<(u64, u64)>>,
}

impl<K: Kernel> Default for Events<K> {
    fn default() -> Self {
        Self {
            irqfds: Mutex::<K, _>::new(Vec::new()),
            ioeventfds: SpinLock::<K, _>::new(Vec::new()),
            zones: SpinLock::<K, _>::new(Vec::new()),
        }
    }
}

/// Adds to a list under a spin lock, which must not be held while memory is allocated or freed. The caller sees to it
/// that additions come one after the other.
fn push<K: Kernel, T>(list: &SpinLock<K, Vec<T>>, item: T) -> Result<()> {
    let len = list.lock().len();
    if len >= MAX_EVENTS {
        return Err(Errno::ENOSPC);
    }
    let mut new = Vec::new();
    reserve(&mut new, len + 1)?;
    let mut guard = list.lock();
    new.append(&mut guard);
    new.push(item);
    core::mem::swap(&mut *guard, &mut new);
    drop(guard);
    drop(new);
    Ok(())
}

fn remove<K: Kernel, T>(list: &SpinLock<K, Vec<T>>, which: impl Fn(&T) -> bool) -> bool {
    let mut guard = list.lock();
    let gone = guard.iter().position(which).map(|at| guard.swap_remove(at));
    drop(guard);
    gone.is_some()
}

fn file(fd: u32) -> Result<i32> {
    i32::try_from(fd).map_err(|_| Errno::EBADF)
}

impl<K: Kernel> Vm<K> {
    /// `KVM_IRQFD`.
    pub(crate) fn irqfd(&self, args: &kvm::Irqfd) -> Result {
        if args.flags & !(event::IRQFD_DEASSIGN | event::IRQFD_RESAMPLE) != 0 {
            return Err(Errno::EINVAL);
        }
        let event = self.kernel.eventfd(file(args.fd)?)?;
        let mut irqfds = self.events.irqfds.lock();
        if args.flags & event::IRQFD_DEASSIGN != 0 {
            while let Some(at) =
                irqfds.iter().position(|irqfd| irqfd.gsi == args.gsi && irqfd.event.is_same(&event))
            {
                let irqfd = irqfds.swap_remove(at);
                self.unhook(irqfd);
            }
            return Ok(0);
        }
        // Whose eventfd nobody has open any more can never fire again.
        while let Some(at) = irqfds.iter().position(|irqfd| irqfd.event.is_closed()) {
            let irqfd = irqfds.swap_remove(at);
            self.unhook(irqfd);
        }
        if irqfds.iter().any(|irqfd| irqfd.event.is_same(&event)) {
            return Err(Errno::EBUSY);
        }
        if irqfds.len() >= MAX_EVENTS {
            return Err(Errno::ENOSPC);
        }
        reserve(&mut irqfds, 1)?;
        let (irqs, gsi) = (self.irqs.clone(), args.gsi);
        let resample = if args.flags & event::IRQFD_RESAMPLE != 0 {
            let resample = self.kernel.eventfd(file(args.resamplefd)?)?;
            irqs.add_resampler(gsi, resample.clone())?;
            Some(resample)
        } else {
            None
        };
        let level = resample.is_some();
        let watch = self.kernel.watch(
            &event,
            Box::new(move || {
                // A level stays until the guest has ended the interrupt. Whoever does not listen misses it.
                let _ = irqs.set_gsi(gsi, true);
                if !level {
                    let _ = irqs.set_gsi(gsi, false);
                }
            }),
        );
        match watch {
            Ok(watch) => irqfds.push(Irqfd { event, gsi, resample, watch }),
            Err(errno) => {
                if let Some(resample) = &resample {
                    self.irqs.remove_resampler(gsi, resample);
                }
                return Err(errno);
            }
        }
        Ok(0)
    }

    fn unhook(&self, irqfd: Irqfd<K>) {
        drop(irqfd.watch);
        if let Some(resample) = &irqfd.resample {
            self.irqs.remove_resampler(irqfd.gsi, resample);
            // Nobody would lower the line any more.
            let _ = self.irqs.set_gsi(irqfd.gsi, false);
        }
    }

    /// `KVM_IOEVENTFD`.
    pub(crate) fn ioeventfd(&self, args: &kvm::Ioeventfd) -> Result {
        let known = event::IOEVENTFD_DATAMATCH | event::IOEVENTFD_DEASSIGN;
        let matches_value = args.flags & event::IOEVENTFD_DATAMATCH != 0;
        // There are no I/O ports (flag PIO) on this architecture.
        if args.flags & !known != 0
            || !matches!(args.len, 0 | 1 | 2 | 4 | 8)
            || args.addr.checked_add(args.len.into()).is_none()
            || (args.len == 0 && matches_value)
        {
            return Err(Errno::EINVAL);
        }
        let event = self.kernel.eventfd(args.fd)?;
        let value = matches_value.then_some(args.datamatch);
        let new = Ioeventfd { event, address: args.addr, len: args.len, value };
        // One at a time.
        let _irqfds = self.events.irqfds.lock();
        let list = &self.events.ioeventfds;
        if args.flags & event::IOEVENTFD_DEASSIGN != 0 {
            let same = |old: &Ioeventfd<K>| {
                old.address == new.address
                    && old.len == new.len
                    && old.value == new.value
                    && old.event.is_same(&new.event)
            };
            return if remove::<K, _>(list, same) { Ok(0) } else { Err(Errno::ENOENT) };
        }
        let collides = |old: &Ioeventfd<K>| {
            old.address == new.address
                && (old.len == 0 || new.len == 0 || old.len == new.len)
                && (old.value.is_none() || new.value.is_none() || old.value == new.value)
        };
        let taken = list.lock().iter().any(collides);
        if taken {
            return Err(Errno::EEXIST);
        }
        push::<K, _>(list, new).map(|()| 0)
    }

    /// A store that an eventfd waits for.
    pub(crate) fn signal_ioeventfd(&self, address: u64, len: usize, value: u64) -> bool {
        let value = if len == 8 { value } else { value & ((1 << (len * 8)) - 1) };
        let list = self.events.ioeventfds.lock();
        let found = list.iter().find(|ioeventfd| ioeventfd.matches(address, len, value));
        if let Some(ioeventfd) = found {
            ioeventfd.event.signal();
        }
        found.is_some()
    }

    /// `KVM_REGISTER_COALESCED_MMIO` and `KVM_UNREGISTER_COALESCED_MMIO`.
    pub(crate) fn coalesced_zone(&self, args: &kvm::CoalescedZone, register: bool) -> Result {
        let zone = (args.addr, u64::from(args.size));
        if args.pio != 0 || zone.0.checked_add(zone.1).is_none() {
            return Err(Errno::EINVAL);
        }
        let _irqfds = self.events.irqfds.lock();
        if register {
            return push::<K, _>(&self.events.zones, zone).map(|()| 0);
        }
        let inside = |old: &(u64, u64)| {
            old.0 >= zone.0 && old.0.saturating_add(old.1) <= zone.0.saturating_add(zone.1)
        };
        while remove::<K, _>(&self.events.zones, inside) {}
        Ok(0)
    }

    /// Puts a store into the ring, if it is in a zone and there is room. User space may write anything into the ring.
    pub(crate) fn coalesce(&self, address: u64, len: usize, value: u64) -> bool {
        let (Ok(bytes), Ok(len32)) = (u64::try_from(len), u32::try_from(len)) else { return false };
        let zones = self.events.zones.lock();
        let end = address.saturating_add(bytes);
        if !zones.iter().any(|(base, size)| *base <= address && end <= base.saturating_add(*size)) {
            return false;
        }
        // The zones' lock is the ring's, too.
        let (first, last) = (self.ring.load_u32(run::RING_FIRST), self.ring.load_u32(run::RING_LAST));
        let next = last.wrapping_add(1) % run::RING_LEN;
        if last >= run::RING_LEN || next == first {
            return false;
        }
        let Ok(index) = usize::try_from(last) else { return false };
        let entry = run::RING_ENTRIES + index * run::RING_ENTRY;
        self.ring.store_u64(entry, address);
        self.ring.store_u32(entry + 8, len32);
        self.ring.store_u32(entry + 12, 0);
        self.ring.store_u64(entry + 16, value);
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        self.ring.store_u32(run::RING_LAST, next);
        drop(zones);
        true
    }
}
