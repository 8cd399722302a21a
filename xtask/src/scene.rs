//! Office, network and home PC together, as demo and tests need them.

use crate::{
    build::Plan,
    capture::{Capture, Packet},
    office::{INTRANET_NAME, Office},
    probe::Probe,
    run::{Error, Result, chain, quietly},
    workvm::HomePc,
    world::{HOME_LINK, Host},
};
use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

/// How long leases live unless a test wants it otherwise, in seconds.
pub(crate) const LEASE_S: u64 = 8 * 3600;
/// How long a command in the emulated machine may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A running office and a home PC that may start its work VM.
pub(crate) struct Scene {
    pub(crate) office: Office,
    pub(crate) home: HomePc,
    /// How long leases live, in seconds.
    pub(crate) lease_s: u64,
    link: Capture,
    inside: Capture,
}

/// What was recorded while a scene was on.
pub(crate) struct Recording {
    /// Every packet of the employee's link.
    pub(crate) link: Vec<Packet>,
    /// Every packet of the office, behind the gateway too.
    pub(crate) office: Vec<Packet>,
}

impl Scene {
    /// Founds an office whose leases live for `lease_s`, enrols the home PC and opens for business, on hosts that
    /// [`make`](crate::world::make) made. No work VM yet.
    pub(crate) fn open(plan: &Plan, lease_s: u64) -> Result<Self> {
        let mut office = Office::found(plan)?;
        let (mut home, host_key) = HomePc::set_up(plan, &office)?;
        office.enrol(&host_key, lease_s)?;
        let release = plan.scratch.join("release");
        let mut sign = Command::new(plan.bin.join("kontor-image"));
        sign.args(["sign", "--version", "1", "--image"]).arg(&plan.image);
        sign.arg("--tenant-dir").arg(office.tenant_directory()).arg("--out").arg(&release);
        quietly(&mut sign)?;
        office.publish(&release)?;
        home.provision(&office)?;
        office.open()?;
        office.start_gateway()?;
        office.start_control()?;
        let link = Capture::start(Host::Home, Some(HOME_LINK))?;
        let inside = Capture::start(Host::Office, None)?;
        home.start_kontord()?;
        Ok(Self { office, home, lease_s, link, inside })
    }

    /// What everybody said last, for a person who has nothing else to look at.
    pub(crate) fn evidence(&self) -> String {
        let status = match self.home.status() {
            Ok(status) => status.to_string(),
            Err(error) => chain(&error),
        };
        let mut text = format!("status: {status}");
        let logs = [
            ("console", self.home.console_log()),
            ("kontord", self.home.path("kontord.log")),
            ("control", self.office.path("control.log")),
            ("gateway", self.office.path("gateway.log")),
        ];
        for (name, log) in logs {
            text.push_str(&format!("\n── {name}\n{}", tail(&log)));
        }
        text
    }

    /// Closes everything and returns what was recorded.
    pub(crate) fn close(mut self) -> Result<Recording> {
        self.home.stop_kontord()?;
        Ok(Recording { link: self.link.stop()?, office: self.inside.stop()? })
    }
}

/// The last lines of a log.
fn tail(log: &Path) -> String {
    const LINES: usize = 40;
    let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// Reads the intranet's page with a program in the work VM; its title and how long it took.
pub(crate) fn read_page(probe: &Probe) -> Result<(String, Duration)> {
    let begin = Instant::now();
    let url = format!("http://{INTRANET_NAME}/");
    let page = probe.must(1000, &["/usr/bin/curl", "-sS", "--fail", "--max-time", "30", &url], PATIENCE)?;
    let title = page
        .split_once("<title>")
        .and_then(|(_, rest)| rest.split_once("</title>"))
        .map(|(title, _)| title.to_owned())
        .ok_or_else(|| Error::Unexpected(format!("a page without a title: {page}")))?;
    Ok((title, begin.elapsed()))
}

/// Processes that run a program of the project's, by name; threads and this program itself aside.
pub(crate) fn running(name: &str) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let program = command.split(|b| *b == 0).next().unwrap_or_default();
            String::from_utf8_lossy(program).rsplit('/').next().is_some_and(|p| p.starts_with(name))
        })
        .collect()
}

/// Resident memory of a process in KiB.
pub(crate) fn resident_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}
