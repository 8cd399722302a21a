//! A packet in a session costs no allocation.

use std::alloc::{GlobalAlloc, Layout, System};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kontor_vpn::{
    Config, DATAGRAM_MAX, HANDSHAKES_PER_S, MTU_MAX, PeerConfig, PublicKey, Routes, Start, StaticSecret,
    Tunnel,
};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// One test only: another one beside it would be counted too.
#[test]
fn packet_in_a_session_costs_no_allocation() {
    #[expect(clippy::disallowed_methods, reason = "a test is where time comes from")]
    let now = Instant::now();
    let keys = [StaticSecret::from([1; 32]), StaticSecret::from([2; 32])];
    let public = [PublicKey::from(&keys[0]), PublicKey::from(&keys[1])];
    let mut ends = keys.map(|private_key| {
        let config = Config {
            private_key,
            mtu: MTU_MAX,
            handshakes_per_s_max: HANDSHAKES_PER_S,
            peers_max: 1,
            seed: [0; 32],
        };
        Tunnel::<u8>::new(config, now).unwrap()
    });
    for (end, start) in [(0, Start::Connect(9)), (1, Start::Listen)] {
        let public_key = public[1 - end];
        let peer = PeerConfig { public_key, routes: Routes::Everything, start, keepalive_s: None };
        ends[end].add_peer(&peer, now).unwrap();
    }
    let (mut out, mut opened) = ([0; DATAGRAM_MAX], [0; DATAGRAM_MAX]);
    for end in [0, 1, 0] {
        let transmit = ends[end].poll_transmit(&mut out).unwrap();
        assert_eq!(ends[1 - end].handle_datagram(9, &out[..transmit.len], &mut opened, now), Ok(None));
    }
    let mut packet = [0; 101];
    packet[0] = 0x45;
    packet[3] = 101;
    packet[12..16].copy_from_slice(&Ipv4Addr::new(10, 0, 0, 1).octets());
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    for round in 0..1000_u32 {
        packet[16..20].copy_from_slice(&round.to_be_bytes());
        let transmit = ends[0].handle_packet(&packet, &mut out, now).unwrap().unwrap();
        let received = ends[1].handle_datagram(9, &out[..transmit.len], &mut opened, now).unwrap().unwrap();
        assert_eq!(received.packet, packet);
        assert_eq!(ends[1].poll_transmit(&mut out), None);
    }
    assert_eq!(ALLOCATIONS.load(Ordering::SeqCst) - before, 0);
}
