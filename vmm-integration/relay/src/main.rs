//! `kontor-relay --uplink 3 --control 4`: each number is a descriptor that kontord handed over; the sockets to the
//! gateways come later, on the second. What kind of socket the uplink is, stream or packets, says the socket. Ends with
//! 0 when it was told to or the virtual machine is gone, 3 when the guest broke the rules of the uplink, 2 on a wrong
//! command line, 1 on anything else.

use kontor_relay::{End, Limits, Relay, Uplink, Wires, message::MAX_GATEWAYS};
use rustix::{
    io::ioctl_fionbio,
    net::{SocketType, sockopt},
};
use std::{
    error::Error,
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
    process::ExitCode,
};

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const NOT_VERIFIED: u8 = 3;

/// Numbers that descriptors may have: standard input, output and error, the two of the command line, and the
/// sockets of a table while those of the one before are still open.
const FILES_MAX: u64 = 5 + 2 * MAX_GATEWAYS as u64;

fn main() -> ExitCode {
    let numbers = match Numbers::parse(std::env::args().skip(1)) {
        Ok(numbers) => numbers,
        Err(words) => {
            eprintln!("kontor-relay: {words}");
            return ExitCode::from(USAGE);
        }
    };
    match run(&numbers) {
        Ok(End::Shutdown | End::UplinkClosed) => ExitCode::SUCCESS,
        Ok(End::Garbage) => ExitCode::from(NOT_VERIFIED),
        Err(error) => {
            eprintln!("kontor-relay: {}", kontor_jail::chain(&*error));
            ExitCode::from(FAILED)
        }
    }
}

/// Numbers of the inherited descriptors.
#[derive(Debug, PartialEq, Eq)]
struct Numbers {
    uplink: RawFd,
    control: RawFd,
}

impl Numbers {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let [mut uplink, mut control] = [None::<RawFd>; 2];
        let mut seen = Vec::new();
        while let Some(name) = words.next() {
            let place = match name.as_str() {
                "--uplink" => &mut uplink,
                "--control" => &mut control,
                _ => return Err(format!("{name:?} is no option of the relay")),
            };
            let number = words.next().and_then(|word| word.parse().ok()).filter(|&fd: &RawFd| fd > 2);
            let number = number.ok_or_else(|| format!("{name} takes the number of a descriptor above 2"))?;
            if seen.contains(&number) || place.replace(number).is_some() {
                return Err(format!("{name} {number} is given twice"));
            }
            seen.push(number);
        }
        let must = |fd: Option<RawFd>, name| fd.ok_or_else(|| format!("{name} is missing"));
        Ok(Self { uplink: must(uplink, "--uplink")?, control: must(control, "--control")? })
    }
}

fn run(numbers: &Numbers) -> Result<End, Box<dyn Error>> {
    let uplink = take(numbers.uplink)?;
    ioctl_fionbio(&uplink, true)?;
    let uplink = match sockopt::socket_type(&uplink)? {
        SocketType::STREAM => Uplink::Stream(uplink.into()),
        SocketType::SEQPACKET => Uplink::Ethernet(uplink.into()),
        _ => return Err("the uplink is a socket of another type".into()),
    };
    let control = take(numbers.control)?;
    let relay = Relay::new(Wires { uplink, control }, Limits::default());
    // From here on it has its descriptors, those that kontord sends, and nothing else.
    kontor_jail::seal_relay(FILES_MAX)?;
    Ok(relay.run()?)
}

fn take(number: RawFd) -> Result<OwnedFd, Box<dyn Error>> {
    // SAFETY: the borrow ends with this statement, and all that is done is to ask whether the number is
    // an open descriptor.
    let open = rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) });
    open.map_err(|error| format!("descriptor {number}: {error}"))?;
    // SAFETY: it is open. The number comes from the command line, where each stands once
    // (`Numbers::parse`), and nothing in this process has opened a descriptor of its own yet: nobody else
    // owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Numbers, String> {
        Numbers::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn command_line_of_kontord_is_read() {
        assert_eq!(parse("--uplink 3 --control 4"), Ok(Numbers { uplink: 3, control: 4 }));
    }

    #[test]
    fn wrong_command_lines_are_refused() {
        for line in [
            "",
            "--uplink 3",
            "--uplink 3 --control 3",
            "--uplink 3 --uplink 4 --control 5",
            "--uplink 2 --control 4",
            "--uplink x --control 4",
            "--uplink 3 --control",
            "--uplink 3 --control 4 --tap 6",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
