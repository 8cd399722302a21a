//! Probe, tap and console log.

use crate::{ended, run, run_with, stub, tenant, world::Setup};
use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
};

fn probe_setup(test_image: bool) -> Setup {
    let scenario = if test_image { "probe" } else { "ready" };
    Setup { test_image, config: "probe_socket = 'DIR/probe.sock'\n", ..Setup::new(scenario) }
}

pub(crate) fn probe_of_a_test_image_is_served_byte_for_byte() {
    let (world, ran) = run_with(&probe_setup(true));
    ended(&ran, 0, "ready");
    let path = world.path("probe.sock");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let sent: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    // One client after the other.
    for _ in 0..2 {
        let mut client = UnixStream::connect(&path).unwrap();
        let mut back = vec![0; sent.len()];
        let mut writer = client.try_clone().unwrap();
        let sending = sent.clone();
        let writing = std::thread::spawn(move || writer.write_all(&sending).unwrap());
        client.read_exact(&mut back).unwrap();
        writing.join().unwrap();
        assert!(back == sent);
    }
    ended(&world.kontor(&["stop"]), 0, "closed");
    assert!(!path.exists());
}

pub(crate) fn probe_of_another_image_is_not_there() {
    let (world, ran) = run_with(&probe_setup(false));
    ended(&ran, 0, "ready");
    assert!(!world.path("probe.sock").exists());
}

pub(crate) fn tap_records_both_directions() {
    let (world, ran) = run_with(&Setup { config: "tap = 'DIR/tap'\n", ..Setup::new("ready") });
    ended(&ran, 0, "ready");
    ended(&world.kontor(&["stop"]), 0, "closed");
    let file = fs::read(world.path("tap")).unwrap();
    let mut frame = Vec::new();
    let gateway = kontor_wire::uplink::GatewayId(tenant::GATEWAY);
    kontor_wire::uplink::encode_port(gateway, 32, &stub::KEEPALIVE, &mut frame).unwrap();
    for direction in [kontor_daemon::tap::Direction::Up, kontor_daemon::tap::Direction::Down] {
        let records = kontor_daemon::tap::records(&file);
        let bytes: Vec<u8> = records
            .filter(|record| record.direction == direction)
            .flat_map(|record| record.bytes.to_vec())
            .collect();
        assert_eq!(bytes, frame);
    }
}

pub(crate) fn logs_are_safe_to_print() {
    let (world, ran) = run("ready");
    ended(&ran, 0, "ready");
    assert_eq!(world.kontor(&["logs"]).out, "booting \\x1b[2J\n");
}
