//! What each request does, and which watches it fires; no sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::server::Outbox;
use super::store::{Change, Store, Transaction, absolute, relative};
use super::wire::{Errno, Header, Kind, PAYLOAD_MAX, message};

/// Most watches of one connection.
const WATCHES_MAX: usize = 4096;
/// Longest token of a watch: event path and token must fit one message.
const TOKEN_MAX: usize = 512;
/// Most open transactions of one connection.
const TRANSACTIONS_MAX: usize = 16;

/// The store, who is connected, and who watches what.
#[derive(Debug)]
pub(super) struct Sessions {
    store: Store,
    introduced: BTreeSet<u32>,
    open: BTreeMap<u64, Session>,
}

#[derive(Debug)]
struct Session {
    outbox: Arc<Outbox>,
    watches: Vec<Watch>,
    transactions: BTreeMap<u32, Transaction>,
    next_transaction: u32,
}

#[derive(Debug)]
struct Watch {
    /// Absolute path, or `@introduceDomain`, `@releaseDomain`.
    path: String,
    relative: bool,
    token: Vec<u8>,
}

impl Watch {
    fn sees(&self, change: &Change) -> bool {
        if change.exact || self.path == change.path {
            return self.path == change.path;
        }
        self.path == "/" && change.path.starts_with('/')
            || change.path.strip_prefix(&self.path).is_some_and(|below| below.starts_with('/'))
    }

    fn event(&self, path: &str) -> Vec<u8> {
        let path = if self.relative { relative(path) } else { path };
        let mut payload = path.as_bytes().to_vec();
        payload.push(0);
        payload.extend_from_slice(&self.token);
        payload.push(0);
        message(Kind::WatchEvent, 0, 0, &payload)
    }
}

impl Sessions {
    pub(super) fn new() -> Sessions {
        Sessions { store: Store::new(), introduced: BTreeSet::new(), open: BTreeMap::new() }
    }

    pub(super) fn connect(&mut self, id: u64, outbox: Arc<Outbox>) {
        let session =
            Session { outbox, watches: Vec::new(), transactions: BTreeMap::new(), next_transaction: 1 };
        self.open.insert(id, session);
    }

    pub(super) fn disconnect(&mut self, id: u64) {
        self.open.remove(&id);
    }

    /// How many are connected.
    #[cfg(test)]
    pub(super) fn connected(&self) -> usize {
        self.open.len()
    }

    /// dom0's own write, as the toolstack does it.
    pub(super) fn write(&mut self, path: &str, value: &str) -> Result<(), Errno> {
        let path = absolute(path)?;
        let ((), changes) = self.store.view(None, |view| view.write(&path, value.as_bytes()))?;
        self.fire(&changes);
        Ok(())
    }

    /// dom0's own removal; nothing there is no error.
    pub(super) fn remove(&mut self, path: &str) -> Result<(), Errno> {
        let path = absolute(path)?;
        match self.store.view(None, |view| view.remove(&path)) {
            Ok(((), changes)) => self.fire(&changes),
            Err(Errno::NoEnt) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    pub(super) fn introduce(&mut self, domid: u32) {
        self.introduced.insert(domid);
        self.fire(&[special("@introduceDomain")]);
    }

    /// The domain shut down: those who watch for it look, it stays introduced until destroyed.
    pub(super) fn announce_shutdown(&mut self) {
        self.fire(&[special("@releaseDomain")]);
    }

    pub(super) fn release(&mut self, domid: u32) -> bool {
        let known = self.introduced.remove(&domid);
        if known {
            self.fire(&[special("@releaseDomain")]);
        }
        known
    }

    fn fire(&self, changes: &[Change]) {
        for session in self.open.values() {
            for change in changes {
                for watch in session.watches.iter().filter(|watch| watch.sees(change)) {
                    session.outbox.push(watch.event(&change.path));
                }
            }
        }
    }

    /// Handles one request of connection `id`: its answer, and events, go to the outboxes.
    pub(super) fn handle(&mut self, id: u64, header: Header, payload: &[u8]) {
        // Only requests of connections that still exist are handled.
        let Some(outbox) = self.open.get(&id).map(|session| Arc::clone(&session.outbox)) else {
            return;
        };
        let outcome = match Kind::from_number(header.kind) {
            None | Some(Kind::WatchEvent | Kind::Error) => Err(Errno::NoSys),
            Some(kind) => self.answer(id, kind, header.transaction, payload).map(|answer| (kind, answer)),
        };
        match outcome {
            Ok((kind, answer)) => {
                // The answer goes out before any event that it causes: clients rely on it.
                outbox.push(message(kind, header.request, header.transaction, &answer.payload));
                if let Some(event) = answer.first_event {
                    outbox.push(event);
                }
                self.fire(&answer.changes);
            }
            Err(error) => {
                let name = format!("{}\0", error.name());
                let error = message(Kind::Error, header.request, header.transaction, name.as_bytes());
                outbox.push(error);
            }
        }
    }

    fn answer(&mut self, id: u64, kind: Kind, transaction_id: u32, payload: &[u8]) -> Result<Answer, Errno> {
        let session = self.open.get_mut(&id).ok_or(Errno::NoEnt)?;
        let store = &mut self.store;
        // A node request that names a transaction must name one of its own connection.
        let transaction = match kind {
            Kind::TransactionEnd => None,
            _ if transaction_id == 0 => None,
            _ => Some(session.transactions.get_mut(&transaction_id).ok_or(Errno::NoEnt)?),
        };
        match kind {
            Kind::Read => {
                let path = only_path(payload)?;
                let (value, _) = store.view(transaction, |view| view.read(&path))?;
                Ok(Answer::payload(value))
            }
            Kind::Directory => {
                let path = only_path(payload)?;
                let ((names, _), _) = store.view(transaction, |view| view.directory(&path))?;
                if names.len() > PAYLOAD_MAX {
                    return Err(Errno::TooBig);
                }
                Ok(Answer::payload(names))
            }
            Kind::DirectoryPart => {
                let [path, offset] = strings(payload)?;
                let (path, offset) = (absolute(path)?, number(offset)?);
                let ((names, generation), _) = store.view(transaction, |view| view.directory(&path))?;
                Ok(Answer::payload(directory_part(&names, generation, offset)))
            }
            Kind::GetPerms => {
                let path = only_path(payload)?;
                let (permissions, _) = store.view(transaction, |view| view.permissions(&path))?;
                let mut list = permissions.join("\0").into_bytes();
                list.push(0);
                Ok(Answer::payload(list))
            }
            Kind::SetPerms => {
                let mut parts = nul_ended(payload)?;
                if parts.is_empty() {
                    return Err(Errno::Inval);
                }
                let path = absolute(parts.remove(0))?;
                if parts.is_empty() || !parts.iter().all(|part| is_permission(part)) {
                    return Err(Errno::Inval);
                }
                let permissions = parts.into_iter().map(str::to_owned).collect();
                let ((), changes) =
                    store.view(transaction, |view| view.set_permissions(&path, permissions))?;
                Ok(Answer::done(changes))
            }
            Kind::Write => {
                let end = payload.iter().position(|&byte| byte == 0).ok_or(Errno::Inval)?;
                let path = std::str::from_utf8(&payload[..end]).map_err(|_| Errno::Inval)?;
                let (path, value) = (absolute(path)?, &payload[end + 1..]);
                let ((), changes) = store.view(transaction, |view| view.write(&path, value))?;
                Ok(Answer::done(changes))
            }
            Kind::Mkdir => {
                let path = only_path(payload)?;
                let ((), changes) = store.view(transaction, |view| view.mkdir(&path))?;
                Ok(Answer::done(changes))
            }
            Kind::Rm => {
                let path = only_path(payload)?;
                let ((), changes) = store.view(transaction, |view| view.remove(&path))?;
                Ok(Answer::done(changes))
            }
            Kind::Watch => session.watch(payload),
            Kind::Unwatch => session.unwatch(payload),
            Kind::ResetWatches => {
                session.watches.clear();
                session.transactions.clear();
                Ok(Answer::done(Vec::new()))
            }
            Kind::TransactionStart => {
                if transaction_id != 0 {
                    return Err(Errno::Busy);
                }
                let id = session.start_transaction()?;
                Ok(Answer::payload(format!("{id}\0").into_bytes()))
            }
            Kind::TransactionEnd => {
                let [verdict] = strings(payload)?;
                let commit = truth(verdict)?;
                let transaction = session.transactions.remove(&transaction_id).ok_or(Errno::NoEnt)?;
                Ok(Answer::done(if commit { store.commit(transaction)? } else { Vec::new() }))
            }
            Kind::GetDomainPath => {
                let [domid] = strings(payload)?;
                let domid = number(domid)?;
                Ok(Answer::payload(format!("/local/domain/{domid}\0").into_bytes()))
            }
            Kind::IsDomainIntroduced => {
                let [domid] = strings(payload)?;
                let domid = number(domid)?;
                let known = domid == 0 || self.introduced.contains(&domid);
                Ok(Answer::payload(if known { b"T\0".to_vec() } else { b"F\0".to_vec() }))
            }
            Kind::Introduce => {
                let [domid, _frame, _port] = strings(payload)?;
                self.introduced.insert(number(domid)?);
                Ok(Answer::done(vec![special("@introduceDomain")]))
            }
            Kind::Release => {
                let [domid] = strings(payload)?;
                if !self.introduced.remove(&number(domid)?) {
                    return Err(Errno::NoEnt);
                }
                Ok(Answer::done(vec![special("@releaseDomain")]))
            }
            Kind::Resume => {
                let [domid] = strings(payload)?;
                if !self.introduced.contains(&number(domid)?) {
                    return Err(Errno::NoEnt);
                }
                Ok(Answer::done(Vec::new()))
            }
            Kind::SetTarget => {
                let [domid, target] = strings(payload)?;
                let (domid, target) = (number(domid)?, number(target)?);
                if !self.introduced.contains(&domid) || !self.introduced.contains(&target) {
                    return Err(Errno::NoEnt);
                }
                Ok(Answer::done(Vec::new()))
            }
            Kind::WatchEvent | Kind::Error => Err(Errno::NoSys),
        }
    }
}

impl Session {
    fn watch(&mut self, payload: &[u8]) -> Result<Answer, Errno> {
        let [path, token] = strings(payload)?;
        let watch = Watch {
            path: watchable(path)?,
            relative: !path.starts_with(['/', '@']),
            token: token.as_bytes().to_vec(),
        };
        if token.len() > TOKEN_MAX {
            return Err(Errno::Inval);
        }
        if self.watches.iter().any(|known| known.path == watch.path && known.token == watch.token) {
            return Err(Errno::Exist);
        }
        if self.watches.len() >= WATCHES_MAX {
            return Err(Errno::NoSpc);
        }
        let first_event = Some(watch.event(&watch.path));
        self.watches.push(watch);
        Ok(Answer { first_event, ..Answer::done(Vec::new()) })
    }

    fn unwatch(&mut self, payload: &[u8]) -> Result<Answer, Errno> {
        let [path, token] = strings(payload)?;
        let path = watchable(path)?;
        let known = |watch: &Watch| watch.path == path && watch.token == token.as_bytes();
        let at = self.watches.iter().position(known).ok_or(Errno::NoEnt)?;
        self.watches.remove(at);
        Ok(Answer::done(Vec::new()))
    }

    fn start_transaction(&mut self) -> Result<u32, Errno> {
        if self.transactions.len() >= TRANSACTIONS_MAX {
            return Err(Errno::NoSpc);
        }
        let id = self.next_transaction;
        self.next_transaction = self.next_transaction.checked_add(1).unwrap_or(1);
        self.transactions.insert(id, Transaction::default());
        Ok(id)
    }
}

/// What a request is answered, and what it changed.
struct Answer {
    payload: Vec<u8>,
    changes: Vec<Change>,
    /// The event by which a new watch fires at its registration.
    first_event: Option<Vec<u8>>,
}

impl Answer {
    fn payload(payload: Vec<u8>) -> Answer {
        Answer { payload, changes: Vec::new(), first_event: None }
    }

    fn done(changes: Vec<Change>) -> Answer {
        Answer { payload: b"OK\0".to_vec(), changes, first_event: None }
    }
}

fn special(name: &str) -> Change {
    Change { path: name.to_owned(), exact: true }
}

/// The strings of a payload; each must be ended by NUL.
fn nul_ended(payload: &[u8]) -> Result<Vec<&str>, Errno> {
    let body = payload.strip_suffix(&[0]).ok_or(Errno::Inval)?;
    body.split(|&byte| byte == 0).map(|part| std::str::from_utf8(part).map_err(|_| Errno::Inval)).collect()
}

/// Exactly (or, as C xenstored has it, at least) N strings.
fn strings<const N: usize>(payload: &[u8]) -> Result<[&str; N], Errno> {
    let mut parts = nul_ended(payload)?;
    if parts.len() < N {
        return Err(Errno::Inval);
    }
    parts.truncate(N);
    parts.try_into().map_err(|_| Errno::Inval)
}

fn only_path(payload: &[u8]) -> Result<String, Errno> {
    let [path] = strings(payload)?;
    absolute(path)
}

fn watchable(path: &str) -> Result<String, Errno> {
    match path {
        "@introduceDomain" | "@releaseDomain" => Ok(path.to_owned()),
        path => absolute(path),
    }
}

fn number(text: &str) -> Result<u32, Errno> {
    text.parse().map_err(|_| Errno::Inval)
}

fn truth(text: &str) -> Result<bool, Errno> {
    match text {
        "T" => Ok(true),
        "F" => Ok(false),
        _ => Err(Errno::Inval),
    }
}

fn is_permission(text: &str) -> bool {
    text.strip_prefix(['r', 'w', 'b', 'n']).is_some_and(|domid| domid.parse::<u32>().is_ok())
}

/// The generation, then whole names from a byte offset on as far as a message goes, then an empty
/// name if these were the last.
fn directory_part(names: &[u8], generation: u64, offset: u32) -> Vec<u8> {
    let mut part = format!("{generation}\0").into_bytes();
    let rest = names.get(offset as usize..).unwrap_or_default();
    let room = PAYLOAD_MAX - part.len() - 1;
    let mut taken = 0;
    for name in rest.split_inclusive(|&byte| byte == 0) {
        if taken + name.len() > room {
            break;
        }
        taken += name.len();
    }
    part.extend_from_slice(&rest[..taken]);
    if taken == rest.len() {
        part.push(0);
    }
    part
}
