//! What only the guest checks.

use super::{NOW, Scene, parts};
use crate::lease::{LeaseError, for_guest};

#[test]
fn lease_issued_before_the_image_was_built_is_refused() {
    let scene = Scene::new();
    let parts = parts(&scene.admit());
    assert!(for_guest(&scene.floor, &parts, &scene.asked(), NOW).is_ok());
    let error = for_guest(&scene.floor, &parts, &scene.asked(), NOW + 1).unwrap_err();
    assert!(
        matches!(error, LeaseError::BeforeBuild { issued_at: NOW, built_at } if built_at == NOW + 1),
        "{error:?}"
    );
}

#[test]
fn lease_of_the_last_boot_is_refused() {
    let scene = Scene::new();
    let parts = parts(&scene.admit());
    let mut asked = scene.asked();
    asked.nonce = [40; 32];
    assert!(matches!(for_guest(&scene.floor, &parts, &asked, 0), Err(LeaseError::OtherNonce)));
    let mut asked = scene.asked();
    asked.boot_key = [50; 32];
    assert!(matches!(for_guest(&scene.floor, &parts, &asked, 0), Err(LeaseError::OtherBootKey)));
    let mut asked = scene.asked();
    asked.seq += 1;
    assert!(matches!(
        for_guest(&scene.floor, &parts, &asked, 0),
        Err(LeaseError::OtherSeq { lease: 2, asked: 3 })
    ));
    let mut asked = scene.asked();
    asked.verity_root.0[0] ^= 1;
    assert!(matches!(for_guest(&scene.floor, &parts, &asked, 0), Err(LeaseError::OtherRoot)));
}
