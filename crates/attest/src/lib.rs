//! Attestation of Arm CCA Realms, for whoever wants to trust one: takes a CCA token apart, checks it, and predicts
//! the measurement that it should contain.
//!
//! | question | module |
//! |---|---|
//! | what does a token say? | [`token`] |
//! | is it true, and is it what I expect? | [`verify`] |
//! | who vouches for the platform? | [`root`] |
//! | what will a Realm's initial measurement be? | [`measure`] |
//! | how is a nonce or a digest written? | [`text`] |
#![forbid(unsafe_code)]

mod cbor;
pub mod measure;
mod render;
pub mod root;
pub mod text;
pub mod token;
pub mod verify;

pub use token::CcaToken;
pub use verify::{Check, Outcome, Policy, Report, verify};
