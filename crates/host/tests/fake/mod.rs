//! A kernel and an RMM for tests: no threads, no guests, but an exact account of who owns which page, and an RMM that
//! can be told to fail. Scenarios with real guests run on the simulated machine.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use cca_abi::kvm::{self, ioctl};
use cca_abi::rmi::{entry_span, fid};
use kvm_realm::files::FileObject;
use kvm_realm::kernel::{
    Entry, EventFd, Fill, Kernel, LogLevel, MemoryHook, Page, PinPurpose, SmcRegs, UserPage, VcpuThread,
};
use kvm_realm::{Errno, Result, System, SystemConfig};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const RAM: u64 = 0x8000_0000;
/// Where the process's memory lies.
pub(crate) const USER: u64 = 0x10_0000;
const USER_SIZE: usize = 0x10_0000;
const START_LEVEL: i64 = 2;

#[derive(Default)]
struct Rmm {
    delegated: BTreeSet<u64>,
    /// Table granules by level and base.
    tables: BTreeMap<(i64, u64), u64>,
    /// Data granules by address.
    data: BTreeMap<u64, u64>,
    unprotected: BTreeSet<u64>,
    calls: Vec<(u64, [u64; 5])>,
    /// Answers to give instead, by function: how many calls to let pass first, then the `x0`.
    failures: BTreeMap<u64, (usize, u64)>,
}

#[derive(Default)]
struct State {
    rmm: Rmm,
    pages: BTreeMap<u64, Arc<[AtomicU8]>>,
    next_page: u64,
    user: Vec<u8>,
    files: Vec<Option<FileObject<Fake>>>,
    other_process: bool,
    no_more_files: bool,
    killed: bool,
    pins: usize,
    rescheduled: usize,
    largest_allocation: usize,
    /// MPIDRs in the order of `REC_CREATE`.
    mpidrs: Vec<u64>,
    /// The first 48 bytes of the last Realm's parameters: flags, s2sz, sve_vl, num_bps, num_wps, pmu_num_ctrs.
    params: Vec<u8>,
    watches: BTreeMap<i32, Arc<dyn Fn() + Send + Sync>>,
    signals: BTreeMap<i32, u32>,
    log: Vec<String>,
}

#[derive(Clone, Default)]
pub(crate) struct Fake(Arc<Mutex<State>>);

impl Fake {
    pub(crate) fn new() -> Self {
        let fake = Self::default();
        let mut state = fake.0.lock().unwrap();
        state.next_page = 0x4000_0000;
        state.user = vec![0; USER_SIZE];
        drop(state);
        fake
    }

    /// Lets `after` calls of `fid` pass and answers all later ones with `x0`, until [`Self::heal`].
    pub(crate) fn fail(&self, fid: u64, after: usize, x0: u64) {
        self.0.lock().unwrap().rmm.failures.insert(fid, (after, x0));
    }

    pub(crate) fn heal(&self) {
        self.0.lock().unwrap().rmm.failures.clear();
    }

    pub(crate) fn calls_of(&self, fid: u64) -> Vec<[u64; 5]> {
        let state = self.0.lock().unwrap();
        state.rmm.calls.iter().filter(|call| call.0 == fid).map(|call| call.1).collect()
    }

    pub(crate) fn calls(&self) -> usize {
        self.0.lock().unwrap().rmm.calls.len()
    }

    pub(crate) fn pages(&self) -> usize {
        self.0.lock().unwrap().pages.len()
    }

    pub(crate) fn delegated(&self) -> usize {
        self.0.lock().unwrap().rmm.delegated.len()
    }

    pub(crate) fn mpidrs(&self) -> Vec<u64> {
        self.0.lock().unwrap().mpidrs.clone()
    }

    /// Most pages that were asked for at once.
    pub(crate) fn largest_allocation(&self) -> usize {
        self.0.lock().unwrap().largest_allocation
    }

    /// The lines of the log since the last time.
    pub(crate) fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().log)
    }

    /// How often others were given a chance.
    pub(crate) fn rescheduled(&self) -> usize {
        self.0.lock().unwrap().rescheduled
    }

    /// One of the last Realm's 64-bit parameters.
    pub(crate) fn param(&self, offset: usize) -> u64 {
        let state = self.0.lock().unwrap();
        u64::from_le_bytes(core::array::from_fn(|at| state.params[offset + at]))
    }

    /// Reads the process's memory.
    pub(crate) fn read<T: FromBytes + IntoBytes>(&self, at: u64) -> T {
        let mut value = T::new_zeroed();
        self.copy_from_user(at, value.as_mut_bytes()).unwrap();
        value
    }

    pub(crate) fn pins(&self) -> usize {
        self.0.lock().unwrap().pins
    }

    pub(crate) fn be_another_process(&self, other: bool) {
        self.0.lock().unwrap().other_process = other;
    }

    pub(crate) fn refuse_files(&self, refuse: bool) {
        self.0.lock().unwrap().no_more_files = refuse;
    }

    pub(crate) fn kill(&self) {
        self.0.lock().unwrap().killed = true;
    }

    pub(crate) fn close_all(&self) {
        let files = std::mem::take(&mut self.0.lock().unwrap().files);
        drop(files);
    }

    /// Writes `value` into the process's memory and says where.
    pub(crate) fn user<T: IntoBytes + Immutable>(&self, value: &T) -> u64 {
        let mut state = self.0.lock().unwrap();
        state.user[..size_of::<T>()].copy_from_slice(value.as_bytes());
        USER
    }

    pub(crate) fn system(&self) -> Arc<System<Self>> {
        System::probe(self.clone(), SystemConfig::default()).unwrap()
    }

    pub(crate) fn system_of(&self, generation: kvm::Generation) -> Arc<System<Self>> {
        System::probe(self.clone(), SystemConfig { generation }).unwrap()
    }

    pub(crate) fn file(&self, fd: i64) -> FileObject<Self> {
        self.file_object(i32::try_from(fd).unwrap()).unwrap()
    }

    pub(crate) fn close(&self, fd: i64) {
        let file = self.0.lock().unwrap().files[usize::try_from(fd).unwrap()].take();
        drop(file);
    }
}

impl Rmm {
    fn level_of(&self, ipa: u64, wanted: i64) -> i64 {
        let mut level = START_LEVEL;
        while level < wanted && self.tables.contains_key(&(level + 1, ipa & !(entry_span(level) - 1))) {
            level += 1;
        }
        level
    }

    fn call(&mut self, regs: &mut SmcRegs) {
        let [function, x1, x2, x3, x4, x5, ..] = *regs;
        regs.fill(0);
        self.calls.push((function, [x1, x2, x3, x4, x5]));
        if let Some((after, x0)) = self.failures.get_mut(&function) {
            if *after == 0 {
                regs[0] = *x0;
                return;
            }
            *after -= 1;
        }
        let walk_error = |level: i64| 4 | u64::try_from(level).unwrap() << 8;
        match function {
            fid::VERSION => (regs[1], regs[2]) = (0x1_0000, 0x1_0000),
            // 48 bits, SVE with 512 bits, 6 breakpoints, 4 watchpoints, a PMU with 7 counters, both hashes, 4 list
            // registers, 2^4 - 1 RECs.
            fid::FEATURES => {
                regs[1] = 48 | 1 << 9 | 3 << 10 | 5 << 14 | 3 << 20 | 1 << 26 | 7 << 27;
                regs[1] |= 3 << 32 | 3 << 34 | 4 << 38;
            }
            fid::GRANULE_DELEGATE => regs[0] = u64::from(!self.delegated.insert(x1)),
            fid::GRANULE_UNDELEGATE => regs[0] = u64::from(!self.delegated.remove(&x1)),
            fid::REC_AUX_COUNT => regs[1] = 2,
            fid::DATA_CREATE | fid::DATA_CREATE_UNKNOWN => {
                let level = self.level_of(x3, 3);
                if level < 3 || self.data.contains_key(&x3) {
                    regs[0] = walk_error(level);
                } else {
                    self.data.insert(x3, x2);
                }
            }
            fid::DATA_DESTROY => match self.data.remove(&x2) {
                Some(data) => (regs[1], regs[2]) = (data, x2 + PAGE),
                None => regs[0] = walk_error(3),
            },
            fid::RTT_CREATE => {
                let level = i64::from_ne_bytes(x4.to_ne_bytes());
                if self.level_of(x3, level) != level - 1 {
                    regs[0] = walk_error(level - 1);
                } else {
                    self.tables.insert((level, x3), x2);
                }
            }
            fid::RTT_DESTROY => match self.tables.remove(&(i64::from_ne_bytes(x3.to_ne_bytes()), x2)) {
                Some(table) => regs[1] = table,
                None => regs[0] = walk_error(2),
            },
            fid::RTT_INIT_RIPAS | fid::RTT_SET_RIPAS => {
                let (base, top) = if function == fid::RTT_INIT_RIPAS { (x2, x3) } else { (x3, x4) };
                let span = entry_span(self.level_of(base, 3));
                let reached = top & !(span - 1);
                if base % span != 0 || reached <= base {
                    regs[0] = walk_error(self.level_of(base, 3));
                } else {
                    regs[1] = reached.min((base & !(entry_span(2) - 1)) + entry_span(2));
                }
            }
            _ => {}
        }
    }
}

pub(crate) struct FakePage {
    kernel: Fake,
    pa: u64,
    bytes: Arc<[AtomicU8]>,
}

impl Drop for FakePage {
    fn drop(&mut self) {
        let mut state = self.kernel.0.lock().unwrap();
        assert!(!state.rmm.delegated.contains(&self.pa), "a page of the Realm world was freed");
        assert!(state.pages.remove(&self.pa).is_some(), "a page was freed twice");
    }
}

impl FakePage {
    fn load<const N: usize>(&self, offset: usize) -> [u8; N] {
        core::array::from_fn(|at| self.bytes[offset + at].load(Ordering::Relaxed))
    }

    fn store(&self, offset: usize, bytes: &[u8]) {
        let state = self.kernel.0.lock().unwrap();
        assert!(!state.rmm.delegated.contains(&self.pa), "the host wrote to a page of the Realm world");
        for (place, byte) in self.bytes[offset..].iter().zip(bytes) {
            place.store(*byte, Ordering::Relaxed);
        }
    }
}

impl Page for FakePage {
    fn pa(&self) -> u64 {
        self.pa
    }
    fn load_u8(&self, offset: usize) -> u8 {
        self.load::<1>(offset)[0]
    }
    fn load_u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.load(offset))
    }
    fn load_u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.load(offset))
    }
    fn store_u8(&self, offset: usize, value: u8) {
        self.store(offset, &[value]);
    }
    fn store_u32(&self, offset: usize, value: u32) {
        self.store(offset, &value.to_le_bytes());
    }
    fn store_u64(&self, offset: usize, value: u64) {
        self.store(offset, &value.to_le_bytes());
    }
}

pub(crate) struct FakePin(Fake, u64);

impl UserPage for FakePin {
    fn pa(&self) -> u64 {
        self.1
    }
}

impl Drop for FakePin {
    fn drop(&mut self) {
        self.0.0.lock().unwrap().pins -= 1;
    }
}

pub(crate) struct FakeThread;

impl VcpuThread for FakeThread {
    fn begin(&self) {}
    fn end(&self) {}
    fn prepare(&self) -> Result<()> {
        Err(Errno::EINTR)
    }
    fn enter(&self, _: &mut SmcRegs, _: bool, _: &mut dyn FnMut() -> bool) -> Entry {
        Entry::Refused
    }
    fn block(&self, _: Option<u64>, _: &mut dyn FnMut() -> bool) -> Result<()> {
        Err(Errno::EINTR)
    }
    fn kick(&self) {}
}

/// eventfds are numbers from [`FIRST_EVENT`] on; what hooked into them is called by [`Fake::signal`].
pub(crate) const FIRST_EVENT: i32 = 1000;

#[derive(Clone)]
pub(crate) struct FakeEvent(Fake, i32);

impl EventFd for FakeEvent {
    fn signal(&self) {
        *self.0.0.lock().unwrap().signals.entry(self.1).or_default() += 1;
    }
    fn is_same(&self, other: &Self) -> bool {
        self.1 == other.1
    }
    fn is_closed(&self) -> bool {
        false
    }
}

/// Unhooks when dropped.
pub(crate) struct FakeWatch(Fake, i32);

impl Drop for FakeWatch {
    fn drop(&mut self) {
        let gone = self.0.0.lock().unwrap().watches.remove(&self.1);
        drop(gone);
    }
}

impl Fake {
    /// Somebody writes to an eventfd.
    pub(crate) fn signal(&self, fd: i32) {
        let fire = self.0.lock().unwrap().watches.get(&fd).cloned();
        fire.expect("nobody waits for the eventfd")();
    }

    /// How often the core signalled an eventfd.
    pub(crate) fn signals(&self, fd: i32) -> u32 {
        self.0.lock().unwrap().signals.get(&fd).copied().unwrap_or(0)
    }
}

impl Kernel for Fake {
    type RawMutex = spin::Mutex<()>;
    type RawSpinLock = spin::Mutex<()>;
    type Page = FakePage;
    type UserPage = FakePin;
    type AddressSpace = ();
    type VcpuThread = FakeThread;
    type EventFd = FakeEvent;
    type Watch = FakeWatch;
    type MemoryWatch = ();

    fn watch_memory(&self, _: Arc<dyn MemoryHook>) -> Result<()> {
        Ok(())
    }

    fn eventfd(&self, fd: i32) -> Result<FakeEvent> {
        if fd >= FIRST_EVENT { Ok(FakeEvent(self.clone(), fd)) } else { Err(Errno::EBADF) }
    }

    fn watch(&self, event: &FakeEvent, fire: Box<dyn Fn() + Send + Sync>) -> Result<FakeWatch> {
        self.0.lock().unwrap().watches.insert(event.1, fire.into());
        Ok(FakeWatch(self.clone(), event.1))
    }

    fn can_mask_pmu(&self) -> bool {
        true
    }

    fn smc(&self, regs: &mut SmcRegs) {
        let mut state = self.0.lock().unwrap();
        if regs[0] == fid::REALM_CREATE {
            let params = state.pages[&regs[2]].clone();
            state.params = params[..48].iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        }
        if regs[0] == fid::REC_CREATE {
            let params = state.pages[&regs[3]].clone();
            state.mpidrs.push(params[0x100].load(Ordering::Relaxed).into());
        }
        state.rmm.call(regs);
    }

    fn alloc_page(&self, _: Fill) -> Result<FakePage> {
        Ok(self.alloc_contiguous(1)?.remove(0))
    }

    fn alloc_contiguous(&self, count: usize) -> Result<Vec<FakePage>> {
        let mut state = self.0.lock().unwrap();
        let size = count as u64 * PAGE;
        state.largest_allocation = state.largest_allocation.max(count);
        let first = state.next_page.next_multiple_of(size);
        state.next_page = first + size;
        let pages = (0..count as u64).map(|n| {
            let pa = first + n * PAGE;
            let bytes = <[AtomicU8]>::new_box_zeroed_with_elems(PAGE as usize).expect("memory");
            let bytes: Arc<[AtomicU8]> = bytes.into();
            state.pages.insert(pa, bytes.clone());
            FakePage { kernel: self.clone(), pa, bytes }
        });
        Ok(pages.collect())
    }

    fn copy_from_user(&self, from: u64, to: &mut [u8]) -> Result<()> {
        let state = self.0.lock().unwrap();
        let at = usize::try_from(from.checked_sub(USER).ok_or(Errno::EFAULT)?).unwrap();
        to.copy_from_slice(state.user.get(at..at + to.len()).ok_or(Errno::EFAULT)?);
        Ok(())
    }

    fn copy_to_user(&self, to: u64, from: &[u8]) -> Result<()> {
        let mut state = self.0.lock().unwrap();
        let at = usize::try_from(to.checked_sub(USER).ok_or(Errno::EFAULT)?).unwrap();
        state.user.get_mut(at..at + from.len()).ok_or(Errno::EFAULT)?.copy_from_slice(from);
        Ok(())
    }

    fn is_user_range(&self, address: u64, size: u64) -> bool {
        address.checked_add(size).is_some_and(|end| end <= 1 << 47)
    }

    fn current_address_space(&self) {}

    fn is_current(&self, (): &()) -> bool {
        !self.0.lock().unwrap().other_process
    }

    fn pin_user_pages(
        &self,
        address: u64,
        count: usize,
        _: PinPurpose,
        pages: &mut Vec<FakePin>,
    ) -> Result<usize> {
        self.0.lock().unwrap().pins += count;
        pages.extend((0..count as u64).map(|n| FakePin(self.clone(), address + n * PAGE)));
        Ok(count)
    }

    fn install_fd(&self, _: &str, object: FileObject<Self>, _: u64) -> Result<i32> {
        let mut state = self.0.lock().unwrap();
        if state.no_more_files {
            drop(state);
            drop(object);
            return Err(Errno::EMFILE);
        }
        state.files.push(Some(object));
        Ok(i32::try_from(state.files.len() - 1).unwrap())
    }

    fn file_object(&self, fd: i32) -> Option<FileObject<Self>> {
        self.0.lock().unwrap().files.get(usize::try_from(fd).ok()?)?.clone()
    }

    fn new_vcpu_thread(&self) -> FakeThread {
        FakeThread
    }

    fn set_signal_mask(&self, mask: u64) -> u64 {
        mask
    }

    fn counter(&self) -> u64 {
        0
    }

    fn counter_frequency(&self) -> u64 {
        1_000_000
    }

    fn online_cpus(&self) -> u32 {
        4
    }

    fn id_register(&self, _: u16) -> u64 {
        0x1020_3006
    }

    fn cond_resched(&self) {
        self.0.lock().unwrap().rescheduled += 1;
    }

    fn is_killed(&self) -> bool {
        self.0.lock().unwrap().killed
    }

    fn log(&self, level: LogLevel, line: fmt::Arguments<'_>) {
        let line = format!("{level:?}: {line}");
        println!("{line}");
        self.0.lock().unwrap().log.push(line);
    }
}

/// A VM with one slot of private memory of `pages` pages at [`RAM`], all of it private.
pub(crate) struct Machine {
    pub(crate) kernel: Fake,
    pub(crate) system: Arc<System<Fake>>,
    pub(crate) vm: i64,
    pub(crate) gmem: i64,
}

impl Machine {
    pub(crate) fn new(kernel: &Fake, pages: u64) -> Self {
        let system = kernel.system();
        let vm = system.ioctl(ioctl::CREATE_VM, kvm::VM_TYPE_REALM | 33).unwrap();
        let this = Self { kernel: kernel.clone(), system, vm, gmem: 0 };
        let create = kvm::CreateGuestMemfd { size: pages * PAGE, flags: 0, reserved: [0; 6] };
        let gmem = this.vm(ioctl::CREATE_GUEST_MEMFD, &create).unwrap();
        let this = Self { gmem, ..this };
        this.vm(ioctl::SET_USER_MEMORY_REGION2, &this.region(0, RAM, pages)).unwrap();
        this.set_private(RAM, pages, true).unwrap();
        this
    }

    /// A VM without memory.
    pub(crate) fn new_small(kernel: &Fake, system: &Arc<System<Fake>>) -> Self {
        let system = system.clone();
        let vm = system.ioctl(ioctl::CREATE_VM, kvm::VM_TYPE_REALM | 33).unwrap();
        Self { kernel: kernel.clone(), system, vm, gmem: 0 }
    }

    pub(crate) fn region(&self, slot: u32, base: u64, pages: u64) -> kvm::MemoryRegion2 {
        kvm::MemoryRegion2 {
            slot,
            flags: kvm::MEM_GUEST_MEMFD,
            guest_phys_addr: base,
            memory_size: pages * PAGE,
            userspace_addr: USER,
            guest_memfd_offset: 0,
            guest_memfd: u32::try_from(self.gmem).unwrap(),
            pad1: 0,
            pad2: [0; 14],
        }
    }

    pub(crate) fn vm<T: IntoBytes + Immutable>(&self, command: u32, argument: &T) -> Result {
        let at = self.kernel.user(argument);
        self.kernel.file(self.vm).ioctl(command, at)
    }

    pub(crate) fn on<T: IntoBytes + Immutable>(&self, fd: i64, command: u32, argument: &T) -> Result {
        let at = self.kernel.user(argument);
        self.kernel.file(fd).ioctl(command, at)
    }

    pub(crate) fn set_private(&self, base: u64, pages: u64, private: bool) -> Result {
        let attributes = if private { kvm::MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
        let range = kvm::MemoryAttributes { address: base, size: pages * PAGE, attributes, flags: 0 };
        self.vm(ioctl::SET_MEMORY_ATTRIBUTES, &range)
    }

    pub(crate) fn rme(&self, command: u64) -> Result {
        self.rme_at(command, 0)
    }

    fn rme_at(&self, command: u64, argument: u64) -> Result {
        let enable = kvm::EnableCap { cap: 300, flags: 0, args: [command, argument, 0, 0], pad: [0; 64] };
        self.vm(ioctl::ENABLE_CAP, &enable)
    }

    /// A sub-command whose argument is a structure, which is put behind the ioctl's own.
    pub(crate) fn rme_with<T: IntoBytes + Immutable>(&self, command: u64, argument: &T) -> Result {
        let at = USER + 0x1000;
        self.kernel.copy_to_user(at, argument.as_bytes()).unwrap();
        self.rme_at(command, at)
    }

    pub(crate) fn populate(&self, base: u64, size: u64) -> Result {
        let args = kvm::RmePopulate { base, size, flags: 1, reserved: [0; 3] };
        self.rme_with(kvm::rme::POPULATE_REALM, &args)
    }

    pub(crate) fn init_ipa(&self, base: u64, size: u64) -> Result {
        self.rme_with(kvm::rme::INIT_IPA_REALM, &kvm::RmeInitIpa { base, size, reserved: [0; 4] })
    }

    pub(crate) fn punch(&self, first: u64, pages: u64) -> Result {
        let FileObject::Gmem(gmem) = self.kernel.file(self.gmem) else { panic!("no guest_memfd") };
        gmem.fallocate(3, first * PAGE, pages * PAGE)
    }

    pub(crate) fn vcpu(&self, id: u64) -> i64 {
        self.vcpu_with(id, 0)
    }

    /// A vCPU with more features than PSCI.
    pub(crate) fn vcpu_with(&self, id: u64, features: u32) -> i64 {
        let vcpu = self.kernel.file(self.vm).ioctl(ioctl::CREATE_VCPU, id).unwrap();
        let mut init = kvm::VcpuInit { target: kvm::TARGET_GENERIC_V8, features: [0; 7] };
        init.features[0] = 1 << kvm::vcpu_feature::PSCI_0_2 | features;
        self.on(vcpu, ioctl::ARM_VCPU_INIT, &init).unwrap();
        vcpu
    }

    /// Writes into the process's memory.
    pub(crate) fn put<T: IntoBytes + Immutable>(&self, at: u64, value: &T) {
        self.kernel.copy_to_user(at, value.as_bytes()).unwrap();
    }

    /// An initialised interrupt controller; its file.
    pub(crate) fn vgic(&self) -> i64 {
        let create = kvm::CreateDevice { device_type: kvm::device_type::ARM_VGIC_V3, fd: 0, flags: 0 };
        self.vm(ioctl::CREATE_DEVICE, &create).unwrap();
        let fd = i64::from(self.kernel.read::<kvm::CreateDevice>(USER).fd);
        let at = USER + 0x1000;
        for (group, attr, payload) in [(0, 2, 0x3FFF_0000u64), (0, 3, 0x3FE0_0000), (3, 0, 96), (4, 0, 0)] {
            self.put(at, &payload);
            let args = kvm::DeviceAttr { flags: 0, group, attr, addr: at };
            self.on(fd, ioctl::SET_DEVICE_ATTR, &args).unwrap();
        }
        fd
    }

    pub(crate) fn finalize(&self, vcpu: i64) -> Result {
        self.on(vcpu, ioctl::ARM_VCPU_FINALIZE, &8u32)
    }

    /// Closes everything and checks that every page came home but `lost` ones.
    pub(crate) fn close(self, files: &[i64], lost: usize) {
        for fd in [self.vm, self.gmem].iter().chain(files) {
            self.kernel.close(*fd);
        }
        assert_eq!(self.kernel.pins(), 0, "pages are still pinned");
        assert_eq!(self.kernel.delegated(), lost, "pages are still delegated");
        assert_eq!(self.kernel.pages(), lost, "pages are still allocated");
        assert_eq!(self.system.stats().leaked(), lost as u64);
        assert_eq!(self.system.stats().delegated(), 0);
        assert_eq!(self.system.live_vms(), 0);
    }
}
