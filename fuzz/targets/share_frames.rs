//! Fuzzes `fuzz::share_frames`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::share_frames(data));
