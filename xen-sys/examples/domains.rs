//! Lists the domains of this host: a first look whether libxenctrl answers here.

use std::process::ExitCode;

use xen_sys::Xenctrl;

fn main() -> ExitCode {
    match Xenctrl::open().and_then(|xen| xen.domains()) {
        Ok(domains) => {
            for domain in domains {
                println!("{domain:?}");
            }
            ExitCode::SUCCESS
        }
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}
