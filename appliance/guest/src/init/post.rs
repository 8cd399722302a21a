//! A call to the gateway's post (`lease.md` 19): one `Hello` through the tunnel and its answer. Nothing here
//! blocks, and how long a call may take is for the caller to see to.

use kontor_trust::Digest;
use kontor_wire::post::{FromPost, MAX_FROM_GATEWAY, ToPost};
use kontor_wire::{Decoder, FrameError, encode};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, recv, send, socket_with,
};
use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error("the connection to the gateway's post")]
    Socket(#[source] io::Error),
    #[error("the gateway's post hung up")]
    HungUp,
    #[error("the gateway's post sent what is no message")]
    Frame(#[source] FrameError),
    #[error("the gateway's post did not answer in time")]
    Late,
}

impl From<Errno> for CallError {
    fn from(error: Errno) -> Self {
        Self::Socket(error.into())
    }
}

/// A call under way.
#[derive(Debug)]
pub(crate) struct Call {
    socket: OwnedFd,
    /// What is still to be said.
    hello: Vec<u8>,
    decoder: Decoder,
}

impl Call {
    /// Begins to say that this boot has the lease with this hash.
    pub(crate) fn begin(to: SocketAddrV4, lease_hash: &Digest) -> Result<Self, CallError> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
        match connect(&socket, &to) {
            Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let hello = encode(&ToPost::Hello { lease_hash: lease_hash.0 });
        Ok(Self { socket, hello, decoder: Decoder::new(MAX_FROM_GATEWAY) })
    }

    /// Goes as far as it goes now; `None` when something must happen first.
    pub(crate) fn proceed(&mut self) -> Option<Result<FromPost, CallError>> {
        self.say().and_then(|()| self.hear()).transpose()
    }

    fn say(&mut self) -> Result<(), CallError> {
        while !self.hello.is_empty() {
            match send(&self.socket, &self.hello, SendFlags::NOSIGNAL) {
                Ok(count) => drop(self.hello.drain(..count)),
                Err(Errno::INTR) => {}
                // Not connected yet.
                Err(Errno::AGAIN | Errno::NOTCONN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn hear(&mut self) -> Result<Option<FromPost>, CallError> {
        let mut chunk = [0; MAX_FROM_GATEWAY];
        loop {
            if let Some(message) = self.decoder.next_message().map_err(CallError::Frame)? {
                return Ok(Some(message));
            }
            let room = self.decoder.room().min(chunk.len());
            match recv(&self.socket, &mut chunk[..room], RecvFlags::empty()) {
                Ok((0, _)) => return Err(CallError::HungUp),
                Ok((count, _)) => drop(self.decoder.push(&chunk[..count])),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOTCONN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Call {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kontor_wire::post::{MAX_FROM_GUEST, Refusal};
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};

    fn desk() -> (TcpListener, SocketAddrV4) {
        let desk = TcpListener::bind("127.0.0.1:0").unwrap();
        let SocketAddr::V4(address) = desk.local_addr().unwrap() else { panic!("no IPv4 address") };
        (desk, address)
    }

    fn outcome(call: &mut Call) -> Result<FromPost, CallError> {
        loop {
            match call.proceed() {
                Some(outcome) => return outcome,
                None => std::thread::yield_now(),
            }
        }
    }

    /// The gateway's end, once a whole `Hello` came.
    fn answered(desk: &TcpListener, answer: &[u8]) -> (ToPost, TcpStream) {
        let mut stream = desk.accept().unwrap().0;
        let mut decoder = Decoder::new(MAX_FROM_GUEST);
        let hello = loop {
            if let Some(hello) = decoder.next_message().unwrap() {
                break hello;
            }
            let mut chunk = [0; 16];
            let count = stream.read(&mut chunk).unwrap();
            decoder.push(&chunk[..count]);
        };
        stream.write_all(answer).unwrap();
        (hello, stream)
    }

    #[test]
    fn hello_is_said_and_its_answer_heard() {
        let (desk, address) = desk();
        let mut call = Call::begin(address, &Digest([7; 32])).unwrap();
        let refused = FromPost::Refused(Refusal::OtherLease);
        let gateway = std::thread::spawn({
            let answer = encode(&refused);
            move || answered(&desk, &answer).0
        });
        assert_eq!(outcome(&mut call).unwrap(), refused);
        assert_eq!(gateway.join().unwrap(), ToPost::Hello { lease_hash: [7; 32] });
    }

    #[test]
    fn gateway_that_is_not_there_hangs_up_or_sends_garbage_is_an_error() {
        let (desk, address) = desk();
        let mut call = Call::begin(address, &Digest([7; 32])).unwrap();
        drop(answered_without_reading(&desk));
        assert!(matches!(outcome(&mut call), Err(CallError::HungUp | CallError::Socket(_))));

        let mut call = Call::begin(address, &Digest([7; 32])).unwrap();
        let gateway = std::thread::spawn(move || answered(&desk, &[1, 0, 0, 0, 99]));
        assert!(matches!(outcome(&mut call), Err(CallError::Frame(_))));
        drop(gateway.join().unwrap());

        let refused = Call::begin(address, &Digest([7; 32])).and_then(|mut call| outcome(&mut call));
        assert!(matches!(refused, Err(CallError::Socket(_))));
    }

    fn answered_without_reading(desk: &TcpListener) -> TcpStream {
        desk.accept().unwrap().0
    }
}
