//! Contains domains (rule 13): one program on the ingress of each vif, and a map that says which vifs are held and which
//! frames may pass.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::maps::{HashMap, MapData, MapError};
use aya::programs::SchedClassifier;
use aya::programs::tc::{SchedClassifierLinkId, TcAttachType, TcHandle};
use aya::{Ebpf, EbpfLoader, Pod, TestRun as _, TestRunOptions};

use crate::layout::Hold;
use crate::load::{CONTAIN_PRIORITY, LoadError, forget_gone, put_on};

// SAFETY: `repr(C)` of integers without implicit padding (the build asserts sizes against C).
unsafe impl Pod for Hold {}

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/contain.bpf.o"));

/// The number of the program on an interface. One program holds for all services.
pub const CONTAIN_NUMBER: u32 = 1;

/// linux/pkt_cls.h.
const TC_ACT_SHOT: u32 = 2;

type Map = Arc<Mutex<HashMap<MapData, u32, Hold>>>;

/// The program, and the interfaces that it is on.
pub struct Containment {
    ebpf: Ebpf,
    map: Map,
    attached: BTreeMap<String, SchedClassifierLinkId>,
}

/// Which vifs are held, by the number of their interface.
pub struct Holds {
    map: Map,
}

/// Loads the program. May take a moment: the kernel verifies it.
pub fn load_containment() -> Result<(Containment, Holds), LoadError> {
    let mut ebpf = EbpfLoader::new().load(OBJECT)?;
    program(&mut ebpf)?.load()?;
    let map = ebpf.take_map("holds").ok_or(LoadError::Missing("holds"))?;
    let map = Arc::new(Mutex::new(HashMap::try_from(map)?));
    Ok((Containment { ebpf, map: Arc::clone(&map), attached: BTreeMap::new() }, Holds { map }))
}

fn lock(map: &Map) -> MutexGuard<'_, HashMap<MapData, u32, Hold>> {
    map.lock().unwrap_or_else(PoisonError::into_inner)
}

fn program(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, LoadError> {
    Ok(ebpf.program_mut("contain").ok_or(LoadError::Missing("contain"))?.try_into()?)
}

impl Containment {
    /// Drops all frames of an interface for which no rules are known yet, until [`Holds::set`] sets them.
    pub fn hold(&mut self, interface: u32) -> Result<(), LoadError> {
        let mut map = lock(&self.map);
        match map.get(&interface, 0) {
            Ok(_) => Ok(()),
            Err(_) => Ok(map.insert(interface, Hold::default(), 0)?),
        }
    }

    /// Attaches the program to a vif, also if it is attached already.
    pub fn attach(&mut self, vif: &str) -> Result<(), LoadError> {
        self.detach(vif);
        let handle = TcHandle::from(CONTAIN_NUMBER);
        let link = put_on(program(&mut self.ebpf)?, vif, TcAttachType::Ingress, CONTAIN_PRIORITY, handle)?;
        self.attached.insert(vif.to_owned(), link);
        Ok(())
    }

    /// Detaches it from a vif, if the vif still exists.
    pub fn leave(&mut self, vif: &str) {
        self.detach(vif);
        forget_gone(vif);
    }

    fn detach(&mut self, vif: &str) {
        if let Some(link) = self.attached.remove(vif)
            && let Ok(program) = program(&mut self.ebpf)
        {
            // The programs of an interface go with it.
            let _ = program.detach(link);
        }
    }

    /// Whether a frame would be dropped, as if it came from the loopback interface: the kernel's own test-run.
    pub fn rehearse(&mut self, frame: &[u8]) -> Result<bool, LoadError> {
        let options = TestRunOptions { data_in: Some(frame), ..TestRunOptions::new() };
        let result = program(&mut self.ebpf)?.test_run(options)?;
        Ok(result.return_value == TC_ACT_SHOT)
    }

    /// The interfaces that it was attached to.
    pub fn vifs(&self) -> Vec<String> {
        self.attached.keys().cloned().collect()
    }
}

impl Holds {
    /// Holds these vifs and no others from now on. A vif that stays keeps its count.
    pub fn set(&mut self, holds: &BTreeMap<u32, Hold>) -> Result<(), MapError> {
        let mut map = lock(&self.map);
        for (interface, hold) in holds {
            let dropped = map.get(interface, 0).map_or(0, |held| held.dropped);
            map.insert(interface, Hold { dropped, ..*hold }, 0)?;
        }
        let held: Vec<u32> = map.keys().flatten().collect();
        for interface in held.iter().filter(|interface| !holds.contains_key(interface)) {
            map.remove(interface)?;
        }
        Ok(())
    }

    /// How many frames were dropped, for each held vif.
    pub fn dropped(&self) -> BTreeMap<u32, u64> {
        lock(&self.map).iter().flatten().map(|(interface, hold)| (interface, hold.dropped)).collect()
    }
}
