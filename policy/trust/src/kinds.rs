//! The kinds of documents. A kind is a type without values; its payload type is under the signature,
//! so no document of one kind can be passed off as another.

use crate::keyset::{Role, Roles};

mod sealed {
    pub trait Sealed {}
}

/// A kind of signed document. The list is closed.
pub trait Kind: sealed::Sealed {
    /// Its name for people.
    const NAME: &'static str;
    /// Its DSSE payload type.
    const PAYLOAD_TYPE: &'static str;
}

/// A kind that a role of the keyset signs.
pub trait RoleKind: Kind {
    /// Which role.
    fn role(roles: &Roles) -> &Role;
}

macro_rules! kind {
    ($(#[$doc:meta])* $name:ident, $text:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {}

        impl sealed::Sealed for $name {}

        impl Kind for $name {
            const NAME: &'static str = $text;
            const PAYLOAD_TYPE: &'static str = concat!("application/vnd.kontor.", $text, "+json");
        }
    };
}

kind! {
    /// Who may sign what; signed by the root role.
    KeysetKind, "keyset"
}
kind! {
    /// An enrolled work VM; signed by the enrol role.
    DeviceKind, "device"
}
kind! {
    /// A boot's request for a lease; signed by the device's host key.
    RequestKind, "request"
}
kind! {
    /// What IT decides; signed by the policy role.
    BundleKind, "bundle"
}
kind! {
    /// The answer to a request; signed by the lease role.
    LeaseKind, "lease"
}

impl RoleKind for DeviceKind {
    fn role(roles: &Roles) -> &Role {
        &roles.enrol
    }
}

impl RoleKind for BundleKind {
    fn role(roles: &Roles) -> &Role {
        &roles.policy
    }
}

impl RoleKind for LeaseKind {
    fn role(roles: &Roles) -> &Role {
        &roles.lease
    }
}
