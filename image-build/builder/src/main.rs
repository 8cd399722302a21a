//! `kontor-image`: makes the work VM's image out of locked packages and this source tree, the same
//! bits for the same lock and compiler.

mod apt;
mod assemble;
mod bench;
mod build;
mod cache;
mod command;
mod compare;
mod cpio;
mod date;
mod deb822;
mod exit;
mod fetch;
mod files;
mod guest;
mod host;
mod initrd;
mod inspect;
mod kernel;
mod lock;
mod lock_verb;
mod modules;
mod out;
mod profile;
mod progress;
mod publish;
mod repository;
mod root_image;
mod rootfs;
mod sbom;
mod sign;
mod staging;
mod tar;
mod tools;
mod unpack;
mod verity;

use clap::{Args, Parser, Subcommand};
use exit::Exit;
use kontor_manual::Section;
use kontor_trust::PublicKey;
use profile::{Profile, Source};
use progress::Progress;
use std::{
    io::Write,
    num::NonZeroU64,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Builds the work VM's image from a locked package list.
#[derive(Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Ask the archives which packages a profile takes today, and write down every one by hash
    Lock {
        #[command(flatten)]
        recipe: Recipe,
        /// Where to write the lock [default: the one in the source tree]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Print the lock as JSON
        #[arg(long)]
        json: bool,
    },
    /// Build an image that belongs to no tenant yet
    Build {
        #[command(flatten)]
        recipe: Recipe,
        /// The lock to build from [default: the one in the source tree]
        #[arg(long, value_name = "FILE")]
        lock: Option<PathBuf>,
        /// Where to put the image; an older image there is replaced in one step
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Whether the host's compiler and tools must be those that the lock names
        #[arg(long, value_enum, default_value = "any")]
        host_programs: build::HostPrograms,
        /// Print the image's description as JSON
        #[arg(long)]
        json: bool,
    },
    /// Write what benchmarks boot: the kernel, and initrds that measure; no image
    #[command(hide = true)]
    Bench {
        #[command(flatten)]
        recipe: Recipe,
        /// The lock to take the kernel from [default: the one in the source tree]
        #[arg(long, value_name = "FILE")]
        lock: Option<PathBuf>,
        /// Where to put them; older ones there are overwritten
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Make an image a tenant's release: adds the tenant's keysets and the manifest
    Sign {
        /// An image that `build` made
        #[arg(long, value_name = "DIR")]
        image: PathBuf,
        /// A directory with the tenant's `id` and `keysets/*.json`
        #[arg(long, value_name = "DIR")]
        tenant_dir: PathBuf,
        /// The release's version, higher than that of every release before
        #[arg(long, value_name = "N")]
        version: NonZeroU64,
        /// Where to put the release
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Print the manifest as JSON
        #[arg(long)]
        json: bool,
    },
    /// Make the keys of a tenant's release repository, and the repository with its first root
    TufInit {
        /// Where to put the keys: three root keys, two for releases, snapshot and timestamp. Give each to
        /// its own person or machine
        #[arg(long, value_name = "DIR")]
        keys: PathBuf,
        /// Where to put the repository
        #[arg(long, value_name = "DIR")]
        repo: PathBuf,
        /// Life of the root in days
        #[arg(long, value_name = "DAYS", default_value_t = 365)]
        expires: u32,
        /// Print the root's hash as JSON
        #[arg(long)]
        json: bool,
    },
    /// Add a release to the repository; it waits there where a signature is missing
    Publish(Publication),
    /// Sign what waits in the repository, if one's own build of it has the same digests
    Cosign(Publication),
    /// Make the published releases fetchable for longer: signs snapshot and timestamp anew, daily
    Refresh {
        /// The repository
        #[arg(long, value_name = "DIR")]
        repo: PathBuf,
        /// The keys of snapshot and timestamp: files, or directories with them
        #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
        keys: Vec<PathBuf>,
        /// Life of snapshot and timestamp in days
        #[arg(long, value_name = "DAYS", default_value_t = 7)]
        fresh: u32,
        /// Print the outcome as JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a key for one of the repository's roles, and print its public half
    TufKey {
        /// File to make, readable by its owner only
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Print the public half as JSON
        #[arg(long)]
        json: bool,
    },
    /// Make the repository's next root, or sign the one that waits; a role that is not named keeps its keys
    TufRoot {
        /// The repository
        #[arg(long, value_name = "DIR")]
        repo: PathBuf,
        /// Secret root keys, of the root before and of the new one: files, or directories with them
        #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
        keys: Vec<PathBuf>,
        /// All root keys from now on, each by its public half
        #[arg(long, value_name = "KEY", num_args = 1..)]
        root: Vec<PublicKey>,
        /// All keys that vouch for releases from now on, each by its public half
        #[arg(long, value_name = "KEY", num_args = 1..)]
        targets: Vec<PublicKey>,
        /// The snapshot's key from now on, by its public half
        #[arg(long, value_name = "KEY")]
        snapshot: Option<PublicKey>,
        /// The timestamp's key from now on, by its public half
        #[arg(long, value_name = "KEY")]
        timestamp: Option<PublicKey>,
        /// Life of the root in days
        #[arg(long, value_name = "DAYS", default_value_t = 365)]
        expires: u32,
        /// Print the outcome as JSON
        #[arg(long)]
        json: bool,
    },
    /// Say what an image or a release is, and check every file of it
    Inspect {
        dir: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write the files of an image's root and its initrd's archive to a new directory, to look at them
    Unpack {
        #[command(flatten)]
        recipe: Recipe,
        /// An image that `build` made
        #[arg(long, value_name = "DIR")]
        image: PathBuf,
        /// Where to put them
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Compare two images bit for bit
    Compare {
        first: PathBuf,
        second: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// A release, where it goes, and who signs.
#[derive(Args)]
struct Publication {
    /// A release that `sign` made
    #[arg(long, value_name = "DIR")]
    release: PathBuf,
    /// A directory with the tenant's `id` and `keysets/*.json`
    #[arg(long, value_name = "DIR")]
    tenant_dir: PathBuf,
    /// The repository
    #[arg(long, value_name = "DIR")]
    repo: PathBuf,
    /// Key files, or directories with them
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    keys: Vec<PathBuf>,
    /// Life of the list of targets in days
    #[arg(long, value_name = "DAYS", default_value_t = 90)]
    expires: u32,
    /// Life of snapshot and timestamp in days
    #[arg(long, value_name = "DAYS", default_value_t = 7)]
    fresh: u32,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

/// What is built, and from where.
#[derive(Args)]
struct Recipe {
    /// A profile's name in the source tree, or a path to one
    #[arg(long, value_name = "PROFILE")]
    profile: String,
    /// The source tree [default: the one around the working directory]
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,
    /// A mirror, for the archive with this label [default label: Debian; default: what apt here uses]
    #[arg(long, value_name = "[LABEL=]URL")]
    mirror: Vec<String>,
}

/// Why a verb could not do its work; each kind of error says it in its own module.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Apt(#[from] apt::AptError),
    #[error(transparent)]
    Assemble(#[from] assemble::AssembleError),
    #[error(transparent)]
    Fetch(#[from] fetch::FetchError),
    #[error(transparent)]
    File(#[from] files::FileError),
    #[error(transparent)]
    Guest(#[from] guest::GuestError),
    #[error(transparent)]
    Host(#[from] host::HostError),
    #[error(transparent)]
    Initrd(#[from] initrd::InitrdError),
    #[error(transparent)]
    Inspect(#[from] inspect::InspectError),
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    #[error(transparent)]
    Lock(#[from] lock::LockError),
    #[error(transparent)]
    Profile(#[from] profile::ProfileError),
    #[error(transparent)]
    Publish(#[from] publish::PublishError),
    #[error(transparent)]
    Root(#[from] rootfs::RootError),
    #[error(transparent)]
    RootImage(#[from] root_image::RootImageError),
    #[error(transparent)]
    Sbom(#[from] sbom::SbomError),
    #[error(transparent)]
    Sign(#[from] sign::SignError),
    #[error(transparent)]
    Tools(#[from] tools::ToolsError),
    #[error("{0} is there and is no image or release: name another place, or remove it yourself")]
    NotAResult(PathBuf),
    #[error(
        "this host has other programs than the lock names: {0}; install those, or leave out --host-programs locked"
    )]
    OtherHost(String),
}

impl Failure {
    fn exit(&self) -> Exit {
        match self {
            Self::Apt(error) => error.exit(),
            Self::Assemble(assemble::AssembleError::File(error)) | Self::File(error) => error.exit(),
            Self::Assemble(_) => Exit::Usage,
            Self::Fetch(error) => error.exit(),
            Self::Guest(error) => error.exit(),
            Self::Host(error) => error.exit(),
            Self::Initrd(error) => error.exit(),
            Self::Inspect(error) => error.exit(),
            Self::Kernel(error) => error.exit(),
            Self::Lock(error) => error.exit(),
            Self::Profile(error) => error.exit(),
            Self::Publish(error) => error.exit(),
            Self::Root(error) => error.exit(),
            Self::RootImage(error) => error.exit(),
            Self::Sbom(error) => error.exit(),
            Self::Sign(error) => error.exit(),
            Self::Tools(error) => error.exit(),
            Self::NotAResult(_) => Exit::Usage,
            Self::OtherHost(_) => Exit::HostLacks,
        }
    }
}

fn main() -> ExitCode {
    // The modes of everything made here are the image's business, not the caller's.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let cli: Cli = kontor_manual::parse(env!("CARGO_BIN_NAME"), Section::Commands);
    let exit = match run(cli.verb) {
        Ok(exit) => exit,
        Err(failure) => {
            report(&failure);
            failure.exit()
        }
    };
    exit.into()
}

fn run(verb: Verb) -> Result<Exit, Failure> {
    let progress = Progress::new();
    match verb {
        Verb::Lock { recipe, out, json } => {
            let (source, profile) = recipe.find()?;
            let out = out.unwrap_or_else(|| source.lock_of(&profile));
            let mirrors = apt::Mirrors::named(&recipe.mirror)?;
            let lock = lock_verb::lock(&source, &profile, mirrors, &out, &progress)?;
            let text = format!(
                "{}: {} packages in the tree, kernel {}, {} for tools, of {}\n",
                out.display(),
                lock.root.len(),
                lock.kernel.version,
                lock.tool.len(),
                date::iso8601(lock.built_at)
            );
            answer(json.then_some(&lock), &text)?;
        }
        Verb::Build { recipe, lock, out, host_programs, json } => {
            let (source, profile) = recipe.find()?;
            let lock = lock.unwrap_or_else(|| source.lock_of(&profile));
            let mirrors = apt::Mirrors::named(&recipe.mirror)?;
            let (source, profile) = (&source, &profile);
            let request = build::Request { source, profile, lock: &lock, mirrors, host_programs, out: &out };
            let image = build::build(&request, &progress)?;
            let total: u64 = image.pieces().map(|piece| piece.bytes).sum();
            let megabytes = total.div_ceil(1_000_000);
            let text = format!(
                "{}: {}, {megabytes} MB, root hash {}\n",
                out.display(),
                image.release,
                image.verity.root_hash
            );
            answer(json.then_some(&image), &text)?;
        }
        Verb::Bench { recipe, lock, out } => {
            let (source, profile) = recipe.find()?;
            let lock = lock.unwrap_or_else(|| source.lock_of(&profile));
            let mirrors = apt::Mirrors::named(&recipe.mirror)?;
            bench::make(&source, &profile, &lock, &mirrors, &out, &progress)?;
        }
        Verb::Sign { image, tenant_dir, version, out, json } => {
            let manifest = sign::sign(&image, &tenant_dir, version.get(), &out)?;
            let text = format!(
                "{}: {} as version {} of tenant {}\n",
                out.display(),
                manifest.image.release,
                manifest.version,
                manifest.tenant
            );
            answer(json.then_some(&manifest), &text)?;
        }
        Verb::TufInit { keys, repo, expires, json } => {
            let root = publish::init(&keys, &repo, expires)?;
            answer(json.then_some(&root), &format!("{root}\n"))?;
        }
        Verb::Publish(publication) => publication.run(publish::publish)?,
        Verb::Cosign(publication) => publication.run(publish::cosign)?,
        Verb::Refresh { repo, keys, fresh, json } => {
            let outcome = publish::refresh(&repo, &keys, fresh)?;
            answer(json.then_some(&outcome), &outcome.to_string())?;
        }
        Verb::TufKey { out, json } => {
            let public = publish::key(&out)?;
            answer(json.then_some(&public), &format!("{public}\n"))?;
        }
        Verb::TufRoot { repo, keys, root, targets, snapshot, timestamp, expires, json } => {
            let (repository, days) = (repo.as_path(), expires);
            let keys = &keys;
            let request = publish::RootRequest { repository, keys, root, targets, snapshot, timestamp, days };
            let outcome = publish::new_root(&request)?;
            answer(json.then_some(&outcome), &outcome.to_string())?;
        }
        Verb::Inspect { dir, json } => {
            let report = inspect::inspect(&dir)?;
            answer(json.then_some(&report), &report.to_string())?;
            return Ok(if report.verified { Exit::Ok } else { Exit::NotVerified });
        }
        Verb::Unpack { recipe, image, out } => {
            let (_, profile) = recipe.find()?;
            unpack::unpack(&image, &profile, &out, &progress)?;
        }
        Verb::Compare { first, second, json } => {
            let comparison = compare::compare(&first, &second)?;
            answer(json.then_some(&comparison), &comparison.to_string())?;
            return Ok(if comparison.identical { Exit::Ok } else { Exit::Bug });
        }
    }
    Ok(Exit::Ok)
}

impl Publication {
    fn run(
        &self,
        verb: fn(&publish::Request<'_>) -> Result<publish::Outcome, Failure>,
    ) -> Result<(), Failure> {
        let outcome = verb(&publish::Request {
            release: &self.release,
            tenant: &self.tenant_dir,
            repository: &self.repo,
            keys: &self.keys,
            days: publish::Days { targets: self.expires, fresh: self.fresh },
        })?;
        answer(self.json.then_some(&outcome), &outcome.to_string())
    }
}

impl Recipe {
    fn find(&self) -> Result<(Source, Profile), Failure> {
        let source = Source::find(self.source.as_deref())?;
        let profile = Profile::find(&self.profile, &source)?;
        Ok((source, profile))
    }
}

/// The verb's result on standard output: JSON where that was asked for.
fn answer(json: Option<&impl serde::Serialize>, text: &str) -> Result<(), Failure> {
    let text = match json {
        Some(value) => serde_json::to_string(value).expect("text and numbers serialize") + "\n",
        None => text.to_owned(),
    };
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    Ok(written.map_err(files::FileError::at("write", Path::new("standard output")))?)
}

/// The chain of causes, once.
fn report(failure: &Failure) {
    let mut text = format!("kontor-image: {failure}");
    let mut cause = std::error::Error::source(failure);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    // A closed stderr leaves the exit code.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 a bug (compare: they differ); 2 wrong usage, profile or lock; 3 a hash or a signature \
does not fit; 4 the host lacks something; 5 a mirror cannot be reached or lacks what is asked for.

KONTOR_CACHE names the cache's directory; otherwise it is ~/.cache/kontor.";
