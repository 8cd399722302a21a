//! What of the gateway stands on its own: the configuration socket that wg(8) speaks to.
#![deny(missing_docs)]

pub mod uapi;
