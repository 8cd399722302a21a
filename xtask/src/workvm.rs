//! The employee's side: `kontord` on the home PC, and `kontor` that steers it.

use crate::{
    build::Plan,
    office::{CONTROL_PORT, DEVICE, Office, await_line, read_text, write},
    probe::Probe,
    run::{Error, Result, at, quietly, text},
    world::{Host, OFFICE_ADDRESS, Power, User},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    fs,
    io::Read,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
};

/// The home PC with Kontor installed.
pub(crate) struct HomePc {
    directory: PathBuf,
    bin: PathBuf,
    tenant: String,
    kontord: Option<Child>,
}

impl HomePc {
    /// Installs Kontor: configuration and host key. Returns the host key's public half too.
    pub(crate) fn set_up(plan: &Plan, office: &Office) -> Result<(Self, String)> {
        let directory = plan.scratch.join("home");
        fs::create_dir(&directory).map_err(at("create", &directory))?;
        let home = Self { directory, bin: plan.bin.clone(), tenant: office.tenant.clone(), kontord: None };
        let config = format!(
            r#"state = {state:?}
socket = {socket:?}
tenant = "{tenant}"
device = "{DEVICE}"
office = "{OFFICE_ADDRESS}:{CONTROL_PORT}"
release_root = "{root}"
probe_socket = {probe:?}
uplink = "{uplink}"
"#,
            state = home.path("state"),
            socket = home.path("kontord.sock"),
            tenant = office.tenant,
            root = office.release_root,
            probe = home.path("probe.sock"),
            uplink = plan.uplink.name(),
        );
        write(&home.path("kontord.toml"), config.as_bytes())?;
        User::Employee.owns(&home.directory)?;
        let key = quietly(&mut home.kontord("host-key"))?;
        Ok((home, String::from_utf8_lossy(&key).trim().to_owned()))
    }

    /// A file of the home PC.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A verb of `kontord` that is not the service.
    fn kontord(&self, verb: &str) -> Command {
        let mut command = User::Employee.command(Power::None, self.bin.join("kontord"));
        command.arg(verb).arg("--config").arg(self.path("kontord.toml"));
        command
    }

    /// Stores the office's documents and installs its newest release.
    pub(crate) fn provision(&self, office: &Office) -> Result<()> {
        let mut documents = self.kontord("provision");
        documents.arg("--keyset").arg(office.path("keys/keysets/00000001.json"));
        documents.arg("--device").arg(office.device_record()).arg("--bundle").arg(office.bundle());
        quietly(&mut documents)?;
        quietly(self.kontord("install").arg("--repo").arg(office.repository())).map(drop)
    }

    /// Tries to install the newest release of a repository.
    pub(crate) fn install(&self, repository: &std::path::Path) -> Result<Output> {
        let mut command = self.kontord("install");
        command.arg("--repo").arg(repository).output().map_err(|source| Error::Start(text(&command), source))
    }

    /// Starts `kontord` and waits until it serves its socket.
    pub(crate) fn start_kontord(&mut self) -> Result<()> {
        let program = self.bin.join("kontord");
        let mut command = Host::Home.command_of(User::Employee, Power::None, program);
        command.args(["run", "--user", "--config"]).arg(self.path("kontord.toml"));
        let (child, _) = await_line(&mut command, &self.path("kontord.log"), "ready")?;
        self.kontord = Some(child);
        Ok(())
    }

    /// Lets `kontord` record all bytes between QEMU and relay from now on, afresh with each work VM.
    pub(crate) fn record_uplink(&mut self) -> Result<()> {
        let file = self.path("kontord.toml");
        let config = read_text(&file)?;
        self.stop_kontord()?;
        write(&file, format!("{config}\ntap = {:?}\n", self.path("tap")).as_bytes())?;
        self.start_kontord()
    }

    /// What was recorded of the newest work VM, as far as a search needs it.
    pub(crate) fn tap(&self) -> Result<Vec<u8>> {
        const ENOUGH: u64 = 32 << 20;
        let path = self.path("tap");
        let mut bytes = Vec::new();
        let file = fs::File::open(&path).map_err(at("open", &path))?;
        file.take(ENOUGH).read_to_end(&mut bytes).map_err(at("read", &path))?;
        Ok(bytes)
    }

    /// Runs a verb of `kontor` to its end.
    pub(crate) fn kontor(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = User::Employee.command(Power::None, self.bin.join("kontor"));
        command.arg("--socket").arg(self.path("kontord.sock")).args(arguments).stdin(Stdio::null());
        command.output().map_err(|source| Error::Start(text(&command), source))
    }

    /// Starts the work VM and waits until its session runs.
    pub(crate) fn start(&self) -> Result<()> {
        let output = self.kontor(&["start", "--headless"])?;
        if output.status.success() {
            return Ok(());
        }
        let said = [output.stdout, output.stderr].concat();
        let console = fs::read(self.console_log()).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let tail: Vec<&str> = console.lines().rev().take(40).collect();
        Err(Error::Unexpected(format!(
            "kontor start ended with {}: {}\nconsole:\n{}",
            output.status,
            String::from_utf8_lossy(&said).trim(),
            tail.into_iter().rev().collect::<Vec<_>>().join("\n")
        )))
    }

    /// `kontor status --json`.
    pub(crate) fn status(&self) -> Result<Value> {
        let output = self.kontor(&["status", "--json"])?;
        serde_json::from_slice(&output.stdout)
            .map_err(|source| Error::Json { what: "kontor status --json".into(), source })
    }

    /// Connects to the running work VM's probe.
    pub(crate) fn probe(&self) -> Result<Probe> {
        Probe::connect(&self.path("probe.sock"))
    }

    /// A file of the installed release.
    pub(crate) fn slot_file(&self, name: &str) -> Result<PathBuf> {
        let file = self.device_directory().join("slots/A").join(name);
        if file.exists() { Ok(file) } else { Err(Error::Unexpected(format!("no {}", file.display()))) }
    }

    /// A file that kontord keeps for the device.
    pub(crate) fn device_file(&self, name: &str) -> PathBuf {
        self.device_directory().join(name)
    }

    /// What the guest's console said.
    pub(crate) fn console_log(&self) -> PathBuf {
        self.device_directory().join("console.log")
    }

    /// Where kontord keeps what belongs to the device.
    fn device_directory(&self) -> PathBuf {
        self.path("state").join(&self.tenant).join(DEVICE)
    }

    /// The process id of `kontord`.
    pub(crate) fn kontord_pid(&self) -> Option<u32> {
        self.kontord.as_ref().map(Child::id)
    }

    /// Ends `kontord` in an orderly way.
    pub(crate) fn stop_kontord(&mut self) -> Result<()> {
        let Some(mut child) = self.kontord.take() else { return Ok(()) };
        let failed = |source| Error::Start("stop kontord".into(), source);
        if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
            kill_process(pid, Signal::TERM).map_err(|e| failed(e.into()))?;
        }
        child.wait().map_err(failed)?;
        Ok(())
    }

    /// Kills `kontord`, as a crash would.
    pub(crate) fn kill_kontord(&mut self) -> Result<()> {
        let Some(mut child) = self.kontord.take() else { return Ok(()) };
        let failed = |source| Error::Start("kill kontord".into(), source);
        child.kill().and_then(|()| child.wait()).map_err(failed)?;
        Ok(())
    }
}

impl Drop for HomePc {
    fn drop(&mut self) {
        if let Some(mut child) = self.kontord.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
