//! Makes `bindings.rs` from the functions and struct layouts of the installed `xenctrl.h`, and finds out the Xen version that
//! those headers belong to.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// Everything the safe layer calls; the loader asks the library for exactly these symbols.
const FUNCTIONS: &str = "xc_(interface_open|interface_close|version|domain_getinfolist|\
                         vcpu_getinfo|domain_pause|domain_unpause|domain_destroy)";
const TYPES: &str = "xc_domaininfo_t|xc_vcpuinfo_t|xentoollog_logger";
const CONSTANTS: &str = "XEN_DOMINF_.*|XEN_INVALID_MAX_VCPU_ID|SHUTDOWN_.*|XENVER_version|\
                         DOMID_FIRST_RESERVED";

fn main() -> ExitCode {
    match generate() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("\nxen-sys can't be built: {problem}\n");
            ExitCode::FAILURE
        }
    }
}

fn generate() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=PKG_CONFIG_PATH");

    let version = pkg_config("--modversion")?;
    let mut numbers = version.trim().split('.');
    let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else {
        return Err(format!(
            "pkg-config says that xencontrol has version '{}', expected e.g. 4.17.0",
            version.trim()
        ));
    };
    // The public headers carry no Xen version of their own, hence pkg-config's.
    println!("cargo::rustc-env=XEN_HEADERS_MAJOR={major}");
    println!("cargo::rustc-env=XEN_HEADERS_MINOR={minor}");

    clang_sys::load().map_err(|cause| {
        format!(
            "libclang, with which bindgen reads xenctrl.h, can't be loaded.\n\
             On Debian: apt install libclang-dev\nCause: {cause}"
        )
    })?;

    let cflags = pkg_config("--cflags")?;
    let bindings = bindgen::Builder::default()
        .header_contents("xen-sys.h", "#include <xenctrl.h>\n")
        .clang_args(cflags.split_whitespace())
        .allowlist_function(FUNCTIONS)
        .allowlist_type(TYPES)
        .allowlist_var(CONSTANTS)
        .dynamic_library_name("Libxenctrl")
        .dynamic_link_require_all(true)
        .derive_default(true)
        .generate_comments(false)
        .formatter(bindgen::Formatter::None)
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()))
        .generate()
        .map_err(|cause| {
            format!(
                "bindgen can't read xenctrl.h.\n\
                 On Debian: apt install libxen-dev libclang-dev\nCause: {cause}"
            )
        })?;

    let out = std::env::var_os("OUT_DIR").ok_or("cargo did not set OUT_DIR")?;
    let file = PathBuf::from(out).join("bindings.rs");
    bindings.write_to_file(&file).map_err(|cause| format!("can't write {}: {cause}", file.display()))
}

fn pkg_config(question: &str) -> Result<String, String> {
    let answer = Command::new("pkg-config").args([question, "xencontrol"]).output().map_err(|cause| {
        format!(
            "pkg-config can't be run ({cause}).\n\
                 On Debian: apt install pkg-config libxen-dev libclang-dev"
        )
    })?;
    if !answer.status.success() {
        return Err(format!(
            "the Xen headers (xenctrl.h, pkg-config name xencontrol) are not installed.\n\
             On Debian: apt install libxen-dev libclang-dev\npkg-config says: {}",
            String::from_utf8_lossy(&answer.stderr).trim()
        ));
    }
    Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
}
