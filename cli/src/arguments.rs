//! The command line and its help.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::{Parser, Subcommand, ValueEnum};
use understudy_api::config::{DEFAULT_CONTROL_SOCKET, DEFAULT_PATH};
use understudy_api::{MAX_DRAIN_TIMEOUT_MS, time};

const EXAMPLES: &str = "\
Examples:
  understudy status                          who serves, who could take over, and if not, why
  understudy attach redis redis-2 --copy ./copy   hold clients, copy the OVM's state, let them in again
  understudy switchover redis --to redis-2   move the service, planned
  understudy events --follow --since 5m      what happened in the last five minutes, and what happens next
  understudy --json status | jq '.services[].epoch'

SERVICE may be left out where the configuration has only one. DOMAIN is a domain's name or UUID.
Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 dom0d can't be reached.";

/// Ask dom0d about the services that it keeps alive, and command it
#[derive(Debug, Parser)]
#[command(name = "understudy", version, after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Print JSON: one object, or for `events` one object per line; errors too, on stderr
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// dom0d's control socket
    #[arg(long, global = true, value_name = "PATH", env = "UNDERSTUDY_SOCKET", default_value = DEFAULT_CONTROL_SOCKET)]
    pub(crate) socket: PathBuf,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the daemon, its services, and each server: its role, and why it is not promotable
    Status,

    /// Show one line per service
    Services,

    /// Show a service's open conversations, and which servers cover them
    Conversations {
        /// The service
        service: Option<String>,
        /// Show at most N
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
        /// Skip the first N
        #[arg(long, value_name = "N", default_value_t = 0)]
        skip: u32,
    },

    /// Put a domain into a service's queue as a replica whose state equals the OVM's
    ///
    /// One of --copy, --drain and --assume-identical must be given: only a server whose state equals the
    /// OVM's can take over. --copy makes it equal; for the other two dom0d relies on your word.
    #[command(allow_missing_positional = true)]
    Attach {
        /// The service
        service: Option<String>,
        /// The domain's name or UUID
        #[arg(required = true)]
        domain: String,
        /// The domain's state equals the OVM's now; refused while conversations are open
        #[arg(long, conflicts_with = "drain")]
        assume_identical: bool,
        /// The domain has everything that clients wrote until now. Holds new conversations until the open
        /// ones have ended, then takes its state as equal. A copy that was made while clients wrote lacks
        /// what they wrote meanwhile
        #[arg(long)]
        drain: bool,
        /// Make the domain's state equal: hold new clients, let open conversations end, then run COMMAND
        /// with sh while no client reaches the OVM. COMMAND gets no terminal. Its environment has
        /// UNDERSTUDY_SERVICE; of the OVM UNDERSTUDY_FROM (its name), _FROM_UUID, _FROM_DOMID,
        /// _FROM_ADDRESSES and _FROM_ADDRESS (the first); of the domain UNDERSTUDY_TO and so on. If COMMAND
        /// fails or takes too long, or if understudy ends, clients are let in again and the domain is not
        /// seeded
        #[arg(long, conflicts_with_all = ["drain", "assume_identical"], value_name = "COMMAND")]
        copy: Option<String>,
        /// How long open conversations get to end, such as 30s (default) or 2m; at most 1h
        #[arg(long, conflicts_with = "assume_identical", value_name = "DURATION", value_parser = wait_limit)]
        timeout: Option<Duration>,
        /// How long the copy may take, while clients wait, such as 10m (default); at most 1h
        #[arg(long, requires = "copy", conflicts_with_all = ["drain", "assume_identical"], value_name = "DURATION", value_parser = wait_limit)]
        copy_limit: Option<Duration>,
    },

    /// Take an RVM out of a service's queue; it stays out until it is attached again
    #[command(allow_missing_positional = true)]
    Detach {
        /// The service
        service: Option<String>,
        /// The domain's name or UUID
        #[arg(required = true)]
        domain: String,
    },

    /// Move a service to a replica, planned: the OVM becomes an RVM, conversations continue
    Switchover {
        /// The service
        service: Option<String>,
        /// The next OVM; the best candidate if not given
        #[arg(long, value_name = "DOMAIN")]
        to: Option<String>,
    },

    /// Depose the OVM as if it were at fault, and fence it
    Failover {
        /// The service
        service: Option<String>,
        /// The next OVM; the best candidate if not given
        #[arg(long, value_name = "DOMAIN")]
        to: Option<String>,
        /// Promote a server that is not promotable, too: conversations that can't continue there are reset
        #[arg(long)]
        force: bool,
    },

    /// Pause a domain for maintenance: no failover follows within the service's limit
    #[command(allow_missing_positional = true)]
    Pause {
        /// The service
        service: Option<String>,
        /// The domain's name or UUID
        #[arg(required = true)]
        domain: String,
    },

    /// Let a paused domain run again and end its maintenance
    #[command(allow_missing_positional = true)]
    Resume {
        /// The service
        service: Option<String>,
        /// The domain's name or UUID
        #[arg(required = true)]
        domain: String,
    },

    /// Tell dom0d to look for domains at once: a domain or vif came or is about to leave
    ///
    /// For the hooks of toolstacks. It is only a hint: dom0d watches xenstore anyway. It waits one second at most.
    Notify {
        /// What happens
        event: What,
        /// The domain's number
        #[arg(long, value_name = "N")]
        domid: Option<u16>,
        /// The vif's backend interface in dom0; empty stands for none, as hooks may not know it
        #[arg(long, value_name = "NAME")]
        vif: Option<String>,
        /// The domain's name; empty stands for none
        #[arg(long, value_name = "NAME")]
        domain: Option<String>,
    },

    /// Show what happened
    Events {
        /// Continue with what happens next, until interrupted
        #[arg(long, short)]
        follow: bool,
        /// Begin at an age such as 5m (0s: only new events), or a time such as 2026-11-23T10:00:00Z
        #[arg(long, value_name = "WHEN", value_parser = since)]
        since: Option<String>,
    },

    /// Check a configuration file as dom0d would, without dom0d
    CheckConfig {
        /// The file
        #[arg(default_value = DEFAULT_PATH)]
        path: PathBuf,
    },
}

/// What [`Command::Notify`] tells.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum What {
    /// It came
    Online,
    /// It is about to leave
    Offline,
}

fn wait_limit(text: &str) -> Result<Duration, String> {
    let timeout = time::duration(text)?;
    let limit = Duration::from_millis(MAX_DRAIN_TIMEOUT_MS);
    if timeout > limit {
        let limit = limit.as_secs() / 3_600;
        return Err(format!("new clients wait that long; at most {limit}h"));
    }
    Ok(timeout)
}

fn since(text: &str) -> Result<String, String> {
    time::since(text, SystemTime::now()).map(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_holds_together() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_single_name_is_the_domain() {
        let one = Arguments::try_parse_from(["understudy", "detach", "redis-2"]);
        let two = Arguments::try_parse_from(["understudy", "detach", "redis", "redis-2"]);
        for (parsed, expected) in [(one, None), (two, Some("redis".to_owned()))] {
            match parsed.map(|arguments| arguments.command) {
                Ok(Command::Detach { service, domain }) => {
                    assert_eq!((service, domain.as_str()), (expected, "redis-2"));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn contradictions_are_refused() {
        for line in [
            "attach d --drain --assume-identical",
            "attach d --drain --copy true",
            "attach d --assume-identical --copy true",
            "attach d --drain --copy-limit 5s",
            "attach d --copy",
            "attach d --timeout 5s --assume-identical",
            "attach d --drain --timeout soon",
            "attach d --drain --timeout 2h",
            "attach --drain",
            "conversations --limit 0",
            "events --since yesterday",
            "failover --force=maybe",
            "notify",
            "notify add",
            "notify online --domid 65536",
            "",
        ] {
            let words = ["understudy"].into_iter().chain(line.split_whitespace());
            assert!(Arguments::try_parse_from(words).is_err(), "{line}");
        }
    }
}
