//! The demo's report: JSON for machines, a page of text for people.

use crate::capture::Tally;
use serde::Serialize;
use std::fmt::Write as _;

/// The demo's outcome. The keys are an interface.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) page: Page,
    pub(crate) boot: Vec<Step>,
    pub(crate) leaks: Vec<Leak>,
    pub(crate) uplink: Uplink,
    pub(crate) image: ImageSize,
    pub(crate) memory: Memory,
    /// `kvm` or `tcg`.
    pub(crate) accel: String,
}

/// The intranet's page as a program in the work VM read it.
#[derive(Debug, Serialize)]
pub(crate) struct Page {
    pub(crate) ok: bool,
    pub(crate) title: String,
    pub(crate) ms: u64,
}

/// A boot state and when it was reached, on the host's clock from `kontor start`.
#[derive(Debug, Serialize)]
pub(crate) struct Step {
    pub(crate) step: String,
    pub(crate) ms: u64,
}

/// An attempt of root in the work VM to get a marked packet out by another way.
#[derive(Debug, Serialize)]
pub(crate) struct Leak {
    pub(crate) name: String,
    pub(crate) stopped: bool,
    /// What stopped it.
    pub(crate) by: String,
}

/// What left the employee's PC.
#[derive(Debug, Serialize)]
pub(crate) struct Uplink {
    pub(crate) backend: String,
    #[serde(flatten)]
    pub(crate) tally: Tally,
}

#[derive(Debug, Serialize)]
pub(crate) struct ImageSize {
    pub(crate) bytes: u64,
    pub(crate) root_hash: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct Memory {
    pub(crate) guest_mib: u64,
    pub(crate) kontord_kib: u64,
    pub(crate) relay_kib: u64,
}

impl Report {
    /// Whether everything went as it shall.
    pub(crate) fn good(&self) -> bool {
        self.page.ok && self.leaks.iter().all(|l| l.stopped) && self.uplink.tally.other_frames == 0
    }

    /// The report for people.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |text: std::fmt::Arguments<'_>| {
            let _ = out.write_fmt(text);
            out.push('\n');
        };
        let Page { ok, title, ms } = &self.page;
        line(format_args!("\nThe intranet's page, read by a program in the work VM"));
        line(format_args!("  {} in {ms} ms", if *ok { format!("\"{title}\"") } else { "NOT READ".into() }));
        line(format_args!("\nFrom press to work ({}), in seconds: in all, and each step", self.accel));
        let mut before = 0;
        for Step { step, ms } in &self.boot {
            let own = ms.saturating_sub(before);
            line(format_args!("  {:>7.1} {:>7.1}  {step}", *ms as f64 / 1000.0, own as f64 / 1000.0));
            before = *ms;
        }
        let stopped = self.leaks.iter().filter(|leak| leak.stopped).count();
        line(format_args!(
            "\nRoot in the work VM tries to get out: {} ways, {stopped} stopped",
            self.leaks.len()
        ));
        let widest = self.leaks.iter().map(|leak| leak.name.len()).max().unwrap_or_default();
        for Leak { name, stopped, by } in &self.leaks {
            line(format_args!("  {} {name:widest$}  {by}", if *stopped { "stopped" } else { "LEAKED " }));
        }
        let Tally { tunnel_frames, control_frames, other_frames, others } = &self.uplink.tally;
        line(format_args!(
            "\nWhat left the employee's PC, by capture on its link (uplink {})",
            self.uplink.backend
        ));
        line(format_args!(
            "  {tunnel_frames} packets of the tunnel, {control_frames} to control, {other_frames} others"
        ));
        for other in others {
            line(format_args!("  other: {other}"));
        }
        line(format_args!("\nSizes"));
        line(format_args!(
            "  image   {:>6.1} MB, root hash {}",
            self.image.bytes as f64 / 1e6,
            self.image.root_hash
        ));
        line(format_args!("  guest   {:>6} MiB of memory", self.memory.guest_mib));
        line(format_args!("  kontord {:>6.1} MiB resident", self.memory.kontord_kib as f64 / 1024.0));
        line(format_args!("  relay   {:>6.1} MiB resident", self.memory.relay_kib as f64 / 1024.0));
        line(format_args!("\n{}", if self.good() { "All as it shall be." } else { "NOT as it shall be." }));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(stopped: bool) -> Report {
        let leak =
            |name: &str, stopped| Leak { name: name.into(), stopped, by: "the gateway drops it".into() };
        Report {
            page: Page { ok: true, title: "Moin".into(), ms: 12 },
            boot: vec![Step { step: "early".into(), ms: 1500 }, Step { step: "verified".into(), ms: 1700 }],
            leaks: vec![leak("udp", stopped), leak("usb-devices", true)],
            uplink: Uplink { backend: "port".into(), tally: Tally::default() },
            image: ImageSize { bytes: 1, root_hash: "00".into() },
            memory: Memory { guest_mib: 128, kontord_kib: 1024, relay_kib: 1024 },
            accel: "tcg".into(),
        }
    }

    #[test]
    fn text_has_each_step_with_its_own_time_and_what_stopped_each_way_out() {
        let text = report(true).text();
        for line in [
            "      1.5     1.5  early",
            "      1.7     0.2  verified",
            "Root in the work VM tries to get out: 2 ways, 2 stopped",
            "  stopped udp          the gateway drops it",
            "All as it shall be.",
        ] {
            assert!(text.lines().any(|has| has == line), "{line:?} in {text}");
        }
    }

    #[test]
    fn one_way_out_is_enough_to_say_no() {
        let text = report(false).text();
        assert!(text.contains("2 ways, 1 stopped") && text.contains("  LEAKED  udp"), "{text}");
        assert!(text.trim_end().ends_with("NOT as it shall be."), "{text}");
    }

    #[test]
    fn keys_are_those_that_programs_read() {
        let report = serde_json::to_value(report(true)).unwrap();
        for (key, inner) in [
            ("page", &["ok", "title", "ms"][..]),
            ("uplink", &["backend", "tunnel_frames", "control_frames", "other_frames"]),
            ("image", &["bytes", "root_hash"]),
            ("memory", &["guest_mib", "kontord_kib", "relay_kib"]),
        ] {
            assert!(inner.iter().all(|name| report[key].get(name).is_some()), "{key} in {report}");
        }
        assert_eq!(report["boot"][0], serde_json::json!({ "step": "early", "ms": 1500 }));
        let leak = serde_json::json!({ "name": "udp", "stopped": true, "by": "the gateway drops it" });
        assert_eq!((&report["leaks"][0], &report["accel"]), (&leak, &serde_json::json!("tcg")));
    }
}
