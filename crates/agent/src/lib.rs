//! The guest's agent: what `realm exec`, `realm cp` and `realm stop` talk to.
//!
//! It needs nothing in the guest but the kernel, and nothing of a C library: every page of an initramfs is measured and
//! populated, so it is as small as it can be. One process listens on a vsock port; each connection has a process of
//! its own, so that sessions cannot disturb each other and end with everything that they hold.
//!
//! | module | question it answers |
//! |---|---|
//! | [`protocol`] | what do host and agent say to each other? |
//! | [`server`] | who may connect, and what becomes of a connection? |
//! | `exec` | how does a command run, and where do its streams go? |
//! | `files` | how do files come and go? |
//! | [`connect`] | how does a program in the guest call a service of the host's? |
//! | [`sys`] | how is the kernel asked? |
//!
//! The host is not trusted by a Realm, and whoever may talk to this agent may do everything in the guest. That it is there
//! is part of what the initial measurement covers.

#![cfg_attr(not(test), no_std)]

pub mod connect;
mod exec;
mod files;
pub mod protocol;
pub mod server;
pub mod sys;

#[cfg(test)]
mod tests;
