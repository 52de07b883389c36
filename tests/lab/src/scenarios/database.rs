//! PostgreSQL sessions that outlive their server: transactions left open by the fault go on, in one
//! session of our own client and in one of the real `psql`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Scenario;
use crate::client::postgres::Session;
use crate::host::{Fault, Service};
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

/// Transfers between accounts; the fault strikes between the two updates of one transaction.
fn transactions(lab: &str, fault: Fault) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Postgresql])?;
    let target = stage.psc(Service::Postgresql)?;
    let mut session = stage.client().run(move || Session::connect(target))?;
    session.query(ACCOUNTS)?;
    let mut struck = None;
    for n in 0..60 {
        let (from, to) = (n % 10 + 1, (n * 7 + 3) % 10 + 1);
        session.query("BEGIN")?;
        session.query(&format!("UPDATE account SET balance = balance - 1 WHERE id = {from}"))?;
        if n == 30 {
            struck = Some(stage.lab.fault(fault, "guest-1")?);
        }
        let rows = session
            .query(&format!("UPDATE account SET balance = balance + 1 WHERE id = {to} RETURNING id"))?;
        ensure!(rows == [[Some(to.to_string())]], "RETURNING gave {rows:?}");
        session.query("COMMIT")?;
        let rows = session
            .query(&format!("INSERT INTO account (owner, balance) VALUES ('new {n}', 0) RETURNING id"))?;
        ensure!(rows == [[Some((11 + n).to_string())]], "the row's number is {rows:?}, not {}", 11 + n);
    }
    let at = struck.context("no fault struck")?;
    let failover = Failover::observe(&stage, Service::Postgresql, fault, at)?;
    let sums = "SELECT count(*), sum(balance) FROM account";
    let through_psc = session.query(sums)?;
    let (place, address) = own_address(&stage.ovm(Service::Postgresql)?, Service::Postgresql)?;
    let direct = place.run(move || Session::connect(address)?.query(sums))?;
    let expected = [[Some("70".to_owned()), Some("1000".to_owned())]];
    ensure!(through_psc == expected, "through the PSC: {through_psc:?}");
    ensure!(direct == expected, "asked directly: {direct:?}");
    failover.expect_plausible()
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
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
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
