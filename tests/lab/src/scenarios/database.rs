//! PostgreSQL sessions that outlive their server: transactions left open by the fault go on, in one
//! session of our own client and in one of the real `psql`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Scenario;
use crate::client::postgres::Session;
use crate::host::{Fault, FaultInstant, Service};
use crate::stage::failover::Failover;
use crate::stage::{Stage, own_address};

pub(super) fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for (fault, name) in [(Fault::Freeze, "freeze"), (Fault::Hang, "hang"), (Fault::Destroy, "destroy")] {
        all.push(Scenario::new(format!("database/transactions/{name}"), move |lab| transactions(lab, fault)));
    }
    all.push(Scenario::new("database/psql", psql));
    all
}

const ACCOUNTS: &str = "CREATE TABLE account (id serial PRIMARY KEY, owner text, balance int);
    INSERT INTO account (owner, balance) SELECT 'owner ' || i, 100 FROM generate_series(1, 10) AS i";

/// The fault strikes between the two updates of one transaction.
fn transactions(lab: &str, fault: Fault) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Postgresql])?;
    let target = stage.psc(Service::Postgresql)?;
    let mut session = stage.client().run(move || Session::connect(target))?;
    let at = transfers(&mut session, || stage.strike(Service::Postgresql, fault))?;
    let failover = Failover::observe(&stage, Service::Postgresql, fault, at)?;
    let (place, address) = own_address(&stage.ovm(Service::Postgresql)?, Service::Postgresql)?;
    expect_balanced(&mut session)?;
    place.run(move || expect_balanced(&mut Session::connect(address)?)).context("asked directly")?;
    failover.expect_plausible()
}

/// Sixty transfers, each a transaction; `strike` is called in the middle of one.
pub(crate) fn transfers(
    session: &mut Session,
    strike: impl FnOnce() -> Result<FaultInstant>,
) -> Result<FaultInstant> {
    session.query(ACCOUNTS)?;
    let (mut strike, mut struck) = (Some(strike), None);
    for n in 0..60 {
        let (from, to) = (n % 10 + 1, (n * 7 + 3) % 10 + 1);
        session.query("BEGIN")?;
        session.query(&format!("UPDATE account SET balance = balance - 1 WHERE id = {from}"))?;
        if n == 30
            && let Some(strike) = strike.take()
        {
            struck = Some(strike()?);
        }
        let rows = session
            .query(&format!("UPDATE account SET balance = balance + 1 WHERE id = {to} RETURNING id"))?;
        ensure!(rows == [[Some(to.to_string())]], "RETURNING gave {rows:?}");
        session.query("COMMIT")?;
        let rows = session
            .query(&format!("INSERT INTO account (owner, balance) VALUES ('new {n}', 0) RETURNING id"))?;
        ensure!(rows == [[Some((11 + n).to_string())]], "the row's number is {rows:?}, not {}", 11 + n);
    }
    struck.context("no fault struck")
}

/// After [`transfers`] every row is there, and no money came or went.
pub(crate) fn expect_balanced(session: &mut Session) -> Result<()> {
    let rows = session.query("SELECT count(*), sum(balance) FROM account")?;
    let expected = [[Some("70".to_owned()), Some("1000".to_owned())]];
    ensure!(rows == expected, "accounts and their sum are {rows:?}, not {expected:?}");
    Ok(())
}

/// The real `psql`, one session from before the fault to after it.
fn psql(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Postgresql])?;
    let mut psql = Psql::start(&stage)?;
    psql.tell("CREATE TABLE t (n int);")?;
    psql.expect("CREATE TABLE")?;
    for n in 0..20 {
        psql.tell(&format!("INSERT INTO t VALUES ({n});"))?;
        psql.expect("INSERT 0 1")?;
    }
    let at = stage.strike(Service::Postgresql, Fault::Freeze)?;
    for n in 20..40 {
        psql.tell(&format!("INSERT INTO t VALUES ({n});"))?;
        psql.expect("INSERT 0 1")?;
    }
    psql.tell("SELECT count(*) || ' rows, sum ' || sum(n) FROM t;")?;
    psql.expect("40 rows, sum 780")?;
    psql.end()?;
    Failover::observe(&stage, Service::Postgresql, Fault::Freeze, at)?.expect_plausible()
}

struct Psql {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Psql {
    fn start(stage: &Stage) -> Result<Self> {
        let target = stage.psc(Service::Postgresql)?.ip().to_string();
        let client = stage.lab.client();
        let mut command = client.command("psql");
        command
            .args(["-h", &target, "-U", "postgres", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = client.spawn(&mut command)?;
        let input = child.stdin.take().context("no pipe to psql")?;
        let output = child.stdout.take().context("no pipe from psql")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, input, lines })
    }

    fn tell(&mut self, sql: &str) -> Result<()> {
        writeln!(self.input, "{sql}").with_context(|| format!("psql does not take \"{sql}\""))
    }

    fn expect(&mut self, wanted: &str) -> Result<()> {
        let line = self
            .lines
            .recv_timeout(Duration::from_secs(20))
            .with_context(|| format!("psql did not say \"{wanted}\""))?;
        ensure!(line == wanted, "psql said \"{line}\", expected \"{wanted}\"");
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        drop(self.input);
        let status = self.child.wait()?;
        ensure!(status.success(), "psql ended with {status}");
        Ok(())
    }
}
