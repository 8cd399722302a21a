//! A PC with Kontor on it: `kontord` as a process, `kontor` as one for each verb, and a gateway that
//! sends every datagram back.

use crate::{
    https,
    repository::Repository,
    stub::{self, ROOT},
    tenant::{Tenant, device_id},
};
use command_fds::{CommandFdExt, FdMapping};
use kontor_bundle::Bundle;
use kontor_release::{CommandLine, Digest, FORMAT, Image, Manifest, Piece, Verity};
use kontor_trust::SecretKey;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, test_kill_process},
};
use std::{
    fs,
    io::{BufRead, BufReader, Read},
    net::{SocketAddr, UdpSocket},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Output, Stdio},
    thread,
};

/// Nothing here takes so long: a test that waits for it has failed.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// More bytes than a pipe holds, twice.
const LONG: usize = 200_000;

/// What a test wants to be different.
pub(crate) struct Setup {
    pub(crate) scenario: &'static str,
    /// How the office answers.
    pub(crate) mode: &'static str,
    pub(crate) test_image: bool,
    pub(crate) bundle: fn(&mut Bundle),
    pub(crate) manifest: fn(&mut Manifest),
    /// More lines of the configuration, `DIR` in them being the world's directory.
    pub(crate) config: &'static str,
}

impl Setup {
    pub(crate) fn new(scenario: &'static str) -> Self {
        Self { scenario, mode: "lease", test_image: false, bundle: |_| {}, manifest: |_| {}, config: "" }
    }
}

pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) tenant: Tenant,
    pub(crate) repository: Repository,
    kontord: Option<Child>,
    log: Option<BufReader<ChildStderr>>,
}

/// A process by a descriptor, so that its end can be waited for.
pub(crate) struct Process {
    pid: Pid,
    descriptor: OwnedFd,
}

pub(crate) fn own_program() -> PathBuf {
    std::env::current_exe().unwrap()
}

/// A gateway that sends every datagram back to where it came from.
pub(crate) fn echoing_gateway() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut datagram = [0; 2000];
        while let Ok((length, from)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..length], from);
        }
    });
    address
}

/// A release whose guest does what `scenario` says.
pub(crate) fn release(dir: &Path, tenant: Digest, setup: &Setup) {
    let piece = |name: &str, content: &[u8]| {
        fs::write(dir.join(name), content).unwrap();
        Piece { name: name.into(), bytes: content.len() as u64, sha256: Digest::of(content) }
    };
    let verity = Verity { root_hash: Digest(ROOT), salt: [2; 32], data_blocks: 3 };
    let line = CommandLine { verity: verity.clone(), built_at: 9, test: setup.test_image };
    let image = Image {
        format: FORMAT,
        profile: "smoke".into(),
        release: "smoke-1".into(),
        built_at: 9,
        test: setup.test_image,
        memory_mib_min: 128,
        cmdline: format!("quiet stub={} {line}", setup.scenario),
        verity,
        kernel: piece("kernel", b"the kernel"),
        initrd: piece("initrd", b"the initrd"),
        root: piece("root.img", b"the root image"),
        sbom: piece("sbom.cdx.json", b"{}"),
        lock: piece("lock.toml", b"lock"),
    };
    let mut manifest = Manifest { tenant, version: 1, segment: piece("segment", b"the segment"), image };
    (setup.manifest)(&mut manifest);
    fs::write(dir.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
}

impl World {
    /// Everything is installed, and kontord serves.
    pub(crate) fn new(setup: &Setup) -> Self {
        let mut world = Self::installed(setup);
        world.serve();
        world
    }

    /// Everything is installed.
    pub(crate) fn installed(setup: &Setup) -> Self {
        let mut world = Self::configured(setup);
        let key = world.kontord(&["host-key"]);
        let key = String::from_utf8(key.stdout).unwrap().trim().parse().unwrap();
        let papers = world.path("office");
        fs::create_dir(&papers).unwrap();
        world.tenant.write(&papers);
        fs::write(papers.join("mode"), setup.mode).unwrap();
        fs::write(papers.join("keyset.json"), &world.tenant.keysets[0]).unwrap();
        fs::write(papers.join("device.json"), world.tenant.device(key, |_| {})).unwrap();
        let bundle = world.tenant.bundle(echoing_gateway(), setup.bundle);
        fs::write(papers.join("bundle.json"), bundle).unwrap();
        let paper = |name: &str| papers.join(name).to_str().unwrap().to_owned();
        let stored = world.kontord(&[
            "provision",
            "--keyset",
            &paper("keyset.json"),
            "--device",
            &paper("device.json"),
            "--bundle",
            &paper("bundle.json"),
        ]);
        assert!(stored.status.success(), "{}", String::from_utf8_lossy(&stored.stderr));

        let pieces = world.path("release");
        fs::create_dir(&pieces).unwrap();
        release(&pieces, world.tenant.id, setup);
        world.repository.publish(&pieces);
        let place = world.repository.dir.to_str().unwrap().to_owned();
        let installed = world.kontord(&["install", "--repo", &place]);
        assert!(installed.status.success(), "{}", String::from_utf8_lossy(&installed.stderr));
        world
    }

    /// There is a configuration and nothing else.
    pub(crate) fn configured(setup: &Setup) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tenant = Tenant::new();
        let repository = Repository::new(&dir.path().join("repository"));
        let (path, own) = (dir.path().to_str().unwrap(), own_program());
        let papers = dir.path().join("office");
        let key = match setup.mode {
            "stranger" => SecretKey::generate().unwrap(),
            _ => SecretKey::from_pkcs8(tenant.control.to_pkcs8()).unwrap(),
        };
        let office = https::serve(key, move |_, request| stub::office(&papers, request));
        let config = format!(
            "state = '{path}/state'\nsocket = '{path}/kontord.sock'\ntenant = '{}'\ndevice = '{}'\nrelease_root = '{}'\n\
             qemu = '{own}'\nkvm = '/no/kvm'\nrelay = '{own}'\njail = '{jail}'\noffice = '{office}'\n{}",
            tenant.id,
            device_id(),
            repository.pin(),
            setup.config.replace("DIR", path),
            own = own.display(),
            jail = env!("CARGO_BIN_EXE_kontor-jail"),
        );
        fs::write(dir.path().join("kontord.toml"), config).unwrap();
        Self { dir, tenant, repository, kontord: None, log: None }
    }

    /// Gives the key of the configuration another value; `DIR` in it is the world's directory.
    pub(crate) fn configure(&self, key: &str, value: &str) {
        let config = fs::read_to_string(self.path("kontord.toml")).unwrap();
        let start = format!("{key} = ");
        let value = value.replace("DIR", self.dir.path().to_str().unwrap());
        let line = |line: &str| match line.starts_with(&start) {
            true => format!("{start}'{value}'\n"),
            false => format!("{line}\n"),
        };
        assert!(config.lines().any(|line| line.starts_with(&start)));
        fs::write(self.path("kontord.toml"), config.lines().map(line).collect::<String>()).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A file of the installed release.
    pub(crate) fn slot(&self, name: &str) -> PathBuf {
        let device = self.path("state").join(self.tenant.id.to_string()).join(device_id().as_str());
        device.join("slots/A").join(name)
    }

    pub(crate) fn kontord(&self, arguments: &[&str]) -> Output {
        self.kontord_command(arguments).output().unwrap()
    }

    pub(crate) fn kontord_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kontord"));
        command.arg(arguments[0]).arg("--config").arg(self.path("kontord.toml")).args(&arguments[1..]);
        command
    }

    /// The command that installs what the repository has.
    pub(crate) fn install(&self) -> Command {
        self.kontord_command(&["install", "--repo", self.repository.dir.to_str().unwrap()])
    }

    /// Publishes a release of version 2 whose pieces are all others, and longer than a pipe holds.
    pub(crate) fn publish_newer(&mut self, setup: &Setup) {
        let pieces = self.path("newer");
        fs::create_dir(&pieces).unwrap();
        release(&pieces, self.tenant.id, setup);
        let mut manifest = Manifest::parse(&fs::read(pieces.join("manifest.json")).unwrap()).unwrap();
        manifest.version = 2;
        let image = &mut manifest.image;
        let all = [&mut image.kernel, &mut image.initrd, &mut image.root, &mut image.sbom, &mut image.lock];
        for piece in all.into_iter().chain([&mut manifest.segment]) {
            let content = piece.name.as_bytes().repeat(LONG / piece.name.len());
            fs::write(pieces.join(&piece.name), &content).unwrap();
            *piece = Piece { bytes: content.len() as u64, sha256: Digest::of(&content), ..piece.clone() };
        }
        fs::write(pieces.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
        self.repository.publish(&pieces);
    }

    /// Most memory that kontord ever had resident, in KiB.
    pub(crate) fn peak_kib(&self) -> u64 {
        let pid = self.kontord.as_ref().unwrap().id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    pub(crate) fn serve(&mut self) {
        self.serve_as(Command::new(env!("CARGO_BIN_EXE_kontord")));
    }

    /// The same with a command that becomes kontord.
    pub(crate) fn serve_as(&mut self, mut command: Command) {
        command.args(["run", "--user", "--config"]).arg(self.path("kontord.toml"));
        // Whoever starts kontord may have left it a descriptor of his own: it must go no further.
        let stray = FdMapping { parent_fd: fs::File::open("/dev/null").unwrap().into(), child_fd: 77 };
        command.fd_mappings(vec![stray]).unwrap();
        let mut kontord = command.env("KONTOR_LOG", "debug").stderr(Stdio::piped()).spawn().unwrap();
        self.log = kontord.stderr.take().map(BufReader::new);
        self.kontord = Some(kontord);
        self.await_log("kontord is ready");
    }

    /// Reads kontord's log up to a line that holds `words`.
    pub(crate) fn await_log(&mut self, words: &str) -> String {
        let log = self.log.as_mut().unwrap();
        let mut seen = String::new();
        loop {
            let mut line = String::new();
            assert!(log.read_line(&mut line).unwrap() > 0, "kontord ended; its log:\n{seen}");
            if line.contains(words) {
                return line;
            }
            seen.push_str(&line);
        }
    }

    /// The process whose start kontord logs next.
    pub(crate) fn await_process(&mut self, words: &str) -> Process {
        Process::of(self.await_pid(words))
    }

    /// The same, for one that may be gone already.
    pub(crate) fn await_pid(&mut self, words: &str) -> Pid {
        pid_in(&self.await_log(words))
    }

    pub(crate) fn kontor_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kontor"));
        command.arg("--socket").arg(self.path("kontord.sock")).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub(crate) fn kontor(&self, arguments: &[&str]) -> Ran {
        Ran::from(self.kontor_command(arguments).output().unwrap())
    }

    pub(crate) fn start(&self) -> Ran {
        self.kontor(&["start", "--headless"])
    }

    pub(crate) fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.kontor(&["status", "--json"]).out).unwrap()
    }

    pub(crate) fn kontord_process(&self) -> Process {
        Process::of(Pid::from_child(self.kontord.as_ref().unwrap()))
    }

    /// Ends kontord by `signal`, and returns its exit code and the rest of its log.
    pub(crate) fn end(&mut self, signal: Signal) -> (Option<i32>, String) {
        self.kontord_process().kill(signal);
        let mut log = String::new();
        self.log.as_mut().unwrap().read_to_string(&mut log).unwrap();
        (self.kontord.take().unwrap().wait().unwrap().code(), log)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(mut kontord) = self.kontord.take() {
            let _ = kontord.kill();
            let _ = kontord.wait();
            let mut log = String::new();
            if thread::panicking() && self.log.as_mut().unwrap().read_to_string(&mut log).is_ok() {
                eprintln!("kontord's log:\n{log}");
            }
        }
    }
}

impl Process {
    pub(crate) fn of(pid: Pid) -> Self {
        Self { pid, descriptor: pidfd_open(pid, PidfdFlags::empty()).unwrap() }
    }

    /// The process that started it.
    pub(crate) fn parent(&self) -> Self {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid.as_raw_nonzero())).unwrap();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap();
        Self::of(Pid::from_raw(parent.trim().parse().unwrap()).unwrap())
    }

    pub(crate) fn kill(&self, signal: Signal) {
        pidfd_send_signal(&self.descriptor, signal).unwrap();
    }

    pub(crate) fn await_end(&self) {
        let mut fds = [PollFd::new(&self.descriptor, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&PATIENCE)), Ok(1), "the process did not end");
    }

    /// Whether it ended and its parent has taken note of it.
    pub(crate) fn is_reaped(&self) -> bool {
        is_reaped(self.pid)
    }
}

pub(crate) fn is_reaped(pid: Pid) -> bool {
    test_kill_process(pid).is_err()
}

/// The process id in a line of the log.
pub(crate) fn pid_in(line: &str) -> Pid {
    let pid = line.split("pid=").nth(1).unwrap().split_whitespace().next().unwrap();
    let pid = pid.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap();
    Pid::from_raw(pid).unwrap()
}

/// How a program ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}
