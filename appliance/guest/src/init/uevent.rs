//! The kernel's announcements of devices. They are taken as a reason to look again, never read: what
//! there is says `/sys`.

use crate::clock::{Moment, timespec};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind,
    netlink::{KOBJECT_UEVENT, SocketAddrNetlink},
    recv, socket_with,
};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// Multicast group of the kernel itself (1); group 2 is udev's.
const KERNEL_GROUP: u32 = 1;
/// Longer than the kernel makes an announcement (`UEVENT_BUFFER_SIZE` is 2048).
const ANNOUNCEMENT_MAX: usize = 4096;

/// Waits for devices. Made before the first look, so that nothing is missed between look and wait.
#[derive(Debug)]
pub(crate) struct Uevents(OwnedFd);

impl Uevents {
    /// Begins to listen.
    pub(crate) fn listen() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        Ok(Self(socket))
    }

    /// Looks, and looks again after each announcement, until something is found; `None` when that
    /// takes longer than `limit`.
    pub(crate) fn until<T>(
        &self,
        limit: Duration,
        mut look: impl FnMut() -> io::Result<Option<T>>,
    ) -> io::Result<Option<T>> {
        let end = Moment::now().after(limit);
        loop {
            if let Some(found) = look()? {
                return Ok(Some(found));
            }
            let left = end.since(Moment::now());
            if left.is_zero() {
                return Ok(None);
            }
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timespec(left))) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.drain()?;
        }
    }

    fn drain(&self) -> io::Result<()> {
        let mut announcement = [0; ANNOUNCEMENT_MAX];
        loop {
            match recv(&self.0, &mut announcement, RecvFlags::empty()) {
                // NOBUFS: announcements were lost, and looking again is all that is asked.
                Ok(_) | Err(Errno::INTR | Errno::NOBUFS) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_already_is_found_without_an_announcement() {
        let uevents = Uevents::listen().unwrap();
        let found = uevents.until(Duration::ZERO, || Ok(Some(7))).unwrap();
        assert_eq!(found, Some(7));
    }

    #[test]
    fn waiting_ends_at_its_limit() {
        let uevents = Uevents::listen().unwrap();
        let found = uevents.until(Duration::from_millis(20), || Ok(None::<()>)).unwrap();
        assert_eq!(found, None);
    }
}
