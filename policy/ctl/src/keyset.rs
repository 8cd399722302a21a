//! `kontorctl keyset`.

use crate::{
    Exit, Failure,
    files::{self, FileError, PUBLIC, SECRET},
    keydir::{KeyDirError, MAX_KEY_FILES, first, keyset_name},
    say,
};
use clap::{Args, Subcommand};
use kontor_trust::{
    Digest, KeyError, Keyset, KeysetError, KeysetFault, KeysetKind, MAX_ENVELOPE, MAX_MEMBERS, Member,
    Person, Role, Roles, SecretKey, TrustedKeyset, sign,
};
use std::path::{Path, PathBuf};

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Found a tenant: make all keys and the first keyset. Prints the tenant.
    Init(Init),
    /// Check a chain of keysets and print the last.
    Inspect {
        /// The tenant that the first keyset must found.
        #[arg(long, value_name = "HEX")]
        tenant: Option<Digest>,
        /// The keysets in rising order, from version 1.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
}

/// How many keys each role has, each for a person of its own, and how many of them must sign.
#[derive(Args)]
pub(crate) struct Init {
    /// Directory to make; it may exist, but no file in it is overwritten.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Keys that make the next keyset.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = keys())]
    root_keys: u8,
    /// How many of their persons must sign.
    #[arg(long, value_name = "K", default_value_t = 2)]
    root_threshold: u8,
    /// Keys that sign bundles.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = keys())]
    policy_keys: u8,
    /// How many of their persons must sign.
    #[arg(long, value_name = "K", default_value_t = 1)]
    policy_threshold: u8,
    /// Keys that sign commands.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = keys())]
    command_keys: u8,
    /// How many of their persons must sign.
    #[arg(long, value_name = "K", default_value_t = 1)]
    command_threshold: u8,
    /// Keys that sign commands that destroy data.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = keys())]
    destroy_keys: u8,
    /// How many of their persons must sign.
    #[arg(long, value_name = "K", default_value_t = 2)]
    destroy_threshold: u8,
    /// Keys that sign device records.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = keys())]
    enrol_keys: u8,
    /// How many of their persons must sign.
    #[arg(long, value_name = "K", default_value_t = 1)]
    enrol_threshold: u8,
    /// SHA-256 of a further public key (SubjectPublicKeyInfo) that control's TLS may use, besides the one
    /// that is made.
    #[arg(long, value_name = "HEX")]
    control_spki: Vec<Digest>,
}

/// Why there is no keyset.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    #[error("make a key")]
    Key(#[source] KeyError),
    #[error("these numbers make no keyset")]
    Fault(#[source] KeysetFault),
    #[error("the new keyset does not verify")]
    Verify(#[source] KeysetError),
}

impl InitError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Key(_) => Exit::Lacks,
            Self::Fault(_) => Exit::Usage,
            Self::Verify(_) => Exit::NotVerified,
        }
    }
}

impl Verb {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self {
            Self::Init(init) => init.run(),
            Self::Inspect { tenant, files } => inspect(tenant.as_ref(), &files),
        }
    }
}

impl Init {
    fn run(self) -> Result<(), Failure> {
        let mut keys = Vec::new();
        let mut role = |name, number, threshold| Self::role(&mut keys, name, number, threshold);
        let root = role("root", self.root_keys, self.root_threshold)?;
        let roots = usize::from(self.root_keys);
        let roles = Roles {
            policy: role("policy", self.policy_keys, self.policy_threshold)?,
            command: role("command", self.command_keys, self.command_threshold)?,
            destroy: role("destroy", self.destroy_keys, self.destroy_threshold)?,
            enrol: role("enrol", self.enrol_keys, self.enrol_threshold)?,
            lease: role(LEASE, 1, 1)?,
        };
        // No role: nothing is signed with it, hosts know control by it.
        let control = SecretKey::generate().map_err(InitError::Key)?;
        let control_spki = std::iter::once(control.public().pin()).chain(self.control_spki).collect();
        keys.push((CONTROL.to_owned(), control));
        let keyset = Keyset { tenant: None, version: 1, root, roles, control_spki };
        keyset.check().map_err(InitError::Fault)?;
        let signers: Vec<&SecretKey> = keys.iter().take(roots).map(|(_, key)| key).collect();
        let envelope = sign::<KeysetKind>(&keyset.payload(), &signers);
        let trusted = TrustedKeyset::dangerous_unpinned(&envelope).map_err(InitError::Verify)?;

        // The keyset comes last: a directory that holds one holds all its keys.
        let keysets = self.out.join("keysets");
        let path = keysets.join(keyset_name(1));
        if path.exists() {
            return Err(FileError::Exists { path }.into());
        }
        files::directory(&keysets)?;
        for (name, key) in &keys {
            files::create(&self.out.join(format!("{name}.key")), key.to_pkcs8(), SECRET)?;
        }
        files::create(&self.out.join("id"), format!("{}\n", trusted.tenant()).as_bytes(), PUBLIC)?;
        files::create(&path, trusted.envelope(), PUBLIC)?;
        say(trusted.tenant())
    }

    /// Makes a role's keys, each for a person who is named after it.
    fn role(
        keys: &mut Vec<(String, SecretKey)>,
        name: &str,
        number: u8,
        threshold: u8,
    ) -> Result<Role, InitError> {
        let mut members = Vec::new();
        for n in 1..=number {
            let name = if name == LEASE { name.to_owned() } else { format!("{name}-{n}") };
            let key = SecretKey::generate().map_err(InitError::Key)?;
            let person: Person = name.parse().expect("role names and numbers are names of persons");
            members.push(Member { person, key: key.public() });
            keys.push((name, key));
        }
        Ok(Role { threshold: threshold.into(), keys: members })
    }
}

/// The role whose one key control holds.
const LEASE: &str = "lease";
/// Control's key for TLS.
const CONTROL: &str = "control";
const _: () = assert!(5 * MAX_MEMBERS + 2 <= MAX_KEY_FILES, "a new directory must be readable");

fn keys() -> clap::builder::RangedI64ValueParser<u8> {
    clap::value_parser!(u8).range(1..=MAX_MEMBERS as i64)
}

fn inspect(tenant: Option<&Digest>, paths: &[PathBuf]) -> Result<(), Failure> {
    let mut paths = paths.iter();
    // clap asks for at least one file.
    let Some(path) = paths.next() else { return Ok(()) };
    let mut newest = first(path, tenant)?;
    for path in paths {
        newest = advance(&newest, path)?;
    }
    let keyset = newest.keyset();
    say(format_args!("tenant   {}", newest.tenant()))?;
    say(format_args!("version  {}", newest.version()))?;
    say(format_args!("payload  {}", newest.hash()))?;
    let Roles { policy, command, destroy, enrol, lease } = &keyset.roles;
    let named = [
        ("root", &keyset.root),
        ("policy", policy),
        ("command", command),
        ("destroy", destroy),
        ("enrol", enrol),
        (LEASE, lease),
    ];
    for (name, role) in named {
        say(format_args!("{name:<8} {} of {} keys", role.threshold, role.keys.len()))?;
        for Member { person, key } in &role.keys {
            say(format_args!("         {key} {person}"))?;
        }
    }
    keyset.control_spki.iter().try_for_each(|pin| say(format_args!("control  {pin}")))
}

fn advance(newest: &TrustedKeyset, path: &Path) -> Result<TrustedKeyset, Failure> {
    let envelope = files::read(path, MAX_ENVELOPE)?;
    let advanced = newest.advance(&envelope);
    Ok(advanced.map_err(|source| KeyDirError::Keyset { path: path.to_owned(), source })?)
}
