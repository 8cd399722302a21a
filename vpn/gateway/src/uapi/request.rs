//! Requests: lines in, one request out at each empty line.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::str::FromStr;

use ipnet::IpNet;
use kontor_vpn::PublicKey;
use rustix::io::Errno;
use zeroize::{Zeroize, Zeroizing};

use super::{AllowedIp, Change, KEY_LEN, Secret, Set, SetPeer};

/// Most bytes of a line without its newline; the longest that means something has 78.
pub const LINE_MAX: usize = 256;
/// Most peers in one request.
pub const PEERS_MAX: usize = 65_536;
/// Most changes of allowed addresses in one request, all peers together.
pub const ALLOWED_IPS_MAX: usize = 262_144;

/// What is asked.
pub enum Request {
    /// `get=1`
    Get,
    /// `set=1`
    Set(Set),
}

/// Why a request is not done. It never quotes the request, which may hold a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The first line is neither of the two.
    #[error("neither get=1 nor set=1")]
    Operation,
    /// A line has no `=`, or is not ASCII.
    #[error("a line is not key=value")]
    Shape,
    /// See [`LINE_MAX`].
    #[error("a line is longer than {LINE_MAX} bytes")]
    LineTooLong,
    /// A key that this place does not know.
    #[error("an unknown key, or one in the wrong place")]
    Key,
    /// A value that its key cannot have.
    #[error("{0} cannot have this value")]
    Value(&'static str),
    /// See [`PEERS_MAX`].
    #[error("more than {PEERS_MAX} peers")]
    Peers,
    /// See [`ALLOWED_IPS_MAX`].
    #[error("more than {ALLOWED_IPS_MAX} allowed addresses")]
    AllowedIps,
}

impl RequestError {
    /// The number that the caller is told (errno(3)).
    pub fn errno(self) -> Errno {
        match self {
            Self::Operation | Self::Shape => Errno::PROTO,
            Self::LineTooLong | Self::Key | Self::Value(_) => Errno::INVAL,
            Self::Peers | Self::AllowedIps => Errno::TOOBIG,
        }
    }
}

/// Who knows interfaces by name: an IPv6 address of a link may have one behind `%`.
pub trait Interfaces {
    /// The interface's index.
    fn index(&self, name: &str) -> Option<u32>;
}

/// Nobody: only indices are understood.
pub struct NoInterfaces;

impl Interfaces for NoInterfaces {
    fn index(&self, _: &str) -> Option<u32> {
        None
    }
}

/// Reads the requests of one connection.
///
/// After an error it goes on to the request's end, so that the answer is that of this request, and the next line is the
/// next request's first.
pub struct Decoder {
    line: Zeroizing<[u8; LINE_MAX]>,
    len: usize,
    request: Draft,
}

/// A request of which some lines are here.
enum Draft {
    None,
    Get,
    Set(SetDraft),
    Failed(RequestError),
}

#[derive(Default)]
struct SetDraft {
    set: Set,
    allowed_ips: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// At the start of a request.
    pub fn new() -> Self {
        Self { line: Zeroizing::new([0; LINE_MAX]), len: 0, request: Draft::None }
    }

    /// Whether some of a request is here that is not complete.
    pub fn is_amid(&self) -> bool {
        self.len > 0 || !matches!(self.request, Draft::None)
    }

    /// Takes bytes up to a request's end; gives how many it took and, at the end, the request. What is left is of the
    /// next one.
    pub fn push(
        &mut self,
        bytes: &[u8],
        interfaces: &dyn Interfaces,
    ) -> (usize, Option<Result<Request, RequestError>>) {
        for (at, byte) in bytes.iter().enumerate() {
            match (byte, self.line.get_mut(self.len)) {
                (b'\n', _) => {
                    let done = self.end_line(interfaces);
                    if done.is_some() {
                        return (at + 1, done);
                    }
                }
                (_, Some(place)) => {
                    *place = *byte;
                    self.len += 1;
                }
                (_, None) => self.request = Draft::Failed(RequestError::LineTooLong),
            }
        }
        (bytes.len(), None)
    }

    fn end_line(&mut self, interfaces: &dyn Interfaces) -> Option<Result<Request, RequestError>> {
        let len = std::mem::take(&mut self.len);
        let result = if len == 0 {
            match std::mem::replace(&mut self.request, Draft::None) {
                // An empty line between requests.
                Draft::None => None,
                Draft::Get => Some(Ok(Request::Get)),
                Draft::Set(draft) => Some(Ok(Request::Set(draft.set))),
                Draft::Failed(error) => Some(Err(error)),
            }
        } else {
            if let Err(error) = self.request.line(&self.line[..len], interfaces) {
                self.request = Draft::Failed(error);
            }
            None
        };
        self.line[..len].zeroize();
        result
    }
}

impl Draft {
    fn line(&mut self, line: &[u8], interfaces: &dyn Interfaces) -> Result<(), RequestError> {
        match self {
            Self::None => {
                *self = match line {
                    b"get=1" => Self::Get,
                    b"set=1" => Self::Set(SetDraft::default()),
                    _ => return Err(RequestError::Operation),
                };
                Ok(())
            }
            Self::Get => Err(RequestError::Key),
            Self::Set(draft) => {
                let line = std::str::from_utf8(line).ok().filter(|line| line.is_ascii());
                let (key, value) = line.and_then(|line| line.split_once('=')).ok_or(RequestError::Shape)?;
                draft.set(key, value, interfaces)
            }
            Self::Failed(_) => Ok(()),
        }
    }
}

impl SetDraft {
    fn set(&mut self, key: &str, value: &str, interfaces: &dyn Interfaces) -> Result<(), RequestError> {
        if key == "public_key" {
            if self.set.peers.len() == PEERS_MAX {
                return Err(RequestError::Peers);
            }
            let public_key = secret(value).ok_or(RequestError::Value("public_key"))?;
            self.set.peers.push(SetPeer::new(PublicKey::from(*public_key.as_bytes())));
            return Ok(());
        }
        match self.set.peers.last_mut() {
            None => self.set.set_interface(key, value),
            Some(peer) => {
                if key == "allowed_ip" {
                    if self.allowed_ips == ALLOWED_IPS_MAX {
                        return Err(RequestError::AllowedIps);
                    }
                    self.allowed_ips += 1;
                }
                peer.set(key, value, interfaces)
            }
        }
    }
}

impl Set {
    fn set_interface(&mut self, key: &str, value: &str) -> Result<(), RequestError> {
        match key {
            "private_key" => {
                self.private_key = key_change(value).ok_or(RequestError::Value("private_key"))?
            }
            "listen_port" => {
                self.listen_port = Some(number(value).ok_or(RequestError::Value("listen_port"))?);
            }
            "fwmark" => self.fwmark = Some(number(value).ok_or(RequestError::Value("fwmark"))?),
            "replace_peers" => {
                yes(value).ok_or(RequestError::Value("replace_peers"))?;
                self.replace_peers = true;
            }
            _ => return Err(RequestError::Key),
        }
        Ok(())
    }
}

impl SetPeer {
    fn set(&mut self, key: &str, value: &str, interfaces: &dyn Interfaces) -> Result<(), RequestError> {
        match key {
            "remove" => {
                yes(value).ok_or(RequestError::Value("remove"))?;
                self.remove = true;
            }
            "update_only" => {
                yes(value).ok_or(RequestError::Value("update_only"))?;
                self.update_only = true;
            }
            "preshared_key" => {
                self.preshared_key = key_change(value).ok_or(RequestError::Value("preshared_key"))?;
            }
            "endpoint" => {
                let endpoint = endpoint(value, interfaces).ok_or(RequestError::Value("endpoint"))?;
                self.endpoint = Some(endpoint);
            }
            "persistent_keepalive_interval" => {
                let seconds = number(value).ok_or(RequestError::Value("persistent_keepalive_interval"))?;
                self.persistent_keepalive_s = Some(seconds);
            }
            "replace_allowed_ips" => {
                yes(value).ok_or(RequestError::Value("replace_allowed_ips"))?;
                self.replace_allowed_ips = true;
                self.allowed_ips.clear();
            }
            "allowed_ip" => {
                self.allowed_ips.push(allowed_ip(value).ok_or(RequestError::Value("allowed_ip"))?);
            }
            "protocol_version" if value == "1" => {}
            "protocol_version" => return Err(RequestError::Value("protocol_version")),
            _ => return Err(RequestError::Key),
        }
        Ok(())
    }
}

/// Sixty-four hexadecimal digits.
fn secret(value: &str) -> Option<Secret> {
    let mut bytes = Zeroizing::new([0; KEY_LEN]);
    hex::decode_to_slice(value, &mut *bytes).ok()?;
    Some(Secret::new(&bytes))
}

/// A key, or zero for none.
fn key_change(value: &str) -> Option<Change<Secret>> {
    secret(value).map(|key| if key.is_none() { Change::Remove } else { Change::Put(key) })
}

/// Decimal digits alone; `from_str` would take a sign.
fn number<T: FromStr>(value: &str) -> Option<T> {
    value.bytes().all(|byte| byte.is_ascii_digit()).then(|| value.parse().ok())?
}

fn yes(value: &str) -> Option<()> {
    (value == "true").then_some(())
}

/// `192.0.2.1:51820`, `[2001:db8::1]:51820`, `[fe80::1%2]:51820` or `[fe80::1%eth0]:51820`.
fn endpoint(value: &str, interfaces: &dyn Interfaces) -> Option<SocketAddr> {
    let (host, port) = value.rsplit_once(':')?;
    let port = number(port)?;
    let Some(host) = host.strip_prefix('[') else {
        return Some((host.parse::<Ipv4Addr>().ok()?, port).into());
    };
    let host = host.strip_suffix(']')?;
    let (address, scope) = match host.split_once('%') {
        Some((address, zone)) => (address, number(zone).or_else(|| interfaces.index(zone))?),
        None => (host, 0),
    };
    Some(SocketAddrV6::new(address.parse::<Ipv6Addr>().ok()?, port, 0, scope).into())
}

/// An address with the length of its prefix; a `-` in front takes it away. Host bits are cleared.
fn allowed_ip(value: &str) -> Option<AllowedIp> {
    let (remove, value) = match value.strip_prefix('-') {
        Some(value) => (true, value),
        None => (false, value),
    };
    let (_, len) = value.split_once('/')?;
    number::<u8>(len)?;
    let network = IpNet::from_str(value).ok()?.trunc();
    Some(if remove { AllowedIp::Remove(network) } else { AllowedIp::Add(network) })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct OneInterface;

    impl Interfaces for OneInterface {
        fn index(&self, name: &str) -> Option<u32> {
            (name == "eth0").then_some(7)
        }
    }

    /// The only request that the bytes hold.
    fn read(bytes: &[u8]) -> Result<Request, RequestError> {
        let (taken, request) = Decoder::new().push(bytes, &OneInterface);
        assert_eq!(taken, bytes.len());
        request.expect("the bytes end with an empty line")
    }

    fn read_set(lines: &str) -> Result<Set, RequestError> {
        match read(format!("set=1\n{lines}\n").as_bytes()) {
            Ok(Request::Set(set)) => Ok(set),
            Ok(Request::Get) => panic!("set was asked"),
            Err(error) => Err(error),
        }
    }

    fn accepted(lines: &str) -> Set {
        read_set(lines).unwrap_or_else(|error| panic!("{lines:?}: {error}"))
    }

    fn refused(lines: &str) -> RequestError {
        read_set(lines).err().unwrap_or_else(|| panic!("{lines:?} was accepted"))
    }

    fn peer(lines: &str) -> SetPeer {
        accepted(&format!("public_key={}\n{lines}", key(9))).peers.remove(0)
    }

    fn refused_of_peer(lines: &str) -> RequestError {
        refused(&format!("public_key={}\n{lines}", key(9)))
    }

    fn key(byte: u8) -> String {
        hex::encode([byte; KEY_LEN])
    }

    #[test]
    fn every_key_of_an_interface_is_read() {
        let lines =
            format!("private_key={}\nlisten_port=51820\nfwmark=4294967295\nreplace_peers=true\n", key(1));
        let set = accepted(&lines);
        assert!(matches!(&set.private_key, Change::Put(secret) if secret.as_bytes() == &[1; KEY_LEN]));
        assert_eq!((set.listen_port, set.fwmark), (Some(51820), Some(u32::MAX)));
        assert!(set.replace_peers && set.peers.is_empty());
        let set = accepted("");
        assert!(matches!(set.private_key, Change::Keep));
        assert_eq!((set.listen_port, set.fwmark, set.replace_peers), (None, None, false));
    }

    #[test]
    fn every_key_of_a_peer_is_read() {
        let lines = format!(
            "update_only=true\npreshared_key={}\nendpoint=192.0.2.1:51820\npersistent_keepalive_interval=25\n\
             replace_allowed_ips=true\nallowed_ip=10.0.0.0/8\nallowed_ip=-fd00::/64\nprotocol_version=1\n",
            key(2)
        );
        let read = peer(&lines);
        assert_eq!(read.public_key.as_bytes(), &[9; KEY_LEN]);
        assert!(read.update_only && !read.remove && read.replace_allowed_ips);
        assert!(matches!(&read.preshared_key, Change::Put(secret) if secret.as_bytes() == &[2; KEY_LEN]));
        assert_eq!(read.endpoint, Some("192.0.2.1:51820".parse().unwrap()));
        assert_eq!(read.persistent_keepalive_s, Some(25));
        let (added, removed) = ("10.0.0.0/8".parse().unwrap(), "fd00::/64".parse().unwrap());
        assert_eq!(read.allowed_ips, [AllowedIp::Add(added), AllowedIp::Remove(removed)]);
        assert!(peer("remove=true\n").remove);
        let read = peer("");
        assert!(!read.update_only && !read.replace_allowed_ips && read.endpoint.is_none());
        assert!(matches!(read.preshared_key, Change::Keep) && read.persistent_keepalive_s.is_none());
    }

    #[test]
    fn key_of_zeros_is_none() {
        let zeros = key(0);
        assert!(matches!(accepted(&format!("private_key={zeros}\n")).private_key, Change::Remove));
        assert!(matches!(peer(&format!("preshared_key={zeros}\n")).preshared_key, Change::Remove));
    }

    #[test]
    fn endpoints_of_both_families_are_read() {
        for (text, expected) in [
            ("[2001:db8::1]:51820", "[2001:db8::1]:51820"),
            ("[fe80::1%3]:1", "[fe80::1%3]:1"),
            ("[fe80::1%eth0]:1", "[fe80::1%7]:1"),
        ] {
            let expected: SocketAddr = expected.parse().unwrap();
            assert_eq!(peer(&format!("endpoint={text}\n")).endpoint, Some(expected));
        }
        for wrong in [
            "",
            ":",
            "192.0.2.1",
            "192.0.2.1:",
            "192.0.2.1:65536",
            "192.0.2.1:+1",
            "2001:db8::1:51820",
            "[2001:db8::1]",
            "[2001:db8::1:51820",
            "[fe80::1%nowhere]:1",
            "[fe80::1%]:1",
            "host:51820",
            "[192.0.2.1]:51820",
        ] {
            assert_eq!(
                refused_of_peer(&format!("endpoint={wrong}\n")),
                RequestError::Value("endpoint"),
                "{wrong}"
            );
        }
    }

    #[test]
    fn host_bits_of_allowed_addresses_are_cleared() {
        assert_eq!(
            peer("allowed_ip=10.1.2.3/8\n").allowed_ips,
            [AllowedIp::Add("10.0.0.0/8".parse().unwrap())]
        );
        for wrong in
            ["", "10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "fd00::/129", "10.0.0.0/+8", "--10.0.0.0/8", "/8"]
        {
            assert_eq!(
                refused_of_peer(&format!("allowed_ip={wrong}\n")),
                RequestError::Value("allowed_ip"),
                "{wrong}"
            );
        }
    }

    #[test]
    fn replace_takes_back_what_came_before_it() {
        let read = peer("allowed_ip=10.0.0.0/8\nreplace_allowed_ips=true\nallowed_ip=fd00::/64\n");
        assert_eq!(read.allowed_ips, [AllowedIp::Add("fd00::/64".parse().unwrap())]);
    }

    #[test]
    fn value_that_a_key_cannot_have_is_refused() {
        for (name, value) in [
            ("private_key", "00"),
            ("private_key", &"zz".repeat(KEY_LEN)),
            ("listen_port", "65536"),
            ("listen_port", "-1"),
            ("listen_port", ""),
            ("fwmark", "4294967296"),
            ("fwmark", "0x1"),
            ("replace_peers", "false"),
            ("public_key", "00"),
        ] {
            let error = refused(&format!("{name}={value}\n"));
            assert_eq!(error, RequestError::Value(name), "{name}={value}");
            assert_eq!(error.errno(), Errno::INVAL);
        }
        for (name, value) in [
            ("remove", "yes"),
            ("update_only", ""),
            ("preshared_key", "1"),
            ("persistent_keepalive_interval", "65536"),
            ("persistent_keepalive_interval", "off"),
            ("replace_allowed_ips", "1"),
            ("protocol_version", "2"),
        ] {
            assert_eq!(
                refused_of_peer(&format!("{name}={value}\n")),
                RequestError::Value(name),
                "{name}={value}"
            );
        }
    }

    #[test]
    fn key_in_the_wrong_place_is_refused() {
        for lines in ["remove=true\n", "jc=4\n", "errno=0\n", "set=1\n"] {
            assert_eq!(refused(lines), RequestError::Key);
        }
        assert_eq!(refused_of_peer("listen_port=1\n"), RequestError::Key);
        assert_eq!(read(b"get=1\nlisten_port=1\n\n").err(), Some(RequestError::Key));
    }

    #[test]
    fn line_that_is_no_pair_is_a_breach_of_protocol() {
        for lines in ["listen_port\n", "\u{e4}=1\n"] {
            assert_eq!(refused(lines), RequestError::Shape);
        }
        for request in ["put=1\n\n", "get=2\n\n", "listen_port=1\n\n", "set=1 \n\n"] {
            let error = read(request.as_bytes()).err();
            assert_eq!(error, Some(RequestError::Operation), "{request:?}");
            assert_eq!(error.map(RequestError::errno), Some(Errno::PROTO));
        }
    }

    #[test]
    fn line_at_the_limit_is_read_and_one_byte_more_is_not() {
        let mut line = vec![b'x'; LINE_MAX];
        for (more, error) in [(None, RequestError::Shape), (Some(b'x'), RequestError::LineTooLong)] {
            line.extend(more);
            let request = [b"set=1\n", &line[..], b"\n\n"].concat();
            assert_eq!(read(&request).err(), Some(error));
        }
    }

    #[test]
    fn limits_on_peers_and_addresses_hold_at_their_edges() {
        let mut draft = SetDraft::default();
        for _ in 0..PEERS_MAX {
            assert_eq!(draft.set("public_key", &key(9), &NoInterfaces), Ok(()));
        }
        let error = draft.set("public_key", &key(9), &NoInterfaces);
        assert_eq!(error, Err(RequestError::Peers));
        for _ in 0..ALLOWED_IPS_MAX {
            assert_eq!(draft.set("allowed_ip", "10.0.0.0/8", &NoInterfaces), Ok(()));
        }
        let error = draft.set("allowed_ip", "10.0.0.0/8", &NoInterfaces);
        assert_eq!(error.map_err(RequestError::errno), Err(Errno::TOOBIG));
    }

    #[test]
    fn after_an_error_the_next_request_is_read() {
        let bytes = b"set=1\nnonsense\nlisten_port=1\n\n\nget=1\n\n";
        let mut decoder = Decoder::new();
        let (taken, request) = decoder.push(bytes, &NoInterfaces);
        assert_eq!(request.and_then(Result::err), Some(RequestError::Shape));
        assert!(!decoder.is_amid());
        let (_, request) = decoder.push(&bytes[taken..], &NoInterfaces);
        assert!(matches!(request, Some(Ok(Request::Get))));
    }

    #[test]
    fn request_in_single_bytes_is_the_same_request() {
        let mut decoder = Decoder::new();
        for byte in b"set=1\nlisten_port=7\n" {
            assert!(matches!(decoder.push(&[*byte], &NoInterfaces), (1, None)));
            assert!(decoder.is_amid());
        }
        let (_, request) = decoder.push(b"\n", &NoInterfaces);
        assert!(matches!(request, Some(Ok(Request::Set(Set { listen_port: Some(7), .. })))));
    }

    #[test]
    fn line_is_cleared_once_it_is_read() {
        let mut decoder = Decoder::new();
        decoder.push(format!("set=1\nprivate_key={}\n", key(1)).as_bytes(), &NoInterfaces);
        assert_eq!(*decoder.line, [0; LINE_MAX]);
    }
}
