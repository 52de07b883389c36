//! What an operator does after a fault: the domain runs again, and holds what the OVM holds.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::host::{Fault, Lab};

/// How long a destroyed domain may take to be gone.
const GONE: Duration = Duration::from_secs(10);

/// Makes the domain that `fault` struck run again, with all of its services. What they hold is as
/// old as the fault, or nothing.
pub(crate) fn repair(lab: &Lab, fault: Fault, domain: &str) -> Result<()> {
    match fault {
        Fault::Freeze | Fault::Spin | Fault::Hang => lab.thaw(domain),
        Fault::Kill => {
            // Its fence may have paused it.
            lab.thaw(domain)?;
            for service in lab.config().services.clone() {
                lab.restart_service(domain, service)?;
            }
            Ok(())
        }
        Fault::Crash | Fault::Destroy | Fault::Poweroff => {
            let deadline = Instant::now() + GONE;
            while lab.domain(domain).is_ok() {
                ensure!(Instant::now() < deadline, "{domain} is still there {GONE:?} after its {fault:?}");
                sleep(Duration::from_millis(5));
            }
            lab.create(domain).map(|_| ())
        }
        // It comes back by itself.
        Fault::Reboot => Ok(()),
    }
}
