//! The tree of nodes, and transactions on it.
//!
//! A transaction works on an overlay and remembers the generation of every node that it looked at;
//! it commits only if none of them changed meanwhile, otherwise its client tries again (EAGAIN).

use std::collections::{BTreeMap, BTreeSet};

use super::wire::{ABSOLUTE_PATH_MAX, Errno, RELATIVE_PATH_MAX};

/// Most nodes that the store holds, whoever writes them.
const NODES_MAX: usize = 100_000;

/// Where paths of dom0's clients that are not absolute start.
const DOM0_HOME: &str = "/local/domain/0";

#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    value: Vec<u8>,
    /// `n0`, `r5`, ...: the owner first.
    permissions: Vec<String>,
    children: BTreeSet<String>,
    generation: u64,
}

/// A change that watches may fire for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) path: String,
    /// Only watches on this very path fire, not those on its ancestors: the descendants of a removed
    /// node, whose removal the ancestors learn from that node's own change.
    pub(super) exact: bool,
}

/// The nodes.
#[derive(Debug)]
pub(super) struct Store {
    nodes: BTreeMap<String, Node>,
    generation: u64,
}

/// What a transaction saw and wants to change.
#[derive(Debug, Default)]
pub(super) struct Transaction {
    seen: BTreeMap<String, Option<u64>>,
    changed: BTreeMap<String, Option<Node>>,
    changes: Vec<Change>,
}

/// The store as one request sees it: directly, or through a transaction.
pub(super) struct View<'a> {
    store: &'a mut Store,
    transaction: Option<&'a mut Transaction>,
    changes: Vec<Change>,
}

impl Store {
    /// A store with nothing but its root.
    pub(super) fn new() -> Store {
        let root = Node {
            value: Vec::new(),
            permissions: vec!["n0".to_owned()],
            children: BTreeSet::new(),
            generation: 0,
        };
        Store { nodes: BTreeMap::from([("/".to_owned(), root)]), generation: 0 }
    }

    /// Runs one request's work, directly or in a transaction; gives the changes that took effect.
    pub(super) fn view<T>(
        &mut self,
        transaction: Option<&mut Transaction>,
        work: impl FnOnce(&mut View<'_>) -> Result<T, Errno>,
    ) -> Result<(T, Vec<Change>), Errno> {
        let mut view = View { store: self, transaction, changes: Vec::new() };
        let answer = work(&mut view)?;
        let changes = view.changes;
        match view.transaction {
            Some(transaction) => {
                transaction.changes.extend(changes);
                Ok((answer, Vec::new()))
            }
            None => Ok((answer, changes)),
        }
    }

    /// Makes a transaction's changes, all or (EAGAIN) none.
    pub(super) fn commit(&mut self, transaction: Transaction) -> Result<Vec<Change>, Errno> {
        for (path, generation) in &transaction.seen {
            if self.nodes.get(path).map(|node| node.generation) != *generation {
                return Err(Errno::Again);
            }
        }
        if self.nodes.len() + transaction.changed.len() > NODES_MAX {
            return Err(Errno::NoSpc);
        }
        for (path, node) in transaction.changed {
            match node {
                Some(node) => self.put(path, node),
                None => drop(self.nodes.remove(&path)),
            }
        }
        Ok(transaction.changes)
    }

    fn put(&mut self, path: String, mut node: Node) {
        self.generation += 1;
        node.generation = self.generation;
        self.nodes.insert(path, node);
    }
}

impl View<'_> {
    fn node(&mut self, path: &str) -> Option<&Node> {
        match &mut self.transaction {
            Some(transaction) => {
                if !transaction.changed.contains_key(path) {
                    let generation = self.store.nodes.get(path).map(|node| node.generation);
                    transaction.seen.entry(path.to_owned()).or_insert(generation);
                    return self.store.nodes.get(path);
                }
                transaction.changed.get(path).and_then(Option::as_ref)
            }
            None => self.store.nodes.get(path),
        }
    }

    fn put(&mut self, path: &str, node: Node) -> Result<(), Errno> {
        let staged = self.transaction.as_ref().map_or(0, |transaction| transaction.changed.len());
        if self.store.nodes.len() + staged >= NODES_MAX && !self.store.nodes.contains_key(path) {
            return Err(Errno::NoSpc);
        }
        match &mut self.transaction {
            Some(transaction) => drop(transaction.changed.insert(path.to_owned(), Some(node))),
            None => self.store.put(path.to_owned(), node),
        }
        Ok(())
    }

    fn drop_node(&mut self, path: &str) {
        match &mut self.transaction {
            Some(transaction) => drop(transaction.changed.insert(path.to_owned(), None)),
            None => drop(self.store.nodes.remove(path)),
        }
    }

    fn changed(&mut self, path: &str, exact: bool) {
        self.changes.push(Change { path: path.to_owned(), exact });
    }

    pub(super) fn read(&mut self, path: &str) -> Result<Vec<u8>, Errno> {
        self.node(path).map(|node| node.value.clone()).ok_or(Errno::NoEnt)
    }

    /// The names of a node's children, each ended by NUL, and the node's generation.
    pub(super) fn directory(&mut self, path: &str) -> Result<(Vec<u8>, u64), Errno> {
        let node = self.node(path).ok_or(Errno::NoEnt)?;
        let mut names = Vec::new();
        for child in &node.children {
            names.extend_from_slice(child.as_bytes());
            names.push(0);
        }
        Ok((names, node.generation))
    }

    pub(super) fn permissions(&mut self, path: &str) -> Result<Vec<String>, Errno> {
        self.node(path).map(|node| node.permissions.clone()).ok_or(Errno::NoEnt)
    }

    pub(super) fn set_permissions(&mut self, path: &str, permissions: Vec<String>) -> Result<(), Errno> {
        let mut node = self.node(path).cloned().ok_or(Errno::NoEnt)?;
        node.permissions = permissions;
        self.put(path, node)?;
        self.changed(path, false);
        Ok(())
    }

    pub(super) fn write(&mut self, path: &str, value: &[u8]) -> Result<(), Errno> {
        let mut node = self.created(path)?;
        node.value = value.to_vec();
        self.put(path, node)?;
        self.changed(path, false);
        Ok(())
    }

    pub(super) fn mkdir(&mut self, path: &str) -> Result<(), Errno> {
        if self.node(path).is_none() {
            let node = self.created(path)?;
            self.put(path, node)?;
            self.changed(path, false);
        }
        Ok(())
    }

    /// The node, created with the ancestors that it lacks; they inherit permissions.
    fn created(&mut self, path: &str) -> Result<Node, Errno> {
        if let Some(node) = self.node(path) {
            return Ok(node.clone());
        }
        let (parent, name) = split(path).ok_or(Errno::Inval)?;
        let mut above = self.created(parent)?;
        let node = Node {
            value: Vec::new(),
            permissions: above.permissions.clone(),
            children: BTreeSet::new(),
            generation: 0,
        };
        self.put(path, node.clone())?;
        above.children.insert(name.to_owned());
        self.put(parent, above)?;
        Ok(node)
    }

    pub(super) fn remove(&mut self, path: &str) -> Result<(), Errno> {
        let (parent, name) = split(path).ok_or(Errno::Inval)?;
        if self.node(path).is_none() {
            // Not there any more is as good as removed, unless the caller is lost altogether.
            return self.node(parent).map(drop).ok_or(Errno::NoEnt);
        }
        let mut above = self.node(parent).cloned().ok_or(Errno::NoEnt)?;
        above.children.remove(name);
        self.put(parent, above)?;
        self.changed(path, false);
        let mut doomed = vec![path.to_owned()];
        while let Some(path) = doomed.pop() {
            if let Some(node) = self.node(&path) {
                let children: Vec<String> =
                    node.children.iter().map(|child| format!("{path}/{child}")).collect();
                for child in &children {
                    self.changed(child, true);
                }
                doomed.extend(children);
            }
            self.drop_node(&path);
        }
        Ok(())
    }
}

/// Parent and name of a path, none for the root.
fn split(path: &str) -> Option<(&str, &str)> {
    match path.rsplit_once('/')? {
        (_, "") => None,
        ("", name) => Some(("/", name)),
        (parent, name) => Some((parent, name)),
    }
}

/// The absolute form of a path that a client sent, or EINVAL.
pub(super) fn absolute(path: &str) -> Result<String, Errno> {
    let limit = if path.starts_with('/') { ABSOLUTE_PATH_MAX } else { RELATIVE_PATH_MAX };
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_@".contains(&byte);
    if path.is_empty()
        || path.starts_with('@')
        || path.len() > limit
        || !path.bytes().all(allowed)
        || path.contains("//")
        || (path.len() > 1 && path.ends_with('/'))
    {
        return Err(Errno::Inval);
    }
    if path.starts_with('/') { Ok(path.to_owned()) } else { Ok(format!("{DOM0_HOME}/{path}")) }
}

/// What a client that watches by a relative path is told: the same kind of path.
pub(super) fn relative(path: &str) -> &str {
    path.strip_prefix(DOM0_HOME).and_then(|rest| rest.strip_prefix('/')).unwrap_or(path)
}
