//! dom0d: keeps TCP services of domUs alive; this file starts and stops the daemon.

mod command;
mod control;
mod datapath;
mod event;
mod wake;

fn main() {}
