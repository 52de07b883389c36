//! The real services that run in each domU: how they are configured, started and asked.

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{Host, Lab};
use crate::client::random::Random;

/// Whom nginx asks for what is below `/proxied/`: a port of the client's.
pub(crate) const PROXIED: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1)), 8_000);

/// A service of the lab's domUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Service {
    /// redis-server, no persistence, DEBUG allowed.
    Redis,
    /// nginx: `GET /large.bin`, `PUT /upload/NAME`.
    Http,
    /// PostgreSQL, trust authentication, role and database `postgres`.
    Postgresql,
}

impl Service {
    /// Every service.
    pub(crate) const ALL: [Service; 3] = [Service::Redis, Service::Http, Service::Postgresql];

    /// Its name in dom0d's configuration and on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Service::Redis => "redis",
            Service::Http => "http",
            Service::Postgresql => "postgresql",
        }
    }

    /// Its TCP port.
    pub(crate) fn port(self) -> u16 {
        match self {
            Service::Redis => 6379,
            Service::Http => 80,
            Service::Postgresql => 5432,
        }
    }

    /// Its PSC is 10.77.0.100 + this, fd77::100 + this.
    pub(crate) fn psc_offset(self) -> u8 {
        match self {
            Service::Redis => 0,
            Service::Http => 1,
            Service::Postgresql => 2,
        }
    }

    /// Makes what all domains share: the large file, and PostgreSQL's initial cluster.
    pub(crate) fn share(self, directory: &Path, large_file_bytes: u64) -> Result<()> {
        match self {
            Service::Redis => Ok(()),
            Service::Http => {
                let www = directory.join("share/www");
                make_directory(&www)?;
                let index = www.join("index.html");
                fs::write(&index, "Understudy's lab\n")
                    .with_context(|| format!("writing {}", index.display()))?;
                write_large_file(&www.join("large.bin"), large_file_bytes)
            }
            Service::Postgresql => {
                let share = directory.join("share/postgresql");
                make_directory(&share)?;
                finish(Command::new("chown").arg("postgres:").arg(&share))?;
                let template = share.join("template");
                let mut initdb = as_postgres(&postgresql_binary("initdb")?);
                initdb.args(["--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"]);
                finish(initdb.arg("-D").arg(&template))?;
                let hba = template.join("pg_hba.conf");
                let trust = "local all all trust\nlocal replication all trust\nhost all all all trust\n\
                             host replication all all trust\n";
                fs::write(&hba, trust).with_context(|| format!("writing {}", hba.display()))
            }
        }
    }

    /// Makes the data directory ready, with the initial state if it is new; gives the command line
    /// that runs the service in the foreground.
    pub(crate) fn prepare(self, directory: &Path, data: &Path) -> Result<Vec<String>> {
        let new = !data.exists();
        make_directory(data)?;
        let path = data.display();
        let line = match self {
            Service::Redis => format!(
                "redis-server --port 6379 --bind * -::* --protected-mode no --save  \
                 --appendonly no --enable-debug-command yes --maxclients 60000 \
                 --tcp-backlog 4096 --daemonize no --dir {path}"
            ),
            Service::Http => {
                make_directory(&data.join("upload"))?;
                make_directory(&data.join("temporary"))?;
                let conf = data.join("nginx.conf");
                fs::write(&conf, nginx_conf(directory, data))
                    .with_context(|| format!("writing {}", conf.display()))?;
                format!("nginx -p {path} -c {} -e stderr", conf.display())
            }
            Service::Postgresql => {
                let cluster = data.join("cluster");
                if new {
                    let template = directory.join("share/postgresql/template");
                    finish(Command::new("cp").arg("-a").arg(template).arg(&cluster))?;
                    finish(Command::new("chown").arg("postgres:").arg(data))?;
                }
                // Killed along with its machine, it must not leave shared memory on this one.
                format!(
                    "setpriv --reuid=postgres --regid=postgres --clear-groups {} -D {} \
                     -c listen_addresses=* -c unix_socket_directories={path} -c fsync=off \
                     -c max_connections=300 -c shared_buffers=32MB \
                     -c dynamic_shared_memory_type=mmap",
                    postgresql_binary("postgres")?.display(),
                    cluster.display()
                )
            }
        };
        // At every blank: two of them are the empty word after redis' --save.
        Ok(line.split(' ').map(str::to_owned).collect())
    }

    /// Whether it answers on the host.
    pub(crate) fn answers(self, host: &Host) -> bool {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port()));
        let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(500)).is_ok();
        host.enter(connect).unwrap_or(false)
            // PostgreSQL accepts connections before it serves them.
            && (self != Service::Postgresql
                || host.run(&["pg_isready", "-q", "-h", "127.0.0.1"]).is_ok())
    }
}

/// Copies the state of every service of `from` to `to`; see [`Lab::copy_state`].
pub(crate) fn copy_state(lab: &Lab, from: &str, to: &str) -> Result<()> {
    let (from, to) = (lab.domain(from)?, lab.domain(to)?);
    for &service in &lab.config().services {
        match service {
            Service::Redis => {
                from.run(&["redis-cli", "SAVE"])?;
                fs::rename(from.data.join("redis/dump.rdb"), to.data.join("redis/dump.rdb"))
                    .context("handing over redis' dump")?;
                to.run(&["redis-cli", "DEBUG", "RELOAD", "NOSAVE"])?;
                // Left there, a restart would load it.
                fs::remove_file(to.data.join("redis/dump.rdb")).context("removing redis' dump")?;
            }
            Service::Http => {
                let target = to.data.join("http/upload");
                fs::remove_dir_all(&target).with_context(|| format!("removing {}", target.display()))?;
                finish(Command::new("cp").arg("-a").arg(from.data.join("http/upload")).arg(&target))?;
            }
            Service::Postgresql => {
                lab.stop_service(&to.name, service)?;
                let cluster = to.data.join("postgresql/cluster");
                fs::remove_dir_all(&cluster).with_context(|| format!("removing {}", cluster.display()))?;
                let socket = from.data.join("postgresql");
                let backup = postgresql_binary("pg_basebackup")?;
                let mut backup = as_postgres(&backup);
                backup.args(["-X", "fetch", "-c", "fast", "--no-sync", "-U", "postgres", "-h"]);
                finish(backup.arg(socket).arg("-D").arg(&cluster))?;
                lab.start_service(&to.name, service)?;
            }
        }
    }
    Ok(())
}

fn nginx_conf(directory: &Path, data: &Path) -> String {
    let (shared, data) = (directory.join("share/www"), data.display());
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|name| format!("  {name}_temp_path {data}/temporary/{name};\n"))
        .collect();
    // Every timeout is long: a connection that ends by itself is none that a test can hold.
    format!(
        "daemon off;\nuser root;\nworker_processes 1;\nworker_rlimit_nofile 60000;\n\
         pid {data}/nginx.pid;\nerror_log stderr;\n\
         events {{ worker_connections 50000; }}\n\
         http {{\n  access_log off;\n{temporary}  sendfile on;\n  keepalive_timeout 1h;\n  \
         keepalive_requests 1000000;\n  client_header_timeout 1h;\n  client_body_timeout 1h;\n  \
         send_timeout 1h;\n  client_max_body_size 0;\n  default_type application/octet-stream;\n  \
         server {{\n    listen 80 backlog=4096;\n    listen [::]:80 backlog=4096;\n    \
         root {};\n    location /upload/ {{ root {data}; dav_methods PUT DELETE; \
         create_full_put_path on; }}\n    \
         location /proxied/ {{ proxy_pass http://{PROXIED}/; }}\n  }}\n}}\n",
        shared.display()
    )
}

/// A file of this length with contents that do not repeat, the same in every lab: what
/// [`Random::fill`] gives from seed 0.
fn write_large_file(path: &Path, bytes: u64) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::create(path)?;
        let mut random = Random::new(0);
        let mut buffer = vec![0; 1 << 20];
        let mut left = bytes;
        while left > 0 {
            let part = left.min(buffer.len() as u64);
            // At most a buffer's length.
            let part_len = usize::try_from(part).unwrap_or(buffer.len());
            random.fill(&mut buffer[..part_len]);
            file.write_all(&buffer[..part_len])?;
            left -= part;
        }
        Ok(())
    };
    write().with_context(|| format!("writing {} ({bytes} bytes)", path.display()))
}

/// A program of the newest PostgreSQL that is installed.
fn postgresql_binary(name: &str) -> Result<PathBuf> {
    let root = Path::new("/usr/lib/postgresql");
    let mut versions: Vec<u32> = fs::read_dir(root)
        .with_context(|| format!("PostgreSQL is not installed: no {}", root.display()))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    versions.sort_unstable();
    let newest = versions.last().context("PostgreSQL is not installed")?;
    Ok(root.join(newest.to_string()).join("bin").join(name))
}

fn as_postgres(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
    // It need not be allowed into the caller's directory.
    command.current_dir("/");
    command
}

fn make_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("making {}", path.display()))
}

/// Runs a command to its end, quietly if it succeeds.
fn finish(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
