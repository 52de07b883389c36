//! `understudy`: the command by which an operator in dom0 asks and commands dom0d.
//!
//! `arguments` defines the command line, `command` carries it out over `daemon`, the client of the control API.
//! `show`, `sentence` and `table` put answers and events into words.
//!
//! Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 dom0d can't be reached.

mod arguments;
mod check_config;
mod command;
mod copy;
mod daemon;
mod failed;
mod output;
mod sentence;
mod show;
mod table;

use std::process::ExitCode;

use clap::Parser;

use crate::arguments::Arguments;
use crate::output::Output;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let output = Output { json: arguments.json };
    match run(arguments, &output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => {
            output.error(&failed);
            failed.exit_code()
        }
    }
}

fn run(arguments: Arguments, output: &Output) -> Result<(), failed::Failed> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed::Failed::Output)?;
    runtime.block_on(command::carry_out(arguments, output))
}
