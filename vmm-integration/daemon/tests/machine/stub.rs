//! The programs that kontord starts, played by this test's own executable: a QEMU whose guest does what
//! its kernel's command line says (`stub=…`), and the relay. And what an office answers.

use crate::{
    escape, https,
    tenant::{GATEWAY, Tenant},
};
use kontor_relay::{
    End, Limits, Relay, Wires,
    message::{self, FromRelay},
};
use kontor_wire::{
    Decoder,
    control::{BootState, Challenge, FromGuest, FromHost, MAX_FROM_HOST},
    encode,
    reason::StopReason,
    uplink::{GatewayId, PortDecoder, encode_port},
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg};
use std::{
    fs::File,
    io::{self, BufRead, BufReader, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::exit,
    thread,
};

/// The root hash that the stub's guest runs from.
pub(crate) const ROOT: [u8; 32] = [0xab; 32];
/// What looks like a keepalive of WireGuard's.
pub(crate) const KEEPALIVE: [u8; 32] = {
    let mut bytes = [5; 32];
    [bytes[0], bytes[1], bytes[2], bytes[3]] = [4, 0, 0, 0];
    bytes
};
/// Numbers of descriptors that a relay may have.
const RELAY_FILES_MAX: u64 = 21;
/// More threads than any QEMU may have.
const THREADS_TRIED: usize = 1000;
/// What a guest that was told to stop powers off with.
const POWERED_OFF: i32 = 0;

fn inherited(fd: RawFd) -> OwnedFd {
    // SAFETY: each number stands once on the stub's command line, and nothing else in it owns one.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// `kontor-relay`, with its arguments.
pub(crate) fn relay(arguments: &[String]) -> ! {
    let number = |name: &str| {
        let at = arguments.iter().position(|word| word == name)?;
        arguments[at + 1].parse::<RawFd>().ok()
    };
    let uplink = UnixStream::from(inherited(number("--uplink").unwrap()));
    uplink.set_nonblocking(true).unwrap();
    let control = inherited(number("--control").unwrap());
    if let Some(port) = taken_over() {
        try_to_get_out(&control, port);
    }
    let uplink = kontor_relay::Uplink::Stream(uplink);
    let wires = Wires { uplink, control };
    match Relay::new(wires, Limits::default()).run() {
        Ok(End::Shutdown | End::UplinkClosed) => exit(0),
        Ok(End::Garbage) => exit(3),
        Err(error) => {
            eprintln!("{error}");
            exit(1)
        }
    }
}

/// Beginning of the name under which the relay is one that was taken over; behind it stands the port of a stranger.
pub(crate) const TAKEN_OVER: &str = "taken-over-";

/// The stranger's port, if this is such a relay.
fn taken_over() -> Option<u16> {
    let program = std::env::args().next()?;
    Path::new(&program).file_name()?.to_str()?.strip_prefix(TAKEN_OVER)?.parse().ok()
}

/// Waits for a socket, closes the last doors as the relay does, then tries to reach the stranger with it.
fn try_to_get_out(control: &OwnedFd, stranger: u16) -> ! {
    let ready = message::encode(&FromRelay::Ready).unwrap();
    rustix::net::send(control, &ready, SendFlags::empty()).unwrap();
    poll(&mut [PollFd::new(control, PollFlags::IN)], None).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let mut packet = [0; message::MAX_MESSAGE];
    recvmsg(control, &mut [IoSliceMut::new(&mut packet)], &mut rights, RecvFlags::empty()).unwrap();
    let socket = rights.drain().find_map(|message| {
        let RecvAncillaryMessage::ScmRights(mut sockets) = message else { return None };
        sockets.next()
    });
    kontor_jail::seal_relay(RELAY_FILES_MAX).unwrap();
    eprintln!("{}", escape::reach(&socket.unwrap(), stranger));
    exit(1)
}

/// The answer of an office whose papers lie in `dir`; the file `mode` there says how it answers.
pub(crate) fn office(dir: &Path, request: &[u8]) -> Vec<u8> {
    let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
    let tenant = Tenant::read(dir);
    let lease = |bend: fn(&mut kontor_trust::Lease)| {
        let parts = tenant.lease(request, &read("device.json"), &read("bundle.json"), bend);
        https::response("200 OK", serde_json::json!({ "lease": parts }).to_string().as_bytes())
    };
    match String::from_utf8(read("mode")).unwrap().as_str() {
        "lease" => lease(|_| {}),
        "bent" => lease(|lease| lease.nonce[0] ^= 1),
        "refused" => https::response("200 OK", br#"{"refused":"the device is revoked"}"#),
        "broken" => https::response("500 Internal Server Error", b""),
        other => panic!("no mode {other}"),
    }
}

/// The virtual machine.
struct Machine {
    arguments: Vec<String>,
    console: UnixStream,
    control: UnixStream,
    decoder: Decoder,
    uplink: UnixStream,
    descriptors: Vec<RawFd>,
}

/// `qemu-system-x86_64`, with its arguments.
pub(crate) fn qemu(arguments: Vec<String>) -> ! {
    let descriptors = descriptors();
    let value = |name: &str| {
        let at = arguments.iter().position(|word| word == name).unwrap();
        arguments[at + 1].clone()
    };
    let line = value("-append");
    let scenario = line.split(' ').find_map(|word| word.strip_prefix("stub=")).unwrap().to_owned();
    let channel = |id: &str| {
        let start = format!("socket,id={id},fd=");
        let fd = arguments.iter().find_map(|word| word.strip_prefix(&start));
        fd.map(|fd| UnixStream::from(inherited(fd.parse().unwrap())))
    };
    let probe = channel("probe");
    let qmp = channel("qmp").unwrap();
    if value("-accel") == "kvm" {
        // A trial of KVM, in which no guest says anything.
        park();
    }
    let deaf = matches!(scenario.as_str(), "deaf" | "flood");
    let mut machine = Machine {
        console: channel("console").unwrap(),
        control: channel("control").unwrap(),
        decoder: Decoder::new(MAX_FROM_HOST),
        // A network device's is no stream; the scenarios of one do not read it.
        uplink: channel("uplink").unwrap_or_else(|| UnixStream::from(inherited(9))),
        descriptors,
        arguments,
    };
    let mut events = qmp.try_clone().unwrap();
    thread::spawn(move || serve_qmp(qmp, deaf));
    match scenario.as_str() {
        "ready" => machine.ready(),
        "again" => machine.renewing(),
        "waking" => machine.waking(),
        "probe" => {
            let mut probe = probe.unwrap();
            let mut echo = probe.try_clone().unwrap();
            thread::spawn(move || io::copy(&mut probe, &mut echo));
            machine.ready()
        }
        "inspect" => machine.inspect(),
        "escape" => machine.escape(),
        away if away.starts_with("away:") => machine.send_away(away),
        "silent" | "deaf" => park(),
        "threads" => machine.threads(),
        "hello" => {
            machine.hello();
            park()
        }
        "leased" => {
            machine.hello();
            machine.lease();
            machine.until_power_off()
        }
        "stubborn" => {
            machine.boot();
            park()
        }
        "garbage" => {
            machine.hello();
            machine.control.write_all(&[0xff; 64]).unwrap();
            park()
        }
        "flood" => machine.flood(events),
        "uplink-garbage" => {
            machine.hello();
            machine.lease();
            let _ = machine.uplink.write_all(&[3, 0, 9, 9, 9].repeat(1000));
            park()
        }
        "root-corrupt" => {
            machine.hello();
            machine.state(BootState::Early);
            machine.say(&FromGuest::Stop(StopReason::RootCorrupt));
            exit(POWERED_OFF)
        }
        "panic" => {
            machine.hello();
            machine.print("[ 1.0] Kernel panic - not syncing: dm-verity device corrupted");
            exit(0)
        }
        "pvpanic" => {
            machine.hello();
            events.write_all(b"{\"event\":\"GUEST_PANICKED\",\"data\":{\"action\":\"pause\"}}\r\n").unwrap();
            exit(0)
        }
        "broken" => {
            eprintln!("qemu-stub: could not\x1b[2J set up");
            exit(1)
        }
        other => panic!("no scenario {other}"),
    }
}

/// The open descriptors. In the jail no directory can be listed.
fn descriptors() -> Vec<RawFd> {
    // SAFETY: a number is asked about; what it stands for is not touched.
    let is_open =
        |number: &RawFd| rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(*number) }).is_ok();
    (0..1024).filter(is_open).collect()
}

fn serve_qmp(qmp: UnixStream, deaf: bool) {
    let mut to = qmp.try_clone().unwrap();
    to.write_all(b"{\"QMP\":{\"version\":{},\"capabilities\":[]}}\r\n").unwrap();
    for line in BufReader::new(qmp).lines() {
        let Ok(line) = line else { return };
        let command: serde_json::Value = serde_json::from_str(&line).unwrap();
        if command["execute"] == "quit" && !deaf {
            exit(0);
        }
        to.write_all(b"{\"return\":{}}\r\n").unwrap();
    }
}

fn park() -> ! {
    loop {
        thread::park();
    }
}

impl Machine {
    fn say(&mut self, message: &FromGuest) {
        self.control.write_all(&encode(message)).unwrap();
    }

    fn hear(&mut self) -> FromHost {
        loop {
            if let Some(message) = self.decoder.next_message().unwrap() {
                return message;
            }
            let mut chunk = [0; 4096];
            let room = self.decoder.room().min(chunk.len());
            let count = self.control.read(&mut chunk[..room]).unwrap();
            assert!(count > 0, "kontord closed the control channel");
            self.decoder.push(&chunk[..count]);
        }
    }

    fn print(&mut self, line: &str) {
        self.console.write_all(format!("{line}\r\n").as_bytes()).unwrap();
    }

    fn hello(&mut self) {
        self.say(&FromGuest::Hello { oldest: 1, newest: 3, features: 5 });
        assert_eq!(self.hear(), FromHost::Hello { version: 1, features: 0 });
    }

    fn state(&mut self, state: BootState) {
        self.say(&FromGuest::State { state, at_ms: 1 });
    }

    fn ask(&mut self, seq: u64) -> FromHost {
        let nonce = [seq.to_le_bytes()[0]; 32];
        let challenge = Challenge { nonce, boot_key: [2; 32], seq, verity_root: ROOT, keyset_version: 1 };
        self.say(&FromGuest::Challenge(challenge));
        self.hear()
    }

    fn lease(&mut self) {
        self.state(BootState::Early);
        self.state(BootState::Verified);
        match self.ask(0) {
            FromHost::Lease(parts) => assert!(!parts.lease.is_empty()),
            FromHost::Refused => {
                self.say(&FromGuest::Stop(StopReason::NoLease));
                exit(POWERED_OFF)
            }
            FromHost::PowerOff => {
                self.say(&FromGuest::Stop(StopReason::Requested));
                exit(POWERED_OFF)
            }
            other @ (FromHost::Hello { .. } | FromHost::Nudge | FromHost::Woken) => panic!("{other:?}"),
        }
    }

    /// Sends a datagram to the gateway and has it come back.
    fn echo(&mut self) {
        let mut frame = Vec::new();
        encode_port(GatewayId(GATEWAY), 32, &KEEPALIVE, &mut frame).unwrap();
        self.uplink.write_all(&frame).unwrap();
        let mut decoder = PortDecoder::new();
        loop {
            if let Some(frame) = decoder.next_frame().unwrap() {
                assert_eq!((frame.gateway(), frame.payload()), (GatewayId(GATEWAY), &KEEPALIVE[..]));
                return;
            }
            let count = self.uplink.read(decoder.space()).unwrap();
            assert!(count > 0, "the relay closed the uplink");
            decoder.advance(count);
        }
    }

    /// From Hello to Ready.
    fn boot(&mut self) {
        self.print("booting \x1b[2J");
        self.hello();
        self.lease();
        self.state(BootState::Leased);
        self.echo();
        for state in [BootState::TunnelUp, BootState::Admitted, BootState::StateOpen, BootState::Session] {
            self.state(state);
        }
        self.say(&FromGuest::Ready);
    }

    fn until_power_off(&mut self) -> ! {
        loop {
            if self.hear() == FromHost::PowerOff {
                self.say(&FromGuest::Stop(StopReason::Requested));
                exit(POWERED_OFF);
            }
        }
    }

    fn ready(mut self) -> ! {
        self.boot();
        self.until_power_off()
    }

    /// Renews once right after the boot.
    fn renewing(mut self) -> ! {
        self.boot();
        self.renew();
        self.until_power_off()
    }

    /// Renews when it is told that the host has slept, and powers off by itself.
    fn waking(mut self) -> ! {
        self.boot();
        let told = self.hear();
        self.print(&format!("told: {told:?}"));
        self.renew();
        self.say(&FromGuest::Stop(StopReason::Requested));
        exit(POWERED_OFF)
    }

    fn renew(&mut self) {
        match self.ask(1) {
            FromHost::Lease(_) => self.print("renewed"),
            other @ (FromHost::Hello { .. }
            | FromHost::Refused
            | FromHost::Nudge
            | FromHost::PowerOff
            | FromHost::Woken) => self.print(&format!("not renewed: {other:?}")),
        }
    }

    /// Prints how each attempt to get out was answered.
    fn escape(mut self) -> ! {
        for line in escape::attempts() {
            self.print(&line);
        }
        exit(0)
    }

    /// Breaks the rules, does not listen, and writes to everybody as fast as it can.
    fn flood(mut self, mut events: UnixStream) -> ! {
        self.hello();
        let mut console = self.console.try_clone().unwrap();
        thread::spawn(move || while console.write_all(&[b'x'; 1 << 16]).is_ok() {});
        let event = b"{\"event\":\"NIC_RX_FILTER_CHANGED\",\"data\":{}}\r\n".repeat(100);
        thread::spawn(move || while events.write_all(&event).is_ok() {});
        thread::spawn(move || while io::stderr().write_all(&[b'y'; 1 << 16]).is_ok() {});
        let mut uplink = self.uplink.try_clone().unwrap();
        thread::spawn(move || while uplink.write_all(&[0xff; 1 << 16]).is_ok() {});
        let challenge = |seq: u64| {
            let nonce = [seq.to_le_bytes()[0]; 32];
            let challenge = Challenge { nonce, boot_key: [2; 32], seq, verity_root: ROOT, keyset_version: 1 };
            encode(&FromGuest::Challenge(challenge))
        };
        for seq in 0.. {
            if self.control.write_all(&challenge(seq)).is_err() {
                break;
            }
        }
        park()
    }

    /// Prints how many threads this process can have.
    fn threads(mut self) -> ! {
        let start = || thread::Builder::new().stack_size(1 << 14).spawn(|| park());
        // Two are there already.
        let others = std::iter::repeat_with(start).take(THREADS_TRIED).take_while(Result::is_ok).count();
        self.print(&format!("threads: {}", others + 2));
        exit(0)
    }

    /// Sends by the uplink to the abstract socket and the file that the scenario names.
    fn send_away(mut self, scenario: &str) -> ! {
        let [_, name, file] = scenario.split(':').collect::<Vec<_>>()[..] else { panic!("{scenario}") };
        for line in escape::send_away(name, file) {
            self.print(&line);
        }
        exit(0)
    }

    /// Prints what kontord gave this process.
    fn inspect(mut self) -> ! {
        let content = |path: &str| {
            let mut text = String::new();
            File::open(path).unwrap().read_to_string(&mut text).unwrap();
            text.escape_default().to_string()
        };
        let value = |name: &str| {
            let at = self.arguments.iter().position(|word| word == name).unwrap();
            self.arguments[at + 1].clone()
        };
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
        let limit = |name: &str| {
            let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().rev().nth(1).unwrap().to_owned()
        };
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let privileges = status.lines().find(|line| line.starts_with("NoNewPrivs")).unwrap().to_owned();
        let lines = [
            format!("kernel {}", content(&value("-kernel"))),
            format!("initrd {}", content(&value("-initrd"))),
            format!("root {}", io::read_to_string(File::from(inherited(5))).unwrap()),
            format!("append {}", value("-append")),
            format!("descriptors {:?}", self.descriptors),
            format!("core {} files {}", limit("Max core file size"), limit("Max file size")),
            format!("threads {}", limit("Max processes")),
            format!("environment {:?}", std::env::vars().map(|(name, _)| name).collect::<Vec<_>>()),
            privileges.replace('\t', " "),
        ];
        for line in lines {
            self.print(&line);
        }
        exit(0)
    }
}
