//! The work VM's own programs. They run inside the guest only, are linked statically, and start no
//! other program but each other.
//!
//! * [`init`]: `kontor-init`, PID 1 from the initrd to the power switch.
//! * [`tunnel`]: `kontor-tunnel`, between the TUN interface and the uplink, without any power.
//! * [`probe`]: `kontor-probe`, runs commands for tests; in test images only. So is [`attempt`], what root
//!   can do to the uplink.
//! * [`bench`]: `kontor-bench`, measures; in no image at all.
//!
//! Trusted are the kernel's command line and the image. The host and the network are not: every byte
//! from there is bounded, parsed without panic, and believed only once it is verified.

pub mod attempt;
pub mod bench;
mod clock;
pub mod init;
mod link;
pub mod probe;
mod sys;
pub mod tunnel;
mod vfio;

/// An error and its causes in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_names_every_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("mount the root")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("no such device"));
        assert_eq!(chain(&error), "mount the root: no such device");
    }
}
