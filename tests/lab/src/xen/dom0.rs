//! The way into dom0: SSH over QEMU's user network, from this machine's loopback only, with keys made
//! for this lab. Also into the client (a network namespace of dom0) and, by their consoles, the domUs.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::machine::Machine;
use super::patience::Patience;
use super::product;
use crate::host::Plane;
use crate::supervise::Ending;

/// How long a domU has to answer to `exec`, in seconds.
const DOMU_ANSWER_LIMIT_S: u32 = 60;

/// By which timeout(1) says that the time was over.
const TIMED_OUT: i32 = 124;

/// Where dom0 keeps which process carries out an order.
const RUNNING: &str = "/run/lab/order";

/// A running dom0.
#[derive(Debug)]
pub(super) struct Dom0 {
    directory: PathBuf,
    port: u16,
}

impl Dom0 {
    pub(super) fn new(directory: &Path, port: u16) -> Self {
        Self { directory: directory.to_owned(), port }
    }

    /// A place on this machine for a file on its way.
    pub(super) fn scratch(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// That of the running lab of this name.
    pub(super) fn find(name: &str) -> Result<Self> {
        Ok(Machine::find(name)?.into_dom0())
    }

    /// Runs a shell script as root, gives its standard output. Anything but success is an error that
    /// quotes what the script said.
    pub(super) fn run(
        &self,
        patience: &Patience,
        what: &str,
        script: &str,
        limit: Duration,
    ) -> Result<String> {
        self.run_with(patience, what, script, &[], limit)
    }

    /// [`Dom0::run`] with standard input.
    pub(super) fn run_with(
        &self,
        patience: &Patience,
        what: &str,
        script: &str,
        input: &[u8],
        limit: Duration,
    ) -> Result<String> {
        let mut ssh = self.ssh();
        ssh.arg(script);
        let output = patience.run(what, &mut ssh, input, limit)?;
        let (said, complained) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            bail!("{what}: failed in dom0 ({})\n{said}{complained}", output.status);
        }
        Ok(said.into_owned())
    }

    /// Opens the connection that everything then goes through, as a login costs two seconds in
    /// emulation: whether dom0 lets us in. It ends with the machine.
    pub(super) fn connect(&self, patience: &Patience) -> bool {
        let mut ssh = self.ssh();
        ssh.args(["-o", "ControlMaster=yes", "-o", "ControlPersist=yes", "true"]);
        ssh.stdout(Stdio::null()).stderr(Stdio::null());
        patience.follow("connecting to dom0", &mut ssh, Duration::from_secs(20)).is_ok_and(|s| s.success())
    }

    /// Has this program carry out an [`Order`](super::inside::Order), its output shown as it comes or
    /// written to a file. It is ended in dom0 when its time is over.
    pub(super) fn order(
        &self,
        patience: &Patience,
        words: &[&str],
        output: Option<&Path>,
        limit: Duration,
    ) -> Result<Ending> {
        let mut ssh = self.ssh();
        let order = words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
        let plane = Plane::chosen().map_or(String::new(), |plane| format!("--plane {}", plane.name()));
        // One at a time: one whose caller was interrupted goes on there.
        ssh.arg(format!(
            "kill $(cat {RUNNING} 2>/dev/null) 2>/dev/null; echo $$ >{RUNNING}; \
             exec timeout --kill-after=5 {} {} {plane} xen inside {order}",
            limit.as_secs(),
            product::LAB
        ));
        if let Some(path) = output {
            let file = File::create(path).with_context(|| format!("writing {}", path.display()))?;
            ssh.stdout(file.try_clone()?).stderr(file);
        }
        let ended = patience.follow(words[0], &mut ssh, limit + Duration::from_secs(30));
        Ok(match ended {
            Ok(status) if status.success() => Ending::Passed,
            Ok(status) if status.code() != Some(TIMED_OUT) => Ending::Failed,
            _ if patience.is_over() => Ending::Interrupted,
            _ => Ending::TimedOut,
        })
    }

    /// Runs a program with this process' terminal; gives its exit code.
    pub(super) fn exec(&self, host: &str, words: &[String]) -> Result<ExitCode> {
        let quoted = words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
        let script = match host {
            "dom0" => quoted,
            "client" => format!("ip netns exec client {quoted}"),
            domain => {
                format!("domu-exec {} {DOMU_ANSWER_LIMIT_S} {}", self::quoted(domain), self::quoted(&quoted))
            }
        };
        finish(self.ssh().arg(script))
    }

    /// An interactive shell.
    pub(super) fn shell(&self, host: &str) -> Result<ExitCode> {
        let mut ssh = self.ssh();
        ssh.arg("-t");
        finish(match host {
            "dom0" => &mut ssh,
            "client" => ssh.arg("ip netns exec client bash"),
            // A console takes orders, not keystrokes: each line is one.
            domain => ssh.arg(format!(
                "while read -r -e -p {0}'# ' line; do domu-exec {0} {DOMU_ANSWER_LIMIT_S} \"$line\"; done",
                quoted(domain)
            )),
        })
    }

    fn ssh(&self) -> Command {
        let file = |name: &str| self.directory.join(name).display().to_string();
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-p", &self.port.to_string(), "-i", &file("key")]);
        for option in [
            format!("UserKnownHostsFile={}", file("known_hosts")),
            "StrictHostKeyChecking=yes".to_owned(),
            "IdentitiesOnly=yes".to_owned(),
            "BatchMode=yes".to_owned(),
            format!("ControlPath={}", file("connection")),
            "LogLevel=ERROR".to_owned(),
            "ConnectTimeout=10".to_owned(),
            // A dom0 that died does not close its connections.
            "ServerAliveInterval=15".to_owned(),
            "ServerAliveCountMax=4".to_owned(),
        ] {
            ssh.args(["-o", &option]);
        }
        ssh.arg("root@127.0.0.1");
        ssh
    }
}

/// A word that a shell reads as just this.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn finish(command: &mut Command) -> Result<ExitCode> {
    let status = command.status().context("cannot start ssh")?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(255)).unwrap_or(255)))
}
