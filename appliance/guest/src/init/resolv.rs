//! `/run/kontor/resolv.conf`, to which the image's `/etc/resolv.conf` points: the office's name servers
//! from the bundle, and nobody else's.

use std::fmt::Write;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Where it lies.
pub(crate) const PATH: &str = "/run/kontor/resolv.conf";

/// Writes the file; readable for all.
pub(crate) fn write(path: &Path, resolvers: &[IpAddr]) -> io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o644).open(path)?;
    io::Write::write_all(&mut file, text(resolvers).as_bytes())
}

fn text(resolvers: &[IpAddr]) -> String {
    let mut text = String::new();
    for resolver in resolvers {
        writeln!(text, "nameserver {resolver}").expect("a String takes every text");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_resolver_has_its_line_in_order() {
        let resolvers = ["10.0.0.53".parse().unwrap(), "fd00::53".parse().unwrap()];
        assert_eq!(text(&resolvers), "nameserver 10.0.0.53\nnameserver fd00::53\n");
    }

    #[test]
    fn file_is_replaced_and_readable_for_all() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("resolv.conf");
        write(&path, &["192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap()]).unwrap();
        write(&path, &["192.0.2.3".parse().unwrap()]).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "nameserver 192.0.2.3\n");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
    }

    #[test]
    fn no_resolver_is_an_empty_file() {
        assert_eq!(text(&[]), "");
    }
}
