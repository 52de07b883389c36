//! Compiles the tc programs with clang, against a header made of [`layout`].

use std::env;
use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

#[path = "src/layout.rs"]
// Only its C header is made here; the rest is for the crate.
#[allow(dead_code, unreachable_pub)]
mod layout;

fn main() -> Result<(), Box<dyn Error>> {
    for input in ["programs", "src/layout.rs", "build.rs"] {
        println!("cargo::rerun-if-changed={input}");
    }
    println!("cargo::rerun-if-env-changed=CLANG");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("layout.h"), layout::c_header())?;
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    // <asm/types.h> is where Debian keeps it for the host's architecture.
    let multiarch = format!("/usr/include/{}-linux-gnu", env::var("CARGO_CFG_TARGET_ARCH")?);
    for object in ["understudy", "contain"] {
        let status = Command::new(&clang)
            .args(["-O2", "-g", "-Wall", "-Wextra", "-Werror", "-target", "bpf", "-mcpu=v3", "-c"])
            .args(["-I", &multiarch, "-I"])
            .arg(&out)
            .arg(format!("programs/{object}.bpf.c"))
            .arg("-o")
            .arg(out.join(format!("{object}.bpf.o")))
            .status()
            .map_err(|error| format!("can't run {clang} (Debian packages: clang libbpf-dev): {error}"))?;
        if !status.success() {
            return Err("clang refused the tc programs (Debian packages: clang libbpf-dev)".into());
        }
    }
    Ok(())
}
