//! Trials of what the commands refuse: bundles and releases of others, signed by too few, or older than the last.
//!
//! Each is tried on a PC of its own, so that the one whose work VM runs keeps what it has.

use super::{
    LOOK_EVERY, Outcome, Stage,
    lies::flip,
    thread::{closes, starts},
    words,
};
use crate::{
    liar::unix_now,
    office::{CONTROL_PORT, DEVICE, LINE, Office, write},
    run::{self, Error, at, quietly, within},
    scene::PATIENCE,
    world::{OFFICE_ADDRESS, Power, User},
};
use kontor_bundle::Bundle;
use kontor_trust::{BundleKind, Digest, SecretKey, TrustedKeyset, sign};
use libtest_mimic::Failed;
use ring::signature::Ed25519KeyPair;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Instant,
};

/// A PC with `kontord`'s files, on which nothing runs.
struct Pc {
    directory: PathBuf,
    bin: PathBuf,
}

impl Pc {
    fn new(stage: &mut Stage, name: &str, tenant: &str) -> run::Result<Self> {
        let directory = stage.plan.scratch.join(name);
        // An earlier trial's may be there.
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir(&directory).map_err(at("create", &directory))?;
        let root = match &stage.scene {
            Some(scene) => scene.office.release_root.clone(),
            None => return Err(Error::Unexpected("the scene is closed".into())),
        };
        let config = format!(
            "state = {:?}\nsocket = {:?}\ntenant = \"{tenant}\"\ndevice = \"{DEVICE}\"\n\
             office = \"{OFFICE_ADDRESS}:{CONTROL_PORT}\"\nrelease_root = \"{root}\"\n",
            directory.join("state"),
            directory.join("socket"),
        );
        write(&directory.join("kontord.toml"), config.as_bytes())?;
        User::Employee.owns(&directory)?;
        Ok(Self { directory, bin: stage.plan.bin.clone() })
    }

    fn kontord(&self, verb: &str) -> Command {
        let mut command = User::Employee.command(Power::None, self.bin.join("kontord"));
        command.arg(verb).arg("--config").arg(self.directory.join("kontord.toml"));
        command
    }

    fn provision(&self, keyset: &Path, device: &Path, bundle: &Path) -> run::Result<Output> {
        let mut command = self.kontord("provision");
        command.arg("--keyset").arg(keyset).arg("--device").arg(device).arg("--bundle").arg(bundle);
        within(PATIENCE, &mut command)
    }

    fn install(&self, repository: &Path) -> run::Result<Output> {
        within(PATIENCE, self.kontord("install").arg("--repo").arg(repository))
    }
}

/// A company in which two sign a bundle, and a PC of its.
struct Strict {
    pc: Pc,
    keys: PathBuf,
    keyset: PathBuf,
    record: PathBuf,
    bin: PathBuf,
    source: String,
}

impl Strict {
    fn found(stage: &mut Stage) -> Result<Self, Failed> {
        let (bin, keys) = (stage.plan.bin.clone(), stage.plan.scratch.join("strict-keys"));
        let _ = fs::remove_dir_all(&keys);
        let mut init = Command::new(bin.join("kontorctl"));
        init.args(["keyset", "init", "--policy-keys", "2", "--policy-threshold", "2", "--out"]).arg(&keys);
        let tenant = String::from_utf8_lossy(&quietly(&mut init).map_err(words)?).trim().to_owned();
        let pc = Pc::new(stage, "strict-pc", &tenant).map_err(words)?;
        let host_key = quietly(&mut pc.kontord("host-key")).map_err(words)?;
        let record = keys.join("device.json");
        let mut sign = Command::new(bin.join("kontorctl"));
        sign.args(["device", "record", "--device", DEVICE, "--line", LINE, "--serial", "1", "--host-key"]);
        sign.arg(String::from_utf8_lossy(&host_key).trim())
            .arg("--keys")
            .arg(&keys)
            .arg("--out")
            .arg(&record);
        quietly(&mut sign).map_err(words)?;
        let office = &stage.scene()?.office;
        let source = fs::read_to_string(office.path("bundle.toml"))?.replace(&office.tenant, &tenant);
        let keyset = keys.join("keysets/00000001.json");
        for part in [&keys, &keys.join("keysets")] {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(part, fs::Permissions::from_mode(0o755))?;
        }
        Ok(Self { pc, keys, keyset, record, bin, source })
    }

    /// A bundle that both signed.
    fn bundle(&self, revision: u64) -> Result<Vec<u8>, Failed> {
        let lines = self.source.lines().map(|line| match line.split_once(" = ") {
            Some(("revision", _)) => format!("revision = {revision}\n"),
            _ => format!("{line}\n"),
        });
        let (source, out) = (self.keys.join("bundle.toml"), self.keys.join("bundle.json"));
        fs::write(&source, lines.collect::<String>())?;
        let mut sign = Command::new(self.bin.join("kontorctl"));
        sign.args(["bundle", "sign", "--keys"]).arg(&self.keys).arg("--in").arg(&source);
        quietly(sign.arg("--out").arg(&out)).map_err(words)?;
        Ok(fs::read(&out)?)
    }

    fn try_bundle(&self, bundle: &[u8]) -> Result<Output, Failed> {
        let file = self.keys.join("tried.json");
        fs::write(&file, bundle)?;
        self.pc.provision(&self.keyset, &self.record, &file).map_err(words)
    }
}

/// What is not signed as the policy role asks is not stored: exit code 3, and the message says what is wrong.
pub(super) fn bundles(stage: &mut Stage) -> Outcome {
    type Edit = fn(&mut Vec<Value>);
    const CASES: &[(&str, Edit, &str)] = &[
        ("unsigned", |signatures| signatures.clear(), "0 persons of the role signed, 2 are needed"),
        (
            "below the threshold",
            |signatures| signatures.truncate(1),
            "1 persons of the role signed, 2 are needed",
        ),
        (
            "signed twice by one",
            |signatures| signatures[1] = signatures[0].clone(),
            "signs the envelope twice",
        ),
        (
            "signed wrongly",
            |signatures| {
                let first = signatures[0]["sig"].clone();
                signatures[0]["sig"] = std::mem::replace(&mut signatures[1]["sig"], first);
            },
            "is wrong",
        ),
    ];
    let strict = Strict::found(stage)?;
    let (older, good) = (strict.bundle(1)?, strict.bundle(2)?);
    accepted("the good bundle", &strict.try_bundle(&good)?)?;
    let memory = only_file(&strict.pc.directory.join("state"), "memory.json")?;
    let before = fs::read(&memory)?;

    for (name, edit, said) in CASES {
        let mut envelope: Value = serde_json::from_slice(&good)?;
        edit(envelope["signatures"].as_array_mut().ok_or("an envelope has signatures")?);
        let bundle = serde_json::to_vec(&envelope)?;
        refused(&format!("bundle {name}"), &strict.try_bundle(&bundle)?, &["bundle", said])?;
    }
    let others = fs::read(stage.scene()?.office.bundle())?;
    refused("bundle of others", &strict.try_bundle(&others)?, &["bundle", "0 persons of the role signed"])?;
    let misplaced = strict_signature_for_others(&strict, &good)?;
    refused("bundle for others", &strict.try_bundle(&misplaced)?, &["the bundle is of another tenant"])?;
    let said = "the bundle is of version 1, version 2 was seen before";
    refused("older bundle", &strict.try_bundle(&older)?, &[said])?;
    let mut changed = good.clone();
    flip(&mut changed);
    refused("changed bundle", &strict.try_bundle(&changed)?, &["the bundle is not signed as it must be"])?;

    let bundle = strict.keys.join("bundle.json");
    fs::write(&bundle, &good)?;
    for (file, said) in [(&strict.record, "the device record is not signed"), (&strict.keyset, "keyset")] {
        let original = fs::read(file)?;
        let mut changed = original.clone();
        flip(&mut changed);
        fs::write(file, changed)?;
        let output = strict.pc.provision(&strict.keyset, &strict.record, &bundle).map_err(words)?;
        fs::write(file, original)?;
        refused(&format!("changed {}", file.display()), &output, &[said])?;
    }
    if fs::read(&memory)? != before {
        return Err("something refused was stored".into());
    }
    accepted("the good bundle again", &strict.try_bundle(&good)?)
}

/// The bundle with another tenant in it, signed by both who may.
fn strict_signature_for_others(strict: &Strict, good: &[u8]) -> Result<Vec<u8>, Failed> {
    let keyset = TrustedKeyset::dangerous_unpinned(&fs::read(&strict.keyset)?)?;
    let mut bundle = Bundle::parse(&keyset.verify::<BundleKind>(good)?)?;
    bundle.tenant = Digest([7; 32]);
    let mut keys = Vec::new();
    for name in ["policy-1.key", "policy-2.key"] {
        keys.push(SecretKey::from_pkcs8(&fs::read(strict.keys.join(name))?)?);
    }
    Ok(sign::<BundleKind>(&bundle.payload(), &keys.iter().collect::<Vec<_>>()))
}

/// A release that too few vouch for is not installed, even from somebody who has the keys that lie on servers.
pub(super) fn releases(stage: &mut Stage) -> Outcome {
    type Edit = fn(&mut Vec<Value>);
    const CASES: &[(&str, Edit)] = &[
        ("unsigned", Vec::clear),
        ("below the threshold", |signatures| signatures.truncate(1)),
        ("signed twice by one", |signatures| signatures[1] = signatures[0].clone()),
        ("signed wrongly", |signatures| {
            let first = signatures[0]["sig"].clone();
            signatures[0]["sig"] = std::mem::replace(&mut signatures[1]["sig"], first);
        }),
    ];
    let tenant = stage.scene()?.office.tenant.clone();
    let pc = Pc::new(stage, "other-pc", &tenant).map_err(words)?;
    for (name, edit) in CASES {
        let copy = Copy::of(stage)?;
        let mut targets = copy.read("targets.json")?;
        edit(targets["signatures"].as_array_mut().ok_or("a role has signatures")?);
        copy.put("targets.json", &targets)?;
        copy.seal(None)?;
        refused(&format!("release {name}"), &pc.install(&copy.repository).map_err(words)?, &["targets"])?;
    }
    let copy = Copy::of(stage)?;
    copy.seal(None)?;
    accepted("the release, sealed again", &pc.install(&copy.repository).map_err(words)?)
}

/// Releases of others, and one older than the last: not installed, exit code 3, and the message says so.
pub(super) fn releases_of_others(stage: &mut Stage) -> Outcome {
    let strict = Strict::found(stage)?;
    let repository = stage.scene()?.office.repository();
    let output = strict.pc.install(&repository).map_err(words)?;
    refused("release for others", &output, &["it has one of another tenant"])?;

    let tenant = stage.scene()?.office.tenant.clone();
    let pc = Pc::new(stage, "other-pc", &tenant).map_err(words)?;
    let scratch = stage.plan.scratch.join("others");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir(&scratch)?;
    let image_tool = stage.plan.bin.join("kontor-image");
    let mut init = Command::new(&image_tool);
    init.arg("tuf-init")
        .arg("--keys")
        .arg(scratch.join("keys"))
        .arg("--repo")
        .arg(scratch.join("repository"));
    quietly(&mut init).map_err(words)?;
    let output = pc.install(&scratch.join("repository")).map_err(words)?;
    refused("repository of others", &output, &["1.root.json", "it is another company's"])?;

    // The next release, installed here and then to be replaced by the last one.
    let newer = scratch.join("newer");
    crate::build::copy(&repository, &newer).map_err(words)?;
    let office = &stage.scene.as_ref().ok_or("the scene is closed")?.office;
    let release = scratch.join("release");
    let mut sign = Command::new(&image_tool);
    sign.args(["sign", "--version", "2", "--image"]).arg(&stage.plan.image);
    sign.arg("--tenant-dir").arg(office.tenant_directory()).arg("--out").arg(&release);
    quietly(&mut sign).map_err(words)?;
    office.publish_to(&newer, &release).map_err(words)?;
    accepted("the next release", &pc.install(&newer).map_err(words)?)?;
    let output = pc.install(&repository).map_err(words)?;
    refused("older metadata", &output, &["timestamp"])?;
    // Without its memory of metadata it still knows the release.
    let fetched = only_file(&pc.directory.join("state"), "fetched")?;
    fs::remove_dir_all(&fetched)?;
    let output = pc.install(&repository).map_err(words)?;
    refused("older release", &output, &["the release is of version 1, version 2 was seen before"])?;
    let _ = fs::remove_dir_all(&scratch);
    Ok(())
}

/// Metadata that expired after it was installed stops installing, and no start.
pub(super) fn expired(stage: &mut Stage) -> Outcome {
    stage.quiet()?;
    let copy = Copy::of(stage)?;
    let mut life_s = 2;
    // On a busy machine it may expire while it is installed.
    loop {
        copy.seal(Some(unix_now() + life_s))?;
        let output = stage.scene()?.home.install(&copy.repository).map_err(words)?;
        if output.status.success() {
            break;
        }
        if life_s > 60 || !String::from_utf8_lossy(&output.stderr).contains("expired") {
            return accepted("short-lived metadata", &output);
        }
        life_s *= 2;
    }
    let limit = Instant::now() + PATIENCE;
    let refusal = loop {
        let output = stage.scene()?.home.install(&copy.repository).map_err(words)?;
        if !output.status.success() || Instant::now() > limit {
            break output;
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let outcome = refused("expired metadata", &refusal, &["expired"]).and_then(|()| starts(stage));
    let repository = stage.scene()?.office.repository();
    let restored = stage.scene()?.home.install(&repository).map_err(words)?;
    outcome?;
    accepted("the repository again", &restored)?;
    closes(stage)
}

/// A copy of the office's repository in the hands of somebody who has keys of it.
struct Copy {
    repository: PathBuf,
    keys: PathBuf,
}

impl Copy {
    fn of(stage: &mut Stage) -> Result<Self, Failed> {
        let repository = stage.plan.scratch.join("copy");
        let _ = fs::remove_dir_all(&repository);
        fs::create_dir(&repository)?;
        let office: &Office = &stage.scene()?.office;
        let original = office.repository();
        crate::build::copy(&original.join("metadata"), &repository.join("metadata")).map_err(words)?;
        std::os::unix::fs::symlink(original.join("targets"), repository.join("targets"))?;
        Ok(Self { repository, keys: office.path("release-keys") })
    }

    /// A role's only file: `1.targets.json` for `targets.json`.
    fn file(&self, role: &str) -> Result<PathBuf, Failed> {
        only_file(&self.repository.join("metadata"), role)
    }

    fn read(&self, role: &str) -> Result<Value, Failed> {
        Ok(serde_json::from_slice(&fs::read(self.file(role)?)?)?)
    }

    fn put(&self, role: &str, value: &Value) -> Outcome {
        Ok(fs::write(self.file(role)?, serde_json::to_vec_pretty(value)?)?)
    }

    /// Lets snapshot and timestamp name what is there now. With `expires` (Unix seconds) all that is above the
    /// root expires then.
    fn seal(&self, expires: Option<u64>) -> Outcome {
        let time = match expires {
            Some(at) => Some(jiff::Timestamp::from_second(i64::try_from(at)?)?.to_string()),
            None => None,
        };
        if let Some(time) = &time {
            let mut targets = self.read("targets.json")?;
            targets["signed"]["expires"] = time.clone().into();
            self.sign(&mut targets, &["targets-ci", "targets-rebuilder"])?;
            self.put("targets.json", &targets)?;
        }
        for (role, named) in [("snapshot", "targets.json"), ("timestamp", "snapshot.json")] {
            let file = format!("{role}.json");
            let bytes = fs::read(self.file(named)?)?;
            let mut value = self.read(&file)?;
            let entry = &mut value["signed"]["meta"][named];
            entry["length"] = bytes.len().into();
            entry["hashes"]["sha256"] = hex::encode(Digest::of(&bytes).0).into();
            if let Some(time) = &time {
                value["signed"]["expires"] = time.clone().into();
            }
            self.sign(&mut value, &[role])?;
            self.put(&file, &value)?;
        }
        Ok(())
    }

    /// Makes each signature anew, in the order in which `keys` made them.
    fn sign(&self, role: &mut Value, keys: &[&str]) -> Outcome {
        // Keys are sorted and nothing stands between: for text and whole numbers that is canonical JSON.
        let message = serde_json::to_vec(&role["signed"])?;
        let signatures = role["signatures"].as_array_mut().ok_or("a role has signatures")?;
        for (signature, name) in signatures.iter_mut().zip(keys) {
            let key = fs::read(self.keys.join(format!("{name}.key")))?;
            let key = Ed25519KeyPair::from_pkcs8(&key).map_err(|error| error.to_string())?;
            signature["sig"] = hex::encode(key.sign(&message)).into();
        }
        Ok(())
    }
}

/// The one file or directory below `directory` whose name ends in `name`.
fn only_file(directory: &Path, name: &str) -> Result<PathBuf, Failed> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            let matches = path.file_name().is_some_and(|own| own.to_string_lossy().ends_with(name));
            if matches {
                found.push(path);
            } else if path.is_dir() {
                open.push(path);
            }
        }
    }
    match <[PathBuf; 1]>::try_from(found) {
        Ok([path]) => Ok(path),
        Err(found) => Err(format!("{name} in {}: {found:?}", directory.display()).into()),
    }
}

/// The command refused with exit code 3, and its message holds all of `said`.
fn refused(what: &str, output: &Output, said: &[&str]) -> Outcome {
    let heard = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(3) && said.iter().all(|words| heard.contains(words)) {
        return Ok(());
    }
    Err(format!("{what}: {} {heard}; expected {said:?}", output.status).into())
}

fn accepted(what: &str, output: &Output) -> Outcome {
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{what}: {} {}", output.status, String::from_utf8_lossy(&output.stderr)).into())
}
