//! What bindgen made of `xenctrl.h`; nothing here is public.

// Generated code: C's names, without docs, and only partly used. Which functions and types are in
// it is decided in build.rs; everything that calls them is in this crate's other modules.
#![allow(
    missing_docs,
    dead_code,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
