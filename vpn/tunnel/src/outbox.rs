//! Handshake messages, cookies and keepalives on their way out: a ring of fixed size.

use std::collections::VecDeque;

/// Answers that wait until the caller fetches them.
pub(crate) struct Outbox<E> {
    waiting: VecDeque<Message<E>>,
}

/// A short message and where it goes.
pub(crate) struct Message<E> {
    to: E,
    len: usize,
    bytes: [u8; MESSAGE_MAX],
}

impl<E: Copy> Message<E> {
    pub(crate) fn to(&self) -> E {
        self.to
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// There is no room for a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl<E> Outbox<E> {
    pub(crate) fn new() -> Self {
        Self { waiting: VecDeque::with_capacity(MESSAGES_MAX) }
    }

    pub(crate) fn push(&mut self, to: E, message: &[u8]) -> Result<(), Full> {
        if self.waiting.len() == MESSAGES_MAX {
            return Err(Full);
        }
        let mut bytes = [0; MESSAGE_MAX];
        bytes.get_mut(..message.len()).ok_or(Full)?.copy_from_slice(message);
        self.waiting.push_back(Message { to, len: message.len(), bytes });
        Ok(())
    }

    pub(crate) fn pop(&mut self) -> Option<Message<E>> {
        self.waiting.pop_front()
    }
}

/// Longest message in bytes: a handshake initiation (WireGuard paper, 5.4.2).
pub(crate) const MESSAGE_MAX: usize = 148;
/// Most messages that wait.
const MESSAGES_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outbox_holds_as_many_messages_as_it_may_and_no_more() {
        let mut outbox = Outbox::new();
        for number in 0..MESSAGES_MAX {
            assert_eq!(outbox.push(number, b"message"), Ok(()));
        }
        assert_eq!(outbox.push(0, b"message"), Err(Full));
        let first = outbox.pop().unwrap();
        assert_eq!((first.to(), first.bytes()), (0, b"message".as_slice()));
        assert_eq!(outbox.push(0, b"message"), Ok(()));
    }

    #[test]
    fn outbox_takes_the_longest_message_and_none_longer() {
        let mut outbox = Outbox::new();
        assert_eq!(outbox.push((), &[1; MESSAGE_MAX]), Ok(()));
        assert_eq!(outbox.push((), &[1; MESSAGE_MAX + 1]), Err(Full));
    }
}
