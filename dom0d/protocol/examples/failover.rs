//! The engine between three TCP stacks: a client asks an echo service, and its OVM vanishes with a request unanswered. The
//! client's connection continues on the replica, which answers that request. All of it in virtual time, without any I/O.
//!
//! ```sh
//! cargo run -p understudy-protocol --example failover
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::error::Error;
use std::net::{IpAddr, Ipv4Addr};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as Moment;
use smoltcp::wire::{HardwareAddress, IpCidr};
use understudy_protocol::{
    Command, Destination, Evidence, Input, Instant, LinkAddress, Output, Passage, Seeding, ServerId,
    ServerSpec, Service, ServiceConfig,
};

const PORT: u16 = 7;
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const PSC: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);
const OVM: (ServerId, Ipv4Addr) = (ServerId(1), Ipv4Addr::new(10, 0, 0, 11));
const RVM: (ServerId, Ipv4Addr) = (ServerId(2), Ipv4Addr::new(10, 0, 0, 12));
/// The link-layer address of the client's next hop. The engine only hands it back.
const NEXT_HOP: LinkAddress = LinkAddress([2, 0, 0, 0, 0, 1]);

/// How long a step of virtual time lasts, in microseconds.
const STEP_US: u64 = 1_000;
/// Longest wait for an answer, in microseconds.
const PATIENCE_US: u64 = 5_000_000;

fn main() -> Result<(), Box<dyn Error>> {
    let mut world = World::new()?;
    for n in 1..=3 {
        world.ask(&format!("request {n}"))?;
    }
    println!("the OVM vanishes, with a request on its way");
    world.say("request 4")?;
    world.step();
    world.servers.remove(&OVM.0);
    // The daemon learns this from the hypervisor.
    world.tell(Input::Evidence { server: OVM.0, evidence: Evidence::DomainGone });
    world.expect("request 4")?;
    for n in 5..=6 {
        world.ask(&format!("request {n}"))?;
    }
    assert_eq!(world.engine.ovm(), Some(RVM.0), "the replica serves");
    assert_eq!(world.engine.status().counters["resets"], 0, "no conversation was reset");
    println!("one connection, six requests, six answers");
    Ok(())
}

/// The engine and the hosts around it.
struct World {
    now_us: u64,
    engine: Service,
    client: Host,
    servers: BTreeMap<ServerId, Host>,
}

impl World {
    /// A service with an OVM and a replica of equal state, and a client that connects to the PSC.
    fn new() -> Result<Self, Box<dyn Error>> {
        let mut engine = Service::new(ServiceConfig::new("echo", vec![IpAddr::V4(PSC)], vec![PORT]));
        let spec = |(id, address): (ServerId, Ipv4Addr)| ServerSpec {
            id,
            addresses: vec![IpAddr::V4(address)],
            mtu: 1500,
        };
        let start = Instant::from_micros(0);
        engine.handle(start, Input::Command(Command::InstallOvm(spec(OVM))))?;
        let attach = Command::Attach { spec: spec(RVM), seeding: Seeding::AssumeIdentical };
        engine.handle(start, Input::Command(attach))?;
        let mut client = Host::new(CLIENT, 1);
        client.connect()?;
        let mut servers = BTreeMap::new();
        // Each stack draws its own initial sequence numbers.
        for (seed, (id, address)) in (2..).zip([OVM, RVM]) {
            let mut server = Host::new(address, seed);
            server.socket().listen(PORT).map_err(|error| format!("can't listen: {error:?}"))?;
            servers.insert(id, server);
        }
        Ok(Self { now_us: 0, engine, client, servers })
    }

    fn now(&self) -> Instant {
        Instant::from_micros(self.now_us)
    }

    /// Hands the engine an input, and carries out its outputs.
    fn tell(&mut self, input: Input<'_>) {
        let now = self.now();
        if let Err(error) = self.engine.handle(now, input) {
            println!("refused: {error}");
        }
        while let Some(output) = self.engine.poll(now) {
            match output {
                Output::Transmit(transmit) => match transmit.to {
                    Destination::Client(_) => self.client.wire.received.push_back(transmit.packet),
                    Destination::Server(id) => {
                        if let Some(server) = self.servers.get_mut(&id) {
                            server.wire.received.push_back(transmit.packet);
                        }
                    }
                },
                Output::Event(event) => println!("{:>8} us  {:?}", self.now_us, event.kind),
                // Rules and StopPlane are for planes that pass conversations by themselves; the fence is the toolstack's.
                other => println!("{:>8} us  {other:?}", self.now_us),
            }
        }
    }

    /// Lets a step of time pass: hosts send, and the engine gets their packets.
    fn step(&mut self) {
        self.now_us += STEP_US;
        for packet in self.client.poll(self.now_us) {
            self.tell(Input::Client { link: NEXT_HOP, passage: Passage::Kept, packet: &packet });
        }
        for id in [OVM.0, RVM.0] {
            let Some(server) = self.servers.get_mut(&id) else { continue };
            server.echo();
            for packet in server.poll(self.now_us) {
                self.tell(Input::Server { server: id, passage: Passage::Kept, packet: &packet });
            }
        }
        if self.engine.next_timeout().is_some_and(|due| due <= self.now()) {
            self.tell(Input::Timeout);
        }
    }

    /// Asks, and waits for the answer.
    fn ask(&mut self, request: &str) -> Result<(), Box<dyn Error>> {
        self.say(request)?;
        self.expect(request)
    }

    /// The client sends a request over its only connection.
    fn say(&mut self, request: &str) -> Result<(), Box<dyn Error>> {
        let deadline = self.now_us + PATIENCE_US;
        while !self.client.socket().may_send() {
            assert!(self.now_us < deadline, "the client is not connected");
            self.step();
        }
        let sent = self.client.socket().send_slice(request.as_bytes());
        assert_eq!(sent.map_err(|error| format!("the client can't send: {error:?}"))?, request.len());
        Ok(())
    }

    /// Waits until the client has read this, byte for byte.
    fn expect(&mut self, answer: &str) -> Result<(), Box<dyn Error>> {
        let deadline = self.now_us + PATIENCE_US;
        let mut read = Vec::new();
        while read.len() < answer.len() {
            assert!(self.now_us < deadline, "the client got {} of {} bytes", read.len(), answer.len());
            self.step();
            read.extend(self.client.read());
        }
        assert_eq!(read, answer.as_bytes(), "the answer is wrong");
        println!("{:>8} us  the client read: {answer}", self.now_us);
        Ok(())
    }
}

/// A host with one TCP socket, on a wire of two queues.
struct Host {
    interface: Interface,
    wire: Wire,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
}

impl Host {
    fn new(address: Ipv4Addr, seed: u64) -> Self {
        let mut wire = Wire::default();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut wire, Moment::ZERO);
        interface.update_ip_addrs(|addresses| {
            // smoltcp has room for two.
            let _ = addresses.push(IpCidr::new(address.into(), 24));
        });
        let buffer = || tcp::SocketBuffer::new(vec![0; 4096]);
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(tcp::Socket::new(buffer(), buffer()));
        Self { interface, wire, sockets, handle }
    }

    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    fn connect(&mut self) -> Result<(), String> {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        let connected = socket.connect(self.interface.context(), (PSC, PORT), 40_000);
        connected.map_err(|error| format!("can't connect: {error:?}"))
    }

    /// The bytes that have arrived.
    fn read(&mut self) -> Vec<u8> {
        let socket = self.socket();
        if !socket.can_recv() {
            return Vec::new();
        }
        socket.recv(|bytes| (bytes.len(), bytes.to_vec())).unwrap_or_default()
    }

    /// Serves: answers what was asked.
    fn echo(&mut self) {
        let request = self.read();
        if let Err(error) = self.socket().send_slice(&request)
            && !request.is_empty()
        {
            println!("a server can't answer: {error:?}");
        }
    }

    /// Processes what arrived and what is due, and returns the packets that leave.
    fn poll(&mut self, now_us: u64) -> Vec<Vec<u8>> {
        let now = Moment::from_micros(i64::try_from(now_us).unwrap_or(i64::MAX));
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        self.wire.sent.drain(..).collect()
    }
}

/// Packets on their way to a host and from it.
#[derive(Default)]
struct Wire {
    received: VecDeque<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
}

impl Device for Wire {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Leaving<'a>;

    fn receive(&mut self, _: Moment) -> Option<(Arrived, Leaving<'_>)> {
        let packet = self.received.pop_front()?;
        Some((Arrived(packet), Leaving(&mut self.sent)))
    }

    fn transmit(&mut self, _: Moment) -> Option<Leaving<'_>> {
        Some(Leaving(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 1500;
        capabilities
    }
}

struct Arrived(Vec<u8>);

impl RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Leaving<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Leaving<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut packet = vec![0; length];
        let result = f(&mut packet);
        self.0.push_back(packet);
        result
    }
}
