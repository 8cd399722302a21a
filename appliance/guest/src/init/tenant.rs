//! Whose work VM this is: the second segment of the initrd, hashed in the signed manifest.
//!
//! `/tenant/id` holds the tenant in hex; `/tenant/keyset-00000001.json` and so on its keysets. The
//! newest of them is the floor from which every later chain is followed.

use kontor_release::MAX_SEGMENT_KEYSETS;
use kontor_trust::{Digest, KeysetError, MAX_ENVELOPE, TrustedKeyset};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Where the initrd holds it.
pub(crate) const DIRECTORY: &str = "/tenant";
/// Bytes of `/tenant/id`: 64 digits and a newline.
const ID_LEN: usize = 65;

/// Why there is no tenant to believe in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TenantError {
    #[error("read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} has more than {limit} bytes")]
    TooLong { path: PathBuf, limit: usize },
    #[error("{DIRECTORY}/id is no tenant")]
    Id,
    #[error("{DIRECTORY} holds more than {MAX_SEGMENT_KEYSETS} keysets")]
    TooMany,
    #[error("{DIRECTORY} holds {0:?}, which does not belong there")]
    Stranger(PathBuf),
    #[error("keyset {version} of the image")]
    Keyset { version: usize, source: KeysetError },
}

/// Reads and verifies the whole chain.
pub(crate) fn load(directory: &Path) -> Result<TrustedKeyset, TenantError> {
    let tenant = parse_id(&read(&directory.join("id"), ID_LEN)?)?;
    let count = count(directory)?;
    let keyset = |version: usize| read(&directory.join(keyset_name(version)), MAX_ENVELOPE);
    let refused = |version| move |source| TenantError::Keyset { version, source };
    let mut newest = TrustedKeyset::first(&keyset(1)?, &tenant).map_err(refused(1))?;
    for version in 2..=count {
        newest = newest.advance(&keyset(version)?).map_err(refused(version))?;
    }
    Ok(newest)
}

/// How many keysets there are. Their names follow from their number, so that a gap shows when they are read.
fn count(directory: &Path) -> Result<usize, TenantError> {
    let failed = |source| TenantError::Read { path: directory.to_owned(), source };
    let mut count = 0;
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        match name.to_str() {
            Some("id") => {}
            Some(text) if text.starts_with("keyset-") => count += 1,
            Some(_) | None => return Err(TenantError::Stranger(name.into())),
        }
        if count > MAX_SEGMENT_KEYSETS {
            return Err(TenantError::TooMany);
        }
    }
    Ok(count)
}

fn keyset_name(version: usize) -> String {
    format!("keyset-{version:08}.json")
}

fn parse_id(bytes: &[u8]) -> Result<Digest, TenantError> {
    let text = std::str::from_utf8(bytes).ok().and_then(|text| text.strip_suffix('\n'));
    text.and_then(|text| text.parse().ok()).ok_or(TenantError::Id)
}

fn read(path: &Path, limit: usize) -> Result<Vec<u8>, TenantError> {
    let failed = |source| TenantError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    let most = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    file.take(most).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > limit { Err(TenantError::TooLong { path: path.to_owned(), limit }) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::fixture::Office;
    use std::fs::write;

    fn segment(office: &Office, keysets: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path().join("id"), format!("{}\n", office.tenant)).unwrap();
        for (name, envelope) in keysets {
            write(directory.path().join(name), envelope).unwrap();
        }
        directory
    }

    #[test]
    fn newest_keyset_of_the_chain_is_the_floor() {
        let office = Office::new();
        let first = ("keyset-00000001.json", office.keyset.clone());
        let one = segment(&office, std::slice::from_ref(&first));
        assert_eq!(load(one.path()).unwrap().version(), 1);
        let two = segment(&office, &[first, ("keyset-00000002.json", office.second_keyset())]);
        let floor = load(two.path()).unwrap();
        assert_eq!((floor.version(), floor.tenant()), (2, office.tenant));
    }

    #[test]
    fn keyset_of_another_tenant_is_refused() {
        let (office, other) = (Office::new(), Office::new());
        let directory = segment(&office, &[("keyset-00000001.json", other.keyset)]);
        assert!(matches!(load(directory.path()), Err(TenantError::Keyset { version: 1, .. })));
    }

    #[test]
    fn link_that_another_root_signed_is_refused() {
        let (office, other) = (Office::new(), Office::new());
        let keysets = [
            ("keyset-00000001.json", office.keyset.clone()),
            ("keyset-00000002.json", other.second_keyset()),
        ];
        let directory = segment(&office, &keysets);
        assert!(matches!(load(directory.path()), Err(TenantError::Keyset { version: 2, .. })));
    }

    #[test]
    fn gap_in_the_chain_is_noticed() {
        let office = Office::new();
        let keysets = [
            ("keyset-00000001.json", office.keyset.clone()),
            ("keyset-00000003.json", office.second_keyset()),
        ];
        assert!(matches!(load(segment(&office, &keysets).path()), Err(TenantError::Read { .. })));
    }

    #[test]
    fn missing_or_malformed_tenant_is_refused() {
        let office = Office::new();
        let directory = segment(&office, &[("keyset-00000001.json", office.keyset.clone())]);
        for id in ["", "abc\n", &office.tenant.to_string(), &format!("{}\n", "g".repeat(64))] {
            write(directory.path().join("id"), id).unwrap();
            assert!(matches!(load(directory.path()), Err(TenantError::Id)), "{id:?}");
        }
        write(directory.path().join("id"), "a".repeat(ID_LEN + 1)).unwrap();
        assert!(matches!(load(directory.path()), Err(TenantError::TooLong { .. })));
        std::fs::remove_file(directory.path().join("id")).unwrap();
        assert!(matches!(load(directory.path()), Err(TenantError::Read { .. })));
    }

    #[test]
    fn file_that_does_not_belong_there_is_refused() {
        let office = Office::new();
        let keysets = [("keyset-00000001.json", office.keyset.clone()), ("notes", Vec::new())];
        assert!(matches!(load(segment(&office, &keysets).path()), Err(TenantError::Stranger(_))));
    }

    #[test]
    fn as_many_keysets_as_allowed_are_counted_and_one_more_is_refused() {
        let office = Office::new();
        let directory = segment(&office, &[]);
        for version in 1..=MAX_SEGMENT_KEYSETS {
            write(directory.path().join(keyset_name(version)), b"").unwrap();
        }
        assert_eq!(count(directory.path()).unwrap(), MAX_SEGMENT_KEYSETS);
        write(directory.path().join(keyset_name(MAX_SEGMENT_KEYSETS + 1)), b"").unwrap();
        assert!(matches!(count(directory.path()), Err(TenantError::TooMany)));
    }
}
