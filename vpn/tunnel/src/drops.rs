//! Why a datagram or a packet went no further, and how often.

/// Why a datagram or a packet was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DropReason {
    /// Datagram: longer than [`DATAGRAM_MAX`](crate::DATAGRAM_MAX). Packet: longer than the MTU.
    TooLong,
    /// Datagram: no WireGuard message. Packet, or the content of a datagram: no whole IP packet.
    Malformed,
    /// A handshake message whose first MAC does not name our public key.
    Mac,
    /// Too many handshakes: the sender was asked to show a cookie first.
    Load,
    /// A handshake of a public key that is no peer's.
    UnknownPeer,
    /// A message for a session or handshake that is not there.
    UnknownSession,
    /// A message that is not what its sender's key would have made.
    Forged,
    /// A message that came before, or that is older than what came before.
    Replayed,
    /// A packet whose source address is not its peer's.
    Source,
    /// A packet for an address that is no peer's.
    NoRoute,
    /// A packet for a peer that has not spoken yet, so nobody knows where it is.
    NoEndpoint,
    /// A packet for a peer without a session, behind as many as may wait for one.
    Waiting,
    /// An answer for which there was no room, because the caller did not fetch earlier ones.
    NoRoom,
}

impl DropReason {
    /// All of them, in order.
    pub const ALL: [Self; 13] = [
        Self::TooLong,
        Self::Malformed,
        Self::Mac,
        Self::Load,
        Self::UnknownPeer,
        Self::UnknownSession,
        Self::Forged,
        Self::Replayed,
        Self::Source,
        Self::NoRoute,
        Self::NoEndpoint,
        Self::Waiting,
        Self::NoRoom,
    ];

    /// One word or two, for a log or a metric.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TooLong => "too_long",
            Self::Malformed => "malformed",
            Self::Mac => "mac",
            Self::Load => "load",
            Self::UnknownPeer => "unknown_peer",
            Self::UnknownSession => "unknown_session",
            Self::Forged => "forged",
            Self::Replayed => "replayed",
            Self::Source => "source",
            Self::NoRoute => "no_route",
            Self::NoEndpoint => "no_endpoint",
            Self::Waiting => "waiting",
            Self::NoRoom => "no_room",
        }
    }
}

/// How often each reason came up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drops([u64; DropReason::ALL.len()]);

impl Drops {
    /// Drops for this reason.
    #[must_use]
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// Every reason with its count.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.into_iter().map(|reason| (reason, self.get(reason)))
    }

    pub(crate) fn count(&mut self, reason: DropReason) {
        self.0[reason as usize] += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_own_count_and_name() {
        let mut drops = Drops::default();
        for (position, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, position);
            drops.count(reason);
        }
        assert!(drops.iter().all(|(_, count)| count == 1));
        let names: std::collections::BTreeSet<_> = DropReason::ALL.map(DropReason::name).into();
        assert_eq!(names.len(), DropReason::ALL.len());
    }
}
