//! `kontor-control answer` as `kontord` calls it, with a gateway at the other end of the socket.

use kontor_bundle::{
    Access, Bundle, Gateway, Settings,
    lease::{Admit, GatewayMemory, HostMemory, OwnGateway, Parts, for_gateway, for_host},
};
use kontor_trust::{
    BundleKind, Device, DeviceKind, DeviceState, Digest, Keyset, KeysetKind, MAX_ENVELOPE, Member, Request,
    RequestKind, Role, Roles, SecretKey, TrustedKeyset, sign, verify_request,
};
use serde::Deserialize;
use std::{
    fs::{self, Permissions},
    io::{BufRead, BufReader, Write},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tempfile::TempDir;

/// Exit codes, as `--help` has them.
const USAGE: i32 = 2;
const NOT_VERIFIED: i32 = 3;
const LACKS: i32 = 4;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Answer {
    Lease(Parts),
    Refused(String),
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
    host: SecretKey,
    keyset: TrustedKeyset,
}

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
        let [root, policy, enrol, lease, host] = [key(), key(), key(), key(), key()];
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
            control_spki: Vec::new(),
        };
        let envelope = sign::<KeysetKind>(&keyset.payload(), &[&root]);
        let keyset = TrustedKeyset::dangerous_unpinned(&envelope).expect("a good keyset");
        let dir = TempDir::new().expect("a directory");
        let office = Self { dir, root, policy, enrol, host, keyset };
        for part in ["keysets", "devices", "bundles"] {
            fs::create_dir(office.path(part)).expect("a new directory");
        }
        office.write("keysets/00000001.json", &envelope);
        office.write("lease.key", lease.to_pkcs8());
        office.mode("lease.key", 0o600);
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
            "{first}\nlease_s = 600\n\n[[gateway]]\nid = 1\nadmission = {:?}\n\
             pool_v4 = \"10.77.0.0/16\"\npool_v6 = \"fd77::/64\"\n",
            self.path("gateway.sock")
        );
        self.write("control.toml", text.as_bytes());
    }

    fn enrol(&self, device: &str, state: DeviceState) {
        let record = Device {
            tenant: self.keyset.tenant(),
            device: device.parse().expect("a good name"),
            enrolment: Digest([3; 32]),
            serial: 1,
            state,
            host_key: self.host.public(),
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
        sign::<RequestKind>(&request.payload(), &[&self.host])
    }

    fn start(&self, request: &[u8]) -> Child {
        let mut child = Command::new(env!("CARGO_BIN_EXE_kontor-control"))
            .args(["answer", "--dir"])
            .arg(self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the built program");
        // It reads no more than it must, so the rest of a long request has nowhere to go.
        let _ = child.stdin.take().expect("a pipe").write_all(request);
        child
    }

    fn run(&self, request: &[u8]) -> Output {
        self.start(request).wait_with_output().expect("a child")
    }

    fn answer(&self, request: &[u8]) -> Answer {
        read(&self.run(request))
    }

    fn lease(&self, request: &[u8]) -> Parts {
        lease(self.answer(request))
    }

    fn refusal(&self, request: &[u8]) -> String {
        match self.answer(request) {
            Answer::Refused(words) => words,
            Answer::Lease(_) => panic!("a lease"),
        }
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

fn read(output: &Output) -> Answer {
    assert!(output.status.success(), "{output:?}");
    let text = std::str::from_utf8(&output.stdout).expect("text");
    assert_eq!(text.find('\n'), Some(text.len() - 1), "one line: {text}");
    serde_json::from_str(text).expect("an answer")
}

fn lease(answer: Answer) -> Parts {
    match answer {
        Answer::Lease(parts) => parts,
        Answer::Refused(words) => panic!("refused: {words}"),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs()
}

#[test]
fn lease_is_believed_by_the_host_and_the_gateway_that_was_told() {
    let office = Office::new();
    let gateway = office.gateway("{\"admitted\":true}\n");
    let request = office.request("laptop-7", 5);
    let parts = office.lease(&request);
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
    office.lease(&office.request("laptop-7", 5));
    let gateway = office.gateway("{\"refused\":\"for the test\"}\n");
    let output = office.run(&office.request("laptop-7", 6));
    lease(read(&output));
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(log.contains("for the test"), "{log}");
    gateway.join().unwrap();
}

#[test]
fn gateway_that_stays_silent_is_waited_for_half_a_second() {
    let office = Office::new();
    let _deaf = UnixListener::bind(office.path("gateway.sock")).unwrap();
    let begin = Instant::now();
    office.lease(&office.request("laptop-7", 5));
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
    let output = office.run(&office.request("laptop-7", 5));
    assert_eq!(lease(read(&output)).keysets.len(), 8);
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(log.contains("the limit is 524288"), "{log}");
}

#[test]
fn request_that_cannot_be_answered_is_refused_in_words() {
    let office = Office::new();
    assert_eq!(office.refusal(b"hello"), "this is no request for a lease");
    assert_eq!(office.refusal(b""), "this is no request for a lease");
    assert_eq!(office.refusal(&office.request("laptop-8", 5)), "the office does not know this device");
    let mut long = office.request("laptop-7", 5);
    long.resize(MAX_ENVELOPE + 1, b' ');
    assert_eq!(office.refusal(&long), "this is no request for a lease");
    let mut longest = office.request("laptop-7", 5);
    longest.resize(MAX_ENVELOPE, b' ');
    office.lease(&longest);
    assert!(office.refusal(&office.request("laptop-7", 5)).contains("answered already"));
}

#[test]
fn revoked_device_and_line_without_policy_are_refused() {
    let office = Office::new();
    office.enrol("laptop-7", DeviceState::Revoked);
    assert_eq!(office.refusal(&office.request("laptop-7", 5)), "the device is revoked");
    office.enrol("laptop-7", DeviceState::Active);
    fs::remove_file(office.path("bundles/sales.json")).unwrap();
    assert!(office.refusal(&office.request("laptop-7", 5)).contains("no policy"));
}

#[test]
fn record_of_another_device_under_this_name_is_refused() {
    let office = Office::new();
    fs::copy(office.path("devices/laptop-7.json"), office.path("devices/laptop-8.json")).unwrap();
    assert!(office.refusal(&office.request("laptop-8", 5)).contains("another device"));
}

#[test]
fn requests_at_the_same_time_get_different_addresses() {
    let office = Office::new();
    let names: Vec<String> = (0..4).map(|n| format!("laptop-{n}")).collect();
    for name in &names {
        office.enrol(name, DeviceState::Active);
    }
    let children: Vec<_> =
        names.iter().zip(10..).map(|(name, boot)| office.start(&office.request(name, boot))).collect();
    for child in children {
        lease(read(&child.wait_with_output().unwrap()));
    }
    let text = fs::read_to_string(office.path("addresses.json")).unwrap();
    let addresses: std::collections::BTreeMap<String, u32> = serde_json::from_str(&text).unwrap();
    let mut indices: Vec<_> = addresses.values().copied().collect();
    indices.sort_unstable();
    assert_eq!(indices, [0, 1, 2, 3]);
}

/// That nothing is answered, with this exit code and these words.
#[track_caller]
fn fails(office: &Office, code: i32, words: &str) {
    let output = office.run(&office.request("laptop-7", 5));
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{log}");
    assert!(output.stdout.is_empty());
    assert!(log.contains(words), "{log}");
}

#[test]
fn forged_file_of_the_office_answers_nothing() {
    let office = Office::new();
    let forged = sign::<BundleKind>(&office.bundle().payload(), &[&office.enrol]);
    office.write("bundles/sales.json", &forged);
    fails(&office, NOT_VERIFIED, "the stored bundle is not signed");

    let office = Office::new();
    office.write("devices/laptop-7.json", b"{}");
    fails(&office, NOT_VERIFIED, "the stored device is not signed");

    let office = Office::new();
    fs::copy(office.path("keysets/00000001.json"), office.path("keysets/00000002.json")).unwrap();
    fails(&office, NOT_VERIFIED, "00000002.json does not verify");

    let office = Office::new();
    office.write("lease.key", key().to_pkcs8());
    fails(&office, NOT_VERIFIED, "does not pass its check");
}

#[test]
fn tenant_in_the_configuration_pins_the_first_keyset() {
    let office = Office::new();
    office.configure(&format!("tenant = \"{}\"", office.keyset.tenant()));
    office.lease(&office.request("laptop-7", 5));
    office.configure(&format!("tenant = \"{}\"", Digest([1; 32])));
    fails(&office, NOT_VERIFIED, "the tenant is 0101");
}

#[test]
fn lease_key_that_others_can_read_is_not_used() {
    for mode in [0o640, 0o604, 0o644] {
        let office = Office::new();
        office.mode("lease.key", mode);
        fails(&office, LACKS, "readable by others");
    }
}

#[test]
fn missing_or_wrong_files_are_named() {
    for name in ["control.toml", "lease.key", "keysets/00000001.json"] {
        let office = Office::new();
        fs::remove_file(office.path(name)).unwrap();
        fails(&office, LACKS, name);
    }
    let office = Office::new();
    office.configure("extra = 1");
    fails(&office, LACKS, "extra");
    office.write("control.toml", b"lease_s = 600\n");
    fails(&office, LACKS, "0 gateways");
    let office = Office::new();
    office.write("lease.key", b"no key");
    office.mode("lease.key", 0o600);
    fails(&office, LACKS, "is no key");
    let office = Office::new();
    office.write("addresses.json", b"{");
    fails(&office, LACKS, "addresses.json does not parse");
}

#[test]
fn wrong_usage_has_its_own_exit_code() {
    let output = Command::new(env!("CARGO_BIN_EXE_kontor-control")).output().unwrap();
    assert_eq!(output.status.code(), Some(USAGE));
}
