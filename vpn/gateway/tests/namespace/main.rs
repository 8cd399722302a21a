//! The gateway as a process, with a real TUN and real sockets, in a network namespace that this process makes for
//! itself. A work VM is a [`Tunnel`](kontor_vpn::Tunnel) in this process behind a UDP socket.
#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]

mod net;
#[path = "../support/office.rs"]
mod office;
mod process;
mod vm;

use std::fs;
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::process::ExitCode;

use kontor_bundle::{Destination, Protocol};
use kontor_wire::post::{FromPost, Refusal};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use office::Boot;
use process::{Site, unix_now};
use vm::Vm;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Before libtest-mimic has threads.
    let missing = net::enter_namespace().err();
    let tests: [(&str, fn()); 19] = [
        ("pings_and_datagrams_pass_both_ways", pings_and_datagrams_pass_both_ways),
        ("what_the_bundle_does_not_list_is_dropped", what_the_bundle_does_not_list_is_dropped),
        ("peers_do_not_reach_each_other", peers_do_not_reach_each_other),
        ("spoofed_source_is_dropped", spoofed_source_is_dropped),
        ("stranger_gets_no_session", stranger_gets_no_session),
        ("bad_lease_is_refused_in_words_and_makes_no_peer", bad_lease_is_refused),
        ("peer_is_gone_when_its_lease_ends", peer_is_gone_when_its_lease_ends),
        ("renewed_lease_keeps_the_session", renewed_lease_keeps_the_session),
        ("another_boot_takes_the_place_of_the_one_before", another_boot_takes_the_place),
        ("restarted_gateway_goes_on_with_its_peers", restarted_gateway_goes_on),
        ("newer_keyset_removes_the_peers_of_a_stolen_key", newer_keyset_removes_peers),
        ("peer_that_moves_to_another_address_goes_on", peer_that_moves_goes_on),
        ("gateway_that_runs_has_no_capability_left", gateway_has_no_capability_left),
        ("nothing_but_the_post_is_reached_before_hello", nothing_is_reached_before_hello),
        ("hello_with_another_lease_is_refused", hello_with_another_lease_is_refused),
        ("answer_of_the_post_is_what_the_gateway_knows", answer_is_what_the_gateway_knows),
        ("key_is_made_once_and_printed", key_is_made_once_and_printed),
        ("second_gateway_leaves_the_first_ones_door", second_gateway_leaves_the_first_ones_door),
        ("exit_codes_tell_what_is_wrong", exit_codes_tell_what_is_wrong),
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
    // One at a time: they share a network namespace with its addresses and ports.
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// Everything of one network, without a word on ports.
fn everything(to: &str) -> Destination {
    Destination { to: to.parse().unwrap(), protocol: Protocol::Any, ports: None }
}

fn pings_and_datagrams_pass_both_ways() {
    let site = Site::new(1);
    let gateway = site.start();
    let mut vm = site.admitted_vm(&gateway, &site.boot("pc", 7), &site.open_bundle());
    for server in [site.server_v4(), site.server_v6()] {
        assert!(vm.ping(server));
        let socket = UdpSocket::bind((server, 0)).unwrap();
        socket.set_read_timeout(Some(process::PATIENCE)).unwrap();
        vm.send_udp(server, socket.local_addr().unwrap().port(), b"question");
        let mut buffer = [0; 64];
        let (len, asker) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"question");
        assert_eq!(asker.ip(), vm.address(server));
        socket.send_to(b"answer", asker).unwrap();
        let answer = vm.receive(|packet| packet.ends_with(b"answer")).expect("the answer");
        assert!(answer.len() > b"answer".len());
    }
}

fn what_the_bundle_does_not_list_is_dropped() {
    let site = Site::new(2);
    let gateway = site.start();
    let (server, other) = (site.server_v4(), site.other_server_v4());
    let listed = UdpSocket::bind((server, 0)).unwrap();
    let unlisted = UdpSocket::bind((server, 0)).unwrap();
    let elsewhere = UdpSocket::bind((other, 0)).unwrap();
    let port = listed.local_addr().unwrap().port();
    let to = format!("{server}/32").parse().unwrap();
    let bundle = site.bundle(1, vec![Destination { to, protocol: Protocol::Udp, ports: Some([port, port]) }]);
    let mut vm = site.admitted_vm(&gateway, &site.boot("pc", 7), &bundle);
    vm.send_udp(server, unlisted.local_addr().unwrap().port(), b"one");
    vm.send_udp(other, elsewhere.local_addr().unwrap().port(), b"two");
    vm.send_ping(server);
    vm.send_udp(server, port, b"three");
    // What came before this in the gateway's one data path has been dropped, or is here.
    listed.set_read_timeout(Some(process::PATIENCE)).unwrap();
    let mut buffer = [0; 64];
    let (len, asker) = listed.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"three");
    for socket in [&unlisted, &elsewhere] {
        socket.set_nonblocking(true).unwrap();
        assert_eq!(socket.recv(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
    // The other way: from a port that is not listed nothing comes back.
    unlisted.send_to(b"four", asker).unwrap();
    listed.send_to(b"five", asker).unwrap();
    let first = vm.receive(|packet| packet.ends_with(b"four") || packet.ends_with(b"five")).unwrap();
    assert!(first.ends_with(b"five"));
    let drops = gateway.stop();
    assert!(drops.contains("up_not_listed=3"), "{drops}");
    assert!(drops.contains("down_not_listed=1"), "{drops}");
}

fn peers_do_not_reach_each_other() {
    let site = Site::new(3);
    let gateway = site.start();
    let bundle = site.bundle(1, vec![everything("0.0.0.0/0"), everything("::/0")]);
    let mut one = site.admitted_vm(&gateway, &site.boot("one", 7), &bundle);
    let mut other = site.admitted_vm(&gateway, &site.boot("other", 8), &bundle);
    one.send_udp(other.address(site.server_v4()), 9, b"psst");
    one.send_udp(other.address(site.server_v6()), 9, b"psst");
    assert!(one.ping(site.server_v4()));
    other.send_ping(site.server_v4());
    let first = other.receive(|packet| packet.ends_with(b"psst") || vm::is_pong(packet)).unwrap();
    assert!(vm::is_pong(&first));
    assert!(gateway.stop().contains("up_peer_to_peer=2"));
}

fn spoofed_source_is_dropped() {
    let site = Site::new(4);
    let gateway = site.start();
    let mut vm = site.admitted_vm(&gateway, &site.boot("pc", 7), &site.open_bundle());
    let socket = UdpSocket::bind((site.server_v4(), 0)).unwrap();
    socket.set_read_timeout(Some(process::PATIENCE)).unwrap();
    let port = socket.local_addr().unwrap().port();
    let neighbour: IpAddr = site.boot("other", 8).v4.into();
    vm.send_packet(&net::udp(neighbour, site.server_v4(), port, b"spoofed"));
    vm.send_udp(site.server_v4(), port, b"honest");
    let mut buffer = [0; 64];
    let (len, _) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"honest");
    assert!(gateway.stop().contains("source=1"));
}

fn stranger_gets_no_session() {
    let site = Site::new(5);
    let gateway = site.start();
    let mut stranger = Vm::new(&gateway, &site.boot("stranger", 9));
    stranger.flush();
    let mut vm = site.admitted_vm(&gateway, &site.boot("pc", 7), &site.open_bundle());
    assert!(vm.ping(site.server_v4()));
    assert!(stranger.is_silent());
    assert!(gateway.stop().contains("unknown_peer=1"));
}

fn bad_lease_is_refused() {
    let site = Site::new(6);
    let gateway = site.start();
    let (boot, bundle) = (site.boot("pc", 7), site.open_bundle());
    let refused = |admit| match gateway.admit(&admit) {
        Ok(()) => panic!("admitted"),
        Err(words) => words,
    };
    let mut forged = site.tenant.admit(&boot, &bundle);
    forged.lease = forged.bundle.clone();
    assert!(refused(forged).contains("the lease is not signed as it must be"));
    let thief = office::Tenant::new();
    assert!(refused(thief.admit(&boot, &bundle)).contains("keyset"));
    let ended = Boot { issued_at: unix_now() - 100, life_s: 50, ..boot.clone() };
    assert!(refused(site.tenant.admit(&ended, &bundle)).contains("the lease ended"));
    let early = Boot { issued_at: unix_now() + 100, ..boot.clone() };
    assert!(refused(site.tenant.admit(&early, &bundle)).contains("issued at"));
    let elsewhere = Boot { v4: "10.200.0.7".parse().unwrap(), ..boot.clone() };
    assert!(refused(site.tenant.admit(&elsewhere, &bundle)).contains("10.200.0.7"));
    assert!(gateway.say("{\"admit\":{}}\n").contains("refused"));
    assert!(gateway.say("garbage\n").contains("refused"));
    let mut vm = Vm::new(&gateway, &boot);
    vm.flush();
    let mut witness = site.admitted_vm(&gateway, &site.boot("witness", 8), &bundle);
    assert!(witness.ping(site.server_v4()));
    assert!(vm.is_silent());
    // The door is open all the same.
    assert_eq!(gateway.admit(&site.tenant.admit(&boot, &bundle)), Ok(()));
    assert!(refused(site.tenant.admit(&boot, &bundle)).contains("was seen"));
}

fn peer_is_gone_when_its_lease_ends() {
    let site = Site::new(7);
    let gateway = site.start();
    let short = Boot { life_s: 2, ..site.boot("pc", 7) };
    let end = short.issued_at + short.life_s;
    let mut vm = site.admitted_vm(&gateway, &short, &site.open_bundle());
    let mut witness = site.admitted_vm(&gateway, &site.boot("witness", 8), &site.open_bundle());
    assert!(vm.ping(site.server_v4()));
    gateway.wait_for("peers removed");
    assert!((end..=end + 1).contains(&unix_now()));
    vm.send_ping(site.server_v4());
    assert!(witness.ping(site.server_v4()));
    assert!(vm.is_silent());
    assert!(gateway.stop().contains("unknown_session=1"));
}

fn renewed_lease_keeps_the_session() {
    let site = Site::new(8);
    let gateway = site.start();
    let first = Boot { issued_at: unix_now() - 10, life_s: 12, ..site.boot("pc", 7) };
    let mut vm = site.admitted_vm(&gateway, &first, &site.open_bundle());
    let renewed = Boot { seq: 1, ..site.boot("pc", 7) };
    gateway.admit(&site.tenant.admit(&renewed, &site.open_bundle())).unwrap();
    let short = Boot { life_s: 3, ..site.boot("witness", 8) };
    gateway.admit(&site.tenant.admit(&short, &site.open_bundle())).unwrap();
    // The witness goes after the first lease of the VM would have ended.
    gateway.wait_for("peers removed");
    assert!(unix_now() >= first.issued_at + first.life_s);
    assert!(vm.ping(site.server_v4()));
    assert_eq!(vm.handshakes(), 1);
}

fn another_boot_takes_the_place() {
    let site = Site::new(9);
    let gateway = site.start();
    let mut before = site.admitted_vm(&gateway, &site.boot("pc", 7), &site.open_bundle());
    assert!(before.ping(site.server_v4()));
    let next = site.boot("pc", 7);
    let next = Boot { boot_key: vm::public_key(77), issued_at: next.issued_at + 1, ..next };
    let admit = site.tenant.admit(&next, &site.open_bundle());
    gateway.admit(&admit).unwrap();
    let mut after = Vm::with_key(&gateway, &next, 77);
    after.connect();
    site.greet(&mut after, &admit);
    before.send_ping(site.server_v4());
    assert!(after.ping(site.server_v4()));
    assert!(before.is_silent());
}

fn restarted_gateway_goes_on() {
    let mut site = Site::new(10);
    let gateway = site.start();
    let boot = site.boot("pc", 7);
    let admit = site.tenant.admit(&boot, &site.open_bundle());
    let mut vm = site.admitted_vm(&gateway, &boot, &site.open_bundle());
    assert!(vm.ping(site.server_v4()));
    let socket = vm.local_addr();
    gateway.stop();
    site.restart_servers();
    let gateway = site.start();
    assert_eq!(gateway.peers_at_start(), 1);
    vm.reconnect();
    assert!(vm.ping(site.server_v4()));
    assert!(vm.ping(site.server_v6()));
    assert_eq!(vm.local_addr(), socket);
    // It remembers, too, which lease it has seen.
    assert!(gateway.admit(&admit).unwrap_err().contains("was seen"));
}

fn newer_keyset_removes_peers() {
    let mut site = Site::new(15);
    let gateway = site.start();
    let mut stolen = site.admitted_vm(&gateway, &site.boot("stolen", 7), &site.open_bundle());
    assert!(stolen.ping(site.server_v4()));
    site.tenant.add_keyset();
    let mut kept = site.admitted_vm(&gateway, &site.boot("kept", 8), &site.open_bundle());
    assert!(stolen.ping(site.server_v4()));
    site.tenant.replace_lease_key();
    let mut new = site.admitted_vm(&gateway, &site.boot("new", 9), &site.open_bundle());
    for vm in [&mut stolen, &mut kept] {
        vm.send_ping(site.server_v4());
    }
    assert!(new.ping(site.server_v4()));
    assert!(stolen.is_silent() && kept.is_silent());
    assert!(gateway.stop().contains("unknown_session=2"));
}

fn peer_that_moves_goes_on() {
    let site = Site::new(11);
    let gateway = site.start();
    let mut vm = site.admitted_vm(&gateway, &site.boot("pc", 7), &site.open_bundle());
    assert!(vm.ping(site.server_v4()));
    let before = vm.local_addr();
    vm.move_to_another_port();
    assert_ne!(vm.local_addr(), before);
    assert!(vm.ping(site.server_v4()));
    assert_eq!(vm.handshakes(), 1);
}

fn gateway_has_no_capability_left() {
    let site = Site::new(12);
    let gateway = site.start();
    for task in fs::read_dir(format!("/proc/{}/task", gateway.pid())).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        for (field, value) in
            [("CapEff", "0000000000000000"), ("CapPrm", "0000000000000000"), ("NoNewPrivs", "1")]
        {
            let line = status.lines().find(|line| line.starts_with(field)).unwrap();
            assert!(line.ends_with(value), "{line}");
        }
    }
}

fn nothing_is_reached_before_hello() {
    let site = Site::new(16);
    let gateway = site.start();
    let admit = site.tenant.admit(&site.boot("pc", 7), &site.open_bundle());
    gateway.admit(&admit).unwrap();
    let mut vm = Vm::new(&gateway, &site.boot("pc", 7));
    vm.connect();
    let server = UdpSocket::bind((site.server_v4(), 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    vm.send_udp(site.server_v4(), port, b"early");
    vm.send_ping(site.post());
    site.greet(&mut vm, &admit);
    vm.send_udp(site.server_v4(), port, b"late");
    server.set_read_timeout(Some(process::PATIENCE)).unwrap();
    let mut buffer = [0; 64];
    let (len, _) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"late");
    let drops = gateway.stop();
    assert!(drops.contains("up_before_hello=1") && drops.contains("up_peer_to_peer=1"), "{drops}");
}

fn hello_with_another_lease_is_refused() {
    let site = Site::new(17);
    let gateway = site.start();
    gateway.admit(&site.tenant.admit(&site.boot("pc", 7), &site.open_bundle())).unwrap();
    let mut vm = Vm::new(&gateway, &site.boot("pc", 7));
    vm.connect();
    assert_eq!(vm.hello(site.post(), [1; 32]), FromPost::Refused(Refusal::OtherLease));
    vm.send_ping(site.server_v4());
    let mut witness = site.admitted_vm(&gateway, &site.boot("witness", 8), &site.open_bundle());
    assert!(witness.ping(site.server_v4()));
    assert!(vm.is_silent());
}

fn answer_is_what_the_gateway_knows() {
    let site = Site::new(18);
    let gateway = site.start();
    let admit = site.tenant.admit(&site.boot("pc", 7), &site.bundle(4, Vec::new()));
    gateway.admit(&admit).unwrap();
    let mut vm = Vm::new(&gateway, &site.boot("pc", 7));
    vm.connect();
    let lease_hash = office::lease_hash(&admit);
    for post in [site.post(), site.post_v6()] {
        let before = unix_now();
        let FromPost::Admitted(newest) = vm.hello(post, lease_hash) else { panic!("refused") };
        assert!((before..=unix_now()).contains(&newest.now));
        let known = (newest.lease_hash, newest.keyset_version, newest.line.as_str(), newest.revision);
        assert_eq!(known, (lease_hash, 1, office::LINE, 4));
    }
    // Another device of the line comes with a newer revision.
    gateway.admit(&site.tenant.admit(&site.boot("laptop", 8), &site.bundle(5, Vec::new()))).unwrap();
    let FromPost::Admitted(newest) = vm.hello(site.post(), lease_hash) else { panic!("refused") };
    assert_eq!(newest.revision, 5);
}

fn key_is_made_once_and_printed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gateway.key");
    let (code, output) = process::make_key(&path);
    assert_eq!(code, 0);
    assert_eq!(hex::decode(output.trim_end()).unwrap().len(), 32);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_ne!(fs::read_to_string(&path).unwrap(), output);
    assert_eq!(process::make_key(&path), (4, String::new()));
}

fn exit_codes_tell_what_is_wrong() {
    let site = Site::new(14);
    let fails = |change: &dyn Fn(String) -> String| site.exit_code_with(change);
    assert_eq!(fails(&|settings| settings + "\nsurprise = 1\n"), 2);
    assert_eq!(fails(&|settings| settings + "\nmtu = 1279\n"), 2);
    let tenant = site.tenant.id.to_string();
    assert_eq!(fails(&|settings| settings.replace(&tenant, &"00".repeat(32))), 3);
    assert_eq!(fails(&|settings| settings.replace("gateway.key", "no.key")), 4);
    assert_eq!(fails(&|settings| settings.replace("127.0.0.1:", "192.0.2.1:")), 4);
    assert_eq!(fails(&|settings| settings.replace("tun = \"", "tun = \"far-too-long-a-name")), 4);
    let other = UdpSocket::bind(site.listen()).unwrap();
    assert_eq!(fails(&|settings| settings), 4);
    drop(other);
}

fn second_gateway_leaves_the_first_ones_door() {
    let site = Site::new(19);
    let gateway = site.start();
    // All but the state and the door are its own.
    let other = |settings: String| {
        settings.replace(&site.listen().to_string(), "127.0.0.1:20119").replace("tunnel19", "tunnel119")
    };
    assert_eq!(site.exit_code_with(&other), 4);
    assert_eq!(site.exit_code_with(&|settings| other(settings).replace("/state\"", "/state2\"")), 4);
    let mut vm = site.admitted_vm(&gateway, &site.boot("pc", 7), &site.open_bundle());
    assert!(vm.ping(site.server_v4()));
    gateway.stop();
}
