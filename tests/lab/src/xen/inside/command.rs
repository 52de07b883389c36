//! dom0's own commands, as an operator types them.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// How long a domU may take to answer an order over its console, in seconds.
const CONSOLE_LIMIT: &str = "30";

/// Runs a program to its end; what it printed. Anything but success is an error that quotes it.
pub(super) fn run(words: &[&str]) -> Result<String> {
    let (program, arguments) = words.split_first().context("no program")?;
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "`{}` failed ({}): {said}{}",
        words.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}

/// Runs a shell script.
pub(super) fn shell(script: &str) -> Result<String> {
    run(&["sh", "-ec", script])
}

/// Runs a shell command in a domU, over its console.
pub(super) fn in_domain(name: &str, script: &str) -> Result<String> {
    run(&["domu-exec", name, CONSOLE_LIMIT, script])
}
