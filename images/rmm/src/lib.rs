//! What of the RMM image needs no machine, so that it can be tested on any.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod manifest;
