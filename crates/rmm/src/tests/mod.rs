//! Tests of whole commands, on a machine without hardware.

extern crate std;

mod attested;
mod calls;
mod chaos;
mod commands;
mod features;
mod host;
mod life;
mod measured;
mod orders;
mod running;
mod table;
mod tables;
mod traps;
