//! Tests of whole commands, on a machine without hardware.

extern crate std;

mod attested;
mod chaos;
mod features;
mod host;
mod life;
mod measured;
mod orders;
mod running;
mod tables;
mod traps;
