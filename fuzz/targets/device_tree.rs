//! Fuzzes `fuzz::device_tree`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::device_tree(data));
