#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| vlanswitchd_fuzz::capture_filter(data));
