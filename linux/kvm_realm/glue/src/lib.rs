//! The Rust side of the kernel module: the host core (`kvm-realm`) on top of the C shim.
//!
//! - [`entry`]: what C calls,
//! - [`kernel`], [`lock`]: the core's `Kernel` trait over what C offers ([`ffi`]),
//! - [`counters`]: what an administrator and the tests can see,
//! - [`runtime`]: allocator and panic handler.
//!
//! Only C touches the kernel's symbols: many of them are macros or inline functions, and all have version checksums.
#![no_std]

extern crate alloc;

mod counters;
mod entry;
mod ffi;
mod kernel;
mod lock;
mod runtime;
