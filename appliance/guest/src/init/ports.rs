//! Virtio-serial ports, found by the name that the host gave them.
//!
//! Each port is a directory `/sys/class/virtio-ports/vport0p1` with a file `name`; its device is
//! `/dev/vport0p1`. The name appears some time after the port, announced by a uevent.

use super::uevent::Uevents;
use rustix::fs::{Mode, OFlags, open};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the kernel lists ports.
const CLASS: &str = "/sys/class/virtio-ports";
/// Most ports that are looked at.
const PORTS_MAX: usize = 64;
/// Most bytes of a port's name; ours are far shorter.
const NAME_MAX: usize = 64;
/// How long the host may take to show a port.
pub(crate) const APPEAR_MAX: Duration = Duration::from_secs(10);

/// Waits for the port and opens it, for reading and writing, without blocking. A port can be open
/// only once at a time.
pub(crate) fn open_named(uevents: &Uevents, name: &str, limit: Duration) -> io::Result<Option<OwnedFd>> {
    let device = uevents.until(limit, || {
        let Some(entry) = find(Path::new(CLASS), name)? else { return Ok(None) };
        let device = Path::new("/dev").join(entry);
        Ok(device.exists().then_some(device))
    })?;
    let Some(device) = device else { return Ok(None) };
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    Ok(Some(open(&device, flags, Mode::empty())?))
}

/// The entry of `class` whose `name` is `name`.
fn find(class: &Path, name: &str) -> io::Result<Option<PathBuf>> {
    let entries = match std::fs::read_dir(class) {
        Ok(entries) => entries,
        // The class appears with the first port.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    for entry in entries.take(PORTS_MAX) {
        let entry = entry?;
        if has_name(&entry.path().join("name"), name) {
            return Ok(Some(entry.file_name().into()));
        }
    }
    Ok(None)
}

/// Whether the file holds `name` and a newline. A file that is not there yet, or not any more, is no match.
fn has_name(path: &Path, name: &str) -> bool {
    let mut text = Vec::new();
    let Ok(file) = File::open(path) else { return false };
    let read = file.take(u64::try_from(NAME_MAX).expect("small")).read_to_end(&mut text);
    read.is_ok() && text.strip_suffix(b"\n").unwrap_or(&text) == name.as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn port(class: &Path, entry: &str, name: Option<&str>) {
        let directory = class.join(entry);
        fs::create_dir(&directory).unwrap();
        if let Some(name) = name {
            fs::write(directory.join("name"), name).unwrap();
        }
    }

    #[test]
    fn port_is_found_by_its_name() {
        let class = tempfile::tempdir().unwrap();
        port(class.path(), "vport0p1", Some("kontor.control\n"));
        port(class.path(), "vport0p2", Some("kontor.uplink\n"));
        port(class.path(), "vport0p3", None);
        assert_eq!(find(class.path(), "kontor.uplink").unwrap(), Some("vport0p2".into()));
        assert_eq!(find(class.path(), "kontor.probe").unwrap(), None);
    }

    #[test]
    fn part_of_a_name_is_no_match() {
        let class = tempfile::tempdir().unwrap();
        port(class.path(), "vport0p1", Some("kontor.control\n"));
        assert_eq!(find(class.path(), "kontor.contro").unwrap(), None);
        assert_eq!(find(class.path(), "kontor.control\n").unwrap(), None);
    }

    #[test]
    fn overlong_name_is_no_match() {
        let class = tempfile::tempdir().unwrap();
        port(class.path(), "vport0p1", Some(&"a".repeat(NAME_MAX + 1)));
        assert_eq!(find(class.path(), &"a".repeat(NAME_MAX + 1)).unwrap(), None);
        port(class.path(), "vport0p2", Some(&"b".repeat(NAME_MAX)));
        assert_eq!(find(class.path(), &"b".repeat(NAME_MAX)).unwrap(), Some("vport0p2".into()));
    }

    #[test]
    fn missing_class_is_no_port_yet() {
        let class = tempfile::tempdir().unwrap();
        assert_eq!(find(&class.path().join("none"), "kontor.uplink").unwrap(), None);
    }
}
