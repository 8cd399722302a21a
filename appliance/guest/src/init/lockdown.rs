//! The kernel's own locks. After this no module loads, and root of the guest can neither read nor
//! change the kernel.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

const LOCKDOWN: &str = "/sys/kernel/security/lockdown";
const SYSCTL: &str = "/proc/sys";
/// The chosen level stands in brackets: `none integrity [confidentiality]`.
const CONFIDENTIALITY: &str = "[confidentiality]";
/// Most bytes of an answer that is read.
const ANSWER_MAX: u64 = 256;

/// Why the guest is not locked down.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockdownError {
    #[error("read {LOCKDOWN}")]
    Lockdown(#[source] io::Error),
    #[error("the kernel's lockdown is {0:?}")]
    Level(String),
    #[error("set {name} to {value}")]
    Set { name: &'static str, value: &'static str, source: io::Error },
    #[error("{name} became {actual:?} instead of {value}")]
    Kept { name: &'static str, value: &'static str, actual: String },
}

/// Before the tunnel's interface is made: no address and no route comes from anything but the lease.
const NETWORK: [(&str, &str); 14] = [
    ("net/ipv4/ip_forward", "0"),
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/default/accept_redirects", "0"),
    ("net/ipv4/conf/all/accept_source_route", "0"),
    ("net/ipv4/conf/default/accept_source_route", "0"),
    ("net/ipv6/conf/all/forwarding", "0"),
    ("net/ipv6/conf/all/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/default/autoconf", "0"),
    ("net/ipv6/conf/default/router_solicitations", "0"),
    // No link-local address of its own making.
    ("net/ipv6/conf/default/addr_gen_mode", "1"),
    ("net/ipv6/conf/all/accept_redirects", "0"),
    ("net/ipv6/conf/default/accept_redirects", "0"),
    ("net/core/bpf_jit_harden", "2"),
];

/// What takes weapons from a process that was taken over. The last one ends all loading of modules.
const KERNEL: [(&str, &str); 17] = [
    ("kernel/kptr_restrict", "2"),
    ("kernel/dmesg_restrict", "1"),
    ("kernel/perf_event_paranoid", "3"),
    ("kernel/unprivileged_bpf_disabled", "1"),
    ("kernel/io_uring_disabled", "2"),
    // Nobody attaches to anybody, root included: the tunnel's key stays in the tunnel.
    ("kernel/yama/ptrace_scope", "3"),
    ("kernel/kexec_load_disabled", "1"),
    ("kernel/sysrq", "0"),
    ("kernel/randomize_va_space", "2"),
    ("vm/unprivileged_userfaultfd", "0"),
    ("dev/tty/ldisc_autoload", "0"),
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_symlinks", "1"),
    ("fs/protected_fifos", "2"),
    ("fs/protected_regular", "2"),
    ("fs/suid_dumpable", "0"),
    ("kernel/modules_disabled", "1"),
];

/// Checks the lockdown and sets every lock; each value is read back.
pub(crate) fn lock() -> Result<(), LockdownError> {
    let level = read(Path::new(LOCKDOWN)).map_err(LockdownError::Lockdown)?;
    if !level.split_ascii_whitespace().any(|word| word == CONFIDENTIALITY) {
        return Err(LockdownError::Level(level));
    }
    NETWORK.iter().chain(&KERNEL).try_for_each(|(name, value)| set(Path::new(SYSCTL), name, value))
}

fn set(tree: &Path, name: &'static str, value: &'static str) -> Result<(), LockdownError> {
    let path = tree.join(name);
    let failed = |source| LockdownError::Set { name, value, source };
    fs::write(&path, value).map_err(failed)?;
    let actual = read(&path).map_err(failed)?;
    if actual == value { Ok(()) } else { Err(LockdownError::Kept { name, value, actual }) }
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(ANSWER_MAX).read_to_string(&mut text)?;
    Ok(text.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_is_set_and_read_back() {
        let tree = tempfile::tempdir().unwrap();
        fs::write(tree.path().join("lock"), "0\n").unwrap();
        set(tree.path(), "lock", "1").unwrap();
        assert_eq!(fs::read(tree.path().join("lock")).unwrap(), b"1");
    }

    #[test]
    fn lock_that_does_not_hold_is_noticed() {
        // /dev/null takes every value and keeps none.
        let error = set(Path::new("/dev"), "null", "1").unwrap_err();
        assert!(matches!(error, LockdownError::Kept { name: "null", .. }), "{error}");
    }

    #[test]
    fn lock_that_the_kernel_lacks_is_an_error() {
        let error = set(Path::new("/nowhere"), "lock", "1").unwrap_err();
        assert!(matches!(error, LockdownError::Set { name: "lock", .. }), "{error}");
    }

    #[test]
    fn loading_of_modules_ends_last() {
        assert_eq!(KERNEL.last(), Some(&("kernel/modules_disabled", "1")));
    }
}
