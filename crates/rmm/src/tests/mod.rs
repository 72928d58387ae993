//! Tests of whole commands, on a machine without hardware.

extern crate std;

mod attested;
mod calls;
mod chaos;
mod commands;
mod features;
mod fuzz;
mod host;
mod life;
mod measured;
mod model;
mod orders;
mod running;
#[cfg(feature = "explore")]
mod schedules;
mod size;
mod table;
mod tables;
mod traps;
