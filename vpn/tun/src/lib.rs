//! TUN interfaces: being written.
