//! A control as far as a host sees it: TLS with a key, and an answer to each request. It lives as long as
//! the test's process.

use kontor_trust::{PublicKey, SecretKey};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread,
};

/// Serves on an own port. `answer` gets the peer's key and the body, and gives the whole response.
pub(crate) fn serve(
    key: SecretKey,
    answer: impl Fn(PublicKey, &[u8]) -> Vec<u8> + Send + Sync + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let config = Arc::new(kontor_tls::server(&key).unwrap());
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (config, answer, stream) = (Arc::clone(&config), Arc::clone(&answer), stream.unwrap());
            // A host that goes away in the middle is no concern of the office.
            thread::spawn(move || exchange(config, stream, &*answer));
        }
    });
    address
}

fn exchange(
    config: Arc<ServerConfig>,
    stream: TcpStream,
    answer: &dyn Fn(PublicKey, &[u8]) -> Vec<u8>,
) -> std::io::Result<()> {
    let connection = ServerConnection::new(config).unwrap();
    let mut stream = BufReader::new(StreamOwned::new(connection, stream));
    let (mut length, mut line) = (0, String::new());
    while stream.read_line(&mut line)? > 0 && line != "\r\n" {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        line.clear();
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let stream = stream.get_mut();
    let peer = kontor_tls::peer(&stream.conn).unwrap();
    stream.write_all(&answer(peer, &body))?;
    stream.conn.send_close_notify();
    stream.flush()
}

/// A response of HTTP/1.1.
pub(crate) fn response(status: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    [head.as_bytes(), body].concat()
}
