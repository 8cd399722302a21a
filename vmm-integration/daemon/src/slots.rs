//! The places where releases lie, and how one is made ready for a start.
//!
//! Installing fetches a release into `A.new`, hashing what was written, and exchanges it with `A` once
//! everything is flushed: a crash or a full disk leaves the old release or the new one. The slot keeps the
//! repository's metadata in `tuf`, as received. A start verifies again, from the pinned root on: every
//! signature and hash down to the manifest, without a network, and whatever the clock says. Then kernel and
//! initrd are copied into memory files that are sealed first and hashed then, so that what was hashed is what
//! QEMU reads. The root image was hashed at installing; while the guest runs dm-verity checks it block by block
//! against the root hash on the verified command line.

use crate::{
    exit::Exit,
    fetch::{FetchError, Offer, clock_is_not_behind, store_exit},
    host::unix_now,
    store::{Store, StoreError, io_error, is_full, not_older, read, sync_parent},
};
use kontor_release::{Digest, MAX_MANIFEST, Manifest, ManifestError, Piece};
use kontor_repository::{MANIFEST_SUFFIX, MAX_ROLE, Metadata, MetadataError, Target, gather, verify};
use rustix::{
    fs::{MemfdFlags, RenameFlags, SealFlags, fcntl_add_seals, memfd_create, renameat_with},
    io::Errno,
};
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Name of the description in a release directory.
pub const MANIFEST: &str = "manifest.json";
/// Most bytes of kernel, initrd and segment, which are held in memory.
pub const MAX_BOOT_PIECE: u64 = 256 << 20;
/// The kernel reads an initrd that follows another at a multiple of this.
const INITRD_ALIGN: u64 = 4;
const COPY_CHUNK: usize = 256 * 1024;
const SLOT: &str = "A";
/// A piece on its way from the installed slot.
const COPY: &str = "copy";
/// Directory in a slot with the repository's metadata.
pub const TUF: &str = "tuf";

/// Why a release is not installed or not started.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// No release is installed.
    #[error("no release is installed")]
    Empty,
    /// The state directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The repository, or what it offers.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The metadata that vouches for it.
    #[error("the release's metadata")]
    Metadata(#[source] MetadataError),
    /// The description.
    #[error("the release's {MANIFEST}")]
    Manifest(#[source] ManifestError),
    /// A release of another tenant.
    #[error("the release is for another tenant")]
    OtherTenant,
    /// A piece cannot be read or written.
    #[error("{doing} the release's {piece}")]
    Piece {
        /// What was being done.
        doing: &'static str,
        /// Which piece.
        piece: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A piece is no regular file.
    #[error("the release's {0} is no file")]
    NoFile(String),
    /// A piece has another length than the manifest says.
    #[error("the release's {piece} has {found} bytes, its manifest says {expected}")]
    Length {
        /// Which piece.
        piece: String,
        /// What the manifest says.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// A piece has another content than the manifest says.
    #[error("the release's {0} is not what its manifest says: a byte of it was changed")]
    Hash(String),
    /// A piece that is held in memory is longer than [`MAX_BOOT_PIECE`].
    #[error("the release's {piece} has {bytes} bytes, at most {MAX_BOOT_PIECE} are started")]
    TooLarge {
        /// Which piece.
        piece: String,
        /// Its length.
        bytes: u64,
    },
    /// Another release was installed at the same moment.
    #[error("another release was installed just now; start again")]
    Changed,
    /// No memory for a sealed copy.
    #[error("make a sealed copy of the release's {piece}")]
    Seal {
        /// Of which piece.
        piece: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl SlotError {
    /// The exit code that goes with it.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Store(error) => store_exit(error),
            Self::Fetch(error) => error.exit(),
            Self::Piece { source, .. } if is_full(source) => Exit::HostLacks,
            Self::Empty => Exit::HostLacks,
            Self::Changed | Self::Seal { .. } => Exit::Failed,
            Self::Metadata(_)
            | Self::Manifest(_)
            | Self::OtherTenant
            | Self::Piece { .. }
            | Self::NoFile(_)
            | Self::Length { .. }
            | Self::Hash(_)
            | Self::TooLarge { .. } => Exit::NotVerified,
        }
    }
}

/// A verified release, ready for one start.
#[derive(Debug)]
pub struct Ready {
    /// What it is.
    pub manifest: Manifest,
    /// The kernel, in sealed memory.
    pub kernel: File,
    /// Initrd and tenant segment, in sealed memory.
    pub initrd: File,
    /// The root image, open for reading.
    pub root: File,
}

/// Fetches the tenant's newest release from the repository at `place`, verifies and installs it. `pin` is
/// the hash of the repository's first root.
///
/// # Errors
/// [`SlotError`] names the piece and what is wrong; what was installed before stays.
pub fn install(store: &Store, pin: &Digest, place: &str) -> Result<Manifest, SlotError> {
    let _installing = store.lock_slots()?;
    let (slot, beside) = (store.slots().join(SLOT), store.slots().join(format!("{SLOT}.new")));
    let known = metadata(&slot).map(|metadata| metadata.roots).unwrap_or_default();
    let offer = Offer::newest(store, pin, place, known)?;
    let manifest = parse(store, &offer.manifest_bytes)?;
    // One that is damaged is about to be replaced, and says nothing.
    let installed = describe(store, pin).map_or(0, |manifest| manifest.image.built_at);
    clock_is_not_behind(unix_now(), manifest.image.built_at.max(installed))?;
    // So that an office whose control was stolen has another way to its PCs.
    let keysets = offer.keysets_after(store.memory()?.keyset_version)?;
    if !store.adopt(&keysets)? {
        tracing::warn!("the newest keyset disowns what is stored: it comes with the next lease");
    }

    clear(&beside)?;
    let written = write(&offer, &slot, &beside);
    if written.is_err() {
        // What does not fit must not stay and keep the disk full.
        clear(&beside)?;
    }
    written?;
    put(&beside, &slot).map_err(io_error("put in place", &slot))?;
    store.remember_release(manifest.version)?;
    clear(&beside)?;
    Ok(manifest)
}

/// Writes a whole slot into the directory `to`, with what `installed` has of it already.
fn write(offer: &Offer, installed: &Path, to: &Path) -> Result<(), SlotError> {
    let (arriving, tuf) = (to.join("arriving"), to.join(TUF));
    for dir in [to, &arriving, &tuf] {
        DirBuilder::new().mode(0o700).create(dir).map_err(io_error("make", dir))?;
    }
    for piece in offer.manifest.pieces() {
        offer.lists(piece)?;
        let arrived = match copied(piece, installed, &arriving) {
            Some(arrived) => arrived,
            None => offer.fetch(piece, &arriving)?,
        };
        settle(piece, &arrived, to)?;
    }
    clear(&arriving)?;
    write_new(MANIFEST, &offer.manifest_bytes, to)?;
    for (name, bytes) in offer.metadata_files() {
        write_new(&name, bytes, &tuf)?;
    }
    for dir in [&tuf, to] {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error("flush", dir))?;
    }
    Ok(())
}

/// Verifies the installed release and makes it ready for a start.
///
/// # Errors
/// [`SlotError`] names the piece and what is wrong.
pub fn open(store: &Store, pin: &Digest) -> Result<Ready, SlotError> {
    let slot = store.slots().join(SLOT);
    let manifest = describe(store, pin)?;
    let image = &manifest.image;
    let kernel = sealed("kernel", &slot, &[&image.kernel])?;
    let initrd = sealed("initrd", &slot, &[&image.initrd, &manifest.segment])?;
    let root = open_piece(&image.root, &slot)?;
    Ok(Ready { kernel, initrd, root, manifest })
}

/// The description of the installed release, its signatures verified from the root with the hash `pin` on;
/// its pieces are not looked at.
///
/// # Errors
/// [`SlotError`] when there is none, or it is not signed as it must be, or not for this tenant, or older
/// than one that was seen.
pub fn describe(store: &Store, pin: &Digest) -> Result<Manifest, SlotError> {
    let slot = store.slots().join(SLOT);
    let untrusted = match read(&slot.join(MANIFEST), MAX_MANIFEST as u64) {
        Ok(untrusted) => untrusted,
        Err(error) if error.is_missing() => return Err(SlotError::Empty),
        Err(error) => return Err(error.into()),
    };
    let verified = verify(&metadata(&slot)?, pin).map_err(SlotError::Metadata)?;
    let found = Target { bytes: untrusted.len() as u64, sha256: Digest::of(&untrusted) };
    if !verified.targets().any(|(name, target)| name.ends_with(MANIFEST_SUFFIX) && target == found) {
        return Err(SlotError::Hash(MANIFEST.into()));
    }
    parse(store, &untrusted)
}

/// The metadata in a slot, not verified.
fn metadata(slot: &Path) -> Result<Metadata, StoreError> {
    gather(|name| match read(&slot.join(TUF).join(name), MAX_ROLE as u64) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => Err(error),
    })
}

/// Hashes every piece of the installed release.
///
/// # Errors
/// [`SlotError`] names the piece that is wrong.
pub fn verify_all(store: &Store, pin: &Digest) -> Result<Manifest, SlotError> {
    let slot = store.slots().join(SLOT);
    let manifest = describe(store, pin)?;
    for piece in manifest.pieces() {
        let file = open_piece(piece, &slot)?;
        let found = hash(file, piece.bytes).map_err(piece_error("read", &piece.name))?;
        same_hash(piece, found)?;
    }
    Ok(manifest)
}

fn parse(store: &Store, untrusted: &[u8]) -> Result<Manifest, SlotError> {
    let manifest = Manifest::parse(untrusted).map_err(SlotError::Manifest)?;
    if manifest.tenant != store.tenant() {
        return Err(SlotError::OtherTenant);
    }
    not_older("release", manifest.version, store.memory()?.manifest_version)?;
    Ok(manifest)
}

/// Moves a piece that arrived into the directory `to`, and hashes what is on the disk.
fn settle(piece: &Piece, arrived: &Path, to: &Path) -> Result<(), SlotError> {
    let failed = || piece_error("store", &piece.name);
    let cwd = rustix::fs::CWD;
    // Never over an existing file: two pieces of one name are one too many.
    let moved = renameat_with(cwd, arrived, cwd, to.join(&piece.name), RenameFlags::NOREPLACE);
    moved.map_err(io::Error::from).map_err(failed())?;
    let file = open_piece(piece, to)?;
    file.sync_all().map_err(failed())?;
    let found = hash(&file, piece.bytes).map_err(failed())?;
    same_hash(piece, found)
}

/// Copies a piece from the slot `installed` into the directory `to`, if it is there under the same name and has the
/// same content. Whatever hinders it, a damaged slot or a full disk, the piece can still be fetched, and the
/// copy is hashed again when it is put in its place.
fn copied(piece: &Piece, installed: &Path, to: &Path) -> Option<PathBuf> {
    let mut from = open_piece(piece, installed).ok()?;
    if hash(&from, piece.bytes).ok()? != piece.sha256 {
        return None;
    }
    from.rewind().ok()?;
    let path = to.join(COPY);
    match File::create(&path).and_then(|mut copy| io::copy(&mut from, &mut copy)) {
        Ok(count) if count == piece.bytes => Some(path),
        Ok(_) | Err(_) => {
            // Its room may be needed.
            let _ = fs::remove_file(&path);
            None
        }
    }
}

/// Writes a small file into the directory `to`, where none of this name may be.
fn write_new(name: &str, bytes: &[u8], to: &Path) -> Result<(), SlotError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to.join(name))?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(piece_error("store", name))
}

/// Puts the directory `new` where `slot` is, in one step.
fn put(new: &Path, slot: &Path) -> io::Result<()> {
    let cwd = rustix::fs::CWD;
    match renameat_with(cwd, new, cwd, slot, RenameFlags::EXCHANGE) {
        Err(Errno::NOENT) => fs::rename(new, slot)?,
        other => other?,
    }
    sync_parent(slot)
}

fn clear(dir: &Path) -> Result<(), SlotError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", dir)(error).into()),
        _ => Ok(()),
    }
}

/// A piece of the right length, open for reading. A link in its place is not followed.
fn open_piece(piece: &Piece, dir: &Path) -> Result<File, SlotError> {
    let failed = || piece_error("open", &piece.name);
    let no_links = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let path = dir.join(&piece.name);
    let file = OpenOptions::new().read(true).custom_flags(no_links).open(path).map_err(failed())?;
    let metadata = file.metadata().map_err(failed())?;
    if !metadata.is_file() {
        return Err(SlotError::NoFile(piece.name.clone()));
    }
    if metadata.len() != piece.bytes {
        let (expected, found) = (piece.bytes, metadata.len());
        return Err(SlotError::Length { piece: piece.name.clone(), expected, found });
    }
    Ok(file)
}

/// The pieces one behind the other, each at a multiple of [`INITRD_ALIGN`], in memory that nobody can
/// change any more; hashed from there.
fn sealed(name: &'static str, slot: &Path, pieces: &[&Piece]) -> Result<File, SlotError> {
    let failed = |source: io::Error| SlotError::Seal { piece: name, source };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut memory = File::from(memfd_create(name, flags).map_err(|errno| failed(errno.into()))?);
    let mut starts = Vec::with_capacity(pieces.len());
    for piece in pieces {
        if piece.bytes > MAX_BOOT_PIECE {
            return Err(SlotError::TooLarge { piece: piece.name.clone(), bytes: piece.bytes });
        }
        let start = memory.stream_position().map_err(failed)?.next_multiple_of(INITRD_ALIGN);
        memory.seek(io::SeekFrom::Start(start)).map_err(failed)?;
        starts.push(start);
        let file = open_piece(piece, slot)?;
        io::copy(&mut file.take(piece.bytes), &mut memory).map_err(piece_error("read", &piece.name))?;
    }
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    fcntl_add_seals(&memory, seals).map_err(|errno| failed(errno.into()))?;
    for (piece, start) in pieces.iter().zip(starts) {
        memory.seek(io::SeekFrom::Start(start)).map_err(failed)?;
        same_hash(piece, hash(&memory, piece.bytes).map_err(failed)?)?;
    }
    memory.rewind().map_err(failed)?;
    Ok(memory)
}

/// SHA-256 of the next `bytes` bytes, or of what there is of them.
fn hash(from: impl Read, bytes: u64) -> io::Result<Digest> {
    let mut from = from.take(bytes);
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let mut chunk = vec![0; COPY_CHUNK];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(Digest::finish(context.finish())),
            Ok(count) => context.update(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn same_hash(piece: &Piece, found: Digest) -> Result<(), SlotError> {
    if found == piece.sha256 { Ok(()) } else { Err(SlotError::Hash(piece.name.clone())) }
}

fn piece_error(doing: &'static str, piece: &str) -> impl FnOnce(io::Error) -> SlotError {
    move |source| SlotError::Piece { doing, piece: piece.into(), source }
}

/// Where a slot's pieces lie.
#[must_use]
pub fn slot_dir(store: &Store) -> PathBuf {
    store.slots().join(SLOT)
}

#[cfg(test)]
mod tests;
