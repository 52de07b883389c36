//! The emulated host: QEMU without KVM, Xen, and Debian's dom0. Starts it, finds it again, ends it.

use std::fmt;
use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::dom0::Dom0;
use super::patience::Patience;
use crate::host::setup;
use crate::stage::logs::{KEEP_LOGS, keep};

/// How long the images may take: packages are downloaded and unpacked.
const IMAGES_LIMIT: Duration = Duration::from_secs(20 * 60);
/// From power-on to dom0's answer; 80 s were seen on two busy cores.
const BOOT_LIMIT: Duration = Duration::from_secs(10 * 60);
/// Memory of the machine, of which dom0 has 1 GiB.
const MEMORY_MIB: u32 = 3072;
/// The file that says how to find the machine again.
const STATE: &str = "machine.json";

/// What appears on the serial console, in this order, and what it means.
const STAGES: [(&str, &str); 3] = [
    ("(XEN) Xen version", "Xen runs"),
    ("(XEN) *** Serial input to DOM0", "dom0's kernel starts"),
    ("systemd[1]:", "dom0's systemd runs"),
];

/// A running machine. Dropping it ends it, unless [`Machine::leave_running`] was called or it came
/// from [`Machine::find`].
#[derive(Debug)]
pub(super) struct Machine {
    directory: PathBuf,
    state: State,
    dom0: Dom0,
    owned: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// QEMU's.
    pid: i32,
    /// Where dom0's SSH is, on the loopback.
    port: u16,
}

/// Builds the images if this recipe was not built before, gives their directory.
pub(super) fn images(patience: &Patience, progress: &dyn Fn(&str)) -> Result<PathBuf> {
    let build = setup::workspace().join("vm-images/build.sh");
    let ask = |argument: &[&str], limit| -> Result<PathBuf> {
        let output = patience.run("building the images", Command::new(&build).args(argument), &[], limit)?;
        ensure!(
            output.status.success(),
            "the images could not be built:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
    };
    let images = ask(&["--where"], Duration::from_secs(60))?;
    if images.join("complete").exists() {
        progress(&format!("images: {} (built before)", images.display()));
    } else {
        progress("building the images: two to four minutes, once");
        ask(&[], IMAGES_LIMIT)?;
        progress(&format!("images: {}", images.display()));
    }
    Ok(images)
}

impl Machine {
    /// Boots, and waits until dom0 answers.
    pub(super) fn boot(
        name: &str,
        images: &Path,
        patience: &Patience,
        progress: &dyn Fn(&str),
    ) -> Result<Machine> {
        Machine::remove(name)?;
        let directory = directory(name);
        let log = directory.join("log");
        fs::create_dir_all(&log).with_context(|| format!("making {}", log.display()))?;
        let port = free_port()?;
        make_keys(&directory, port, patience)?;
        let qemu_log = File::create(log.join("qemu.log")).context("making QEMU's log")?;
        let mut child = qemu(images, &directory, port)?
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(qemu_log.try_clone()?)
            .stderr(qemu_log)
            .spawn()
            .context("cannot start qemu-system-x86_64")?;
        let state = State { pid: i32::try_from(child.id())?, port };
        let dom0 = Dom0::new(&directory, port);
        let machine = Machine { directory, state, dom0, owned: true };
        fs::write(machine.directory.join(STATE), serde_json::to_vec(&machine.state)?)?;
        // A process has no command line yet in the first moments of its life.
        patience.until("starting QEMU", Duration::from_secs(10), || {
            let ended = child.try_wait()?;
            ensure!(ended.is_none(), "QEMU does not start; see {}", log.join("qemu.log").display());
            Ok(is_ours(&machine.directory, machine.state.pid).then_some(()))
        })?;
        progress(&format!("QEMU boots Xen, its console is in {}", machine.console().display()));
        machine.wait_for_dom0(patience, progress)?;
        Ok(machine)
    }

    fn wait_for_dom0(&self, patience: &Patience, progress: &dyn Fn(&str)) -> Result<()> {
        let mut seen = 0;
        patience.until("booting dom0", BOOT_LIMIT, || {
            let console = self.console_text();
            while let Some((mark, meaning)) = STAGES.get(seen)
                && console.contains(mark)
            {
                progress(meaning);
                seen += 1;
            }
            ensure!(
                !console.contains("Kernel panic") && is_ours(&self.directory, self.state.pid),
                "the machine died while booting; the end of its console:\n{}\n(all of it: {})",
                last_lines(&console, 15),
                self.console().display()
            );
            // Asked no earlier: the port answers from power-on, and then nobody speaks.
            Ok((seen == STAGES.len() && self.dom0.connect(patience)).then_some(()))
        })?;
        progress("dom0 answers");
        Ok(())
    }

    /// The running machine of this name, which goes on when this is dropped.
    pub(super) fn find(name: &str) -> Result<Machine> {
        let directory = directory(name);
        let Some(state) = saved(&directory)? else {
            bail!("no Xen lab \"{name}\" is up: `cargo lab xen up` starts one");
        };
        let dom0 = Dom0::new(&directory, state.port);
        Ok(Machine { directory, state, dom0, owned: false })
    }

    /// Ends the machine of this name and removes what it left. Idempotent.
    pub(super) fn remove(name: &str) -> Result<()> {
        let directory = directory(name);
        if let Some(state) = saved(&directory)? {
            end(&directory, state.pid)?;
        }
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", directory.display()))
            }
            _ => Ok(()),
        }
    }

    /// The way in.
    pub(super) fn dom0(&self) -> &Dom0 {
        &self.dom0
    }

    pub(super) fn into_dom0(mut self) -> Dom0 {
        self.owned = false;
        Dom0::new(&self.directory, self.state.port)
    }

    /// It goes on when this handle is dropped.
    pub(super) fn leave_running(mut self) {
        self.owned = false;
    }

    /// Whether it ends with this handle.
    pub(super) fn is_ours_to_end(&self) -> bool {
        self.owned
    }

    /// Where its logs are.
    pub(super) fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    fn console(&self) -> PathBuf {
        self.log().join("console.log")
    }

    fn console_text(&self) -> String {
        fs::read(self.console()).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        if let Err(error) = end(&self.directory, self.state.pid) {
            eprintln!("QEMU (pid {}) could not be ended: {error:#}", self.state.pid);
        }
        let log = self.log();
        match std::env::var_os(KEEP_LOGS).map(PathBuf::from) {
            Some(to) if keep(&log, &to).is_ok() => eprintln!("the machine's logs are in {}", to.display()),
            _ => eprintln!("the machine's logs are in {} until the next `up`", log.display()),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "QEMU is process {}, dom0's SSH on 127.0.0.1:{}, its console in {}",
            self.state.pid,
            self.state.port,
            self.console().display()
        )
    }
}

fn directory(name: &str) -> PathBuf {
    PathBuf::from("/run/understudy-lab").join(format!("{name}.xen"))
}

/// What is known of the machine there, if it runs.
fn saved(directory: &Path) -> Result<Option<State>> {
    let Ok(text) = fs::read(directory.join(STATE)) else { return Ok(None) };
    let state: State = serde_json::from_slice(&text)
        .with_context(|| format!("reading {}", directory.join(STATE).display()))?;
    Ok(is_ours(directory, state.pid).then_some(state))
}

/// Whether the process is this lab's QEMU, and no later one with its number.
fn is_ours(directory: &Path, pid: i32) -> bool {
    let console = directory.join("log/console.log").display().to_string();
    // A process that has ended and was not waited for has no command line.
    fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| String::from_utf8_lossy(&line).contains(&console))
}

fn end(directory: &Path, pid: i32) -> Result<()> {
    if !is_ours(directory, pid) {
        return Ok(());
    }
    // Nothing of it is kept: its disk is a snapshot.
    kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("killing QEMU (pid {pid})"))?;
    for _ in 0..100 {
        if !is_ours(directory, pid) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("QEMU (pid {pid}) does not end")
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("looking for a free port")?;
    Ok(listener.local_addr()?.port())
}

fn make_keys(directory: &Path, port: u16, patience: &Patience) -> Result<()> {
    for (name, comment) in [("key", "understudy-lab"), ("host_key", "dom0")] {
        let path = directory.join(name);
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", comment, "-f"]).arg(&path);
        let output = patience.run("making a key", &mut keygen, &[], Duration::from_secs(30))?;
        ensure!(output.status.success(), "ssh-keygen: {}", String::from_utf8_lossy(&output.stderr));
    }
    let host_key = fs::read_to_string(directory.join("host_key.pub"))?;
    fs::write(directory.join("known_hosts"), format!("[127.0.0.1]:{port} {host_key}"))?;
    Ok(())
}

/// The recipe that was seen to work; vm-images/README.md has the reasons.
fn qemu(images: &Path, directory: &Path, port: u16) -> Result<Command> {
    let file = |name: &str| images.join(name).display().to_string();
    let lab = |name: &str| directory.join(name).display().to_string();
    for path in [images, directory] {
        ensure!(!path.display().to_string().contains(','), "QEMU can't take a comma in {}", path.display());
    }
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-smp", "2"])
        // With SMAP, dom0 dies in its first iret; with XSAVE, vector registers get lost at times, and
        // with them whatever programs copy or decrypt; with Virtual GIF, PVH guests get lost, and the host at
        // times with them. vm-images/README.md has the evidence.
        .args(["-cpu", "max,-smap,-xsave,-vgif", "-m", &MEMORY_MIB.to_string()])
        .args(["-serial", &format!("file:{}", lab("log/console.log"))])
        .args(["-kernel", &file("xen")])
        .args(["-append", "console=com1 com1=115200,8n1 dom0_mem=1024M,max:1024M dom0_max_vcpus=1"])
        .args([
            "-initrd",
            &format!(
                "{} console=hvc0 net.ifnames=0 systemd.show_status=error loglevel=5 pci=nomsi,{}",
                file("vmlinuz"),
                file("dom0.initrd")
            ),
        ])
        .args(["-drive", &format!("file={},format=raw,if=none,id=root,snapshot=on", file("dom0.ext4"))])
        .args(["-device", "nvme,serial=root,drive=root"])
        // Restricted: dom0 reaches nothing outside, and only this machine's loopback reaches dom0.
        .args(["-netdev", &format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22")])
        .args(["-device", "e1000,netdev=net,romfile="])
        .args(["-fw_cfg", &format!("name=opt/org.understudy/authorized_keys,file={}", lab("key.pub"))])
        .args(["-fw_cfg", &format!("name=opt/org.understudy/host_key,file={}", lab("host_key"))]);
    Ok(qemu)
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
