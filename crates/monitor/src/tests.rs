//! Tests of the core on a machine made of plain memory.

mod attest;
mod dtb;
mod enables;
mod gpt;
mod machine;
mod manifest;
mod psci;
mod rmm_el3;
mod routing;
mod smc;
mod trng;
mod undefined;
