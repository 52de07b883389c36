//! libFuzzer's entry to [`understudy_fuzz::engine`]. Built without libFuzzer, it replays the files named as arguments.
#![cfg_attr(fuzzing, no_main, allow(unsafe_code))]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| understudy_fuzz::engine(bytes));

#[cfg(not(fuzzing))]
fn main() -> std::io::Result<()> {
    for path in std::env::args_os().skip(1) {
        understudy_fuzz::engine(&std::fs::read(path)?);
    }
    Ok(())
}
