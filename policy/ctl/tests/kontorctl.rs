//! `kontorctl` as IT calls it.

use kontor_bundle::Bundle;
use kontor_trust::{
    BundleKind, Device, DeviceKind, DeviceState, Digest, KeysetKind, LeaseKind, SecretKey, TrustedKeyset,
    sign,
};
use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};
use tempfile::TempDir;

/// Exit codes, as `--help` has them.
const USAGE: i32 = 2;
const NOT_VERIFIED: i32 = 3;
const LACKS: i32 = 4;

/// A place to work in, with a tenant's keys in `keys`.
struct Desk(TempDir);

impl Desk {
    fn empty() -> Self {
        Self(TempDir::new().expect("a directory"))
    }

    fn new() -> Self {
        let desk = Self::empty();
        desk.done("keyset init --out keys");
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).expect("a file")
    }

    fn run(&self, words: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kontorctl"));
        command.current_dir(self.0.path()).args(words.split(' ')).output().expect("the built program")
    }

    /// Runs what must succeed; its output.
    #[track_caller]
    fn done(&self, words: &str) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// Runs what must fail with this code and say these words.
    #[track_caller]
    fn fails(&self, words: &str, code: i32, says: &str) {
        let output = self.run(words);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{error}");
        assert!(error.contains(says), "{error}");
    }

    fn tenant(&self) -> Digest {
        String::from_utf8(self.read("keys/id")).expect("text").trim().parse().expect("a digest")
    }

    fn keyset(&self) -> TrustedKeyset {
        TrustedKeyset::first(&self.read("keys/keysets/00000001.json"), &self.tenant()).expect("a good keyset")
    }

    fn key(&self, name: &str) -> SecretKey {
        SecretKey::from_pkcs8(&self.read(&format!("keys/{name}.key"))).expect("a key")
    }

    /// Makes the next keyset with nothing changed.
    fn next_keyset(&self) -> TrustedKeyset {
        let first = self.keyset();
        let mut keyset = first.keyset().clone();
        keyset.tenant = Some(first.tenant());
        keyset.version = 2;
        let roots = [self.key("root-1"), self.key("root-3")];
        let envelope = sign::<KeysetKind>(&keyset.payload(), &[&roots[0], &roots[1]]);
        fs::write(self.path("keys/keysets/00000002.json"), &envelope).expect("a writable directory");
        first.advance(&envelope).expect("a good keyset")
    }

    fn source(&self, revision: u64) -> String {
        format!(
            r#"
tenant = "{}"
line = "sales"
revision = {revision}
min_release = 1
lease_s_max = 3600
apply_s = 60
silence_s = 180
lapse_off_s = 60

[[gateways]]
id = 1
key = "{}"
endpoints = ["192.0.2.1:51820"]
v4 = "10.77.0.1"
v6 = "fd77::1"

[settings]
allow_emulation = false
allow_test_image = false
memory_mib = 1024
resolvers = []

[access]
destinations = [{{ to = "10.0.0.0/8", protocol = "any" }}]
"#,
            self.tenant(),
            "09".repeat(32)
        )
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("a writable directory");
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("a file").permissions().mode() & 0o777
}

fn record(rest: &str) -> String {
    let host = "11".repeat(32);
    format!(
        "device record --keys keys --device anna-1 --line sales --serial 1 --host-key {host} --out d.json{rest}"
    )
}

#[test]
fn init_founds_a_tenant() {
    let desk = Desk::empty();
    let printed = desk.done("keyset init --out keys");
    assert_eq!(printed.trim().parse::<Digest>().unwrap(), desk.tenant());
    let keyset = desk.keyset();
    assert_eq!((keyset.keyset().root.threshold, keyset.keyset().root.keys.len()), (2, 3));
    assert_eq!(keyset.keyset().roles.lease.keys[0].key, desk.key("lease").public());
    assert_eq!(keyset.keyset().control_spki, [desk.key("control").public().pin()]);
    let names = "root-1 root-2 root-3 policy-1 command-1 destroy-1 destroy-2 enrol-1 lease control";
    for name in names.split(' ') {
        assert_eq!(mode(&desk.path(&format!("keys/{name}.key"))), 0o600, "{name}");
    }
    assert_eq!(mode(&desk.path("keys")), 0o700);
}

#[test]
fn init_takes_numbers_and_refuses_what_makes_no_keyset() {
    let desk = Desk::empty();
    desk.done("keyset init --out keys --root-keys 5 --root-threshold 3 --policy-keys 2 --policy-threshold 2");
    let keyset = desk.keyset();
    assert_eq!((keyset.keyset().root.threshold, keyset.keyset().root.keys.len()), (3, 5));
    assert_eq!(keyset.keyset().roles.policy.threshold, 2);
    desk.done("keyset init --out many --root-keys 32 --root-threshold 32");
    let pin = Digest([7; 32]);
    desk.done(&format!("keyset init --out pinned --control-spki {pin}"));
    let printed = desk.done("keyset inspect pinned/keysets/00000001.json");
    assert_eq!(printed.matches("control  ").count(), 2);
    assert!(printed.contains(&format!("control  {pin}")), "{printed}");
    desk.fails("keyset init --out none --root-keys 33", USAGE, "33");
    desk.fails("keyset init --out none --root-keys 0", USAGE, "0");
    desk.fails("keyset init --out none --root-threshold 4", USAGE, "role root needs 4 of 3 persons");
    desk.fails("keyset init --out none --enrol-threshold 0", USAGE, "role enrol needs 0 of 1 persons");
    assert!(!desk.path("none").exists());
}

#[test]
fn key_is_never_overwritten() {
    let desk = Desk::new();
    let before = desk.read("keys/root-1.key");
    desk.fails("keyset init --out keys", LACKS, "exists already");
    fs::remove_file(desk.path("keys/keysets/00000001.json")).unwrap();
    desk.fails("keyset init --out keys", LACKS, "root-1.key exists already");
    assert_eq!(desk.read("keys/root-1.key"), before);
}

#[test]
fn inspect_follows_the_chain() {
    let desk = Desk::new();
    let printed = desk.done("keyset inspect keys/keysets/00000001.json");
    assert!(printed.contains(&format!("tenant   {}", desk.tenant())), "{printed}");
    assert!(printed.contains("root     2 of 3 keys"), "{printed}");
    desk.next_keyset();
    let both = "keyset inspect keys/keysets/00000001.json keys/keysets/00000002.json";
    assert!(desk.done(both).contains("version  2"));
    desk.fails(
        "keyset inspect keys/keysets/00000002.json",
        NOT_VERIFIED,
        "of version 2 came where 1 is next",
    );
    desk.done(&format!("keyset inspect --tenant {} keys/keysets/00000001.json", desk.tenant()));
    let other = "01".repeat(32);
    desk.fails(
        &format!("keyset inspect --tenant {other} keys/keysets/00000001.json"),
        NOT_VERIFIED,
        "the tenant is",
    );
    desk.write("forged.json", "{}");
    desk.fails("keyset inspect forged.json", NOT_VERIFIED, "forged.json does not verify");
    desk.fails("keyset inspect absent.json", LACKS, "absent.json");
}

#[test]
fn record_is_signed_by_the_enrol_role() {
    let desk = Desk::new();
    let printed = desk.done(&record(""));
    let verified = desk.keyset().verify::<DeviceKind>(&desk.read("d.json")).unwrap();
    let device = Device::parse(&verified).unwrap();
    assert_eq!((device.device.as_str(), device.line.as_str(), device.serial), ("anna-1", "sales", 1));
    assert_eq!((device.tenant, device.state), (desk.tenant(), DeviceState::Active));
    assert_eq!(device.host_key.to_string(), "11".repeat(32));
    assert!(printed.contains(&device.enrolment.to_string()), "{printed}");
    assert_eq!(mode(&desk.path("d.json")), 0o644);
    assert!(desk.done("device inspect --keys keys d.json").contains("anna-1"));
}

#[test]
fn each_enrolment_is_new_unless_it_is_named() {
    let desk = Desk::new();
    let enrolment = |rest: &str| {
        desk.done(&record(rest));
        let verified = desk.keyset().verify::<DeviceKind>(&desk.read("d.json")).unwrap();
        Device::parse(&verified).unwrap()
    };
    let (first, second) = (enrolment(""), enrolment(""));
    assert_ne!(first.enrolment, second.enrolment);
    let revoked = enrolment(&format!(" --revoked --enrolment {}", second.enrolment));
    assert_eq!((revoked.enrolment, revoked.state), (second.enrolment, DeviceState::Revoked));
    desk.fails(&record(" --revoked"), USAGE, "--enrolment");
}

#[test]
fn bundle_is_signed_by_the_policy_role() {
    let desk = Desk::new();
    desk.write("b.toml", &desk.source(3));
    let printed = desk.done("bundle sign --keys keys --in b.toml --out b.json");
    let verified = desk.keyset().verify::<BundleKind>(&desk.read("b.json")).unwrap();
    assert_eq!(Bundle::parse(&verified).unwrap().revision, 3);
    assert_eq!(printed, format!("bundle sales revision 3 {}\n", verified.hash()));
    assert!(desk.done("bundle inspect --keys keys b.json").contains("\"revision\":3"));
}

#[test]
fn wrong_bundle_is_not_signed() {
    let desk = Desk::new();
    let sign = "bundle sign --keys keys --in b.toml --out b.json";
    desk.fails(sign, LACKS, "b.toml");
    desk.write("b.toml", &desk.source(0));
    desk.fails(sign, USAGE, "revision is 0");
    desk.write("b.toml", &format!("extra = 1\n{}", desk.source(1)));
    desk.fails(sign, USAGE, "extra");
    desk.write("b.toml", &desk.source(1).replace(&desk.tenant().to_string(), &"01".repeat(32)));
    desk.fails(sign, NOT_VERIFIED, "another tenant");
    fs::write(desk.path("b.toml"), b"\xff").unwrap();
    desk.fails(sign, USAGE, "not UTF-8");
    assert!(!desk.path("b.json").exists());
}

#[test]
fn too_few_keys_sign_nothing() {
    let desk = Desk::empty();
    desk.done("keyset init --out keys --policy-keys 2 --policy-threshold 2");
    desk.write("b.toml", &desk.source(1));
    desk.done("bundle sign --keys keys --in b.toml --out b.json");
    fs::remove_file(desk.path("keys/policy-2.key")).unwrap();
    desk.fails(
        "bundle sign --keys keys --in b.toml --out c.json",
        NOT_VERIFIED,
        "1 persons of the role signed",
    );
    fs::remove_file(desk.path("keys/enrol-1.key")).unwrap();
    desk.fails(&record(""), NOT_VERIFIED, "enough persons");
    assert!(!desk.path("c.json").exists() && !desk.path("d.json").exists());
}

#[test]
fn key_that_others_can_read_is_not_used() {
    let desk = Desk::new();
    fs::set_permissions(desk.path("keys/policy-1.key"), Permissions::from_mode(0o640)).unwrap();
    desk.fails(&record(""), LACKS, "policy-1.key is readable by others");
}

#[test]
fn file_that_is_no_key_is_named() {
    let desk = Desk::new();
    desk.write("keys/notes.key", "no key");
    fs::set_permissions(desk.path("keys/notes.key"), Permissions::from_mode(0o600)).unwrap();
    desk.fails(&record(""), LACKS, "notes.key is no key");
}

#[test]
fn tenant_pins_the_directory() {
    let desk = Desk::new();
    desk.done(&record(&format!(" --tenant {}", desk.tenant())));
    desk.fails(&record(&format!(" --tenant {}", "01".repeat(32))), NOT_VERIFIED, "the tenant is 0101");
}

#[test]
fn newest_keyset_decides_who_signs() {
    let desk = Desk::new();
    let second = desk.next_keyset();
    desk.done(&record(""));
    assert!(second.verify::<DeviceKind>(&desk.read("d.json")).is_ok());
    fs::copy(desk.path("keys/keysets/00000001.json"), desk.path("keys/keysets/00000003.json")).unwrap();
    desk.fails(&record(""), NOT_VERIFIED, "00000003.json does not verify");
}

#[test]
fn inspect_refuses_what_is_not_signed_for_the_tenant() {
    let (desk, other) = (Desk::new(), Desk::new());
    other.done(&record(""));
    fs::copy(other.path("d.json"), desk.path("d.json")).unwrap();
    desk.fails("device inspect --keys keys d.json", NOT_VERIFIED, "d.json is no device");
    desk.write("l.json", std::str::from_utf8(&sign::<LeaseKind>(b"{}", &[&desk.key("lease")])).unwrap());
    desk.fails("bundle inspect --keys keys l.json", NOT_VERIFIED, "l.json is no bundle");
    // Signed by the right key, but naming another tenant.
    let verified = other.keyset().verify::<DeviceKind>(&other.read("d.json")).unwrap();
    let foreign = sign::<DeviceKind>(verified.payload(), &[&desk.key("enrol-1")]);
    fs::write(desk.path("d.json"), foreign).unwrap();
    desk.fails("device inspect --keys keys d.json", NOT_VERIFIED, "of another tenant");
}

#[test]
fn every_command_explains_itself() {
    let desk = Desk::empty();
    for words in [
        "--help",
        "keyset init --help",
        "keyset inspect --help",
        "device record --help",
        "bundle sign --help",
    ] {
        assert!(desk.done(words).contains("Usage: kontorctl"), "{words}");
    }
    desk.fails("bundle", USAGE, "Usage");
    desk.fails(&record(" --device ../x"), USAGE, "--device");
    desk.fails(&record("").replace("anna-1", "../x"), USAGE, "no device id");
}
