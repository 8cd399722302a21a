//! Trials of a stolen control: it can refuse, disconnect and look on, but it admits no key of its own, names no
//! gateway of its own and brings back no old policy.
//!
//! Each lie is told to the real gateway and, in answer to a real boot, to the real host. What a host refuses its
//! guest does not get to hear; that the guest refuses the same by itself is for `kontor_bundle`'s tests
//! (`policy/bundle/src/tests/{lease,guest}.rs`), where one check stands for all sides, and for those of
//! `kontor_guest`'s `init::lease`.

use super::{
    Outcome, Stage,
    thread::{closes, page_is_read, starts},
    words,
};
use crate::{
    liar::{Answer, Liar, Lie, Loot, unix_now},
    office::SILENCE_S,
    scene::LEASE_S,
};
use kontor_bundle::Bundle;
use kontor_trust::{
    BundleKind, Device, DeviceKind, Digest, Keyset, KeysetKind, Request, RequestKind, Verified, sign,
    verify_request,
};
use libtest_mimic::Failed;
use serde_json::{Value, json};

/// A lie, and what becomes of it.
pub(super) struct Case {
    pub(super) name: &'static str,
    lie: Lie,
    /// What the host does about it.
    host: Host,
    /// The gateway's words for it.
    gateway: &'static str,
}

enum Host {
    /// It refuses, in these words: exit code 3.
    Says(&'static str),
    /// It cannot know better, and its guest stops for this reason: exit code 5.
    Stops(&'static str),
    /// Not tried.
    IsNotAsked,
}
use Host::{IsNotAsked, Says, Stops};

/// A key that control has thought up, as the X25519 key of a tunnel.
const INVENTED: [u8; 32] = [0x5a; 32];
/// 2030-01-01.
const IN_2030: u64 = 1_893_456_000;
/// How long a lease that no gateway admits shall keep a guest waiting, in seconds.
const BRIEFLY: u64 = 3;

/// What is told to the host has a trial each; the first one goes with all that the gateway is told.
pub(super) const CASES: &[Case] = &[
    Case {
        name: "lease_with_another_nonce",
        lie: |answer, loot| answer.change(loot, |lease| lease.nonce[0] ^= 1),
        host: Says("the lease has another nonce"),
        gateway: "the lease has another nonce",
    },
    Case {
        name: "lease_for_a_key_that_control_invents",
        lie: |answer, loot| answer.change(loot, |lease| lease.boot_key = INVENTED),
        host: Says("the lease is for another boot key"),
        gateway: "the lease is for another boot key",
    },
    Case {
        name: "lease_for_another_device",
        lie: |answer, loot| {
            answer.change(loot, |lease| lease.device = "emil-2".parse().unwrap_or(lease.device.clone()))
        },
        host: Says("the lease is for another device"),
        gateway: "the lease is for another device",
    },
    Case {
        name: "lease_of_another_tenant",
        lie: |answer, loot| answer.change(loot, |lease| lease.tenant = Digest([7; 32])),
        host: Says("the lease is of another tenant"),
        gateway: "the lease is of another tenant",
    },
    Case {
        name: "lease_for_another_image",
        lie: |answer, loot| answer.change(loot, |lease| lease.verity_root.0[0] ^= 1),
        host: Says("the lease is for another image"),
        gateway: "the lease is for another image",
    },
    Case {
        name: "lease_that_ended_before_the_last_one_began",
        lie: |answer, loot| {
            answer.change(loot, |lease| {
                lease.issued_at -= 2 * LEASE_S;
                lease.not_after = lease.issued_at + LEASE_S;
            });
        },
        host: Says("the lease was issued at"),
        gateway: "the lease ended at",
    },
    Case {
        name: "lease_that_ended_a_second_ago",
        lie: |answer, loot| {
            answer
                .change(loot, |lease| (lease.issued_at, lease.not_after) = (unix_now() - 2, unix_now() - 1));
        },
        // The host's clock is nobody's judge.
        host: Stops("lease-expired"),
        gateway: "the lease ended at",
    },
    Case {
        name: "lease_replayed_from_the_boot_before",
        lie: |answer, loot| *answer = loot.before.clone().unwrap_or_else(|| answer.clone()),
        host: Says("the lease has another nonce"),
        gateway: "the lease was issued at",
    },
    Case {
        name: "lease_for_a_gateway_that_the_bundle_does_not_have",
        lie: |answer, loot| answer.change(loot, |lease| lease.gateways[0].id = 9),
        host: Says("the lease names gateway 9, which the bundle does not have"),
        gateway: "the lease names gateway 9, which the bundle does not have",
    },
    Case {
        name: "gateway_key_that_control_invents",
        lie: |answer, loot| rewrite_bundle(answer, loot, |bundle| bundle.gateways[0].key = INVENTED),
        host: Says("the bundle is not signed as it must be"),
        gateway: "the bundle is not signed as it must be",
    },
    Case {
        name: "gateway_address_that_control_invents",
        lie: |answer, loot| {
            rewrite_bundle(answer, loot, |bundle| {
                bundle.gateways[0].endpoints.iter_mut().for_each(|endpoint| endpoint.set_port(9));
            });
        },
        host: IsNotAsked,
        gateway: "the bundle is not signed as it must be",
    },
    Case {
        name: "policy_that_was_replaced",
        lie: old_policy,
        host: Says("the lease is for revision 1, revision 2 is known"),
        gateway: "the lease is for revision 1, revision 2 is known",
    },
    Case {
        name: "keyset_that_control_makes",
        lie: own_keyset,
        host: Says("the roots of keyset 1 do not vouch for the next"),
        gateway: "the roots of keyset 1 do not vouch for the next",
    },
    Case {
        name: "lease_with_a_changed_byte",
        lie: |answer, _| flip(&mut answer.parts.lease),
        host: Says("the lease is not signed as it must be"),
        gateway: "the lease is not signed as it must be",
    },
    Case {
        name: "device_record_with_a_changed_byte",
        lie: |answer, _| flip(&mut answer.parts.device),
        host: Says("the device is not signed as it must be"),
        gateway: "the device is not signed as it must be",
    },
    Case {
        name: "bundle_with_a_changed_byte",
        lie: |answer, _| flip(&mut answer.parts.bundle),
        host: Says("the bundle is not signed as it must be"),
        gateway: "the bundle is not signed as it must be",
    },
    Case {
        name: "keyset_with_a_changed_byte",
        lie: |answer, _| answer.parts.keysets.iter_mut().for_each(|keyset| flip(keyset)),
        host: Says("the chain of keysets"),
        gateway: "the chain of keysets",
    },
    // What only the gateway is told.
    Case {
        name: "request_that_control_signs",
        lie: own_request,
        host: IsNotAsked,
        gateway: "the request is not signed as it must be",
    },
    Case {
        name: "device_record_that_control_signs",
        lie: own_device,
        host: IsNotAsked,
        gateway: "the device is not signed as it must be",
    },
    Case {
        name: "lease_for_another_enrolment",
        lie: |answer, loot| answer.change(loot, |lease| lease.enrolment.0[0] ^= 1),
        host: IsNotAsked,
        gateway: "the lease is for another enrolment of the device",
    },
    Case {
        name: "lease_for_another_challenge",
        lie: |answer, loot| answer.change(loot, |lease| lease.seq += 1),
        host: IsNotAsked,
        gateway: "the lease answers challenge 1, asked was 0",
    },
    Case {
        name: "lease_for_another_request",
        lie: |answer, loot| answer.change(loot, |lease| lease.request.0[0] ^= 1),
        host: IsNotAsked,
        gateway: "the lease answers another request",
    },
    Case {
        name: "lease_for_another_bundle",
        lie: |answer, loot| answer.change(loot, |lease| lease.bundle.0[0] ^= 1),
        host: IsNotAsked,
        gateway: "the lease is for another bundle",
    },
    Case {
        name: "lease_that_lasts_for_ever",
        lie: |answer, loot| answer.change(loot, |lease| lease.not_after = u64::MAX),
        host: IsNotAsked,
        gateway: "the lease lasts from",
    },
    Case {
        name: "lease_without_a_signature",
        lie: |answer, _| answer.parts.lease = sign::<kontor_trust::LeaseKind>(&answer.lease.payload(), &[]),
        host: IsNotAsked,
        gateway: "the lease is not signed as it must be",
    },
    // The last: what the host remembers of time is no measure after it.
    IN_THE_FUTURE,
];

const IN_THE_FUTURE: Case = Case {
    name: "lease_of_a_control_whose_clock_stands_at_2030",
    lie: |answer, loot| {
        answer.change(loot, |lease| (lease.issued_at, lease.not_after) = (IN_2030, IN_2030 + BRIEFLY));
    },
    host: Stops("lease-expired"),
    gateway: "the lease was issued at 1893456000, it is",
};

impl Case {
    /// Whether the host is told it too.
    pub(super) fn is_told_to_the_host(&self) -> bool {
        !matches!(self.host, IsNotAsked)
    }

    fn is_refused_by_the_gateway(&self, heard: &Value) -> bool {
        heard["refused"].as_str().is_some_and(|words| words.contains(self.gateway))
    }
}

/// The trial's own measure: with the stolen keys, and nothing changed, all is as with control itself.
pub(super) fn truth_is_believed(stage: &mut Stage) -> Outcome {
    stage.liar = None;
    take_controls_place(stage)
}

/// Every lie is told to the gateway, in answer to one boot of the device: it has words for each, and no peer.
pub(super) fn gateway_refuses_all(stage: &mut Stage) -> Outcome {
    let heard = tell(stage, CASES.iter().map(|case| case.lie).collect(), &CASES[0])?;
    let log = stage.scene()?.office.gateway_said("refused").map_err(words)?;
    let mut wrong = Vec::new();
    for (case, heard) in CASES.iter().zip(&heard) {
        if !case.is_refused_by_the_gateway(heard) || !log.iter().any(|line| line.contains(case.gateway)) {
            wrong.push(format!("{}: the gateway says {heard}", case.name));
        }
    }
    if wrong.is_empty() && heard.len() == CASES.len() + 1 {
        return Ok(());
    }
    Err(format!("{} answers; {}", heard.len(), wrong.join("; ")).into())
}

/// A lie is told to the gateway and to the host: no peer, no session, and both say why.
pub(super) fn is_refused(stage: &mut Stage, case: &'static Case) -> Outcome {
    let heard = tell(stage, Vec::new(), case)?;
    if heard.len() == 1 { Ok(()) } else { Err(format!("{} answers to one lie", heard.len()).into()) }
}

/// The host remembers a lease of 2030, and installs all the same: that is how it gets rid of a stolen control.
pub(super) fn future_stops_no_installing(stage: &mut Stage) -> Outcome {
    const CASE: &Case = &IN_THE_FUTURE;
    let last_lease = |stage: &mut Stage| -> Result<Option<u64>, Failed> {
        let memory = std::fs::read(stage.scene()?.home.device_file("memory.json"))?;
        Ok(serde_json::from_slice::<Value>(&memory)?["seen"]["issued_at"].as_u64())
    };
    if last_lease(stage)? != Some(IN_2030) {
        is_refused(stage, CASE)?;
    }
    let remembered = last_lease(stage)?;
    if remembered != Some(IN_2030) {
        return Err(format!("the host remembers a lease of {remembered:?}").into());
    }
    let scene = stage.scene()?;
    let installed = scene.home.install(&scene.office.repository()).map_err(words)?;
    if installed.status.success() {
        return Ok(());
    }
    Err(format!("kontord install: {}", String::from_utf8_lossy(&installed.stderr)).into())
}

/// A work VM is started, the gateway is told each of `first`, and then both are told a lie. `Err` when one of them
/// believes it or does not say why it does not, or when there is a peer or a session.
fn tell(stage: &mut Stage, first: Vec<Lie>, case: &Case) -> Result<Vec<Value>, Failed> {
    take_controls_place(stage)?;
    let before = admitted(stage)?;
    stage.liar.as_ref().ok_or("nobody lies")?.says(first, case.lie);
    let output = stage.scene()?.home.kontor(&["start", "--headless"]).map_err(words)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let status = stage.scene()?.home.status().map_err(words)?;
    let heard = stage.liar.as_ref().ok_or("nobody lies")?.heard().map_err(words)?;
    let after = admitted(stage)?;

    let stop = &status["stop"];
    let (code, reason, by_host) = match case.host {
        Says(expected) => {
            let detail = stop["detail"].as_str().unwrap_or_default();
            (3, "bad-lease", said.contains(expected) && detail.contains(expected))
        }
        Stops(reason) => (5, reason, stop["words"].as_str().is_some_and(|words| said.contains(words))),
        IsNotAsked => return Err("this is not for the host".into()),
    };
    let by_host = by_host && output.status.code() == Some(code) && stop["reason"] == reason;
    let by_gateway = heard.last().is_some_and(|heard| case.is_refused_by_the_gateway(heard));
    let reached = status["states"].as_array().into_iter().flatten().filter_map(|s| s["state"].as_str());
    let reached: Vec<&str> = reached.collect();
    let no_tunnel = ["tunnel-up", "admitted", "session"].iter().all(|state| !reached.contains(state));
    if by_host && by_gateway && no_tunnel && before == after {
        return Ok(heard);
    }
    Err(format!(
        "kontor start: {} {said}; stop {stop}; reached {reached:?}; the gateway says {:?}, {} peers made",
        output.status,
        heard.last(),
        after - before
    )
    .into())
}

/// Control is itself again: what the lies left behind hinders nobody.
pub(super) fn honest_again(stage: &mut Stage) -> Outcome {
    stage.quiet()?;
    stage.liar = None;
    stage.scene()?.office.start_control().map_err(words)?;
    starts(stage)?;
    page_is_read(stage)?;
    closes(stage)
}

/// No work VM runs, and control's place is taken, by somebody who was believed once. From then on revision 2 is known.
fn take_controls_place(stage: &mut Stage) -> Outcome {
    stage.quiet()?;
    if stage.liar.is_some() {
        return Ok(());
    }
    let scene = stage.scene()?;
    let (bundle, old) = (scene.office.bundle(), scene.office.old_bundle());
    if !old.exists() {
        std::fs::copy(&bundle, &old).map_err(|e| format!("{}: {e}", old.display()))?;
        scene.office.sign_bundle(2, LEASE_S, SILENCE_S).map_err(words)?;
    }
    scene.office.kill_control().map_err(words)?;
    let liar = Liar::open(&scene.office).map_err(words)?;
    stage.liar = Some(liar);
    starts(stage)?;
    page_is_read(stage)?;
    let heard = stage.liar.as_ref().ok_or("nobody speaks")?.heard().map_err(words)?;
    if heard != [json!({ "admitted": true })] {
        return Err(format!("to the truth the gateway says {heard:?}").into());
    }
    closes(stage)
}

/// How many leases the gateway has made peers of.
fn admitted(stage: &mut Stage) -> Result<usize, Failed> {
    Ok(stage.scene()?.office.gateway_said(" admitted").map_err(words)?.len())
}

/// Changes the bundle and signs it with what there is: the key of another role.
fn rewrite_bundle(answer: &mut Answer, loot: &mut Loot, change: fn(&mut Bundle)) {
    let Ok(mut bundle) = verified(loot, &answer.parts.bundle, Bundle::parse) else { return };
    change(&mut bundle);
    let payload = bundle.payload();
    answer.parts.bundle = sign::<BundleKind>(&payload, &[&loot.lease_key]);
    answer.change(loot, |lease| lease.bundle = Digest::of(&payload));
}

/// The bundle of revision 1, which the policy role did sign.
fn old_policy(answer: &mut Answer, loot: &mut Loot) {
    answer.parts.bundle.clone_from(&loot.old_bundle);
    let hash = loot.keyset.verify::<BundleKind>(&loot.old_bundle).map(|verified| verified.hash());
    let Ok(hash) = hash else { return };
    answer.change(loot, |lease| (lease.revision, lease.bundle) = (1, hash));
}

/// A second keyset in which every role is control's.
fn own_keyset(answer: &mut Answer, loot: &mut Loot) {
    let mut next = Keyset { tenant: Some(loot.keyset.tenant()), version: 2, ..loot.keyset.keyset().clone() };
    let own = loot.own_key.public();
    let roles = &mut next.roles;
    for role in [&mut next.root, &mut roles.policy, &mut roles.enrol] {
        role.threshold = 1;
        role.keys.truncate(1);
        role.keys.iter_mut().for_each(|member| member.key = own);
    }
    answer.parts.keysets.push(sign::<KeysetKind>(&next.payload(), &[&loot.own_key]));
    answer.change(loot, |lease| lease.keyset_version = 2);
}

/// A request of control's own, for a key of its own.
fn own_request(answer: &mut Answer, loot: &mut Loot) {
    let Ok(device) = verified(loot, &answer.parts.device, Device::parse) else { return };
    let verified = verify_request(&answer.request, &device.host_key).map_err(|e| e.to_string());
    let Ok(request) = verified.and_then(|v| Request::parse(&v).map_err(|e| e.to_string())) else { return };
    let payload = Request { boot_key: INVENTED, nonce: INVENTED, ..request }.payload();
    answer.request = sign::<RequestKind>(&payload, &[&loot.own_key]);
    answer.change(loot, |lease| {
        (lease.boot_key, lease.nonce, lease.request) = (INVENTED, INVENTED, Digest::of(&payload));
    });
}

/// The same, and a device record that names control's key as the host's.
fn own_device(answer: &mut Answer, loot: &mut Loot) {
    own_request(answer, loot);
    let Ok(device) = verified(loot, &answer.parts.device, Device::parse) else { return };
    let payload = Device { host_key: loot.own_key.public(), serial: device.serial + 1, ..device }.payload();
    answer.parts.device = sign::<DeviceKind>(&payload, &[&loot.lease_key]);
}

fn verified<K: kontor_trust::RoleKind, T, E>(
    loot: &Loot,
    envelope: &[u8],
    parse: impl FnOnce(&Verified<K>) -> Result<T, E>,
) -> Result<T, String> {
    let verified = loot.keyset.verify::<K>(envelope).map_err(|error| error.to_string())?;
    parse(&verified).map_err(|_| "malformed".to_owned())
}

/// Changes a character in the middle of an envelope's payload, so that it is still an envelope.
pub(super) fn flip(envelope: &mut [u8]) {
    const BEFORE: &[u8] = b"\"payload\":\"";
    const DEEP: usize = 40;
    let begin = envelope.windows(BEFORE.len()).position(|window| window == BEFORE);
    if let Some(byte) = begin.and_then(|begin| envelope.get_mut(begin + BEFORE.len() + DEEP)) {
        *byte = if *byte == b'A' { b'B' } else { b'A' };
    }
}
