//! The name of an interface, as the kernel takes it.

use std::io;

/// Sixteen bytes, the last of them zero.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Name([u8; IFNAMSIZ]);

impl Name {
    /// Takes 1 to 15 bytes of `[A-Za-z0-9_-]`, no more than what the kernel takes: it would also
    /// replace a `%d`, and read `a:1` as another label of `a`.
    pub(crate) fn parse(name: &str) -> io::Result<Self> {
        let bytes = name.as_bytes();
        let plain = bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
        if !(1..IFNAMSIZ).contains(&bytes.len()) || !plain {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{name:?} is no interface name: 1 to 15 letters, digits, '_' and '-' are"),
            ));
        }
        let mut padded = [0; IFNAMSIZ];
        padded[..bytes.len()].copy_from_slice(bytes);
        Ok(Self(padded))
    }
}

/// Bytes of a name with its final zero (`linux/if.h`).
const IFNAMSIZ: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_of_fifteen_bytes_is_taken_and_of_sixteen_refused() {
        assert!(Name::parse("kontor012345678").is_ok());
        assert_eq!(
            Name::parse("kontor0123456789").err().map(|e| e.kind()),
            Some(io::ErrorKind::InvalidInput)
        );
        assert!(Name::parse("").is_err());
    }

    #[test]
    fn name_that_the_kernel_would_read_otherwise_is_refused() {
        for name in ["tun%d", "tun0:1", "../tun", "tun 0", "tun\0", "tün"] {
            assert!(Name::parse(name).is_err(), "{name:?}");
        }
    }
}
