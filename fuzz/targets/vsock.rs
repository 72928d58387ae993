//! Fuzzes `fuzz::vsock`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::vsock(data));
