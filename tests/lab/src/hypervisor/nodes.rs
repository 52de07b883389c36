//! The xenstore nodes of a domain, as xl and libxl write and remove them.

use anyhow::Result;
use uuid::Uuid;

use crate::host::BRIDGE;
use crate::xenstored::Xenstored;

use super::request::Record;

/// XenbusState of a device that its frontend has not taken up yet.
const INITIALISING: &str = "1";
/// XenbusState of a device in use.
const CONNECTED: &str = "4";

fn backend(domid: u32) -> String {
    format!("/local/domain/0/backend/vif/{domid}/0")
}

/// What is there before the domain runs.
pub(super) fn create(xenstored: &Xenstored, domain: &Record, start_time: &str) -> Result<()> {
    let Record { domid, name, uuid, mac, vif, .. } = domain;
    let (home, vm, libxl) =
        (format!("/local/domain/{domid}"), format!("/vm/{uuid}"), format!("/libxl/{domid}"));
    let (frontend, backend) = (format!("{home}/device/vif/0"), backend(*domid));
    let domid = domid.to_string();
    let addresses: Vec<String> = domain.addresses.iter().map(ToString::to_string).collect();
    let addresses = addresses.join(" ");
    for (key, value) in [
        ("vm", vm.as_str()),
        ("name", name),
        ("domid", &domid),
        ("control/shutdown", ""),
        ("control/platform-feature-multiprocessor-suspend", "1"),
        ("cpu/0/availability", "online"),
        ("memory/static-max", "131072"),
        ("memory/target", "131072"),
        ("console/type", "xenconsoled"),
    ] {
        xenstored.write(&format!("{home}/{key}"), value)?;
    }
    let name_and_uuid = [("name", name.as_str()), ("uuid", &uuid.to_string())];
    for (key, value) in name_and_uuid.into_iter().chain([("start_time", start_time)]) {
        xenstored.write(&format!("{vm}/{key}"), value)?;
    }
    xenstored.write(&format!("{libxl}/type"), "pv")?;
    // libxl keeps a copy of what it wrote for the backend, which no guest can touch.
    for tree in [&backend, &format!("{libxl}/device/vif/0")] {
        for (key, value) in [
            ("frontend", frontend.as_str()),
            ("backend", &backend),
            ("frontend-id", &domid),
            ("online", "1"),
            ("state", INITIALISING),
            ("script", "/etc/xen/scripts/vif-bridge"),
            ("mac", mac),
            ("ip", &addresses),
            ("bridge", BRIDGE),
            ("handle", "0"),
            ("type", "vif"),
            ("vifname", vif),
        ] {
            if key != "backend" || tree != &backend {
                xenstored.write(&format!("{tree}/{key}"), value)?;
            }
        }
    }
    for (key, value) in [
        ("backend", backend.as_str()),
        ("backend-id", "0"),
        ("state", INITIALISING),
        ("handle", "0"),
        ("mac", mac),
    ] {
        xenstored.write(&format!("{frontend}/{key}"), value)?;
    }
    Ok(())
}

/// The hotplug script has put the vif on the bridge, and both ends are connected.
pub(super) fn connect(xenstored: &Xenstored, domain: &Record) -> Result<()> {
    let (domid, backend) = (domain.domid, backend(domain.domid));
    xenstored.write(&format!("{backend}/hotplug-status"), "connected")?;
    xenstored.write(&format!("/local/domain/{domid}/device/vif/0/state"), CONNECTED)?;
    xenstored.write(&format!("{backend}/state"), CONNECTED)
}

/// `xl rename`.
pub(super) fn rename(xenstored: &Xenstored, domid: u32, uuid: Uuid, name: &str) -> Result<()> {
    xenstored.write(&format!("/local/domain/{domid}/name"), name)?;
    xenstored.write(&format!("/vm/{uuid}/name"), name)
}

/// Removes the vif's backend.
pub(super) fn remove_backend(xenstored: &Xenstored, domid: u32) -> Result<()> {
    xenstored.remove(&format!("/local/domain/0/backend/vif/{domid}"))
}

/// Removes the rest.
pub(super) fn remove(xenstored: &Xenstored, domid: u32, uuid: Uuid) -> Result<()> {
    xenstored.remove(&format!("/local/domain/{domid}"))?;
    xenstored.remove(&format!("/vm/{uuid}"))?;
    xenstored.remove(&format!("/libxl/{domid}"))
}
