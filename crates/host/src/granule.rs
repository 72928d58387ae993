//! Pages that belong to the Realm world.

use core::mem::ManuallyDrop;

use crate::kernel::{Kernel, Page};

/// A page that was delegated to the RMM. The host must not touch it, and cannot: this type gives out its address
/// only. The page comes back through [`crate::rmi::Rmi::undelegate`]; a value that is merely dropped leaves its page
/// allocated for ever, because handing a Realm's page to the kernel's allocator would be fatal.
pub struct Delegated<K: Kernel> {
    page: ManuallyDrop<K::Page>,
}

impl<K: Kernel> Delegated<K> {
    /// To be called only right after the RMM accepted the page.
    pub(crate) fn new(page: K::Page) -> Self {
        Self { page: ManuallyDrop::new(page) }
    }

    /// Physical address.
    pub fn pa(&self) -> u64 {
        self.page.pa()
    }

    /// To be called only right after the RMM gave the page back.
    pub(crate) fn into_page(self) -> K::Page {
        ManuallyDrop::into_inner(self.page)
    }
}
