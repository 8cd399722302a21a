//! Finds the uplink and opens it for the tunnel: a network device of virtio's where the machine has one,
//! else the virtio-serial port.
//!
//! The kernel has no driver for the network device. Its PCI driver for virtio may hold it all the same,
//! so it is taken from that, given to `vfio-pci`, and opened through VFIO. init holds it open as long as
//! the session lasts: an IOMMU group can be open only once, so nobody else comes to drive it.

use super::ports::{self, APPEAR_MAX};
use super::uevent::Uevents;
use crate::tunnel::VFIO;
use crate::vfio::{Container, Device};
use std::fs::{read_dir, read_link, read_to_string, write};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

const PCI: &str = "/sys/bus/pci";
const CONTAINER: &str = "/dev/vfio/vfio";
const GROUPS: &str = "/dev/vfio";
const DRIVER: &str = "vfio-pci";
/// virtio's network device, version 1.
const VENDOR_AND_DEVICE: (&str, &str) = ("0x1af4", "0x1041");
/// Most devices that are looked at.
const DEVICES_MAX: usize = 256;

/// Why there is an uplink, but none that can be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UplinkError {
    #[error("list the PCI devices")]
    List(#[source] io::Error),
    #[error("look for the uplink's port")]
    Port(#[source] io::Error),
    #[error("take {address} from its driver")]
    Unbind { address: String, source: io::Error },
    #[error("give {address} to {DRIVER}")]
    Bind { address: String, source: io::Error },
    #[error("find the IOMMU group of {address}; is there an IOMMU?")]
    Group { address: String, source: io::Error },
    #[error("open {address} through VFIO")]
    Open { address: String, source: io::Error },
}

/// The uplink's descriptors.
pub(crate) enum Uplink {
    Port(OwnedFd),
    Vfio(Container, Device),
}

impl Uplink {
    /// Opens the uplink; `None` when none appears in time.
    pub(crate) fn open(uevents: &Uevents) -> Result<Option<Self>, UplinkError> {
        if let Some(address) = find(&Path::new(PCI).join("devices")).map_err(UplinkError::List)? {
            let (container, device) = take_over(Path::new(PCI), &address)?;
            return Ok(Some(Self::Vfio(container, device)));
        }
        let port = ports::open_named(uevents, kontor_wire::uplink::PORT, APPEAR_MAX);
        Ok(port.map_err(UplinkError::Port)?.map(Self::Port))
    }

    /// What the tunnel is started with: its arguments, and its descriptors around the other two.
    pub(crate) fn passed<'f>(
        &'f self,
        tun: BorrowedFd<'f>,
        link: BorrowedFd<'f>,
    ) -> (&'static [&'static str], Vec<BorrowedFd<'f>>) {
        match self {
            Self::Port(port) => (&[], vec![port.as_fd(), tun, link]),
            Self::Vfio(container, device) => (&[VFIO], vec![container.as_fd(), tun, link, device.as_fd()]),
        }
    }

    /// For people.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Port(_) => "port",
            Self::Vfio(..) => "vfio",
        }
    }
}

/// Whether the machine has a network device, which is then its uplink.
pub(crate) fn has_uplink_device() -> Result<bool, UplinkError> {
    let found = find(&Path::new(PCI).join("devices")).map_err(UplinkError::List)?;
    Ok(found.is_some())
}

/// The address of the first network device.
fn find(devices: &Path) -> io::Result<Option<String>> {
    let mut found = Vec::new();
    for entry in read_dir(devices)?.take(DEVICES_MAX) {
        let entry = entry?;
        let says = |file: &str| read_to_string(entry.path().join(file)).unwrap_or_default();
        if (says("vendor").trim_end(), says("device").trim_end()) == VENDOR_AND_DEVICE {
            found.extend(entry.file_name().into_string().ok());
        }
    }
    Ok(found.into_iter().min())
}

fn take_over(pci: &Path, address: &str) -> Result<(Container, Device), UplinkError> {
    let directory = pci.join("devices").join(address);
    hand_to_vfio(pci, &directory, address)?;
    let group = group(&directory).map_err(|source| UplinkError::Group { address: address.into(), source })?;
    Container::open(Path::new(CONTAINER), &group, address)
        .map_err(|source| UplinkError::Open { address: address.into(), source })
}

/// Unbinds whatever driver has the device, and lets `vfio-pci` have it, and no other.
fn hand_to_vfio(pci: &Path, directory: &Path, address: &str) -> Result<(), UplinkError> {
    match write(directory.join("driver/unbind"), address) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(UplinkError::Unbind { address: address.into(), source });
        }
        Ok(()) | Err(_) => {}
    }
    write(directory.join("driver_override"), DRIVER)
        .and_then(|()| write(pci.join("drivers_probe"), address))
        .map_err(|source| UplinkError::Bind { address: address.into(), source })
}

/// The group's file, by the number at the end of a link like `../../../kernel/iommu_groups/3`.
fn group(directory: &Path) -> io::Result<PathBuf> {
    let link = read_link(directory.join("iommu_group"))?;
    let number = link.file_name().ok_or(io::ErrorKind::InvalidData)?;
    Ok(Path::new(GROUPS).join(number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::create_dir_all;
    use std::os::unix::fs::symlink;

    fn device(pci: &Path, address: &str, vendor: &str, device: &str) -> PathBuf {
        let directory = pci.join("devices").join(address);
        create_dir_all(&directory).unwrap();
        write(directory.join("vendor"), vendor).unwrap();
        write(directory.join("device"), device).unwrap();
        directory
    }

    #[test]
    fn network_device_of_virtio_is_found_and_nothing_else() {
        let pci = tempfile::tempdir().unwrap();
        device(pci.path(), "0000:00:01.0", "0x1af4\n", "0x1042\n");
        device(pci.path(), "0000:00:02.0", "0x8086\n", "0x1041\n");
        let devices = pci.path().join("devices");
        assert_eq!(find(&devices).unwrap(), None);
        device(pci.path(), "0000:00:04.0", "0x1af4\n", "0x1041\n");
        device(pci.path(), "0000:00:03.0", "0x1af4\n", "0x1041\n");
        assert_eq!(find(&devices).unwrap().as_deref(), Some("0000:00:03.0"));
    }

    #[test]
    fn device_is_taken_from_its_driver_and_given_to_vfio() {
        let pci = tempfile::tempdir().unwrap();
        let address = "0000:00:03.0";
        let directory = device(pci.path(), address, "", "");
        // Nobody has it.
        hand_to_vfio(pci.path(), &directory, address).unwrap();
        assert_eq!(read_to_string(directory.join("driver_override")).unwrap(), "vfio-pci");
        assert_eq!(read_to_string(pci.path().join("drivers_probe")).unwrap(), address);
        // Somebody has it.
        create_dir_all(directory.join("driver")).unwrap();
        hand_to_vfio(pci.path(), &directory, address).unwrap();
        assert_eq!(read_to_string(directory.join("driver/unbind")).unwrap(), address);
    }

    #[test]
    fn machine_without_an_iommu_is_said_to_have_none() {
        let pci = tempfile::tempdir().unwrap();
        device(pci.path(), "0000:00:03.0", "", "");
        let refused = take_over(pci.path(), "0000:00:03.0");
        assert!(matches!(refused, Err(UplinkError::Group { .. })));
    }

    #[test]
    fn group_is_named_by_its_link() {
        let directory = tempfile::tempdir().unwrap();
        symlink("../../../../kernel/iommu_groups/12", directory.path().join("iommu_group")).unwrap();
        assert_eq!(group(directory.path()).unwrap(), Path::new("/dev/vfio/12"));
    }
}
