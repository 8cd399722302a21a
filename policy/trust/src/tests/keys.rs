use super::key;
use crate::{DeviceId, Digest, KeyError, MAX_NAME, Person, PublicKey, SPKI_BYTES, SecretKey, hex32};

#[test]
fn signature_of_rfc_8032_is_good() {
    // RFC 8032, 7.1, test 3.
    let public: PublicKey =
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025".parse().unwrap();
    let mut signature = [0; 64];
    let text = "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac\
                18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a";
    hex::decode_to_slice(text, &mut signature).unwrap();
    assert!(public.signed(&[0xaf, 0x82], &signature));
    assert!(!public.signed(&[0xaf, 0x83], &signature));
}

#[test]
fn stored_key_is_the_same_key() {
    let key = key();
    let again = SecretKey::from_pkcs8(key.to_pkcs8()).unwrap();
    assert_eq!(again.public(), key.public());
    assert_eq!(again.sign(b"text"), key.sign(b"text"));
}

#[test]
fn key_with_a_changed_byte_is_refused() {
    // A changed public half does not fit; a changed secret half does not either.
    let key = key();
    for at in 0..key.to_pkcs8().len() {
        let mut der = key.to_pkcs8().to_vec();
        der[at] ^= 1;
        assert_eq!(SecretKey::from_pkcs8(&der).err(), Some(KeyError::Pkcs8), "byte {at}");
    }
}

#[test]
fn cut_key_is_refused() {
    let key = key();
    for length in 0..key.to_pkcs8().len() {
        assert_eq!(SecretKey::from_pkcs8(&key.to_pkcs8()[..length]).err(), Some(KeyError::Pkcs8));
    }
}

#[test]
fn key_id_is_the_hash_of_the_public_key() {
    let public = key().public();
    assert_eq!(public.id(), Digest::of(&public.0));
}

#[test]
fn public_key_is_64_lower_case_digits() {
    let text = "0a".repeat(32);
    assert_eq!(text.parse::<PublicKey>().unwrap().to_string(), text);
    for wrong in
        [text.to_uppercase(), text[1..].to_owned(), format!("{text}0a"), "zz".repeat(32), String::new()]
    {
        assert!(wrong.parse::<PublicKey>().is_err(), "{wrong:?}");
        assert!(wrong.parse::<Digest>().is_err(), "{wrong:?}");
        assert!(hex32::decode(&wrong).is_none(), "{wrong:?}");
    }
}

#[test]
fn name_has_1_to_64_characters() {
    assert!("".parse::<DeviceId>().is_err());
    assert!("a".parse::<DeviceId>().is_ok());
    assert!("a".repeat(MAX_NAME).parse::<DeviceId>().is_ok());
    assert!("a".repeat(MAX_NAME + 1).parse::<DeviceId>().is_err());
}

#[test]
fn name_that_would_leave_its_directory_is_refused() {
    for wrong in ["..", "a/b", "a.json", "A", "a b", "a\n", "ä", "a_b", "\0"] {
        assert!(wrong.parse::<DeviceId>().is_err(), "{wrong:?}");
        assert!(serde_json::from_value::<DeviceId>(wrong.into()).is_err(), "{wrong:?}");
    }
}

#[test]
fn person_may_be_an_address() {
    assert!("anna.b+root_1@hanse-co.example".parse::<Person>().is_ok());
    assert!("Anna".parse::<Person>().is_err());
}

#[test]
fn key_is_read_back_from_what_tls_shows() {
    // RFC 8410, 10.1.
    let der = "302a300506032b657003210019bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1";
    let der = hex::decode(der).unwrap();
    let key = PublicKey::from_spki(&der).unwrap();
    assert_eq!(key.spki(), der[..]);
    assert_eq!(key.pin(), Digest::of(&der));
    for length in 0..SPKI_BYTES {
        assert_eq!(PublicKey::from_spki(&der[..length]), None);
    }
    assert_eq!(PublicKey::from_spki(&[&der[..], &[0]].concat()), None);
    for at in 0..12 {
        let mut other = der.clone();
        other[at] ^= 1;
        assert_eq!(PublicKey::from_spki(&other), None, "byte {at}");
    }
}
