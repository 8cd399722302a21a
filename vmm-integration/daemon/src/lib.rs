//! What runs on the employee's PC besides the work VM itself: the service `kontord` and the employee's
//! command line `kontor`.
//!
//! ```text
//! kontor ──unix── verbs ── daemon ── vm ─┬─ qemu      (everything by inherited descriptor)
//!                                        ├─ relay     (the only wire)
//!                                        └─ lease ─── office
//! ```
//!
//! * [`session`] decides: one VM's life as a state machine over inputs and time, without any IO.
//! * [`vm`] acts: processes, channels and clocks around that machine, one owner and one queue.
//! * [`sleep`] notices that the host has slept, of which the guest is told.
//! * `fetch` asks the release repository, under TUF.
//! * [`slots`] and [`store`] keep what is on disk, and believe none of it without a check.
//! * [`lease`] turns a guest's challenge into a signed request, and an answer into a checked lease.
//!
//! Trusted are the files below the state directory as far as they verify, and the employee's own uid on
//! the socket. Not trusted: the guest, QEMU, the office's answers.

pub mod config;
mod console;
pub mod control_group;
pub mod daemon;
mod doctor;
pub mod exit;
mod fetch;
#[cfg(test)]
#[expect(dead_code, reason = "the programs' tests use all of it")]
#[path = "../tests/tenant/mod.rs"]
mod fixture;
pub mod host;
mod jail;
pub mod lease;
mod lines;
mod links;
pub mod office;
mod probe;
pub mod qemu;
mod qmp;
mod relay;
pub mod session;
pub mod sleep;
pub mod slots;
pub mod status;
pub mod store;
mod sys;
mod tail;
pub mod tap;
pub mod verbs;
pub mod vm;
