//! Giving up every capability for good.

use crate::JailError;
use rustix::thread::{
    CapabilitiesSecureBits as Bits, CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits,
};

/// Empties every set of the calling thread and locks them, also against what an exec by uid 0 would give.
///
/// # Errors
/// [`JailError`] when the kernel refuses.
pub fn drop_all() -> Result<(), JailError> {
    clear_ambient_capability_set().map_err(JailError::at("clear ambient capabilities"))?;
    for capability in CapabilitySet::all().iter() {
        // Capabilities that this kernel does not know are not there to be dropped.
        match remove_capability_from_bounding_set(capability) {
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(JailError::at("empty the bounding set")(error)),
        }
    }
    let locked = Bits::NO_ROOT
        | Bits::NO_ROOT_LOCKED
        | Bits::NO_SETUID_FIXUP
        | Bits::NO_SETUID_FIXUP_LOCKED
        | Bits::KEEP_CAPS_LOCKED
        | Bits::NO_CAP_AMBIENT_RAISE
        | Bits::NO_CAP_AMBIENT_RAISE_LOCKED;
    set_capabilities_secure_bits(locked).map_err(JailError::at("lock capabilities"))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(JailError::at("drop capabilities"))
}
