use super::{NOW, id};
use crate::{BOOTS_KEPT, Boot, Past};

fn boot(n: usize) -> Boot {
    Boot { boot_key: [u8::try_from(n).unwrap(); 32], seq: 9 }
}

#[test]
fn last_boots_are_remembered() {
    let (mut past, device) = (Past::default(), id("a"));
    for n in 0..=BOOTS_KEPT {
        past.note(&device, boot(n), NOW);
    }
    assert_eq!(past.last_seq(&device, &boot(0).boot_key), None);
    for n in 1..=BOOTS_KEPT {
        assert_eq!(past.last_seq(&device, &boot(n).boot_key), Some(9));
    }
}

#[test]
fn renewed_boot_is_the_newest() {
    let (mut past, device) = (Past::default(), id("a"));
    for n in 0..BOOTS_KEPT {
        past.note(&device, boot(n), NOW);
    }
    past.note(&device, Boot { seq: 10, ..boot(0) }, NOW);
    past.note(&device, boot(BOOTS_KEPT), NOW);
    assert_eq!(past.last_seq(&device, &boot(0).boot_key), Some(10));
    assert_eq!(past.last_seq(&device, &boot(1).boot_key), None);
}

#[test]
fn boot_key_belongs_to_the_device_that_used_it() {
    let mut past = Past::default();
    past.note(&id("a"), boot(1), NOW);
    assert!(past.is_anothers(&id("b"), &boot(1).boot_key));
    assert!(!past.is_anothers(&id("a"), &boot(1).boot_key));
    assert!(!past.is_anothers(&id("b"), &boot(2).boot_key));
}

#[test]
fn past_survives_being_stored() {
    let mut past = Past::default();
    past.note(&id("a"), boot(1), NOW);
    let text = serde_json::to_string(&past).unwrap();
    assert_eq!(serde_json::from_str::<Past>(&text).unwrap(), past);
}
