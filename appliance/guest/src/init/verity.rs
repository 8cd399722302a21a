//! The root image through dm-verity (kernel documentation, admin-guide/device-mapper/verity), by
//! device mapper's own requests: no tool, no library.
//!
//! The hash tree stands behind the data on the same device, without a superblock, so it begins at the
//! block whose number is the count of data blocks. A block that does not match its hash makes the
//! kernel panic: nothing changed is ever executed or read.

use crate::sys::{DM_HEADER_LEN, DmCall, DmCommand, DmTarget, device_mapper};
use kontor_release::Verity;
use rustix::fs::{Mode, OFlags, open};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

const CONTROL: &str = "/dev/mapper/control";
const NAME: &[u8] = b"kontor-root";
/// Bytes of a block, of data and of hashes alike.
pub(crate) const BLOCK: u64 = 4096;
const SECTOR: u64 = 512;
/// The interface's version that is spoken; the kernel takes any of its own major number.
const DM_VERSION: [u32; 3] = [4, 0, 0];
const DM_READONLY: u32 = 1;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VerityError {
    #[error("open {CONTROL}")]
    Control(#[source] io::Error),
    #[error("{0} data blocks are more than a device holds")]
    Size(u64),
    #[error("{command:?} the verity device")]
    Request { command: DmCommand, source: io::Error },
}

/// Makes the verity device over the block device `major:minor`; returns its node.
pub(crate) fn open_root(verity: &Verity, (major, minor): (u32, u32)) -> Result<PathBuf, VerityError> {
    let control = open(CONTROL, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| VerityError::Control(error.into()))?;
    let request = |command, mut call: DmCall| {
        device_mapper(control.as_fd(), command, &mut call)
            .map(|()| call)
            .map_err(|source| VerityError::Request { command, source })
    };
    let created = request(DmCommand::Create, call(0))?;
    request(DmCommand::TableLoad, table(verity, major, minor)?)?;
    request(DmCommand::Suspend, call(0))?;
    Ok(PathBuf::from(format!("/dev/dm-{}", minor_of(created.dev))))
}

fn call(flags: u32) -> DmCall {
    DmCall {
        version: DM_VERSION,
        data_size: 0,
        data_start: u32::try_from(DM_HEADER_LEN).expect("below a page"),
        target_count: 0,
        open_count: 0,
        flags,
        event_nr: 0,
        padding: 0,
        dev: 0,
        name: padded(NAME),
        uuid: [0; 129],
        data: [0; 7],
        target: DmTarget {
            sector_start: 0,
            length: 0,
            status: 0,
            next: 0,
            target_type: [0; 16],
            params: padded(b""),
        },
    }
}

fn table(verity: &Verity, major: u32, minor: u32) -> Result<DmCall, VerityError> {
    let blocks = verity.data_blocks;
    let length = blocks.checked_mul(BLOCK / SECTOR).ok_or(VerityError::Size(blocks))?;
    let mut call = call(DM_READONLY);
    call.target_count = 1;
    call.target.length = length;
    call.target.target_type = padded(b"verity");
    call.target.params = padded(parameters(verity, major, minor).as_bytes());
    Ok(call)
}

/// `version data_device hash_device data_block_size hash_block_size data_blocks hash_start digest root
/// salt count options…`
fn parameters(verity: &Verity, major: u32, minor: u32) -> String {
    let Verity { root_hash, salt, data_blocks } = verity;
    let salt = hex::encode(salt);
    format!(
        "1 {major}:{minor} {major}:{minor} {BLOCK} {BLOCK} {data_blocks} {data_blocks} sha256 {root_hash} {salt} \
         1 panic_on_corruption"
    )
}

/// Minor number in the kernel's `huge_encode_dev` form: bits 0..8 and 20..32.
fn minor_of(dev: u64) -> u64 {
    (dev & 0xff) | ((dev >> 12) & 0x000f_ff00)
}

/// `text` with NULs behind it; our texts are shorter than the arrays, whose last byte stays NUL.
fn padded<const N: usize>(text: &[u8]) -> [u8; N] {
    assert!(text.len() < N, "a text of ours fits its field");
    let mut field = [0; N];
    field[..text.len()].copy_from_slice(text);
    field
}

#[cfg(test)]
mod tests {
    use super::*;
    use kontor_release::Digest;

    fn verity(data_blocks: u64) -> Verity {
        Verity { root_hash: Digest([0xab; 32]), salt: [1; 32], data_blocks }
    }

    #[test]
    fn tree_begins_behind_the_data_and_corruption_panics() {
        let expected = format!(
            "1 254:0 254:0 4096 4096 7000 7000 sha256 {} {} 1 panic_on_corruption",
            "ab".repeat(32),
            "01".repeat(32)
        );
        assert_eq!(parameters(&verity(7000), 254, 0), expected);
    }

    #[test]
    fn table_is_one_read_only_target_over_all_data() {
        let call = table(&verity(7000), 254, 0).unwrap();
        assert_eq!((call.target_count, call.flags), (1, DM_READONLY));
        assert_eq!((call.target.sector_start, call.target.length), (0, 7000 * 8));
        assert_eq!(&call.target.target_type[..7], b"verity\0");
        assert!(call.target.params.starts_with(b"1 254:0 "));
    }

    #[test]
    fn longest_parameters_fit_their_field() {
        let text = parameters(&verity(u64::MAX), u32::MAX, u32::MAX);
        assert!(text.len() < crate::sys::DM_PARAMS, "{}", text.len());
    }

    #[test]
    fn more_blocks_than_sectors_can_count_are_refused() {
        assert!(table(&verity(u64::MAX / 8), 254, 0).is_ok());
        assert!(matches!(table(&verity(u64::MAX / 8 + 1), 254, 0), Err(VerityError::Size(_))));
    }

    #[test]
    fn minor_number_is_read_from_the_kernels_form() {
        assert_eq!(minor_of(0xfe00), 0);
        assert_eq!(minor_of(0xfe07), 7);
        assert_eq!(minor_of(0x0010_fe00), 0x100);
    }
}
