//! Whether a server holds every write that a client was told is done.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::{Context, Result, bail};

use super::load::{Ledger, Outcome};
use super::script::{Model, command};
use super::session::{Answer, Session};
use crate::client::place::Place;

/// Slots asked for; at least as many as the script uses.
const SLOTS: u64 = 8;

/// What a comparison of a server with a load's ledgers found.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    /// Acknowledged writes whose effect is missing on the server.
    pub(crate) lost_writes: u64,
    /// Connections whose keys hold something that no order of its requests gives.
    pub(crate) wrong: Vec<String>,
}

/// Compares the server at `address`, asked directly from within `place`, with what was acknowledged.
pub(crate) fn verify(place: &Place, address: SocketAddr, outcome: &Outcome) -> Result<Verdict> {
    let ledgers = outcome.ledgers.clone();
    place.run(move || {
        let mut session = Session::connect(address)?;
        let mut verdict = Verdict::default();
        for ledger in &ledgers {
            let held = read(&mut session, &ledger.prefix)
                .with_context(|| format!("cannot read {}'s keys from {address}", ledger.prefix))?;
            judge(ledger, &held, &mut verdict);
        }
        Ok(verdict)
    })
}

fn judge(ledger: &Ledger, held: &Model, verdict: &mut Verdict) {
    let mut possible = ledger.acknowledged.clone();
    if possible == *held {
        return;
    }
    for op in &ledger.open {
        possible.apply(op, &mut Vec::new());
        if possible == *held {
            return;
        }
    }
    let lost = lost_writes(&ledger.acknowledged, held);
    verdict.lost_writes += lost;
    verdict.wrong.push(format!(
        "{} ({}): {} requests open, at least {lost} acknowledged writes missing; counter {} for {}, \
         list {} for {}, log {} bytes for {}",
        ledger.prefix,
        ledger.local,
        ledger.open.len(),
        held.counter,
        ledger.acknowledged.counter,
        held.list.len(),
        ledger.acknowledged.list.len(),
        held.log.len(),
        ledger.acknowledged.log.len(),
    ));
}

/// Effects of acknowledged writes that are missing, counted one by one where the type allows it.
fn lost_writes(acknowledged: &Model, held: &Model) -> u64 {
    let values = differences(&acknowledged.values, &held.values);
    let records = differences(&acknowledged.records, &held.records);
    let counter = acknowledged.counter.saturating_sub(held.counter).max(0) as u64;
    let list =
        acknowledged.list.iter().enumerate().filter(|(n, item)| held.list.get(*n) != Some(item)).count()
            as u64;
    let log = acknowledged.log.split_inclusive('>').filter(|token| !held.log.contains(token)).count() as u64;
    values + records + counter + list + log
}

fn differences<V: PartialEq>(wanted: &BTreeMap<u64, V>, held: &BTreeMap<u64, V>) -> u64 {
    let missing = wanted.iter().filter(|(slot, value)| held.get(slot) != Some(value)).count();
    let undeleted = held.keys().filter(|slot| !wanted.contains_key(slot)).count();
    (missing + undeleted) as u64
}

fn read(session: &mut Session, prefix: &str) -> Result<Model> {
    let key = |name: &str| format!("{prefix}:{name}");
    let mut out = Vec::new();
    for slot in 0..SLOTS {
        command(&mut out, &["GET", &key(&format!("v{slot}"))]);
        command(&mut out, &["HGETALL", &key(&format!("r{slot}"))]);
    }
    command(&mut out, &["GET", &key("n")]);
    command(&mut out, &["GET", &key("log")]);
    command(&mut out, &["LRANGE", &key("list"), "0", "-1"]);
    session.send_bytes(&out)?;

    let mut model = Model::default();
    for slot in 0..SLOTS {
        if let Some(value) = text(session.answer()?)? {
            model.values.insert(slot, value);
        }
        let fields = list(session.answer()?)?;
        let mut record = BTreeMap::new();
        for pair in fields.chunks(2) {
            if let [field, value] = pair {
                let number = field.trim_start_matches('f').parse()?;
                record.insert(number, value.clone());
            }
        }
        if !record.is_empty() {
            model.records.insert(slot, record);
        }
    }
    model.counter = text(session.answer()?)?.map_or(Ok(0), |n| n.parse())?;
    model.log = text(session.answer()?)?.unwrap_or_default();
    model.list = list(session.answer()?)?;
    Ok(model)
}

fn text(answer: Answer) -> Result<Option<String>> {
    match answer {
        Answer::Bulk(None) => Ok(None),
        Answer::Bulk(Some(bytes)) => Ok(Some(String::from_utf8(bytes)?)),
        other => bail!("unexpected answer {other:?}"),
    }
}

fn list(answer: Answer) -> Result<Vec<String>> {
    match answer {
        Answer::Array(Some(items)) => {
            items.into_iter().map(|item| Ok(text(item)?.unwrap_or_default())).collect()
        }
        other => bail!("unexpected answer {other:?}"),
    }
}
