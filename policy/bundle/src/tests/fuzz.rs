//! Whatever comes is an error and not a panic.

use super::{NOW, Scene, bundle, own, parts};
use crate::{
    Bundle,
    lease::{Admit, GatewayMemory, HostMemory, for_gateway, for_guest},
};
use kontor_trust::{BundleKind, Digest, sign};
use proptest::{collection::vec, prelude::*, sample::Index};
use std::sync::LazyLock;

static SCENE: LazyLock<Scene> = LazyLock::new(Scene::new);

fn read(admit: &Admit, now: u64) {
    let _ = for_guest(&SCENE.floor, &parts(admit), &SCENE.asked(), now);
    let _ = SCENE.host_with(admit, &HostMemory::default());
    let _ = for_gateway(&SCENE.floor, admit, now, &own(), |_, _, _| GatewayMemory::default());
}

proptest! {
    #[test]
    fn any_parts_are_read_without_a_panic(
        keysets in vec(vec(any::<u8>(), 0..40), 0..10),
        which in 0..4_u8,
        bytes in vec(any::<u8>(), 0..300),
        now in any::<u64>(),
    ) {
        let mut admit = Admit { keysets, ..SCENE.admit() };
        match which {
            0 => admit.device = bytes,
            1 => admit.request = bytes,
            2 => admit.bundle = bytes,
            _ => admit.lease = bytes,
        }
        read(&admit, now);
        admit.keysets.clear();
        read(&admit, now);
    }

    #[test]
    fn any_signed_bytes_are_read_as_a_bundle_without_a_panic(payload in vec(any::<u8>(), 0..300)) {
        let envelope = sign::<BundleKind>(&payload, &[&SCENE.keys.policy]);
        let _ = Bundle::parse(&SCENE.floor.verify(&envelope).unwrap());
    }

    #[test]
    fn signed_bundle_with_a_changed_byte_is_read_without_a_panic(at in any::<Index>(), byte in any::<u8>()) {
        let mut payload = bundle(Digest([1; 32])).payload();
        let at = at.index(payload.len());
        payload[at] = byte;
        let envelope = sign::<BundleKind>(&payload, &[&SCENE.keys.policy]);
        let _ = Bundle::parse(&SCENE.floor.verify(&envelope).unwrap());
    }

    #[test]
    fn any_times_are_judged_without_a_panic(
        issued_at in any::<u64>(), not_after in any::<u64>(), now in any::<u64>(), seq in any::<u64>(),
    ) {
        let mut scene = Scene::new();
        scene.lease.issued_at = issued_at;
        scene.lease.not_after = not_after;
        scene.lease.seq = seq;
        let _ = scene.gateway_with(&scene.admit(), now, &own(), GatewayMemory { seq: Some(NOW), ..Default::default() });
        let _ = scene.guest(&scene.admit());
    }
}
