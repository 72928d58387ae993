//! Fuzzes `fuzz::qcow2_device`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::qcow2_device(data));
