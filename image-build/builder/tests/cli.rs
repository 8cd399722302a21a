//! The program as its callers see it: exit codes, and what is left on the disk when it fails.
#![expect(clippy::unwrap_used, reason = "a test ends where its scene cannot be set")]

use kontor_release::{CommandLine, FORMAT, Image, Piece, Verity};
use kontor_trust::{Digest, Keyset, KeysetKind, Member, Role, Roles, SecretKey};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_kontor-image"))
}

fn source() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// An image with a root of `root_bytes` and a tenant, ready to be signed.
struct Scene(tempfile::TempDir);

impl Scene {
    fn new(root_bytes: u64) -> Self {
        let scene = Self(tempfile::tempdir().unwrap());
        scene.make_image(root_bytes);
        scene.make_tenant();
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn make_image(&self, root_bytes: u64) {
        let at = self.path("image");
        fs::create_dir(&at).unwrap();
        let piece = |name: &str, bytes: u64| {
            fs::File::create(at.join(name)).unwrap().set_len(bytes).unwrap();
            let content = fs::read(at.join(name)).unwrap();
            Piece { name: name.into(), bytes, sha256: Digest::of(&content) }
        };
        let verity = Verity { root_hash: Digest([1; 32]), salt: [2; 32], data_blocks: 1 };
        let line = CommandLine { verity: verity.clone(), built_at: 9, test: true };
        let image = Image {
            format: FORMAT,
            profile: "smoke".into(),
            release: "smoke-1".into(),
            built_at: 9,
            test: true,
            memory_mib_min: 128,
            cmdline: line.to_string(),
            verity,
            kernel: piece("kernel", 1),
            initrd: piece("initrd", 2),
            root: piece("root.img", root_bytes),
            sbom: piece("sbom.cdx.json", 3),
            lock: piece("lock.toml", 4),
        };
        fs::write(at.join("image.json"), serde_json::to_vec(&image).unwrap()).unwrap();
    }

    fn make_tenant(&self) {
        let [root, it, control] = [(); 3].map(|()| SecretKey::generate().unwrap());
        let role = |person: &str, key: &SecretKey| {
            let member = Member { person: person.parse().unwrap(), key: key.public() };
            Role { threshold: 1, keys: vec![member] }
        };
        let of_it = || role("it", &it);
        let lease = role("control", &control);
        let roles = Roles { policy: of_it(), command: of_it(), destroy: of_it(), enrol: of_it(), lease };
        let keyset =
            Keyset { tenant: None, version: 1, root: role("root", &root), roles, control_spki: Vec::new() };
        let payload = keyset.payload();
        fs::create_dir_all(self.path("tenant/keysets")).unwrap();
        fs::write(self.path("tenant/id"), format!("{}\n", Digest::of(&payload))).unwrap();
        let envelope = kontor_trust::sign::<KeysetKind>(&payload, &[&root]);
        fs::write(self.path("tenant/keysets/00000001.json"), envelope).unwrap();
    }

    fn sign(&self, out: &Path) -> Command {
        self.sign_as("1", out)
    }

    fn sign_as(&self, version: &str, out: &Path) -> Command {
        let mut command = program();
        command.args(["sign", "--version", version, "--image"]).arg(self.path("image"));
        command.arg("--tenant-dir").arg(self.path("tenant")).arg("--out").arg(out);
        command
    }
}

#[test]
fn release_is_made_and_named_in_json() {
    let scene = Scene::new(4096);
    let output = scene.sign(&scene.path("release")).arg("--json").output().unwrap();
    assert_eq!(code(&output), 0, "{}", words(&output));
    let manifest = kontor_release::Manifest::parse(&output.stdout).unwrap();
    assert_eq!(manifest.version, 1);
    assert_eq!(names(&scene.path("release")).len(), 7);
    assert_eq!(names(scene.0.path()), ["image", "release", "tenant"]);
}

#[test]
fn full_disk_leaves_nothing_and_is_the_hosts_lack() {
    let scene = Scene::new(8 << 20);
    let small = scene.path("small");
    fs::create_dir(&small).unwrap();
    // A file system of 1 MiB that only this command sees.
    let script = r#"mount -t tmpfs -o size=1m tmpfs "$1" || exit 99; cd "$1"; shift; "$@"; code=$?; ls -A; exit $code"#;
    let sign = scene.sign(&small.join("release"));
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]).arg(&small);
    command.arg(sign.get_program()).args(sign.get_args());
    let output = match command.output() {
        Ok(output) if code(&output) != 99 && !words(&output).contains("unshare") => output,
        _ => {
            eprintln!("skipped: no mount namespace to be had here");
            return;
        }
    };
    assert_eq!(code(&output), 4, "{}", words(&output));
    assert!(words(&output).contains("make room"), "{}", words(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "something is left");
}

#[test]
fn killed_run_leaves_no_result_and_the_next_one_tidies_up() {
    let scene = Scene::new(256 << 20);
    let mut child = scene.sign(&scene.path("release")).spawn().unwrap();
    let begin = Instant::now();
    while !names(scene.0.path()).iter().any(|name| name.starts_with(".release.partial.")) {
        assert!(begin.elapsed() < Duration::from_secs(30), "it never began");
        std::thread::yield_now();
    }
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert!(!status.success(), "it was done before it could be killed");
    assert!(!scene.path("release").exists());
    let output = scene.sign(&scene.path("release")).output().unwrap();
    assert_eq!(code(&output), 0, "{}", words(&output));
    assert_eq!(names(scene.0.path()), ["image", "release", "tenant"]);
}

impl Scene {
    /// `kontor-image publish` or `cosign` of the release `name`, with these keys.
    fn publishing(&self, verb: &str, name: &str, keys: &[&str]) -> Command {
        let mut command = program();
        command.arg(verb).arg("--release").arg(self.path(name)).arg("--tenant-dir").arg(self.path("tenant"));
        command.arg("--repo").arg(self.path("repo")).arg("--keys");
        command.args(keys.iter().map(|key| self.path("keys").join(format!("{key}.key"))));
        command
    }

    /// Every file of the repository but its lock, with its content.
    fn repository(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = Vec::new();
        for part in ["", "metadata", "targets"] {
            let part = self.path("repo").join(part);
            for name in names(&part) {
                let path = part.join(name);
                if path.is_file() && !path.ends_with(".lock") {
                    files.push((path.clone(), fs::read(&path).unwrap()));
                }
            }
        }
        files
    }
}

/// More than a pipe holds, so that whoever reads it is in its middle when half of it is written.
const LARGER_THAN_A_PIPE: u64 = 400_000;

#[test]
fn publishing_killed_in_the_middle_of_a_file_changes_nothing_and_the_next_run_tidies_up() {
    const REBUILDER: [&str; 3] = ["targets-rebuilder", "snapshot", "timestamp"];
    let scene = Scene::new(4096);
    let must = |mut command: Command| {
        let output = command.output().unwrap();
        assert_eq!(code(&output), 0, "{}", words(&output));
    };
    let mut init = program();
    init.arg("tuf-init").arg("--keys").arg(scene.path("keys")).arg("--repo").arg(scene.path("repo"));
    must(init);
    must(scene.sign(&scene.path("first")));
    must(scene.publishing("publish", "first", &["targets-ci"]));
    must(scene.publishing("cosign", "first", &REBUILDER));
    let published = scene.repository();

    fs::remove_dir_all(scene.path("image")).unwrap();
    scene.make_image(LARGER_THAN_A_PIPE);
    must(scene.sign_as("2", &scene.path("second")));
    let root = scene.path("second/root.img");
    let content = fs::read(&root).unwrap();
    fs::remove_file(&root).unwrap();
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &root, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let mut child = scene.publishing("publish", "second", &["targets-ci"]).spawn().unwrap();
    let begun = |name: &String| name.starts_with(".kontor-");
    // It is read once to be measured, and once more to be copied; in between the copy is begun.
    let writer = std::thread::spawn({
        let (root, content) = (root.clone(), content.clone());
        move || fs::write(&root, &content)
    });
    let begin = Instant::now();
    while !names(&scene.path("repo/targets")).iter().any(begun) {
        assert_eq!(child.try_wait().unwrap(), None, "it ended before it copied the file");
        assert!(begin.elapsed() < Duration::from_secs(30), "it never began to copy");
        std::thread::sleep(Duration::from_millis(5));
    }
    writer.join().unwrap().unwrap();
    let mut fifo = fs::OpenOptions::new().write(true).open(&root).unwrap();
    std::io::Write::write_all(&mut fifo, &content[..content.len() / 2]).unwrap();
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success());
    drop(fifo);
    assert!(names(&scene.path("repo/targets")).iter().any(begun));
    assert_eq!(scene.repository(), published);

    fs::remove_file(&root).unwrap();
    fs::write(&root, &content).unwrap();
    must(scene.publishing("publish", "second", &["targets-ci"]));
    must(scene.publishing("cosign", "second", &REBUILDER));
    assert!(!names(&scene.path("repo/targets")).iter().any(begun));
    let now = scene.repository();
    assert!(now.len() > published.len() && now.iter().any(|(_, bytes)| *bytes == content));
}

#[test]
fn foreign_directory_is_not_overwritten() {
    let scene = Scene::new(4096);
    let out = scene.path("thesis");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("chapter1"), "").unwrap();
    let output = scene.sign(&out).output().unwrap();
    assert_eq!(code(&output), 2);
    assert_eq!(names(&out), ["chapter1"]);
}

#[test]
fn version_zero_is_wrong_usage() {
    let scene = Scene::new(1);
    let mut command = program();
    command.args(["sign", "--version", "0", "--image", "i", "--tenant-dir", "t", "--out"]);
    assert_eq!(code(&command.arg(scene.path("o")).output().unwrap()), 2);
}

#[test]
fn compare_says_by_its_exit_code_and_by_name_what_differs() {
    let scene = Scene::new(4096);
    let (image, other) = (scene.path("image"), scene.path("other"));
    fs::create_dir(&other).unwrap();
    for name in names(&image) {
        fs::copy(image.join(&name), other.join(&name)).unwrap();
    }
    let compare = || program().arg("compare").arg(&image).arg(&other).output().unwrap();
    assert_eq!(code(&compare()), 0);
    fs::write(other.join("kernel"), "x").unwrap();
    let output = compare();
    assert_eq!((code(&output), &output.stdout[..]), (1, &b"kernel: differs from byte 0 on\n"[..]));
    let output = program().arg("compare").arg(&image).arg(scene.path("absent")).output().unwrap();
    assert_eq!(code(&output), 2);
}

#[test]
fn inspect_finds_a_root_image_that_its_hash_does_not_fit() {
    let scene = Scene::new(8192);
    let output = program().arg("inspect").arg(scene.path("image")).arg("--json").output().unwrap();
    assert_eq!(code(&output), 3);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["verified"], &report["root_hash_fits"]), (&false.into(), &false.into()));
}

#[test]
fn unknown_profile_and_stale_lock_are_wrong_usage() {
    let dir = tempfile::tempdir().unwrap();
    let run = |profile: &str, lock: &Path| {
        let mut command = program();
        command.env("KONTOR_CACHE", dir.path()).args(["build", "--profile", profile, "--source"]);
        command.arg(source()).arg("--lock").arg(lock).arg("--out").arg(dir.path().join("o")).output().unwrap()
    };
    let committed = source().join("image-build/image/smoke.lock.toml");
    assert_eq!(code(&run("no-such-profile", &committed)), 2);
    let stale = dir.path().join("stale.toml");
    let text = fs::read_to_string(&committed).unwrap().replace("\"iproute2\"", "\"iproute3\"");
    fs::write(&stale, text).unwrap();
    let output = run("smoke", &stale);
    assert_eq!(code(&output), 2);
    assert!(words(&output).contains("kontor-image lock --profile smoke"), "{}", words(&output));
    assert!(!dir.path().join("o").exists());
}

#[test]
fn lock_whose_packages_are_gone_is_unreachable_and_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let mirror = format!("file:{}", dir.path().display());
    let output = program()
        .env("KONTOR_CACHE", dir.path().join("cache"))
        .args(["build", "--profile", "smoke", "--mirror", &mirror])
        .arg("--mirror")
        .arg(format!("Debian-Security={mirror}"))
        .arg("--source")
        .arg(source())
        .arg("--out")
        .arg(dir.path().join("o"))
        .output()
        .unwrap();
    if code(&output) == 4 {
        eprintln!("skipped: {}", words(&output));
        return;
    }
    assert_eq!(code(&output), 5, "{}", words(&output));
    assert!(words(&output).contains("no longer has"), "{}", words(&output));
    assert!(words(&output).contains("make a new lock with kontor-image lock"), "{}", words(&output));
    assert_eq!(names(dir.path()), ["cache"]);
}

#[test]
fn archive_that_is_not_there_cannot_be_locked() {
    let dir = tempfile::tempdir().unwrap();
    let mirror = format!("file:{}", dir.path().display());
    let lock = |mirror: &str| {
        let mut command = program();
        command.env("KONTOR_CACHE", dir.path().join("cache")).args([
            "lock",
            "--profile",
            "smoke",
            "--source",
        ]);
        command.arg(source()).args(["--mirror", mirror, "--out"]).arg(dir.path().join("l")).output().unwrap()
    };
    let output = lock(&mirror);
    if code(&output) == 4 {
        eprintln!("skipped: {}", words(&output));
        return;
    }
    assert_eq!(code(&output), 5, "{}", words(&output));
    assert_eq!(code(&lock("gopher://x")), 2);
    assert_eq!(names(dir.path()), ["cache"]);
}
