//! The office of demo and tests: keys and records, control, gateway, intranet, resolver.

use crate::{
    build::Plan,
    run::{Error, Result, at, quietly},
    world::{Host, INTRANET_ADDRESS, OFFICE_ADDRESS, Power, User},
};
use std::{
    fs::{self, Permissions},
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// The gateway's UDP port.
pub(crate) const GATEWAY_PORT: u16 = 51820;
/// The spare gateway's.
pub(crate) const SPARE_PORT: u16 = 51821;
/// Control's TCP port.
pub(crate) const CONTROL_PORT: u16 = 443;
/// The gateway's id in bundle and lease.
pub(crate) const GATEWAY_ID: u8 = 1;
/// The intranet's name.
pub(crate) const INTRANET_NAME: &str = "intranet.office.example";
/// Title of the intranet's page.
pub(crate) const TITLE: &str = "Kontor Hanse & Co: intranet";
/// Path of a larger file on the intranet, for transfers that last.
pub(crate) const LARGE_FILE: &str = "large.bin";
/// Length of that file in bytes.
pub(crate) const LARGE_FILE_LEN: usize = 8 << 20;
/// The device's line and name.
pub(crate) const LINE: &str = "sales";
pub(crate) const DEVICE: &str = "anna-1";
/// Longest time from a lease's end to the work VM's; a quarter of the lease's life where that is less.
const LAPSE_OFF_S_MAX: u64 = 60;
/// For how long nothing may come from a gateway before work VMs close their tunnel, in seconds.
pub(crate) const SILENCE_S: u64 = 180;
/// Memory of the work VM in MiB.
pub(crate) const MEMORY_MIB: u64 = 128;

/// Where a gateway is, and which addresses it gives.
struct Site {
    id: u8,
    port: u16,
    /// Its files begin so.
    name: &'static str,
    /// Its interface.
    tun: &'static str,
    /// Of its inner networks, `10.N.0.0/16` and `fdN::/64`.
    network: u8,
}

/// The office's gateway.
const PRIMARY: Site = Site { id: GATEWAY_ID, port: GATEWAY_PORT, name: "gateway", tun: "kgw0", network: 77 };
/// The one that bundle and lease name behind it. It runs only where a test starts it.
const SPARE: Site = Site { id: 2, port: SPARE_PORT, name: "spare", tun: "kgw1", network: 78 };

/// The id of each gateway, and the networks of the addresses that it gives.
pub(crate) fn pools() -> [(u8, String, String); 2] {
    [PRIMARY, SPARE]
        .map(|Site { id, network, .. }| (id, format!("10.{network}.0.0/16"), format!("fd{network}::/64")))
}

/// A running office.
pub(crate) struct Office {
    directory: PathBuf,
    bin: PathBuf,
    control: Option<Child>,
    gateway: Option<Child>,
    spare: Option<Child>,
    servers: Vec<Child>,
    /// The tenant's id.
    pub(crate) tenant: String,
    /// Hash of the release repository's first root.
    pub(crate) release_root: String,
}

impl Office {
    /// Makes the tenant and its keys.
    pub(crate) fn found(plan: &Plan) -> Result<Self> {
        let directory = plan.scratch.join("office");
        fs::create_dir(&directory).map_err(at("create", &directory))?;
        // Each service makes its own files here, and touches nobody else's.
        fs::set_permissions(&directory, Permissions::from_mode(0o1777)).map_err(at("open", &directory))?;
        let mut office = Self {
            directory,
            bin: plan.bin.clone(),
            control: None,
            gateway: None,
            spare: None,
            servers: Vec::new(),
            tenant: String::new(),
            release_root: String::new(),
        };
        let keys = office.path("keys");
        quietly(office.tool("kontorctl").args(["keyset", "init", "--out"]).arg(&keys))?;
        // The keysets are for everybody; each key is its owner's alone.
        for (part, mode) in [("", 0o711), ("keysets", 0o755)] {
            let part = keys.join(part);
            fs::set_permissions(&part, Permissions::from_mode(mode)).map_err(at("open", &part))?;
        }
        office.tenant = read_text(&keys.join("id"))?;
        let mut init = office.tool("kontor-image");
        init.args(["tuf-init", "--keys"]).arg(office.path("release-keys"));
        let printed = quietly(init.arg("--repo").arg(office.repository()))?;
        office.release_root = String::from_utf8_lossy(&printed).trim().to_owned();
        office.write_site()?;
        Ok(office)
    }

    /// A file of the office.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The directory with the tenant's id and keysets, as `kontor-image sign` takes it.
    pub(crate) fn tenant_directory(&self) -> PathBuf {
        self.path("keys")
    }

    /// The repository that PCs fetch releases from.
    pub(crate) fn repository(&self) -> PathBuf {
        self.path("repository")
    }

    /// Publishes a release: CI signs it, then the rebuilder, who also has the keys of snapshot and timestamp.
    pub(crate) fn publish(&self, release: &Path) -> Result<()> {
        self.publish_to(&self.repository(), release)
    }

    /// The same, in a copy of the repository.
    pub(crate) fn publish_to(&self, repository: &Path, release: &Path) -> Result<()> {
        let (ci, rebuilder) = (["targets-ci"], ["targets-rebuilder", "snapshot", "timestamp"]);
        for (verb, names) in [("publish", &ci[..]), ("cosign", &rebuilder[..])] {
            quietly(&mut self.publishing(verb, names, release, repository))?;
        }
        Ok(())
    }

    /// The command that publishes a release in `repository`, or signs it there too, with keys of these names.
    pub(crate) fn publishing(
        &self,
        verb: &str,
        names: &[&str],
        release: &Path,
        repository: &Path,
    ) -> Command {
        let keys = self.path("release-keys");
        let mut command = self.tool("kontor-image");
        command.arg(verb).arg("--release").arg(release).arg("--tenant-dir").arg(self.tenant_directory());
        command.arg("--repo").arg(repository).arg("--keys");
        command.args(names.iter().map(|name| keys.join(format!("{name}.key"))));
        command
    }

    /// The directory that control answers from.
    pub(crate) fn control_directory(&self) -> PathBuf {
        self.path("control")
    }

    fn tool(&self, name: &str) -> Command {
        Command::new(self.bin.join(name))
    }

    /// Signs the device record and the bundle, and lays out control's directory.
    pub(crate) fn enrol(&self, host_key: &str, lease_s: u64) -> Result<()> {
        let control = self.control_directory();
        for part in ["", "devices", "bundles"] {
            let path = control.join(part);
            fs::create_dir_all(&path).map_err(at("create", &path))?;
        }
        let keys = self.path("keys");
        crate::build::copy(&keys.join("keysets"), &control.join("keysets"))?;
        for key in ["lease.key", "control.key"] {
            crate::build::copy(&keys.join(key), &control.join(key))?;
        }
        let mut record = self.tool("kontorctl");
        record.args(["device", "record", "--device", DEVICE, "--line", LINE, "--serial", "1"]);
        record.args(["--host-key", host_key, "--keys"]).arg(&keys);
        quietly(record.arg("--out").arg(self.device_record()))?;
        self.sign_bundle(1, lease_s, SILENCE_S)?;
        let pools: String = [PRIMARY, SPARE]
            .iter()
            .map(|Site { id, name, network, .. }| {
                format!(
                    "\n[[gateway]]\nid = {id}\nadmission = {admission:?}\n\
                     pool_v4 = \"10.{network}.0.0/16\"\npool_v6 = \"fd{network}::/64\"\n",
                    admission = self.path(&format!("{name}.sock"))
                )
            })
            .collect();
        let config = format!("listen = [\"{OFFICE_ADDRESS}:{CONTROL_PORT}\"]\nlease_s = {lease_s}\n{pools}");
        write(&control.join("control.toml"), config.as_bytes())?;
        User::Control.owns(&control)
    }

    /// The signed device record.
    pub(crate) fn device_record(&self) -> PathBuf {
        self.control_directory().join(format!("devices/{DEVICE}.json"))
    }

    /// The signed bundle.
    pub(crate) fn bundle(&self) -> PathBuf {
        self.control_directory().join(format!("bundles/{LINE}.json"))
    }

    /// A bundle that the newest has replaced, where a trial keeps one.
    pub(crate) fn old_bundle(&self) -> PathBuf {
        self.path("old-bundle.json")
    }

    /// Where control tells the gateway about leases.
    pub(crate) fn admission_socket(&self) -> PathBuf {
        self.path("gateway.sock")
    }

    /// Signs the line's newest bundle, which control has from then on. Nothing may come from the gateway for
    /// `silence_s`.
    pub(crate) fn sign_bundle(&self, revision: u64, lease_s: u64, silence_s: u64) -> Result<()> {
        let mut gateways = String::new();
        for site in [&PRIMARY, &SPARE] {
            let Site { id, port, network, .. } = site;
            let key = self.gateway_key(site)?;
            gateways += &format!(
                "[[gateways]]\nid = {id}\nkey = \"{key}\"\nendpoints = [\"{OFFICE_ADDRESS}:{port}\"]\n\
                 v4 = \"10.{network}.0.1\"\nv6 = \"fd{network}::1\"\n\n"
            );
        }
        let source = format!(
            r#"tenant = "{tenant}"
line = "{LINE}"
revision = {revision}
min_release = 1
lease_s_max = {lease_s}
apply_s = 60
silence_s = {silence_s}
lapse_off_s = {lapse_off_s}

{gateways}[settings]
allow_emulation = true
allow_test_image = true
memory_mib = {MEMORY_MIB}
resolvers = ["{INTRANET_ADDRESS}"]

[[access.destinations]]
to = "{INTRANET_ADDRESS}/32"
protocol = "tcp"
ports = [80, 80]

[[access.destinations]]
to = "{INTRANET_ADDRESS}/32"
protocol = "udp"
ports = [53, 53]
"#,
            tenant = self.tenant,
            lapse_off_s = (lease_s / 4).min(LAPSE_OFF_S_MAX),
        );
        let file = self.path("bundle.toml");
        write(&file, source.as_bytes())?;
        let mut sign = self.tool("kontorctl");
        sign.args(["bundle", "sign", "--keys"]).arg(self.path("keys")).arg("--in").arg(&file);
        quietly(sign.arg("--out").arg(self.bundle())).map(drop)
    }

    /// A gateway's public key; makes the key when there is none.
    fn gateway_key(&self, site: &Site) -> Result<String> {
        let public = self.path(&format!("{}.pub", site.name));
        if !public.exists() {
            let mut make = self.tool("kontor-gateway");
            let printed = quietly(make.args(["key", "--out"]).arg(self.path(&format!("{}.key", site.name))))?;
            write(&public, &printed)?;
        }
        read_text(&public)
    }

    fn write_site(&self) -> Result<()> {
        let site = self.path("site");
        fs::create_dir(&site).map_err(at("create", &site))?;
        let page =
            format!("<!doctype html><html><head><title>{TITLE}</title></head><body>Moin.</body></html>\n");
        write(&site.join("index.html"), page.as_bytes())?;
        // Not compressible, and not the same everywhere.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        let large: Vec<u8> = (0..LARGE_FILE_LEN / 8).flat_map(|_| random()).collect();
        write(&site.join(LARGE_FILE), &large)
    }

    /// Starts the intranet's web server and resolver, and waits until the first answers.
    pub(crate) fn open(&mut self) -> Result<()> {
        let mut web = Host::Office.command_of(User::Web, Power::LowPorts, "busybox");
        web.args(["httpd", "-f", "-p"])
            .arg(format!("{INTRANET_ADDRESS}:80"))
            .arg("-h")
            .arg(self.path("site"));
        self.servers.push(spawn(&mut web)?);
        let mut dns = Host::Office.command_of(User::Resolver, Power::LowPorts, "dnsmasq");
        dns.args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--pid-file=",
        ]);
        dns.args(["--user=root", "--group=", "--bind-interfaces", "--local=/office.example/"]);
        dns.arg(format!("--listen-address={INTRANET_ADDRESS}"));
        dns.arg(format!("--address=/{INTRANET_NAME}/{INTRANET_ADDRESS}"));
        self.servers.push(spawn(&mut dns)?);
        Ok(())
    }

    /// Starts the gateway and waits until it says that it is ready.
    pub(crate) fn start_gateway(&mut self) -> Result<()> {
        self.gateway = Some(self.run_gateway(&PRIMARY)?);
        Ok(())
    }

    /// The same with the spare gateway.
    pub(crate) fn start_spare(&mut self) -> Result<()> {
        self.spare = Some(self.run_gateway(&SPARE)?);
        Ok(())
    }

    fn run_gateway(&self, site: &Site) -> Result<Child> {
        let Site { id, port, name, tun, network } = site;
        self.gateway_key(site)?;
        let file = |end: &str| self.path(&format!("{name}{end}"));
        let config = file(".toml");
        let text = format!(
            r#"id = {id}
listen = ["{OFFICE_ADDRESS}:{port}"]
key = {key:?}
tun = "{tun}"
v4 = "10.{network}.0.1"
v6 = "fd{network}::1"
pool_v4 = "10.{network}.0.0/16"
pool_v6 = "fd{network}::/64"
admission = {admission:?}
state = {state:?}
tenant = "{tenant}"
keyset = {keyset:?}
"#,
            key = file(".key"),
            admission = file(".sock"),
            state = file("-state"),
            tenant = self.tenant,
            keyset = self.path("keys/keysets/00000001.json"),
        );
        write(&config, text.as_bytes())?;
        User::Gateway.owns(&file(".key"))?;
        let program = self.bin.join("kontor-gateway");
        let mut command = Host::Office.command_of(User::Gateway, Power::NetAdmin, program);
        command.args(["run", "--config"]).arg(&config);
        await_line(&mut command, &file(".log"), "ready").map(|(child, _)| child)
    }

    /// Lines that the gateway has logged so far and that hold `words`.
    pub(crate) fn gateway_said(&self, words: &str) -> Result<Vec<String>> {
        let log = self.path("gateway.log");
        let text = fs::read_to_string(&log).map_err(at("read", &log))?;
        Ok(text.lines().filter(|line| line.contains(words)).map(str::to_owned).collect())
    }

    /// Kills the gateway, as a crash would.
    pub(crate) fn kill_gateway(&mut self) -> Result<()> {
        kill(&mut self.gateway, "the gateway")
    }

    /// The same with the spare gateway.
    pub(crate) fn kill_spare(&mut self) -> Result<()> {
        kill(&mut self.spare, "the spare gateway")
    }

    /// Starts control and waits until it says that it is ready.
    pub(crate) fn start_control(&mut self) -> Result<()> {
        let program = self.bin.join("kontor-control");
        let mut command = Host::Office.command_of(User::Control, Power::LowPorts, program);
        command.args(["serve", "--dir"]).arg(self.control_directory());
        let (child, _) = await_line(&mut command, &self.path("control.log"), "ready")?;
        self.control = Some(child);
        Ok(())
    }

    /// Kills control, as a crash would.
    pub(crate) fn kill_control(&mut self) -> Result<()> {
        kill(&mut self.control, "control")
    }
}

fn kill(child: &mut Option<Child>, name: &str) -> Result<()> {
    let Some(mut child) = child.take() else { return Ok(()) };
    child
        .kill()
        .and_then(|()| child.wait())
        .map_err(|source| Error::Start(format!("kill {name}"), source))?;
    Ok(())
}

impl Drop for Office {
    fn drop(&mut self) {
        for child in
            self.servers.iter_mut().chain(&mut self.control).chain(&mut self.gateway).chain(&mut self.spare)
        {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn spawn(command: &mut Command) -> Result<Child> {
    let words = crate::run::text(command);
    let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().map_err(|source| Error::Start(words, source))
}

/// Starts a service whose log goes to a file, and waits for a line of it that holds `word`.
pub(crate) fn await_line(command: &mut Command, log: &Path, word: &str) -> Result<(Child, String)> {
    let words = crate::run::text(command);
    let failed = |source| Error::Start(words.clone(), source);
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(failed)?;
    let stderr = child.stderr.take().ok_or_else(|| Error::Unexpected("no standard error".into()))?;
    let mut lines = BufReader::new(stderr);
    let mut file = fs::File::create(log).map_err(at("create", log))?;
    let mut line = String::new();
    loop {
        line.clear();
        if lines.read_line(&mut line).map_err(failed)? == 0 {
            let status = child.wait().map_err(failed)?;
            let output = format!(": {}", fs::read_to_string(log).unwrap_or_default().trim());
            return Err(Error::Failed { command: words, status, output });
        }
        std::io::Write::write_all(&mut file, line.as_bytes()).map_err(at("write", log))?;
        if line.contains(word) {
            break;
        }
    }
    std::thread::spawn(move || std::io::copy(&mut lines, &mut file));
    Ok((child, line))
}

pub(crate) fn read_text(path: &Path) -> Result<String> {
    Ok(fs::read_to_string(path).map_err(at("read", path))?.trim().to_owned())
}

pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(at("write", path))
}
