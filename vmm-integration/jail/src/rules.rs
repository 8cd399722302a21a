//! Landlock: the second wall behind the empty root.

use crate::JailError;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use std::{io, path::PathBuf};

/// The newest interface that is asked for; an older kernel gives what it has.
const NEWEST: ABI = ABI::V6;

/// What stays allowed.
#[derive(Debug, Clone, Default)]
pub struct Grants {
    /// Files, and directories with all below them, that may be read.
    pub read: Vec<PathBuf>,
    /// Files that may be read and executed.
    pub execute: Vec<PathBuf>,
    /// Devices that may be read, written and asked.
    pub devices: Vec<PathBuf>,
}

/// Lets the calling thread open what `grants` names and nothing else, bind or reach no TCP port, and reach
/// no abstract socket and no process outside.
///
/// # Errors
/// [`JailError`] when a path is not there or the kernel has no Landlock.
pub fn restrict(grants: &Grants) -> Result<(), JailError> {
    let failed = |error: &dyn std::error::Error| JailError {
        doing: "restrict by Landlock".into(),
        source: io::Error::other(error.to_string()),
    };
    let read = BitFlags::from(AccessFs::ReadFile);
    let groups = [
        (&grants.read, read),
        (&grants.execute, read | AccessFs::Execute),
        (&grants.devices, read | AccessFs::WriteFile | AccessFs::IoctlDev),
    ];
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .map_err(|error| failed(&error))?;
    for (paths, access) in groups {
        for path in paths {
            let file = PathFd::new(path).map_err(|error| failed(&error))?;
            rules = rules.add_rule(PathBeneath::new(file, access)).map_err(|error| failed(&error))?;
        }
    }
    let status = rules.restrict_self().map_err(|error| failed(&error))?;
    if status.ruleset == RulesetStatus::NotEnforced {
        let source = io::Error::new(io::ErrorKind::Unsupported, "this kernel has no Landlock");
        return Err(JailError { doing: "restrict by Landlock".into(), source });
    }
    Ok(())
}
