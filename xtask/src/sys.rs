//! What no safe interface offers: a packet socket bound to one interface, a mount namespace for this process,
//! and a mount whose files have another owner.

#![expect(unsafe_code, reason = "packet(7) sockets and mount_setattr(2) have no safe wrapper")]
#![expect(clippy::cast_possible_truncation, reason = "constants and sizes of C structures")]

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU32, Ordering},
};

/// Bytes of one block of the ring.
const BLOCK: usize = 1 << 20;
/// Blocks of the ring.
const BLOCKS: usize = 32;
/// A block that is not full is handed over after so many milliseconds.
pub(crate) const RETIRE_MS: u32 = 20;

/// Receives every frame that passes an interface, through a ring shared with the kernel (packet(7),
/// `TPACKET_V3`): an ordinary user's socket buffer would lose packets under load.
pub(crate) struct PacketRing {
    socket: OwnedFd,
    ring: NonNull<u8>,
    next: usize,
}

impl PacketRing {
    /// A ring for `interface` of the calling thread's network namespace, or for all its interfaces.
    pub(crate) fn open(interface: Option<u32>) -> io::Result<Self> {
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: takes no pointer.
        let raw = check(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) })?;
        // SAFETY: `raw` was just opened and belongs to nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(raw) };
        set(&socket, libc::PACKET_VERSION, &libc::tpacket_versions::TPACKET_V3)?;
        let request = libc::tpacket_req3 {
            tp_block_size: BLOCK as u32,
            tp_block_nr: BLOCKS as u32,
            tp_frame_size: 2048,
            tp_frame_nr: (BLOCK * BLOCKS / 2048) as u32,
            tp_retire_blk_tov: RETIRE_MS,
            tp_sizeof_priv: 0,
            tp_feature_req_word: 0,
        };
        set(&socket, libc::PACKET_RX_RING, &request)?;
        // SAFETY: asks the kernel for a new mapping of the ring's size.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BLOCK * BLOCKS,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                socket.as_raw_fd(),
                0,
            )
        };
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ring = NonNull::new(mapping.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let opened = Self { socket, ring, next: 0 };
        // SAFETY: `sockaddr_ll` is plain data for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = interface.unwrap_or(0).cast_signed();
        let length = mem::size_of_val(&address) as libc::socklen_t;
        // SAFETY: the pointer and length describe `address`.
        check(unsafe { libc::bind(opened.socket.as_raw_fd(), (&raw const address).cast(), length) })?;
        Ok(opened)
    }

    /// Appends the frames of the next finished block; false when there is none.
    pub(crate) fn take(&mut self, packets: &mut Vec<Vec<u8>>) -> bool {
        // SAFETY: `next` is below `BLOCKS`, so the block lies in the mapping.
        let block = unsafe { self.ring.add(self.next * BLOCK) };
        let description = block.cast::<libc::tpacket_block_desc>();
        // SAFETY: a block begins with its description; the kernel writes the status atomically.
        let status = unsafe { AtomicU32::from_ptr(&raw mut (*description.as_ptr()).hdr.bh1.block_status) };
        if status.load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
            return false;
        }
        // SAFETY: the status says that the block is ours until we give it back.
        let header = unsafe { (*description.as_ptr()).hdr.bh1 };
        let mut at = header.offset_to_first_pkt as usize;
        for _ in 0..header.num_pkts {
            // SAFETY: the kernel placed a packet's header here, within the block.
            let packet = unsafe { block.add(at).cast::<libc::tpacket3_hdr>().read_unaligned() };
            // SAFETY: so many bytes of the frame stand at `tp_mac` behind the header, within the block.
            let bytes = unsafe {
                std::slice::from_raw_parts(
                    block.add(at + usize::from(packet.tp_mac)).as_ptr(),
                    packet.tp_snaplen as usize,
                )
            };
            packets.push(bytes.to_vec());
            at += packet.tp_next_offset as usize;
        }
        status.store(libc::TP_STATUS_KERNEL, Ordering::Release);
        self.next = (self.next + 1) % BLOCKS;
        true
    }

    /// How many frames found no room since the last call.
    pub(crate) fn lost(&self) -> io::Result<u32> {
        // SAFETY: `tpacket_stats_v3` is plain data for which zero is a value.
        let mut stats: libc::tpacket_stats_v3 = unsafe { mem::zeroed() };
        let mut length = mem::size_of_val(&stats) as libc::socklen_t;
        // SAFETY: the pointers describe `stats` and its length.
        check(unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut length,
            )
        })?;
        Ok(stats.tp_drops)
    }
}

impl AsFd for PacketRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for PacketRing {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `open` with this length, and nothing borrows from it.
        let _ = unsafe { libc::munmap(self.ring.as_ptr().cast(), BLOCK * BLOCKS) };
    }
}

/// Gives this process, which must have one thread, mounts of its own.
pub(crate) fn leave_mount_namespace() -> io::Result<()> {
    // SAFETY: no file descriptor table is left, only mounts.
    Ok(unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }?)
}

/// Shows the files of a mount, and of those below it, that is at no place yet under the owners that the maps of
/// the user namespace `map` say: what they map from on disk, what they map to in the mount (mount_setattr(2)).
pub(crate) fn map_mount(mount: &OwnedFd, map: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP | if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 },
        attr_clr: 0,
        propagation: 0,
        userns_fd: map.as_raw_fd().unsigned_abs().into(),
    };
    // SAFETY: the pointers describe an empty path, and `attributes` and its length.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            mem::size_of_val(&attributes),
        )
    };
    check(result as libc::c_int).map(drop)
}

fn set<T>(socket: &OwnedFd, option: libc::c_int, value: &T) -> io::Result<()> {
    let length = mem::size_of_val(value) as libc::socklen_t;
    // SAFETY: the pointer and length describe `value`, which is plain data.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            option,
            std::ptr::from_ref(value).cast(),
            length,
        )
    })
    .map(drop)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
