//! Answers: the lines of an interface's state, and the number at the end.

use std::fmt::{self, Write};
use std::time::{Duration, SystemTime};

use rustix::io::Errno;
use zeroize::Zeroizing;

use super::{KEY_LEN, State, StatePeer};

impl State {
    /// The lines of a `get`, without the number at the end.
    ///
    /// The text is as large as it gets from the start, so that no piece of memory is left behind with keys in it.
    pub fn text(&self) -> Zeroizing<String> {
        let allowed_ips: usize = self.peers.iter().map(|peer| peer.allowed_ips.len()).sum();
        let most = INTERFACE_MAX + self.peers.len() * PEER_MAX + allowed_ips * ALLOWED_IP_MAX;
        let mut text = Zeroizing::new(String::with_capacity(most));
        // Writing to a string does not fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> fmt::Result {
        if let Some(key) = &self.private_key {
            write_key(text, "private_key", key.as_bytes())?;
        }
        if self.listen_port != 0 {
            writeln!(text, "listen_port={}", self.listen_port)?;
        }
        if self.fwmark != 0 {
            writeln!(text, "fwmark={}", self.fwmark)?;
        }
        self.peers.iter().try_for_each(|peer| peer.write(text))
    }
}

impl StatePeer {
    fn write(&self, text: &mut String) -> fmt::Result {
        write_key(text, "public_key", self.public_key.as_bytes())?;
        if let Some(key) = &self.preshared_key {
            write_key(text, "preshared_key", key.as_bytes())?;
        }
        text.write_str("protocol_version=1\n")?;
        if let Some(endpoint) = self.endpoint {
            writeln!(text, "endpoint={endpoint}")?;
        }
        let since_1970 = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let handshake = self.last_handshake.map_or(Duration::ZERO, since_1970);
        writeln!(text, "last_handshake_time_sec={}", handshake.as_secs())?;
        writeln!(text, "last_handshake_time_nsec={}", handshake.subsec_nanos())?;
        writeln!(text, "tx_bytes={}", self.tx_bytes)?;
        writeln!(text, "rx_bytes={}", self.rx_bytes)?;
        writeln!(text, "persistent_keepalive_interval={}", self.persistent_keepalive_s)?;
        self.allowed_ips.iter().try_for_each(|network| writeln!(text, "allowed_ip={network}"))
    }
}

fn write_key(text: &mut String, name: &str, key: &[u8; KEY_LEN]) -> fmt::Result {
    let mut digits = Zeroizing::new([0; 2 * KEY_LEN]);
    hex::encode_to_slice(key, &mut *digits).map_err(|_| fmt::Error)?;
    writeln!(text, "{name}={}", std::str::from_utf8(&*digits).map_err(|_| fmt::Error)?)
}

/// The end of an answer to `get`. wg(8) reads digits alone here.
pub(crate) fn end_of_get(result: Result<(), Errno>) -> String {
    end(result.map_or_else(Errno::raw_os_error, |()| 0))
}

/// The answer to `set`. wg(8) expects the number negative here, as wireguard-go writes it.
pub(crate) fn end_of_set(result: Result<(), Errno>) -> String {
    end(result.map_or_else(|errno| -errno.raw_os_error(), |()| 0))
}

fn end(errno: i32) -> String {
    format!("errno={errno}\n\n")
}

/// Most bytes of the lines before the first peer.
const INTERFACE_MAX: usize = 128;
/// Most bytes of a peer's lines without its allowed addresses.
const PEER_MAX: usize = 512;
/// Most bytes of the line of an allowed address.
const ALLOWED_IP_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use kontor_vpn::PublicKey;

    use super::super::Secret;
    use super::*;

    /// A state whose lines are as long as they get.
    fn longest() -> State {
        let network: ipnet::IpNet = "1111:2222:3333:4444:5555:6666:7777:8888/128".parse().unwrap();
        let mut peer = StatePeer::new(PublicKey::from([0xff; KEY_LEN]));
        peer.preshared_key = Some(Secret::new(&[0xfe; KEY_LEN]));
        peer.endpoint = Some("[1111:2222:3333:4444:5555:6666:7777:8888%4294967295]:65535".parse().unwrap());
        peer.last_handshake =
            Some(SystemTime::UNIX_EPOCH + Duration::new(i64::MAX.unsigned_abs(), 999_999_999));
        (peer.tx_bytes, peer.rx_bytes) = (u64::MAX, u64::MAX);
        peer.persistent_keepalive_s = u16::MAX;
        peer.allowed_ips = vec![network; 2];
        State {
            private_key: Some(Secret::new(&[0xfd; KEY_LEN])),
            listen_port: u16::MAX,
            fwmark: u32::MAX,
            peers: vec![peer.clone(), peer],
        }
    }

    #[test]
    fn state_is_written_in_the_order_of_the_protocol() {
        let (private, public) = ("fd".repeat(KEY_LEN), "ff".repeat(KEY_LEN));
        let mut state = longest();
        state.peers.truncate(1);
        let text = state.text();
        let head =
            format!("private_key={private}\nlisten_port=65535\nfwmark=4294967295\npublic_key={public}\n");
        assert!(text.starts_with(&head));
        let keys: Vec<&str> = text.lines().map(|line| line.split_once('=').unwrap().0).collect();
        assert_eq!(
            keys[4..],
            [
                "preshared_key",
                "protocol_version",
                "endpoint",
                "last_handshake_time_sec",
                "last_handshake_time_nsec",
                "tx_bytes",
                "rx_bytes",
                "persistent_keepalive_interval",
                "allowed_ip",
                "allowed_ip"
            ]
        );
    }

    #[test]
    fn what_is_not_there_is_not_written() {
        assert_eq!(*State::default().text(), "");
    }

    #[test]
    fn longest_text_fits_into_its_first_piece_of_memory() {
        let state = longest();
        let text = state.text();
        assert_eq!(text.capacity(), INTERFACE_MAX + 2 * PEER_MAX + 4 * ALLOWED_IP_MAX);
    }

    #[test]
    fn numbers_are_positive_for_get_and_negative_for_set() {
        assert_eq!(end_of_get(Ok(())), "errno=0\n\n");
        assert_eq!(end_of_get(Err(Errno::IO)), "errno=5\n\n");
        assert_eq!(end_of_set(Ok(())), "errno=0\n\n");
        assert_eq!(end_of_set(Err(Errno::INVAL)), "errno=-22\n\n");
    }
}
