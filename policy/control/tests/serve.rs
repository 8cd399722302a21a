//! `kontor-control serve` as `kontord` speaks with it, with a gateway at the other end of the socket.

use kontor_bundle::{
    Access, Bundle, Gateway, Settings,
    lease::{Admit, GatewayMemory, HostMemory, Notice, OwnGateway, Parts, for_gateway, for_host},
};
use kontor_trust::{
    BundleKind, Device, DeviceKind, DeviceState, Digest, Keyset, KeysetKind, MAX_ENVELOPE, Member, Request,
    RequestKind, Role, Roles, SecretKey, TrustedKeyset, sign, verify_request,
};
use rustix::process::{Pid, Signal, kill_process};
use rustls::{ClientConnection, StreamOwned, pki_types::ServerName};
use serde::Deserialize;
use std::{
    fs::{self, Permissions},
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::PathBuf,
    process::{Child, ChildStderr, Command, Output, Stdio},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tempfile::TempDir;

/// Exit codes, as `--help` has them.
const USAGE: i32 = 2;
const NOT_VERIFIED: i32 = 3;
const LACKS: i32 = 4;
/// Nothing here takes so long.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Answer {
    Lease(Parts),
    Refused(String),
    Revoked(Notice),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ToGateway {
    Admit(Admit),
}

/// A directory that control answers from, and everybody's keys.
struct Office {
    dir: TempDir,
    root: SecretKey,
    policy: SecretKey,
    enrol: SecretKey,
    control: SecretKey,
    host: SecretKey,
    keyset: TrustedKeyset,
}

/// Control as a process.
struct Control {
    child: Child,
    address: SocketAddr,
    log: BufReader<ChildStderr>,
}

/// A connection to control.
type Line = StreamOwned<ClientConnection, TcpStream>;

fn key() -> SecretKey {
    SecretKey::generate().expect("the test machine has randomness")
}

fn one(person: &str, key: &SecretKey) -> Role {
    let person = person.parse().expect("a good name");
    Role { threshold: 1, keys: vec![Member { person, key: key.public() }] }
}

impl Office {
    /// An office with the device `laptop-7` of the line `sales`, and gateway 1.
    fn new() -> Self {
        let [root, policy, enrol, lease, control, host] = [key(), key(), key(), key(), key(), key()];
        let keyset = Keyset {
            tenant: None,
            version: 1,
            root: one("anna", &root),
            roles: Roles {
                policy: one("dora", &policy),
                command: one("dora", &policy),
                destroy: one("dora", &policy),
                enrol: one("emil", &enrol),
                lease: one("control", &lease),
            },
            control_spki: vec![control.public().pin()],
        };
        let envelope = sign::<KeysetKind>(&keyset.payload(), &[&root]);
        let keyset = TrustedKeyset::dangerous_unpinned(&envelope).expect("a good keyset");
        let dir = TempDir::new().expect("a directory");
        let office = Self { dir, root, policy, enrol, control, host, keyset };
        for part in ["keysets", "devices", "bundles"] {
            fs::create_dir(office.path(part)).expect("a new directory");
        }
        office.write("keysets/00000001.json", &envelope);
        for (name, key) in [("lease.key", &lease), ("control.key", &office.control)] {
            office.write(name, key.to_pkcs8());
            office.mode(name, 0o600);
        }
        office.configure("");
        office.enrol("laptop-7", DeviceState::Active);
        office
            .write("bundles/sales.json", &sign::<BundleKind>(&office.bundle().payload(), &[&office.policy]));
        office
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).expect("a writable directory");
    }

    fn mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), Permissions::from_mode(mode)).expect("an own file");
    }

    fn configure(&self, first: &str) {
        let text = format!(
            "{first}\nlisten = [\"127.0.0.1:0\"]\nlease_s = 600\n\n[[gateway]]\nid = 1\nadmission = {:?}\n\
             pool_v4 = \"10.77.0.0/16\"\npool_v6 = \"fd77::/64\"\n",
            self.path("gateway.sock")
        );
        self.write("control.toml", text.as_bytes());
    }

    fn enrol(&self, device: &str, state: DeviceState) {
        self.enrol_with(device, state, &self.host);
    }

    fn enrol_with(&self, device: &str, state: DeviceState, host: &SecretKey) {
        let record = Device {
            tenant: self.keyset.tenant(),
            device: device.parse().expect("a good name"),
            enrolment: Digest([3; 32]),
            serial: 1,
            state,
            host_key: host.public(),
            line: "sales".parse().expect("a good name"),
            share_id: "share-1".parse().expect("a good name"),
        };
        let envelope = sign::<DeviceKind>(&record.payload(), &[&self.enrol]);
        self.write(&format!("devices/{device}.json"), &envelope);
    }

    fn bundle(&self) -> Bundle {
        Bundle {
            tenant: self.keyset.tenant(),
            line: "sales".parse().expect("a good name"),
            revision: 1,
            min_release: 1,
            lease_s_max: 600,
            apply_s: 60,
            silence_s: 180,
            lapse_off_s: 600,
            gateways: vec![Gateway {
                id: 1,
                key: [9; 32],
                endpoints: vec![([192, 0, 2, 1], 51_820).into()],
                v4: [10, 77, 0, 1].into(),
                v6: "fd77::1".parse().expect("an address"),
            }],
            settings: Settings {
                allow_emulation: false,
                allow_test_image: false,
                memory_mib: 1_024,
                resolvers: Vec::new(),
            },
            access: Access { destinations: Vec::new() },
        }
    }

    fn request(&self, device: &str, boot: u8) -> Vec<u8> {
        self.request_with(device, boot, &self.host)
    }

    fn request_with(&self, device: &str, boot: u8, host: &SecretKey) -> Vec<u8> {
        let request = Request {
            tenant: self.keyset.tenant(),
            device: device.parse().expect("a good name"),
            enrolment: Digest([3; 32]),
            nonce: [4; 32],
            boot_key: [boot; 32],
            seq: 0,
            verity_root: Digest([6; 32]),
            release: "smoke-1".to_owned(),
            keyset_version: 1,
        };
        sign::<RequestKind>(&request.payload(), &[host])
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kontor-control"));
        command.args(["serve", "--dir"]).arg(self.dir.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Control, once it is ready.
    fn serve(&self) -> Control {
        let mut child = self.command().spawn().expect("the built program");
        let mut log = BufReader::new(child.stderr.take().expect("a pipe"));
        let (mut seen, mut address) = (String::new(), None);
        while !seen.contains("ready") {
            let mut line = String::new();
            assert!(log.read_line(&mut line).expect("a log") > 0, "control ended: {seen}");
            let word = line.split("address=").nth(1).and_then(|rest| rest.trim().parse().ok());
            address = address.or(word);
            seen.push_str(&line);
        }
        Control { child, address: address.expect("an address in the log"), log }
    }

    fn connect(&self, control: &Control) -> Line {
        connect(control.address, &self.host, &[self.control.public().pin()])
    }

    /// What control answers to the host.
    fn answer(&self, control: &Control, request: &[u8]) -> Answer {
        ask(&mut self.connect(control), request)
    }

    fn lease(&self, control: &Control, request: &[u8]) -> Parts {
        lease(self.answer(control, request))
    }

    fn refusal(&self, control: &Control, request: &[u8]) -> String {
        refusal(self.answer(control, request))
    }

    /// Gateway 1, which takes one admission and gives one answer.
    fn gateway(&self, answer: &'static str) -> JoinHandle<Admit> {
        let listener = UnixListener::bind(self.path("gateway.sock")).expect("a new socket");
        thread::spawn(move || {
            let (stream, _) = listener.accept().expect("control");
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).expect("a line");
            (&stream).write_all(answer.as_bytes()).expect("control listens");
            let ToGateway::Admit(admit) = serde_json::from_str(&line).expect("an admission");
            admit
        })
    }
}

impl Control {
    /// Ends it by `signal`; its exit code and the rest of its log.
    fn end(mut self, signal: Signal) -> (Option<i32>, String) {
        kill_process(Pid::from_child(&self.child), signal).expect("an own child");
        let mut log = String::new();
        self.log.read_to_string(&mut log).expect("a log");
        (self.child.wait().expect("an own child").code(), log)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection with `key` to a control that is pinned by `pins`.
fn connect(address: SocketAddr, key: &SecretKey, pins: &[Digest]) -> Line {
    let config = Arc::new(kontor_tls::client(key, pins).expect("a good key"));
    let name = ServerName::try_from("control.example").expect("a name");
    let connection = ClientConnection::new(config, name).expect("a good configuration");
    let stream = TcpStream::connect(address).expect("control listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time");
    StreamOwned::new(connection, stream)
}

/// Everything that control sends until it closes.
fn rest(line: &mut Line) -> String {
    let mut answer = Vec::new();
    // Whoever closes with unread bytes before it breaks the connection off.
    let broken = [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe, io::ErrorKind::UnexpectedEof];
    if let Err(error) = line.read_to_end(&mut answer) {
        assert!(broken.contains(&error.kind()), "{error}");
    }
    String::from_utf8(answer).expect("text")
}

/// The whole response to a POST of `request`.
fn post(line: &mut Line, request: &[u8]) -> String {
    let length = request.len();
    let head = format!("POST /v1/lease HTTP/1.1\r\nHost: c\r\nContent-Length: {length}\r\n\r\n");
    line.write_all(&[head.as_bytes(), request].concat()).expect("control listens");
    rest(line)
}

fn ask(line: &mut Line, request: &[u8]) -> Answer {
    let response = post(line, request);
    let (head, body) = response.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
    assert_eq!(body.find('\n'), Some(body.len() - 1), "one line: {body}");
    serde_json::from_str(body).expect("an answer")
}

fn refusal(answer: Answer) -> String {
    match answer {
        Answer::Refused(words) => words,
        Answer::Lease(_) | Answer::Revoked(_) => panic!("no refusal"),
    }
}

fn lease(answer: Answer) -> Parts {
    match answer {
        Answer::Lease(parts) => parts,
        Answer::Refused(words) => panic!("refused: {words}"),
        Answer::Revoked(_) => panic!("revoked"),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs()
}

#[test]
fn lease_is_believed_by_the_host_and_the_gateway_that_was_told() {
    let office = Office::new();
    let control = office.serve();
    let gateway = office.gateway("{\"admitted\":true}\n");
    let request = office.request("laptop-7", 5);
    let parts = office.lease(&control, &request);
    let verified = verify_request(&request, &office.host.public()).unwrap();
    let checked = for_host(&office.keyset, &parts, &verified, &HostMemory::default()).unwrap();
    assert_eq!(checked.life_s(), 600);

    let own =
        OwnGateway { id: 1, pool_v4: "10.77.0.0/16".parse().unwrap(), pool_v6: "fd77::/64".parse().unwrap() };
    let admit = gateway.join().unwrap();
    let admitted =
        for_gateway(&office.keyset, &admit, now(), &own, |_, _, _| GatewayMemory::default()).unwrap();
    assert_eq!(admitted.lease_hash, checked.lease_hash);
    let addresses = fs::read_to_string(office.path("addresses.json")).unwrap();
    assert_eq!(addresses, r#"{"laptop-7":0}"#);
}

#[test]
fn gateway_that_refuses_or_is_not_there_holds_no_lease_back() {
    let office = Office::new();
    let control = office.serve();
    office.lease(&control, &office.request("laptop-7", 5));
    let gateway = office.gateway("{\"refused\":\"for the test\"}\n");
    office.lease(&control, &office.request("laptop-7", 6));
    gateway.join().unwrap();
    let (_, log) = control.end(Signal::TERM);
    assert!(log.contains("for the test"), "{log}");
}

#[test]
fn gateway_that_stays_silent_is_waited_for_half_a_second() {
    let office = Office::new();
    let control = office.serve();
    let _deaf = UnixListener::bind(office.path("gateway.sock")).unwrap();
    let begin = Instant::now();
    office.lease(&control, &office.request("laptop-7", 5));
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(500), "{took:?}");
    // Half a second and the rest of a slow machine's work.
    assert!(took < Duration::from_secs(10), "{took:?}");
}

#[test]
fn admission_that_is_too_large_holds_no_lease_back() {
    let office = Office::new();
    let mut last = office.keyset.clone();
    for version in 1..=8 {
        if version > 1 {
            let mut keyset = last.keyset().clone();
            keyset.tenant = Some(last.tenant());
            keyset.version = version;
            last = last.advance(&sign::<KeysetKind>(&keyset.payload(), &[&office.root])).unwrap();
        }
        let mut envelope = last.envelope().to_vec();
        envelope.resize(MAX_ENVELOPE, b' ');
        office.write(&format!("keysets/{version:08}.json"), &envelope);
    }
    let control = office.serve();
    assert_eq!(office.lease(&control, &office.request("laptop-7", 5)).keysets.len(), 8);
    let (_, log) = control.end(Signal::TERM);
    assert!(log.contains("the limit is 524288"), "{log}");
}

#[test]
fn request_that_cannot_be_answered_is_refused_in_words() {
    let office = Office::new();
    let control = office.serve();
    assert_eq!(office.refusal(&control, b"hello"), "this is no request for a lease");
    assert_eq!(office.refusal(&control, b""), "this is no request for a lease");
    let unknown = office.request("laptop-8", 5);
    assert_eq!(office.refusal(&control, &unknown), "the office does not know this device");
    let mut longest = office.request("laptop-7", 5);
    longest.resize(MAX_ENVELOPE, b' ');
    office.lease(&control, &longest);
    assert!(office.refusal(&control, &office.request("laptop-7", 5)).contains("answered already"));
}

#[test]
fn body_over_the_limit_is_refused_by_its_length() {
    let office = Office::new();
    let control = office.serve();
    let mut line = office.connect(&control);
    let length = MAX_ENVELOPE + 1;
    let head = format!("POST /v1/lease HTTP/1.1\r\nHost: c\r\nContent-Length: {length}\r\n\r\n");
    line.write_all(head.as_bytes()).unwrap();
    let response = rest(&mut line);
    assert!(response.starts_with("HTTP/1.1 413 "), "{response}");
    // And one that does not say how long it is.
    let mut line = office.connect(&control);
    line.write_all(b"POST /v1/lease HTTP/1.1\r\nHost: c\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
    let chunk = [b"1000\r\n".as_slice(), &[b' '; 0x1000], b"\r\n"].concat();
    // The end of the connection may come in the middle of it.
    let sent = (0..1024).take_while(|_| line.write_all(&chunk).is_ok()).count();
    assert!(sent < 1024, "4 MiB were taken");
    office.lease(&control, &office.request("laptop-7", 5));
}

#[test]
fn what_is_not_the_one_route_is_not_there() {
    let office = Office::new();
    let control = office.serve();
    for (request, status) in [
        ("GET /v1/lease HTTP/1.1\r\nHost: c\r\n\r\n", "HTTP/1.1 405 "),
        ("POST /v1/leases HTTP/1.1\r\nHost: c\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 404 "),
        ("garbage\r\n\r\n", "HTTP/1.1 400 "),
        (&format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(1000)), "HTTP/1.1 431 "),
        (&format!("GET / HTTP/1.1\r\na: {}\r\n\r\n", "b".repeat(64 * 1024)), "HTTP/1.1 431 "),
    ] {
        let mut line = office.connect(&control);
        // Control may answer and close before it has read all of it.
        let _ = line.write_all(request.as_bytes());
        let response = rest(&mut line);
        assert!(response.starts_with(status) || response.is_empty() && request.len() > 8192, "{response}");
    }
    office.lease(&control, &office.request("laptop-7", 5));
}

#[test]
fn one_connection_brings_one_answer() {
    let office = Office::new();
    let control = office.serve();
    let mut line = office.connect(&control);
    let request = "GET / HTTP/1.1\r\nHost: c\r\n\r\n".repeat(3);
    line.write_all(request.as_bytes()).unwrap();
    assert_eq!(rest(&mut line).matches("HTTP/1.1 404 ").count(), 1);
}

#[test]
fn host_that_expects_another_key_finds_a_stranger_and_says_nothing() {
    let office = Office::new();
    let control = office.serve();
    let mut line = connect(control.address, &office.host, &[key().public().pin()]);
    let error = line.write_all(b"x").and_then(|()| line.flush()).unwrap_err();
    assert_eq!(kontor_tls::stranger(&error), Some(kontor_tls::Stranger(office.control.public().pin())));
}

#[test]
fn connection_with_another_key_than_the_records_gets_no_lease() {
    let office = Office::new();
    let control = office.serve();
    let pins = [office.control.public().pin()];
    let request = office.request("laptop-7", 5);
    let mut line = connect(control.address, &key(), &pins);
    let words = refusal(ask(&mut line, &request));
    assert_eq!(words, "the connection is not made with the device's host key");
    // The stolen request was not counted as the device's.
    office.lease(&control, &request);
}

#[test]
fn devices_cannot_ask_for_each_other() {
    let office = Office::new();
    let other = key();
    office.enrol_with("laptop-8", DeviceState::Active, &other);
    let control = office.serve();
    let pins = [office.control.public().pin()];
    let ask_as = |host: &SecretKey, request: &[u8]| ask(&mut connect(control.address, host, &pins), request);
    let (own, others) = (office.request("laptop-7", 5), office.request_with("laptop-8", 6, &other));
    assert!(refusal(ask_as(&other, &own)).contains("not made with the device's host key"));
    assert!(refusal(ask_as(&office.host, &others)).contains("not made with the device's host key"));
    let forged = office.request_with("laptop-7", 7, &other);
    assert!(refusal(ask_as(&office.host, &forged)).contains("not signed by the device's host key"));
    lease(ask_as(&office.host, &own));
    lease(ask_as(&other, &others));
    // A boot key that was another's.
    assert!(refusal(ask_as(&other, &office.request_with("laptop-8", 5, &other))).contains("another device"));
}

#[test]
fn device_that_asks_too_often_waits_and_the_other_does_not() {
    let office = Office::new();
    let other = key();
    office.enrol_with("laptop-8", DeviceState::Active, &other);
    let control = office.serve();
    let refused = (0..100).find(|boot| {
        matches!(office.answer(&control, &office.request("laptop-7", *boot)), Answer::Refused(words)
            if words.starts_with("the device asks too often: again in "))
    });
    assert!(refused.is_some_and(|boot| boot >= 16), "{refused:?}");
    let request = office.request_with("laptop-8", 200, &other);
    lease(ask(&mut connect(control.address, &other, &[office.control.public().pin()]), &request));
}

#[test]
fn slow_connections_are_closed_wherever_they_stop() {
    let office = Office::new();
    let control = office.serve();
    let silent = TcpStream::connect(control.address).unwrap();
    let mut head = office.connect(&control);
    head.write_all(b"POST /v1/lease HTTP/1.1\r\n").unwrap();
    let mut body = office.connect(&control);
    body.write_all(b"POST /v1/lease HTTP/1.1\r\nHost: c\r\nContent-Length: 9\r\n\r\nx").unwrap();
    let begin = Instant::now();
    silent.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!((&silent).read(&mut [0; 1]).unwrap_or(0), 0);
    // A line of the head every now and then does not prolong it.
    while begin.elapsed() < PATIENCE && head.write_all(b"a: b\r\n").and_then(|()| head.flush()).is_ok() {
        thread::sleep(Duration::from_millis(200));
    }
    assert!(!rest(&mut body).starts_with("HTTP/1.1 200"));
    let took = begin.elapsed();
    assert!((Duration::from_secs(9)..PATIENCE / 2).contains(&took), "{took:?}");
}

#[test]
fn crowd_of_half_open_connections_holds_nobody_off() {
    let office = Office::new();
    let control = office.serve();
    let crowd = |count: usize| -> Vec<_> {
        (0..count).map(|_| TcpStream::connect(control.address).expect("control listens")).collect()
    };
    // Fewer than may be there, and then many more.
    for (boot, count) in [(5, 200), (6, 400)] {
        let silent = crowd(count);
        let begin = Instant::now();
        office.lease(&control, &office.request("laptop-7", boot));
        assert!(begin.elapsed() < Duration::from_secs(8), "only when the crowd's time was over");
        drop(silent);
    }
}

#[test]
fn garbage_instead_of_a_handshake_is_survived() {
    let office = Office::new();
    let control = office.serve();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for length in [1, 5, 100, 5000, 100_000] {
        let garbage: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        })
        .take(length)
        .collect();
        let mut stream = TcpStream::connect(control.address).unwrap();
        // Control closes as soon as it has seen enough.
        let _ = stream.write_all(&garbage);
    }
    office.lease(&control, &office.request("laptop-7", 5));
    let (code, log) = control.end(Signal::TERM);
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("panic"), "{log}");
}

#[test]
fn restarted_control_remembers_what_it_answered() {
    let office = Office::new();
    let control = office.serve();
    office.lease(&control, &office.request("laptop-7", 5));
    assert_eq!(control.end(Signal::KILL).0, None);
    let control = office.serve();
    assert!(office.refusal(&control, &office.request("laptop-7", 5)).contains("answered already"));
    office.lease(&control, &office.request("laptop-7", 6));
    assert_eq!(fs::read_to_string(office.path("addresses.json")).unwrap(), r#"{"laptop-7":0}"#);
}

#[test]
fn answer_under_way_is_given_although_control_ends() {
    let office = Office::new();
    let mut control = office.serve();
    let deaf = UnixListener::bind(office.path("gateway.sock")).unwrap();
    let mut silent = TcpStream::connect(control.address).unwrap();
    let (mut line, request) = (office.connect(&control), office.request("laptop-7", 5));
    let asking = thread::spawn(move || ask(&mut line, &request));
    // Once the gateway is told, control waits for its answer.
    let _told = deaf.accept().unwrap();
    kill_process(Pid::from_child(&control.child), Signal::TERM).unwrap();
    lease(asking.join().unwrap());
    assert_eq!(control.child.wait().unwrap().code(), Some(0));
    assert_eq!(silent.read(&mut [0; 1]).unwrap_or(0), 0);
}

#[test]
fn revoked_device_and_line_without_policy_are_refused() {
    let office = Office::new();
    let control = office.serve();
    office.enrol("laptop-7", DeviceState::Revoked);
    let Answer::Revoked(notice) = office.answer(&control, &office.request("laptop-7", 5)) else {
        panic!("not revoked")
    };
    let record = office.keyset.follow(&notice.keysets).unwrap().verify(&notice.device).unwrap();
    assert_eq!(Device::parse(&record).unwrap().state, DeviceState::Revoked);
    office.enrol("laptop-7", DeviceState::Active);
    fs::remove_file(office.path("bundles/sales.json")).unwrap();
    assert!(office.refusal(&control, &office.request("laptop-7", 5)).contains("no policy"));
}

#[test]
fn requests_at_the_same_time_get_different_addresses() {
    let office = Office::new();
    let names: Vec<String> = (0..4).map(|n| format!("laptop-{n}")).collect();
    for name in &names {
        office.enrol(name, DeviceState::Active);
    }
    let control = office.serve();
    let asking: Vec<_> = names
        .iter()
        .zip(10..)
        .map(|(name, boot)| {
            let (mut line, request) = (office.connect(&control), office.request(name, boot));
            thread::spawn(move || ask(&mut line, &request))
        })
        .collect();
    for asking in asking {
        lease(asking.join().unwrap());
    }
    let text = fs::read_to_string(office.path("addresses.json")).unwrap();
    let addresses: std::collections::BTreeMap<String, u32> = serde_json::from_str(&text).unwrap();
    let mut indices: Vec<_> = addresses.values().copied().collect();
    indices.sort_unstable();
    assert_eq!(indices, [0, 1, 2, 3]);
}

/// That control does not start, with this exit code and these words.
#[track_caller]
fn fails(office: &Office, code: i32, words: &str) {
    let output: Output = office.command().output().expect("the built program");
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{log}");
    assert!(log.contains(words), "{log}");
}

#[test]
fn control_does_not_start_with_a_forged_file() {
    let office = Office::new();
    let forged = sign::<BundleKind>(&office.bundle().payload(), &[&office.enrol]);
    office.write("bundles/sales.json", &forged);
    fails(&office, NOT_VERIFIED, "sales.json does not verify: the stored bundle is not signed");

    let office = Office::new();
    office.write("devices/laptop-7.json", b"{}");
    fails(&office, NOT_VERIFIED, "laptop-7.json does not verify: the stored device is not signed");

    let office = Office::new();
    fs::copy(office.path("devices/laptop-7.json"), office.path("devices/laptop-8.json")).unwrap();
    fails(&office, NOT_VERIFIED, "laptop-8.json does not verify: the stored device is of another");

    let office = Office::new();
    fs::copy(office.path("keysets/00000001.json"), office.path("keysets/00000002.json")).unwrap();
    fails(&office, NOT_VERIFIED, "00000002.json does not verify");

    let office = Office::new();
    office.write("lease.key", key().to_pkcs8());
    fails(&office, NOT_VERIFIED, "the lease key is none of the keyset's role lease");

    let office = Office::new();
    office.write("control.key", key().to_pkcs8());
    fails(&office, NOT_VERIFIED, "control.key is not pinned by the keyset");
}

#[test]
fn file_that_goes_bad_later_is_the_offices_fault_and_logged() {
    let office = Office::new();
    let control = office.serve();
    let forged = sign::<BundleKind>(&office.bundle().payload(), &[&office.enrol]);
    let good = fs::read(office.path("bundles/sales.json")).unwrap();
    office.write("bundles/sales.json", &forged);
    let response = post(&mut office.connect(&control), &office.request("laptop-7", 5));
    assert!(response.starts_with("HTTP/1.1 500 "), "{response}");
    assert!(!response.contains("bundle"), "{response}");
    office.write("bundles/sales.json", &good);
    office.lease(&control, &office.request("laptop-7", 5));
    let (_, log) = control.end(Signal::TERM);
    assert!(log.contains("the stored bundle is not signed"), "{log}");
}

#[test]
fn tenant_in_the_configuration_pins_the_first_keyset() {
    let office = Office::new();
    office.configure(&format!("tenant = \"{}\"", office.keyset.tenant()));
    office.lease(&office.serve(), &office.request("laptop-7", 5));
    office.configure(&format!("tenant = \"{}\"", Digest([1; 32])));
    fails(&office, NOT_VERIFIED, "the tenant is 0101");
}

#[test]
fn key_that_others_can_read_is_not_used() {
    for (name, mode) in [("lease.key", 0o640), ("lease.key", 0o604), ("control.key", 0o644)] {
        let office = Office::new();
        office.mode(name, mode);
        fails(&office, LACKS, "readable by others");
    }
}

#[test]
fn missing_or_wrong_files_are_named() {
    for name in ["control.toml", "lease.key", "control.key", "keysets/00000001.json"] {
        let office = Office::new();
        fs::remove_file(office.path(name)).unwrap();
        fails(&office, LACKS, name);
    }
    let office = Office::new();
    fs::remove_dir_all(office.path("devices")).unwrap();
    fails(&office, LACKS, "devices");
    let office = Office::new();
    office.write("devices/laptop-7.jsn", b"{}");
    fails(&office, LACKS, "laptop-7.jsn is not named after a device or line");
    let office = Office::new();
    office.configure("extra = 1");
    fails(&office, LACKS, "extra");
    office.write("control.toml", b"listen = [\"127.0.0.1:0\"]\nlease_s = 600\n");
    fails(&office, LACKS, "0 gateways");
    let office = Office::new();
    for name in ["lease.key", "control.key"] {
        let office = Office::new();
        office.write(name, b"no key");
        fails(&office, LACKS, "is no key");
    }
    office.write("addresses.json", b"{");
    fails(&office, LACKS, "addresses.json does not parse");
}

#[test]
fn address_in_use_is_named() {
    let office = Office::new();
    let control = office.serve();
    let text = fs::read_to_string(office.path("control.toml")).unwrap();
    let address = control.address.to_string();
    office.write("control.toml", text.replace("127.0.0.1:0", &address).as_bytes());
    fails(&office, LACKS, &format!("listen on {address}"));
}

#[test]
fn wrong_usage_has_its_own_exit_code() {
    let output = Command::new(env!("CARGO_BIN_EXE_kontor-control")).output().unwrap();
    assert_eq!(output.status.code(), Some(USAGE));
}
