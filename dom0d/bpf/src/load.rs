//! Loads the programs into the kernel and attaches them to interfaces. Whatever may wait (verification, netlink) is here.
//!
//! Maps are pinned: the next daemon loads its own programs with them. The programs of a killed daemon stay attached
//! until the next daemon's replace them, and no frame passes in between.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf};
use aya::programs::links::Link as _;
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttachOptions, TcHandle, qdisc_add_clsact,
};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfError, EbpfLoader, Pod, TestRun as _, TestRunOptions};

use crate::layout::{Bounds, Control, Conversation, Key, NO_SLOT, PORTS, SERVE, SLOTS};
use crate::shared::{RingPositions, SharedBounds, SharedControl};
use crate::tap::Tap;

// SAFETY: `repr(C)` of integers without implicit padding (the build asserts sizes against C).
unsafe impl Pod for Control {}
// SAFETY: as above.
unsafe impl Pod for Bounds {}
// SAFETY: as above.
unsafe impl Pod for Key {}
// SAFETY: as above.
unsafe impl Pod for Conversation {}

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/understudy.bpf.o"));

/// The programs' place among an interface's filters. It is fixed, so that a successor's programs replace them, and
/// leftovers are found.
pub const PRIORITY: u16 = 40_000;

/// The same for the containing program: behind the others, which take their service's frames first.
pub const CONTAIN_PRIORITY: u16 = 40_001;

/// Identifies this service's filter there: its domains may belong to other services, too.
fn handle(psc_mac: [u8; 6]) -> TcHandle {
    let [_, _, a, b, c, d] = psc_mac;
    match (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])) {
        // That asks for any.
        (0, 0) => TcHandle::new(0, 1),
        (major, minor) => TcHandle::new(major, minor),
    }
}

/// The number that distinguishes a service's programs on an interface from another service's.
pub fn number(psc_mac: [u8; 6]) -> u32 {
    handle(psc_mac).into()
}

/// Detaches the program of this priority and number from one side of an interface, whichever dom0d attached it. Succeeds if
/// there is none.
pub fn take_off(interface: &str, is_ingress: bool, priority: u16, number: u32) {
    let side = if is_ingress { TcAttachType::Ingress } else { TcAttachType::Egress };
    if let Ok(link) = SchedClassifierLink::attached(interface, side, priority, number.into(), None) {
        // It may have gone with its interface.
        let _ = link.detach();
    }
}

/// The rings of servers that are not the OVM, by slot.
const RVM_RINGS: [&str; SLOTS] = [
    "rvm_ring_0",
    "rvm_ring_1",
    "rvm_ring_2",
    "rvm_ring_3",
    "rvm_ring_4",
    "rvm_ring_5",
    "rvm_ring_6",
    "rvm_ring_7",
];

/// All maps that are pinned for the next daemon.
fn pinned() -> impl Iterator<Item = &'static str> {
    ["control", "bounds", "ring", "conversations", "counters"].into_iter().chain(RVM_RINGS)
}

/// Interfaces that this process attached programs to, and whether a dom0d, this or an earlier one, made their clsact qdisc.
static PREPARED: Mutex<BTreeMap<String, bool>> = Mutex::new(BTreeMap::new());

/// Interfaces whose clsact qdisc a dom0d made: it is removed when dom0d ends.
pub fn prepared_interfaces() -> Vec<String> {
    let prepared = PREPARED.lock().unwrap_or_else(PoisonError::into_inner);
    prepared.iter().filter(|(_, ours)| **ours).map(|(name, _)| name.clone()).collect()
}

/// What the programs must know of a service from the start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The PSC's addresses: at most one per family.
    pub psc: Vec<IpAddr>,
    /// The PSC's MAC.
    pub psc_mac: [u8; 6],
    /// The VLAN that its frames are tagged with; `None` if they have no tag.
    pub vlan: Option<u16>,
    /// Its ports.
    pub ports: Vec<u16>,
    /// Entries for conversations.
    pub conversations: u32,
    /// How long the daemon may be silent before `serve` applies.
    pub daemon_grace: Duration,
    /// Whether conversations continue, unrecorded, once the daemon has been silent for that long.
    pub serve: bool,
    /// The directory in a bpffs where the maps are pinned. If all maps are pinned there already, they are used as they are.
    /// `None`: the maps go with the programs.
    pub pins: Option<PathBuf>,
}

/// Why the programs can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel refused programs or maps.
    #[error("the kernel does not take the tc programs: {0}")]
    Refused(#[from] EbpfError),
    /// The kernel refused a program.
    #[error("the kernel does not take a tc program: {0}")]
    Program(#[from] ProgramError),
    /// A map is not usable.
    #[error("a map of the tc programs can't be used: {0}")]
    Map(#[from] MapError),
    /// Memory can't be shared with the programs.
    #[error("the memory of the tc programs can't be mapped: {0}")]
    Shared(#[from] nix::Error),
    /// Unusable pins are in the way.
    #[error("{path} can't be removed: {error}")]
    Pins {
        /// The directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A program can't be attached to an interface.
    #[error("a tc program can't be attached to {interface}: {error}")]
    Attach {
        /// Which.
        interface: String,
        /// Why.
        error: String,
    },
    /// The service has more ports than there is room for.
    #[error("the fast plane has room for {PORTS} ports, and the service has {0}; use plane = \"pcap\"")]
    TooManyPorts(usize),
    /// The object file lacks a part; the build is broken.
    #[error("the tc programs lack {0}; this is a bug in the build")]
    Missing(&'static str),
}

/// The programs of one service. Dropping them detaches them.
pub struct Programs {
    ebpf: Ebpf,
    handle: TcHandle,
    attached: Vec<(&'static str, String, SchedClassifierLinkId)>,
}

/// Whether a daemon left all its maps at `pins`.
pub fn is_pinned(pins: &Path) -> bool {
    pinned().all(|name| pins.join(name).exists())
}

/// Removes what a daemon left at `pins`. Succeeds if there is nothing.
pub fn unpin(pins: &Path) -> Result<(), LoadError> {
    match std::fs::remove_dir_all(pins) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(LoadError::Pins { path: pins.to_owned(), error })
        }
        _ => Ok(()),
    }
}

/// Loads the programs, with new or with pinned maps.
pub fn load(settings: &Settings) -> Result<(Programs, Tap), LoadError> {
    if settings.ports.len() > PORTS {
        return Err(LoadError::TooManyPorts(settings.ports.len()));
    }
    let conversations = settings.conversations.max(1);
    let mut loader = EbpfLoader::new();
    loader.map_max_entries("conversations", conversations).map_max_entries("bounds", conversations);
    let mut adopts = false;
    if let Some(pins) = &settings.pins {
        adopts = is_pinned(pins);
        if !adopts {
            unpin(pins)?;
            std::fs::create_dir_all(pins).map_err(|error| LoadError::Pins { path: pins.clone(), error })?;
        }
        for name in pinned() {
            loader.map_pin_path(name, pins.join(name));
        }
    }
    let mut ebpf = loader.load(OBJECT)?;
    for name in ["client", "server"] {
        classifier(&mut ebpf, name)?.load()?;
    }
    let mut take = |name: &'static str| ebpf.take_map(name).ok_or(LoadError::Missing(name));
    let mut map = take("control")?;
    let first = first_control(settings);
    if !adopts {
        Array::<_, Control>::try_from(&mut map)?.set(0, first, 0)?;
    }
    let control = match &map {
        Map::Array(map) => SharedControl::map(map.fd())?,
        _ => return Err(LoadError::Missing("control")),
    };
    // The configuration may have changed since another daemon left it.
    control.set_policy(first.grace_ns, first.policy);
    let map = take("bounds")?;
    let bounds = match &map {
        Map::Array(map) => SharedBounds::map(map.fd(), conversations)?,
        _ => return Err(LoadError::Missing("bounds")),
    };
    let mut rvm_rings = Vec::with_capacity(SLOTS);
    for name in RVM_RINGS {
        rvm_rings.push(RingBuf::try_from(take(name)?)?);
    }
    let ring: RingBuf<MapData> = RingBuf::try_from(take("ring")?)?;
    let positions = RingPositions::map(&ring)?;
    let tap = Tap::new(
        control,
        bounds,
        (ring, positions),
        rvm_rings,
        HashMap::try_from(take("conversations")?)?,
        PerCpuArray::try_from(take("counters")?)?,
    );
    Ok((Programs { ebpf, handle: handle(settings.psc_mac), attached: Vec::new() }, tap))
}

fn first_control(settings: &Settings) -> Control {
    let mut control = Control {
        active: NO_SLOT,
        grace_ns: i64::try_from(settings.daemon_grace.as_nanos()).unwrap_or(i64::MAX).cast_unsigned(),
        policy: if settings.serve { SERVE } else { 0 },
        vlan: settings.vlan.unwrap_or(0),
        psc_mac: settings.psc_mac,
        ..Control::default()
    };
    for address in &settings.psc {
        match address {
            IpAddr::V4(v4) => (control.has_v4, control.psc_v4) = (1, v4.octets()),
            IpAddr::V6(v6) => (control.has_v6, control.psc_v6) = (1, v6.octets()),
        }
    }
    control.ports[..settings.ports.len()].copy_from_slice(&settings.ports);
    control
}

/// Notes whether a dom0d made an interface's clsact qdisc.
fn note_prepared(interface: &str, ours: bool) {
    let mut prepared = PREPARED.lock().unwrap_or_else(PoisonError::into_inner);
    *prepared.entry(interface.to_owned()).or_default() |= ours;
}

/// Attaches a program to one side of an interface, in place of a killed dom0d's if there is one. Returns also whether
/// a dom0d made the clsact qdisc.
pub(crate) fn put_on(
    program: &mut SchedClassifier,
    interface: &str,
    side: TcAttachType,
    priority: u16,
    handle: TcHandle,
) -> Result<SchedClassifierLinkId, LoadError> {
    let failed = |error: String| LoadError::Attach { interface: interface.to_owned(), error };
    // If this fails for any other reason than that it exists, attaching fails and says why.
    let made = qdisc_add_clsact(interface).is_ok();
    let left = SchedClassifierLink::attached(interface, side, priority, handle, None);
    let replaced = left.ok().and_then(|left| program.attach_to_link(left).ok());
    note_prepared(interface, made || replaced.is_some());
    match replaced {
        Some(link) => Ok(link),
        None => {
            let options = NlOptions { priority, handle, classid: None };
            program
                .attach_with_options(interface, side, TcAttachOptions::Netlink(options))
                .map_err(|error| failed(error.to_string()))
        }
    }
}

/// Forgets an interface that does not exist any more.
pub(crate) fn forget_gone(interface: &str) {
    if !Path::new("/sys/class/net").join(interface).exists() {
        PREPARED.lock().unwrap_or_else(PoisonError::into_inner).remove(interface);
    }
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, LoadError> {
    Ok(ebpf.program_mut(name).ok_or(LoadError::Missing(name))?.try_into()?)
}

impl Programs {
    /// Attaches the client side to the anchor, the PSC's port of the bridge.
    pub fn attach_anchor(&mut self, interface: &str) -> Result<(), LoadError> {
        self.attach("client", interface, TcAttachType::Egress)
    }

    /// Attaches the server side to a vif.
    pub fn attach_vif(&mut self, interface: &str) -> Result<(), LoadError> {
        self.attach("server", interface, TcAttachType::Ingress)
    }

    /// The interfaces that the programs are attached to, and whether to the ingress.
    pub fn places(&self) -> Vec<(String, bool)> {
        let places = self.attached.iter();
        places.map(|(name, interface, _)| (interface.clone(), *name == "server")).collect()
    }

    /// Detaches the programs from an interface, if it still exists, and forgets it.
    pub fn leave(&mut self, interface: &str) {
        self.detach(interface);
        forget_gone(interface);
    }

    /// Detaches the programs from an interface, if it still exists.
    pub fn detach(&mut self, interface: &str) {
        let (gone, kept) =
            std::mem::take(&mut self.attached).into_iter().partition(|(_, on, _)| on == interface);
        self.attached = kept;
        for (name, _, link) in gone {
            if let Ok(program) = classifier(&mut self.ebpf, name) {
                // The programs of an interface go with it.
                let _ = program.detach(link);
            }
        }
    }

    /// Runs a program on a frame by the kernel's test-run, as if the frame came from a client or from the server whose vif
    /// is the loopback interface. Records and conversations change as they would for a real frame. Writes the resulting
    /// frame to `out`; returns the program's verdict, and the mean time of `repeat` runs.
    pub fn rehearse(
        &mut self,
        from_client: bool,
        frame: &[u8],
        out: &mut Vec<u8>,
        repeat: u32,
    ) -> Result<(i32, Duration), LoadError> {
        out.resize(frame.len(), 0);
        let program = classifier(&mut self.ebpf, if from_client { "client" } else { "server" })?;
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(out.as_mut_slice()),
            repeat,
            ..TestRunOptions::new()
        };
        let result = program.test_run(options)?;
        Ok((result.return_value.cast_signed(), result.duration))
    }

    fn attach(&mut self, name: &'static str, interface: &str, side: TcAttachType) -> Result<(), LoadError> {
        self.detach(interface);
        let handle = self.handle;
        let link = put_on(classifier(&mut self.ebpf, name)?, interface, side, PRIORITY, handle)?;
        self.attached.push((name, interface.to_owned(), link));
        Ok(())
    }
}
