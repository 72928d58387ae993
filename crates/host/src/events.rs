//! eventfds: as sources of interrupts (`KVM_IRQFD`), and as what a guest's store signals (`KVM_IOEVENTFD`). And the ring
//! in which user space finds stores that it need not see one by one (`KVM_REGISTER_COALESCED_MMIO`).
//!
//! A change happens under the VM's lock for them and makes a new [`Snapshot`]. A vCPU keeps the snapshot that it saw
//! last and looks at one number to learn that there is a newer one, so a store that rings a doorbell takes no lock. An
//! irqfd keeps the route of its GSI, so that its signal, which may come in any context, takes only its own lock.

use crate::sync::{AtomicU64, Ordering};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use cca_abi::kvm::{self, event, run};

use crate::errno::{Errno, Result};
use crate::irqchip::Irqs;
use crate::kernel::{EventFd, Kernel, Mutex, Page, SpinLock, read_user, reserve};
use crate::lock::guarded;
use crate::routing::{MAX_ROUTES, Route, Routing};
use crate::vgic::Remembered;
use crate::vm::Vm;

/// Most irqfds, ioeventfds and coalesced zones of a VM, each.
const MAX_EVENTS: usize = 4096;

/// What an irqfd's signal needs.
struct Wire<K: Kernel> {
    route: SpinLock<K, Route>,
    remembered: Remembered,
}

/// An eventfd that raises a GSI. Dropping it unhooks it.
struct Irqfd<K: Kernel> {
    event: K::EventFd,
    gsi: u32,
    /// Where the GSI leads now.
    wire: Arc<Wire<K>>,
    resample: Option<K::EventFd>,
    /// Only for its end.
    _watch: K::Watch,
}

/// A store that signals an eventfd.
#[derive(Clone)]
struct Ioeventfd<E> {
    event: E,
    address: u64,
    /// 0: any length.
    len: u32,
    /// Only this value.
    value: Option<u64>,
    /// An I/O port. There are none on this architecture, so it is never written.
    port: bool,
}

impl<E: EventFd> Ioeventfd<E> {
    fn matches(&self, len: usize, value: u64) -> bool {
        let masked = if len < 8 { value & ((1 << (len * 8)) - 1) } else { value };
        !self.port
            && (self.len == 0
                || (usize::try_from(self.len) == Ok(len) && self.value.is_none_or(|wanted| wanted == masked)))
    }

    fn collides(&self, other: &Self) -> bool {
        self.address == other.address
            && self.port == other.port
            && (self.len == 0
                || other.len == 0
                || (self.len == other.len
                    && (self.value.is_none() || other.value.is_none() || self.value == other.value)))
    }

    fn is_same(&self, other: &Self) -> bool {
        (self.address, self.len, self.value, self.port) == (other.address, other.len, other.value, other.port)
            && self.event.is_same(&other.event)
    }
}

/// What a running vCPU needs to know.
struct Snapshot<E> {
    /// Sorted by address.
    ioeventfds: Vec<Ioeventfd<E>>,
    /// SPIs whose end is to be told, and whom.
    resamplers: Vec<(u32, E)>,
    /// Address and size of coalesced zones.
    zones: Vec<(u64, u64)>,
}

/// The snapshot that a vCPU has seen.
pub(crate) struct View<K: Kernel> {
    generation: u64,
    snapshot: Option<Arc<Snapshot<K::EventFd>>>,
}

impl<K: Kernel> Default for View<K> {
    fn default() -> Self {
        Self { generation: 0, snapshot: None }
    }
}

struct Registered<K: Kernel> {
    routing: Routing,
    irqfds: Vec<Irqfd<K>>,
    /// Sorted by address.
    ioeventfds: Vec<Ioeventfd<K::EventFd>>,
    zones: Vec<(u64, u64)>,
    snapshot: Option<Arc<Snapshot<K::EventFd>>>,
}

/// A VM's eventfds, routes and zones.
pub(crate) struct Events<K: Kernel> {
    registered: Mutex<K, Registered<K>>,
    /// Counts snapshots.
    generation: AtomicU64,
    /// Orders stores into the ring, which all vCPUs share.
    ring: SpinLock<K, ()>,
}

impl<K: Kernel> Default for Events<K> {
    fn default() -> Self {
        Self {
            registered: guarded(
                c"events.registered",
                Registered {
                    routing: Routing::default(),
                    irqfds: Vec::new(),
                    ioeventfds: Vec::new(),
                    zones: Vec::new(),
                    snapshot: None,
                },
            ),
            generation: AtomicU64::new(0),
            ring: guarded(c"events.ring", ()),
        }
    }
}

impl<K: Kernel> Registered<K> {
    /// Tells vCPUs of a change. `ENOMEM`: the caller takes the change back.
    fn publish(&mut self, generation: &AtomicU64) -> Result<()> {
        let mut ioeventfds = Vec::new();
        reserve(&mut ioeventfds, self.ioeventfds.len())?;
        ioeventfds.extend(self.ioeventfds.iter().cloned());
        let mut zones = Vec::new();
        reserve(&mut zones, self.zones.len())?;
        zones.extend_from_slice(&self.zones);
        let mut resamplers = Vec::new();
        reserve(&mut resamplers, self.irqfds.len())?;
        for irqfd in &self.irqfds {
            if let (Some(event), Route::Spi(intid)) = (&irqfd.resample, self.routing.find(irqfd.gsi)) {
                resamplers.push((intid, event.clone()));
            }
        }
        self.snapshot = Some(Arc::new(Snapshot { ioeventfds, resamplers, zones }));
        generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Takes out the irqfds that `goes` names and lets their lines fall. They are returned so that they can be dropped
    /// without the lock: that waits for signals under way.
    fn take_irqfds(
        &mut self,
        irqs: &Irqs<K>,
        generation: &AtomicU64,
        goes: impl Fn(&Irqfd<K>) -> bool,
    ) -> Result<Vec<Irqfd<K>>> {
        let count = self.irqfds.iter().filter(|irqfd| goes(irqfd)).count();
        let mut gone = Vec::new();
        if count == 0 {
            return Ok(gone);
        }
        reserve(&mut gone, count)?;
        let mut at = 0;
        while let Some(irqfd) = self.irqfds.get(at) {
            if gone.len() < count && goes(irqfd) {
                gone.push(self.irqfds.swap_remove(at));
            } else {
                at += 1;
            }
        }
        if let Err(errno) = self.publish(generation) {
            // There is room: they were here before.
            self.irqfds.append(&mut gone);
            return Err(errno);
        }
        for irqfd in &gone {
            let shared = self.irqfds.iter().any(|other| other.gsi == irqfd.gsi && other.resample.is_some());
            if let (Some(_), false, Route::Spi(intid)) = (&irqfd.resample, shared, *irqfd.wire.route.lock()) {
                // Nobody would lower the line any more.
                irqs.drive_spi(intid, false);
            }
        }
        Ok(gone)
    }
}

fn file(fd: u32) -> Result<i32> {
    i32::try_from(fd).map_err(|_| Errno::EBADF)
}

impl<K: Kernel> Events<K> {
    /// The snapshot of now.
    fn view<'a>(&self, view: &'a mut View<K>) -> Option<&'a Snapshot<K::EventFd>> {
        if self.generation.load(Ordering::Acquire) != view.generation {
            let registered = self.registered.lock();
            let generation = self.generation.load(Ordering::Acquire);
            *view = View { generation, snapshot: registered.snapshot.clone() };
        }
        view.snapshot.as_deref()
    }

    /// A guest stored `value`. Whether an eventfd was waiting for that.
    pub(crate) fn signal(&self, view: &mut View<K>, address: u64, len: usize, value: u64) -> bool {
        let Some(snapshot) = self.view(view) else { return false };
        let first = snapshot.ioeventfds.partition_point(|ioeventfd| ioeventfd.address < address);
        let found = snapshot
            .ioeventfds
            .iter()
            .skip(first)
            .take_while(|ioeventfd| ioeventfd.address == address)
            .find(|ioeventfd| ioeventfd.matches(len, value));
        if let Some(ioeventfd) = found {
            ioeventfd.event.signal();
        }
        found.is_some()
    }

    /// The guest has finished these level-triggered SPIs.
    pub(crate) fn ended(&self, view: &mut View<K>, irqs: &Irqs<K>, intids: impl Iterator<Item = u32>) {
        let Some(snapshot) = self.view(view).filter(|snapshot| !snapshot.resamplers.is_empty()) else {
            return;
        };
        for intid in intids {
            let mut here = snapshot.resamplers.iter().filter(|(other, _)| *other == intid).peekable();
            if here.peek().is_some() {
                // First the line, then the news: whoever still wants attention raises it again.
                irqs.drive_spi(intid, false);
                here.for_each(|(_, event)| event.signal());
            }
        }
    }
}

impl<K: Kernel> Vm<K> {
    /// `KVM_IRQFD`.
    pub(crate) fn irqfd(&self, args: &kvm::Irqfd) -> Result {
        if args.flags & !(event::IRQFD_DEASSIGN | event::IRQFD_RESAMPLE) != 0 {
            return Err(Errno::EINVAL);
        }
        let (irqs, generation) = (&self.irqs, &self.events.generation);
        if args.flags & event::IRQFD_DEASSIGN != 0 {
            let event = self.kernel.eventfd(file(args.fd)?)?;
            let mut registered = self.events.registered.lock();
            let gone = registered.take_irqfds(irqs, generation, |irqfd| {
                irqfd.gsi == args.gsi && irqfd.event.is_same(&event)
            })?;
            drop(registered);
            drop(gone);
            return Ok(0);
        }
        if !self.vgic().is_some_and(|vgic| vgic.is_initialised()) {
            return Err(Errno::EAGAIN);
        }
        let event = self.kernel.eventfd(file(args.fd)?)?;
        let resample = match args.flags & event::IRQFD_RESAMPLE {
            0 => None,
            _ => Some(self.kernel.eventfd(file(args.resamplefd)?)?),
        };
        let mut registered = self.events.registered.lock();
        // Whose eventfd nobody has open any more can never fire again.
        let stale = registered.take_irqfds(irqs, generation, |irqfd| irqfd.event.is_closed())?;
        let added = self.add_irqfd(&mut registered, args.gsi, event, resample);
        drop(registered);
        drop(stale);
        added.map(|()| 0)
    }

    fn add_irqfd(
        &self,
        registered: &mut Registered<K>,
        gsi: u32,
        event: K::EventFd,
        resample: Option<K::EventFd>,
    ) -> Result<()> {
        if registered.irqfds.iter().any(|irqfd| irqfd.event.is_same(&event)) {
            return Err(Errno::EBUSY);
        }
        if registered.irqfds.len() >= MAX_EVENTS {
            return Err(Errno::ENOSPC);
        }
        reserve(&mut registered.irqfds, 1)?;
        let route = guarded(c"events.route", registered.routing.find(gsi));
        let wire = Arc::new(Wire { route, remembered: Remembered::default() });
        let (irqs, own, level) = (self.irqs.clone(), wire.clone(), resample.is_some());
        let fire = move || {
            // Under the lock, so that nothing of an earlier route is remembered for a later one.
            let route = own.route.lock();
            match *route {
                // A level stays until the guest has ended the interrupt.
                Route::Spi(intid) if level => irqs.drive_spi(intid, true),
                Route::Spi(intid) => irqs.pulse_spi(intid),
                // Whoever does not listen misses it.
                Route::Msi(msi) => drop(irqs.message(&msi, Some(&own.remembered))),
                Route::None => {}
            }
        };
        let watch = self.kernel.watch(&event, Box::new(fire))?;
        registered.irqfds.push(Irqfd { event, gsi, wire, resample, _watch: watch });
        // A level that has risen already, and whose end came before this, is seen at the next one.
        registered.publish(&self.events.generation).inspect_err(|_| {
            drop(registered.irqfds.pop());
        })
    }

    /// `KVM_IOEVENTFD`.
    pub(crate) fn ioeventfd(&self, args: &kvm::Ioeventfd) -> Result {
        let known = event::IOEVENTFD_DATAMATCH | event::IOEVENTFD_PIO | event::IOEVENTFD_DEASSIGN;
        let matches_value = args.flags & event::IOEVENTFD_DATAMATCH != 0;
        if args.flags & !known != 0
            || !matches!(args.len, 0 | 1 | 2 | 4 | 8)
            || args.addr.checked_add(args.len.into()).is_none()
            || (args.len == 0 && matches_value)
        {
            return Err(Errno::EINVAL);
        }
        let new = Ioeventfd {
            event: self.kernel.eventfd(args.fd)?,
            address: args.addr,
            len: args.len,
            value: matches_value.then_some(args.datamatch),
            port: args.flags & event::IOEVENTFD_PIO != 0,
        };
        let mut registered = self.events.registered.lock();
        let registered = &mut *registered;
        let list = &mut registered.ioeventfds;
        if args.flags & event::IOEVENTFD_DEASSIGN != 0 {
            let at = list.iter().position(|old| old.is_same(&new)).ok_or(Errno::ENOENT)?;
            let gone = list.remove(at);
            if let Err(errno) = registered.publish(&self.events.generation) {
                registered.ioeventfds.insert(at, gone);
                return Err(errno);
            }
            return Ok(0);
        }
        if list.iter().any(|old| old.collides(&new)) {
            return Err(Errno::EEXIST);
        }
        if list.len() >= MAX_EVENTS {
            return Err(Errno::ENOSPC);
        }
        reserve(list, 1)?;
        let at = list.partition_point(|old| old.address < new.address);
        list.insert(at, new);
        if let Err(errno) = registered.publish(&self.events.generation) {
            registered.ioeventfds.remove(at);
            return Err(errno);
        }
        Ok(0)
    }

    /// `KVM_SET_GSI_ROUTING`: replaces the whole table.
    pub(crate) fn set_gsi_routing(&self, argument: u64) -> Result {
        let header: kvm::IrqRouting = read_user(&self.kernel, argument)?;
        if header.nr > MAX_ROUTES || header.flags != 0 || self.vgic().is_none() {
            return Err(Errno::EINVAL);
        }
        let mut entries = Vec::new();
        reserve(&mut entries, usize::try_from(header.nr).map_err(|_| Errno::EINVAL)?)?;
        let mut at = argument.checked_add(8).ok_or(Errno::EFAULT)?;
        for _ in 0..header.nr {
            entries.push(read_user::<_, kvm::IrqRoutingEntry>(&self.kernel, at)?);
            at = at.checked_add(48).ok_or(Errno::EFAULT)?;
        }
        let routing = Routing::new(&entries)?;
        let mut registered = self.events.registered.lock();
        let before = core::mem::replace(&mut registered.routing, routing);
        if let Err(errno) = registered.publish(&self.events.generation) {
            registered.routing = before;
            return Err(errno);
        }
        for irqfd in &registered.irqfds {
            let mut route = irqfd.wire.route.lock();
            *route = registered.routing.find(irqfd.gsi);
            irqfd.wire.remembered.forget();
        }
        Ok(0)
    }

    /// `KVM_REGISTER_COALESCED_MMIO` and `KVM_UNREGISTER_COALESCED_MMIO`.
    pub(crate) fn coalesced_zone(&self, args: &kvm::CoalescedZone, register: bool) -> Result {
        let zone = (args.addr, u64::from(args.size));
        if args.pio != 0 || zone.0.checked_add(zone.1).is_none() {
            return Err(Errno::EINVAL);
        }
        let mut registered = self.events.registered.lock();
        if register {
            if registered.zones.len() >= MAX_EVENTS {
                return Err(Errno::ENOSPC);
            }
            reserve(&mut registered.zones, 1)?;
            registered.zones.push(zone);
            let published = registered.publish(&self.events.generation);
            return published.map(|()| 0).inspect_err(|_| {
                registered.zones.pop();
            });
        }
        let inside = |old: &(u64, u64)| {
            old.0 >= zone.0 && old.0.saturating_add(old.1) <= zone.0.saturating_add(zone.1)
        };
        registered.zones.retain(|old| !inside(old));
        // Without memory vCPUs go on coalescing there, which user space must expect until it has emptied the ring.
        registered.publish(&self.events.generation).map(|()| 0)
    }

    /// Puts a store into the ring, if it is in a zone and there is room. User space may write anything into the ring.
    pub(crate) fn coalesce(&self, view: &mut View<K>, address: u64, len: usize, value: u64) -> bool {
        let (Ok(bytes), Ok(len32)) = (u64::try_from(len), u32::try_from(len)) else { return false };
        let Some(snapshot) = self.events.view(view) else { return false };
        let end = address.saturating_add(bytes);
        if !snapshot.zones.iter().any(|(base, size)| *base <= address && end <= base.saturating_add(*size)) {
            return false;
        }
        let ring = self.events.ring.lock();
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
        drop(ring);
        true
    }
}
