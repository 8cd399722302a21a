//! Whatever comes, signed or not, is an error and not a panic.

use super::{Office, key, lease, request};
use crate::{
    BundleKind, Device, DeviceKind, Digest, KeysetKind, Lease, LeaseKind, Request, RequestKind,
    TrustedKeyset, sign, untrusted_device, verify_request,
};
use proptest::{collection::vec, prelude::*, sample::Index};
use std::sync::LazyLock;

static OFFICE: LazyLock<Office> = LazyLock::new(Office::new);
static FIRST: LazyLock<TrustedKeyset> = LazyLock::new(|| OFFICE.first());

/// Everything that reads an envelope.
fn read(envelope: &[u8]) {
    let _ = FIRST.verify::<BundleKind>(envelope);
    let _ = FIRST.verify::<DeviceKind>(envelope).map(|verified| Device::parse(&verified));
    let _ = FIRST.verify::<LeaseKind>(envelope).map(|verified| Lease::parse(&verified));
    let _ = FIRST.advance(envelope);
    let _ = FIRST.follow(&[envelope.to_vec()]);
    let _ = TrustedKeyset::dangerous_unpinned(envelope);
    let _ = untrusted_device(envelope);
    let _ = verify_request(envelope, &key().public()).map(|verified| Request::parse(&verified));
}

/// Text that looks like JSON for a while.
fn almost_json() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        Just("{"),
        Just("}"),
        Just("["),
        Just("]"),
        Just(":"),
        Just(","),
        Just("null"),
        Just("-1"),
        Just("1e999"),
        Just("18446744073709551616"),
        Just("\"payload\""),
        Just("\"payloadType\""),
        Just("\"signatures\""),
        Just("\"keyid\""),
        Just("\"sig\""),
        Just("\"version\""),
        Just("\"tenant\""),
        Just("\"\\ud800\""),
        Just("\"\""),
        Just("\"application/vnd.kontor.lease+json\""),
    ];
    vec(word, 0..40).prop_map(|words| words.concat().into_bytes())
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in vec(any::<u8>(), 0..300)) {
        read(&bytes);
    }

    #[test]
    fn anything_like_json_is_read_without_a_panic(bytes in almost_json()) {
        read(&bytes);
    }

    #[test]
    fn any_signed_bytes_are_read_without_a_panic(payload in prop_oneof![vec(any::<u8>(), 0..300), almost_json()]) {
        read(&sign::<DeviceKind>(&payload, &[&OFFICE.enrol]));
        read(&sign::<LeaseKind>(&payload, &[&OFFICE.lease]));
        read(&sign::<KeysetKind>(&payload, &[&OFFICE.roots[0], &OFFICE.roots[1]]));
        let host = key();
        let request = sign::<RequestKind>(&payload, &[&host]);
        let _ = verify_request(&request, &host.public()).map(|verified| Request::parse(&verified));
    }

    #[test]
    fn signed_documents_with_a_changed_byte_are_read_without_a_panic(at in any::<Index>(), byte in any::<u8>()) {
        let tenant = Digest([1; 32]);
        for (mut payload, is_lease) in [(lease(tenant).payload(), true), (request(tenant).payload(), false)] {
            let at = at.index(payload.len());
            payload[at] = byte;
            if is_lease {
                read(&sign::<LeaseKind>(&payload, &[&OFFICE.lease]));
            } else {
                let _ = untrusted_device(&sign::<RequestKind>(&payload, &[]));
            }
        }
    }

    #[test]
    fn what_is_signed_is_what_is_read(payload in vec(any::<u8>(), 0..2000)) {
        let envelope = sign::<BundleKind>(&payload, &[&OFFICE.policy[0]]);
        let verified = FIRST.verify::<BundleKind>(&envelope).unwrap();
        prop_assert_eq!(verified.payload(), &payload[..]);
    }
}
