//! Makes a bare Debian 12 fit for the lab: packages, and the product's release build.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::geteuid;

use super::Service;

/// Packages that the lab, dom0d's build and the tests need whatever the services.
const PACKAGES: [&str; 17] = [
    "iproute2",
    "nftables",
    "ethtool",
    "util-linux",
    "procps",
    "tcpdump",
    "curl",
    "iputils-ping",
    "socat",
    "xenstore-utils",
    "build-essential",
    "clang",
    "libbpf-dev",
    "libclang-dev",
    "libpcap-dev",
    "libxen-dev",
    "pkg-config",
];

/// Debian's switch that keeps packages from starting their services.
const POLICY: &str = "/usr/sbin/policy-rc.d";
/// Where an administrator's own is kept meanwhile.
const POLICY_ASIDE: &str = "/usr/sbin/policy-rc.d.before-understudy-lab";
const OUR_POLICY: &str = "#!/bin/sh\n# Written by Understudy's lab while it installs packages.\nexit 101\n";

impl Service {
    /// Its Debian packages.
    fn packages(self) -> &'static [&'static str] {
        match self {
            Service::Redis => &["redis-server", "redis-tools"],
            Service::Http => &["nginx-light"],
            Service::Postgresql => &["postgresql", "postgresql-client"],
        }
    }

    /// The system services by which Debian would run it at the next boot.
    fn system_service(self) -> &'static str {
        match self {
            Service::Redis => "redis-server",
            Service::Http => "nginx",
            Service::Postgresql => "postgresql",
        }
    }
}

/// Installs the packages that are missing, without leaving their services running or enabled.
pub(crate) fn install(services: &[Service], progress: &dyn Fn(&str)) -> Result<()> {
    ensure!(
        geteuid().is_root(),
        "the lab needs root: it makes network namespaces, control groups and mounts; \
         run it as root, for instance `sudo -E env \"PATH=$PATH\" cargo lab ...`"
    );
    let own = services.iter().flat_map(|service| service.packages());
    let packages: Vec<&str> = PACKAGES.iter().chain(own).copied().collect();
    let system: Vec<&str> = services.iter().map(|service| service.system_service()).collect();
    install_packages(&packages, &system, progress)
}

/// Builds dom0d and the command line tool.
pub(crate) fn build(progress: &dyn Fn(&str)) -> Result<()> {
    progress("building dom0d and understudy (release)");
    let begun = Instant::now();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(&cargo)
        .args(["build", "--quiet", "--release", "-p", "dom0d", "-p", "understudy"])
        .current_dir(workspace())
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("starting {}", cargo.to_string_lossy()))?;
    ensure!(status.success(), "dom0d and understudy could not be built ({status}); see above");
    progress(&format!("built in {:.0} s", begun.elapsed().as_secs_f64()));
    Ok(())
}

/// A program of the release build.
pub(crate) fn built(name: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), |target| workspace().join(target));
    target.join("release").join(name)
}

/// The project's top directory.
pub(crate) fn workspace() -> PathBuf {
    // This crate is tests/lab of it.
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("/")).to_owned()
}

/// Installs those of these packages that are missing, without leaving the system services that they bring running
/// or enabled. A service's name begins its package's.
pub(crate) fn install_packages(packages: &[&str], services: &[&str], progress: &dyn Fn(&str)) -> Result<()> {
    let mut missing = Vec::new();
    for package in packages.iter().copied() {
        if !is_installed(package)? {
            missing.push(package);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    ensure!(
        Path::new("/usr/bin/apt-get").exists(),
        "missing: {}; the lab installs them itself on Debian only, install them by hand here",
        missing.join(" ")
    );
    progress(&format!("installing {}", missing.join(" ")));
    let begun = Instant::now();
    forbid_service_starts()?;
    let outcome = apt_get(&["update", "-qq"]).and_then(|()| {
        apt_get(&[&["install", "-qq", "-y", "--no-install-recommends"], missing.as_slice()].concat())
    });
    restore_policy()?;
    outcome?;
    for service in services.iter().filter(|service| missing.iter().any(|name| name.starts_with(**service))) {
        // They were not started; nor are they to be at the next boot.
        let mut disable = Command::new("update-rc.d");
        disable.args([service, "disable"]);
        let _ = disable.stdin(Stdio::null()).output();
    }
    progress(&format!("installed in {:.0} s", begun.elapsed().as_secs_f64()));
    Ok(())
}

fn is_installed(package: &str) -> Result<bool> {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f=${db:Status-Status}", package])
        .stdin(Stdio::null())
        .output()
        .context("starting dpkg-query: the lab knows how to set up Debian only")?;
    Ok(output.stdout == b"installed")
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let output = Command::new("apt-get")
        .args(["-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Options::=--force-confold"])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .context("starting apt-get")?;
    if !output.status.success() {
        bail!(
            "apt-get {} failed ({}):\n{}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

fn forbid_service_starts() -> Result<()> {
    // What a killed run left is not the administrator's.
    restore_policy()?;
    if Path::new(POLICY).exists() {
        fs::rename(POLICY, POLICY_ASIDE).with_context(|| format!("moving {POLICY} aside"))?;
    }
    fs::write(POLICY, OUR_POLICY)
        .and_then(|()| fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("writing {POLICY}"))
}

/// Lets packages start their services as before. Idempotent.
pub(crate) fn restore_policy() -> Result<()> {
    let ours = fs::read(POLICY).is_ok_and(|text| text == OUR_POLICY.as_bytes());
    if ours {
        fs::remove_file(POLICY).with_context(|| format!("removing {POLICY}"))?;
    }
    match fs::rename(POLICY_ASIDE, POLICY) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).context(format!("restoring {POLICY}"))
        }
        _ => Ok(()),
    }
}
