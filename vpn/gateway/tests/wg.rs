//! wg(8) of wireguard-tools against the configuration socket, in user, network and mount namespaces that this process
//! makes for itself: wg has no option for where it looks, so a tmpfs lies there.
#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]

#[path = "support/interfaces.rs"]
mod interfaces;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitCode, Output};
use std::time::{Duration, SystemTime};

use kontor_gateway::uapi::{DIRECTORY, Device, End, Errno, Model, Set, Socket, State};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // Before libtest-mimic has threads.
    let missing = enter_namespaces().and_then(|()| find_wg()).err();
    let tests: [(&str, fn()); 12] = [
        ("show_finds_the_interface_and_tells_its_state", show_tells_the_state),
        ("set_changes_what_it_names", set_changes_what_it_names),
        ("showconf_is_what_setconf_takes", showconf_is_what_setconf_takes),
        ("syncconf_changes_the_difference", syncconf_changes_the_difference),
        ("addconf_keeps_what_is_there", addconf_keeps_what_is_there),
        ("allowed_address_moves_between_peers", allowed_address_moves),
        ("error_of_the_device_is_told_in_words", error_is_told_in_words),
        ("ten_thousand_peers_are_set_and_shown", ten_thousand_peers),
        ("interfaces_carry_what_they_are_given_whole", interfaces::whole),
        ("path_that_is_narrower_than_a_datagram_is_no_hole", interfaces::narrow),
        ("link_without_checksums_carries_all", interfaces::without_checksums),
        ("interface_ends_with_its_socket_or_a_signal", interfaces::ends_with_its_socket),
    ];
    let trials = tests.into_iter().map(|(name, test)| {
        let missing = missing.clone();
        Trial::ignorable_test(name, move || match &missing {
            Some(reason) => {
                eprintln!("skipped {name}: {reason}");
                Ok(Completion::ignored_with(reason))
            }
            None => std::panic::catch_unwind(test)
                .map(|()| Completion::Completed)
                .map_err(|_| Failed::from("panicked")),
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// Makes namespaces in which nothing is in `/run`, and no interface but `lo` is there.
fn enter_namespaces() -> Result<(), String> {
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let flags = UnshareFlags::NEWUSER | UnshareFlags::NEWNET | UnshareFlags::NEWNS;
    // SAFETY: this process has one thread, and no descriptor of another namespace.
    unsafe { rustix::thread::unshare_unsafe(flags) }
        .map_err(|errno| format!("no namespaces here: {errno}"))?;
    let write = |path: &str, text: String| fs::write(path, text).map_err(|error| format!("{path}: {error}"));
    write("/proc/self/setgroups", "deny".into())?;
    write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    // Debian's /var/run is a link to it; elsewhere it is a directory of its own.
    let run = fs::canonicalize("/var/run").map_err(|error| format!("/var/run: {error}"))?;
    let propagation = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", propagation)
        .and_then(|()| rustix::mount::mount("tmpfs", &run, "tmpfs", MountFlags::empty(), c"mode=0755"))
        .map_err(|errno| format!("no mounts here: {errno}"))
}

fn find_wg() -> Result<(), String> {
    match Command::new("wg").arg("--version").output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("wg --version: {}", output.status)),
        Err(error) => Err(format!("no wg (package wireguard-tools): {error}")),
    }
}

fn run(arguments: &[&str]) -> Output {
    // Plain text, whatever the caller has set.
    Command::new("wg").args(arguments).env("WG_COLOR_MODE", "never").output().unwrap()
}

/// What wg prints when all goes well.
fn wg(arguments: &[&str]) -> String {
    let output = run(arguments);
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success() && err.is_empty(), "wg {arguments:?}: {out}{err}");
    out
}

/// Serves `device` as the interface `name` while `talk` runs; gives the device back.
fn served<D: Device + Send>(name: &str, mut device: D, talk: impl FnOnce()) -> D {
    let socket = Socket::bind(Path::new(DIRECTORY), name).unwrap();
    let (stop, stopped) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| socket.serve(&mut device, stopped.as_fd()).unwrap());
        // Whether `talk` panics or not, the server ends.
        let stop = stop;
        talk();
        drop(stop);
        assert_eq!(serving.join().unwrap(), End::Stopped);
    });
    device
}

/// A file with these lines.
fn file(lines: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), lines).unwrap();
    file
}

fn genkey() -> String {
    wg(&["genkey"]).trim().to_owned()
}

/// A public key: that of some private key or not, wg does not ask.
fn public(number: u32) -> String {
    use base64::Engine;
    let mut key = [0; 32];
    key[..4].copy_from_slice(&number.to_le_bytes());
    key[31] = 1;
    base64::engine::general_purpose::STANDARD.encode(key)
}

fn show_tells_the_state() {
    let (one, two) = (public(1), public(2));
    let mut model = served("show0", Model::default(), || {
        assert!(wg(&["show", "interfaces"]).split_whitespace().any(|name| name == "show0"));
        assert_eq!(wg(&["show", "show0"]), "interface: show0\n");
        wg(&["set", "show0", "peer", &one, "allowed-ips", "10.0.0.0/8,fd00::/64", "peer", &two]);
    });
    let peer = &mut model.0.peers[0];
    peer.last_handshake = Some(SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 5));
    (peer.tx_bytes, peer.rx_bytes) = (u64::MAX, 7);
    peer.endpoint = Some("[2001:db8::1]:7".parse().unwrap());
    served("show0", model, || {
        assert_eq!(wg(&["show", "show0", "latest-handshakes"]), format!("{one}\t1700000000\n{two}\t0\n"));
        assert_eq!(wg(&["show", "show0", "transfer"]), format!("{one}\t7\t{}\n{two}\t0\t0\n", u64::MAX));
        assert_eq!(wg(&["show", "show0", "endpoints"]), format!("{one}\t[2001:db8::1]:7\n{two}\t(none)\n"));
        let allowed = format!("{one}\t10.0.0.0/8 fd00::/64\n{two}\t(none)\n");
        assert_eq!(wg(&["show", "show0", "allowed-ips"]), allowed);
    });
    // The socket is gone, and with it the interface.
    assert!(!run(&["show", "show0"]).status.success());
}

fn set_changes_what_it_names() {
    let (private, psk, one) = (genkey(), wg(&["genpsk"]), public(1));
    let (key, shared) = (file(&private), file(&psk));
    served("set0", Model::default(), || {
        let (key, shared) = (key.path().to_str().unwrap(), shared.path().to_str().unwrap());
        wg(&["set", "set0", "private-key", key, "listen-port", "51820", "fwmark", "0xca6c"]);
        wg(&["set", "set0", "peer", &one, "preshared-key", shared, "endpoint", "192.0.2.1:7"]);
        wg(&["set", "set0", "peer", &one, "persistent-keepalive", "25", "allowed-ips", "10.0.0.0/8"]);
        let dump = wg(&["show", "set0", "dump"]);
        let lines: Vec<Vec<&str>> = dump.lines().map(|line| line.split('\t').collect()).collect();
        assert_eq!((lines[0][0], lines[0][2], lines[0][3]), (private.as_str(), "51820", "0xca6c"));
        let psk = psk.trim();
        assert_eq!(lines[1], [one.as_str(), psk, "192.0.2.1:7", "10.0.0.0/8", "0", "0", "0", "25"]);
        // Everything back again.
        wg(&["set", "set0", "private-key", "/dev/null", "fwmark", "0"]);
        wg(&["set", "set0", "peer", &one, "preshared-key", "/dev/null", "persistent-keepalive", "off"]);
        wg(&["set", "set0", "peer", &one, "allowed-ips", ""]);
        let dump = wg(&["show", "set0", "dump"]);
        let lines: Vec<Vec<&str>> = dump.lines().map(|line| line.split('\t').collect()).collect();
        assert_eq!((lines[0][0], lines[0][3]), ("(none)", "off"));
        assert_eq!(lines[1], [one.as_str(), "(none)", "192.0.2.1:7", "(none)", "0", "0", "0", "off"]);
        wg(&["set", "set0", "peer", &one, "remove"]);
        assert_eq!(wg(&["show", "set0", "peers"]), "");
    });
}

fn showconf_is_what_setconf_takes() {
    let (private, one) = (genkey(), public(1));
    let wanted = format!(
        "[Interface]\nListenPort = 7\nFwMark = 0x9\nPrivateKey = {private}\n\n[Peer]\nPublicKey = {one}\n\
         PresharedKey = {}\nAllowedIPs = 10.0.0.0/8, fd00::/64\nEndpoint = [2001:db8::1]:7\nPersistentKeepalive = 25\n",
        wg(&["genpsk"]).trim()
    );
    served("conf0", Model::default(), || {
        wg(&["set", "conf0", "peer", &public(2)]);
        wg(&["setconf", "conf0", file(&wanted).path().to_str().unwrap()]);
        assert_eq!(wg(&["showconf", "conf0"]), wanted);
    });
}

fn syncconf_changes_the_difference() {
    let [one, two, three] = [1, 2, 3].map(public);
    let peer = |key: &str, ips: &str| format!("[Peer]\nPublicKey = {key}\nAllowedIPs = {ips}\n");
    let (stays, goes, comes) =
        (peer(&one, "10.1.0.0/16"), peer(&two, "10.2.0.0/16"), peer(&three, "10.3.0.0/16"));
    let mut model = served("sync0", Model::default(), || {
        wg(&["setconf", "sync0", file(&(stays.clone() + &goes)).path().to_str().unwrap()]);
    });
    model.0.peers[0].tx_bytes = 7;
    served("sync0", model, || {
        wg(&["syncconf", "sync0", file(&(stays.clone() + &comes)).path().to_str().unwrap()]);
        let ips = format!("{one}\t10.1.0.0/16\n{three}\t10.3.0.0/16\n");
        assert_eq!(wg(&["show", "sync0", "allowed-ips"]), ips);
        // It was not made again.
        assert_eq!(wg(&["show", "sync0", "transfer"]), format!("{one}\t0\t7\n{three}\t0\t0\n"));
    });
}

fn addconf_keeps_what_is_there() {
    let (one, two) = (public(1), public(2));
    served("add0", Model::default(), || {
        wg(&["set", "add0", "listen-port", "7", "peer", &one]);
        wg(&["addconf", "add0", file(&format!("[Peer]\nPublicKey = {two}\n")).path().to_str().unwrap()]);
        assert_eq!(wg(&["show", "add0", "peers"]), format!("{one}\n{two}\n"));
        assert_eq!(wg(&["show", "add0", "listen-port"]), "7\n");
    });
}

fn allowed_address_moves() {
    let (one, two) = (public(1), public(2));
    served("move0", Model::default(), || {
        wg(&["set", "move0", "peer", &one, "allowed-ips", "10.0.0.0/8,10.1.0.0/16"]);
        wg(&["set", "move0", "peer", &two, "allowed-ips", "10.0.0.0/8"]);
        let allowed = format!("{one}\t10.1.0.0/16\n{two}\t10.0.0.0/8\n");
        assert_eq!(wg(&["show", "move0", "allowed-ips"]), allowed);
    });
}

/// A device whose port is taken, and that cannot say what it is.
struct Broken;

impl Device for Broken {
    fn get(&mut self) -> Result<State, Errno> {
        Err(Errno::NOBUFS)
    }

    fn set(&mut self, _: Set) -> Result<(), Errno> {
        Err(Errno::ADDRINUSE)
    }
}

fn error_is_told_in_words() {
    served("broken0", Broken, || {
        let failed = |arguments: &[&str]| {
            let output = run(arguments);
            assert!(!output.status.success());
            String::from_utf8(output.stderr).unwrap()
        };
        let words = failed(&["set", "broken0", "listen-port", "7"]);
        assert_eq!(words, "Unable to modify interface: Address already in use\n");
        let words = failed(&["show", "broken0"]);
        assert_eq!(words, "Unable to access interface: No buffer space available\n");
    });
}

fn ten_thousand_peers() {
    const PEERS: u32 = 10_000;
    let lines: Vec<String> =
        (0..PEERS).map(|number| format!("[Peer]\nPublicKey = {}\n", public(number))).collect();
    served("many0", Model::default(), || {
        wg(&["setconf", "many0", file(&lines.concat()).path().to_str().unwrap()]);
        assert_eq!(wg(&["show", "many0", "peers"]).lines().count(), PEERS.try_into().unwrap());
    });
}
