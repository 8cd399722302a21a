//! kontord's side of the office: whom it takes a lease from, and what it says when it takes none.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod https;
#[expect(dead_code, reason = "other tests use more of it")]
mod tenant;

use https::{response, serve};
use kontor_daemon::{
    exit::chain,
    office::{HttpsOffice, LeaseSource, MAX_ANSWER, OfficeError, Reply},
    store::Store,
};
use kontor_trust::{PublicKey, SecretKey};
use std::{
    net::{SocketAddr, TcpListener},
    sync::mpsc,
    time::Instant,
};
use tenant::{Tenant, device_id};

/// A host with what it was provisioned with.
struct Host {
    _dir: tempfile::TempDir,
    tenant: Tenant,
    store: Store,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tenant = Tenant::new();
        let store = Store::open(dir.path(), tenant.id, device_id()).unwrap();
        store.make_host_key().unwrap();
        let host = Self { _dir: dir, tenant, store };
        host.provision();
        host
    }

    /// Stores the tenant's keysets as they are now.
    fn provision(&self) {
        let key = self.store.host_key().unwrap().public();
        let bundle = self.tenant.bundle("192.0.2.1:51820".parse().unwrap(), |_| {});
        self.store.provision(&self.tenant.keysets, &self.tenant.device(key, |_| {}), &bundle).unwrap();
    }

    fn office(&self, address: impl ToString) -> HttpsOffice {
        HttpsOffice::new(address.to_string().parse().unwrap(), self.store.clone())
    }

    /// What comes of asking control at `address`.
    async fn ask(&self, address: impl ToString) -> Result<Reply, OfficeError> {
        self.office(address).answer(b"request".to_vec()).await
    }

    /// What comes of it when control answers so.
    async fn answered(&self, whole: Vec<u8>) -> Result<Reply, OfficeError> {
        self.ask(serve(same(&self.tenant.control), move |_, _| whole.clone())).await
    }
}

fn same(key: &SecretKey) -> SecretKey {
    SecretKey::from_pkcs8(key.to_pkcs8()).unwrap()
}

fn refused(words: &str) -> Vec<u8> {
    response("200 OK", format!("{{\"refused\":\"{words}\"}}\n").as_bytes())
}

#[tokio::test]
async fn request_arrives_whole_and_with_the_host_key() {
    let host = Host::new();
    let (tell, told) = mpsc::channel::<(PublicKey, Vec<u8>)>();
    let address = serve(same(&host.tenant.control), move |peer, request| {
        tell.send((peer, request.to_vec())).unwrap();
        response(
            "200 OK",
            br#"{"lease":{"keysets":["YQ=="],"device":"Yg==","bundle":"Yw==","lease":"ZA=="}}"#,
        )
    });
    let longest = vec![b'x'; kontor_trust::MAX_ENVELOPE];
    let Ok(Reply::Lease(parts)) = host.office(address).answer(longest.clone()).await else { panic!() };
    assert_eq!((parts.keysets, parts.lease), (vec![b"a".to_vec()], b"d".to_vec()));
    let (peer, request) = told.recv().unwrap();
    assert_eq!(peer, host.store.host_key().unwrap().public());
    assert_eq!(request, longest);
}

#[tokio::test]
async fn office_is_found_by_name() {
    let host = Host::new();
    let address = serve(same(&host.tenant.control), |_, _| refused("no"));
    let reply = host.ask(format!("localhost:{}", address.port())).await;
    assert!(matches!(reply, Ok(Reply::Refused(words)) if words == "no"));
}

#[tokio::test]
async fn somebody_with_another_key_is_not_spoken_with() {
    let host = Host::new();
    let thief = SecretKey::generate().unwrap();
    let pin = thief.public().pin();
    let address = serve(thief, |_, _| panic!("the request went to a stranger"));
    let error = host.ask(address).await.unwrap_err();
    assert!(matches!(error, OfficeError::Stranger(..)), "{error:?}");
    let words = chain(&error);
    assert!(words.contains("somebody else answers as the office"), "{words}");
    assert!(words.contains(&pin.to_string()) && words.contains("tell IT"), "{words}");
}

#[tokio::test]
async fn stolen_key_is_refused_once_a_keyset_without_it_was_seen() {
    let mut host = Host::new();
    let (stolen, fresh) = (same(&host.tenant.control), SecretKey::generate().unwrap());
    let pin = fresh.public().pin();
    let old = serve(stolen, |_, _| refused("old"));
    let new = serve(fresh, |_, _| refused("new"));
    // While both are pinned, both are control.
    host.tenant.advance_with(|keyset| keyset.control_spki.push(pin));
    assert!(matches!(host.ask(new).await, Err(OfficeError::Stranger(..))));
    host.provision();
    assert!(matches!(host.ask(new).await, Ok(Reply::Refused(words)) if words == "new"));
    assert!(matches!(host.ask(old).await, Ok(Reply::Refused(words)) if words == "old"));
    host.tenant.advance_with(|keyset| keyset.control_spki = vec![pin]);
    host.provision();
    assert!(matches!(host.ask(new).await, Ok(Reply::Refused(words)) if words == "new"));
    assert!(matches!(host.ask(old).await, Err(OfficeError::Stranger(..))));
}

#[tokio::test]
async fn words_of_the_office_are_cut_and_cleaned() {
    let host = Host::new();
    let words = format!("\\u001b[2J{}", "x".repeat(500));
    let Ok(Reply::Refused(words)) = host.answered(refused(&words)).await else { panic!("no refusal") };
    assert!(words.starts_with("\\x1b[2Jxx") && words.len() < 210, "{words}");
}

#[tokio::test]
async fn what_is_no_answer_is_told_apart() {
    let host = Host::new();
    for body in ["", "nonsense", r#"{"lease":{}}"#, r#"{"refused":"a","lease":1}"#] {
        let answer = host.answered(response("200 OK", body.as_bytes())).await;
        assert!(matches!(answer, Err(OfficeError::Parse(_))), "{body}");
    }
    let answer = host.answered(response("503 Service Unavailable", b"")).await;
    assert!(matches!(answer, Err(OfficeError::Status(status)) if status == 503));
    for whole in [&b""[..], b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"] {
        let answer = host.answered(whole.to_vec()).await;
        assert!(matches!(answer, Err(OfficeError::Speak(..))), "{answer:?}");
    }
}

#[tokio::test]
async fn answer_at_the_limit_is_read_and_a_longer_one_is_not() {
    let host = Host::new();
    let spaces = |length: usize| {
        let mut body = br#"{"refused":"no"}"#.to_vec();
        body.resize(length, b' ');
        response("200 OK", &body)
    };
    assert!(matches!(host.answered(spaces(MAX_ANSWER)).await, Ok(Reply::Refused(_))));
    assert!(matches!(host.answered(spaces(MAX_ANSWER + 1)).await, Err(OfficeError::TooLong)));
    let head = format!("HTTP/1.1 200 OK\r\na: {}\r\n\r\n", "x".repeat(64 * 1024));
    assert!(matches!(host.answered(head.into_bytes()).await, Err(OfficeError::Speak(..))));
}

#[tokio::test]
async fn office_that_cannot_be_reached_is_named() {
    let host = Host::new();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = host.ask(nobody).await.unwrap_err();
    assert!(matches!(error, OfficeError::Connect(..)), "{error:?}");
    assert!(chain(&error).contains(&format!("reach the office {nobody}: is this PC online?")));
    let error = host.ask("does-not-exist.invalid:443").await.unwrap_err();
    assert!(matches!(error, OfficeError::Resolve(..)), "{error:?}");
}

#[tokio::test]
async fn office_that_accepts_and_stays_silent_is_given_up() {
    let host = Host::new();
    let deaf = TcpListener::bind("127.0.0.1:0").unwrap();
    let begin = Instant::now();
    let error = host.ask(deaf.local_addr().unwrap()).await.unwrap_err();
    assert!(matches!(error, OfficeError::Late), "{error:?}");
    assert!((4..20).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn what_is_no_tls_is_told() {
    let host = Host::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        use std::io::Write;
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(b"HTTP/1.1 302 Found\r\nLocation: http://hotel.example/\r\n\r\n");
    });
    let error = host.ask(address).await.unwrap_err();
    assert!(matches!(error, OfficeError::Handshake(..)), "{error:?}");
}
