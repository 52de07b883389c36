//! dom0d: keeps TCP services of domUs alive; this file starts and stops the daemon.

mod clock;
mod command;
mod control;
mod datapath;
mod event;
mod hypervisor;
mod liveness;
mod wake;

fn main() {}
