//! What peers cause outside themselves.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::drops::{DropReason, Drops};
use crate::outbox::Outbox;
use crate::peer::Peer;
use crate::tunnel::PeerId;

pub(crate) struct Effects<E> {
    pub(crate) outbox: Outbox<E>,
    pub(crate) drops: Drops,
    /// Peers with packets that waited for the session that they now have.
    pub(crate) flushing: BTreeSet<PeerId>,
    /// When the timers run next.
    pub(crate) next_sweep: Instant,
}

impl<E: Copy + Eq> Effects<E> {
    pub(crate) fn send(&mut self, to: Option<E>, message: &[u8]) {
        let Some(to) = to else {
            return self.drops.count(DropReason::NoEndpoint);
        };
        if self.outbox.push(to, message).is_err() {
            self.drops.count(DropReason::NoRoom);
        }
    }

    /// After anything happened to a peer: its packets that waited, and its next deadline.
    pub(crate) fn settle(&mut self, id: PeerId, peer: &Peer<E>) {
        if peer.can_flush() {
            self.flushing.insert(id);
        }
        if let Some(due) = peer.due() {
            self.next_sweep = self.next_sweep.min(due);
        }
    }
}
