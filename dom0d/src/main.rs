//! dom0d: keeps TCP services of domUs alive; this file starts and stops the daemon.

mod clock;
mod command;
mod control;
mod datapath;
mod discovery;
mod event;
mod fencing;
mod hypervisor;
mod liveness;
mod memory;
mod orders;
mod plane;
mod report;
mod server;
mod service;
mod wake;

fn main() {}
