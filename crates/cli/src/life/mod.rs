//! The life of Realms: names, the control socket, and the commands that talk to Realms that run.
//!
//! ```text
//! realm exec, cp, console, stop ──▶ api.sock ──────────────▶ VMM ── virtio-vsock ──▶ agent in the guest
//!                                      └─ developer's machine: tunnel over a serial port ─▶ the VMM's socket
//! ```
//!
//! A Realm's process owns a directory with its socket ([`registry`]). On the developer's machine that process drives
//! the emulated machine, and its socket leads to the one of the VMM there: the same commands work in both places.
//!
//! | module | question it answers |
//! |---|---|
//! | [`args`], [`names`], [`vsock`] | what does the user say? |
//! | [`registry`] | which Realms are there? |
//! | [`owner`] | what does a Realm's own process do for that? |
//! | [`api`], [`http`], [`socket`] | what is said on the control socket? |
//! | [`hub`] | who sees the guest's terminal? |
//! | [`tunnel`] | how does a socket lead into the emulated machine? |
//! | [`agent`] | how does one talk to the guest's agent? |
//! | [`client`], [`keys`] | what do the commands do? |

pub(crate) mod agent;
pub(crate) mod api;
pub(crate) mod args;
pub(crate) mod client;
pub(crate) mod http;
pub(crate) mod hub;
pub(crate) mod keys;
pub(crate) mod names;
pub(crate) mod owner;
pub(crate) mod registry;
pub(crate) mod socket;
pub(crate) mod tunnel;
pub(crate) mod vsock;
