//! Disks without room: what does not fit is refused with the path and exit code 4, nothing half-written is used or
//! left, and everything works again once there is room.

use super::{
    Outcome, Stage,
    thread::{closes, page_is_read, starts},
    words,
};
use crate::{
    office::Office,
    run::{Error, Result, at, os, quietly, text},
    world::User,
};
use libtest_mimic::Failed;
use rustix::mount::{MountFlags, mount_remount};
use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// Exit code: the host lacks something.
const LACKS: i32 = 4;
/// Less than a release's largest piece.
const TOO_SMALL: &str = "16m";
/// Enough for one release with all that belongs to it, not for another one beside it.
const FOR_ONE: &str = "64m";
/// Enough for an update.
const FOR_TWO: &str = "192m";

/// A file system in memory, mounted for as long as this lives.
struct Disk(PathBuf);

impl Disk {
    fn new(at_path: PathBuf, size: &str) -> Result<Self> {
        fs::create_dir(&at_path).map_err(at("create", &at_path))?;
        quietly(
            Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(&at_path),
        )?;
        Ok(Self(at_path))
    }

    fn resize(&self, size: &str) -> Result<()> {
        // Not by mount(8), which repeats the options of before: `uid` among them is one that this namespace
        // does not know.
        mount_remount(&self.0, MountFlags::empty(), format!("size={size}"))
            .map_err(os("resize a file system"))
    }

    /// Takes all the room there is; it is free again when the returned file is removed.
    fn fill(&self) -> Result<PathBuf> {
        let path = self.0.join("filler");
        let mut file = File::create(&path).map_err(at("create", &path))?;
        // Large pieces first, so that it does not take long.
        for piece in [vec![1; 1 << 20], vec![1; 512]] {
            loop {
                match file.write_all(&piece) {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::StorageFull => break,
                    Err(error) => return Err(at("write", &path)(error)),
                }
            }
        }
        Ok(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // All mounts end with the outer namespace.
        let _ = quietly(Command::new("umount").arg("--lazy").arg(&self.0));
        let _ = fs::remove_dir(&self.0);
    }
}

/// kontord's state on a disk that is too small: neither a first release nor an update is installed by halves, no work
/// VM starts, and what was there before runs on.
pub(super) fn state(stage: &mut Stage) -> Outcome {
    stage.probe = None;
    let home = &mut stage.scene()?.home;
    let state = home.path("state");
    let disk = Disk::new(home.path("small"), FOR_ONE).map_err(words)?;
    home.stop_kontord().map_err(words)?;
    quietly(Command::new("cp").args(["--archive", "--"]).arg(state.join(".")).arg(&disk.0)).map_err(words)?;
    User::Employee.owns(&disk.0).map_err(words)?;
    quietly(Command::new("mount").arg("--bind").arg(&disk.0).arg(&state)).map_err(words)?;
    let outcome = on_small_disk(stage, &disk);
    let home = &mut stage.scene()?.home;
    home.stop_kontord().map_err(words)?;
    quietly(Command::new("umount").arg("--lazy").arg(&state)).map_err(words)?;
    home.start_kontord().map_err(words)?;
    outcome
}

fn on_small_disk(stage: &mut Stage, disk: &Disk) -> Outcome {
    let repository = stage.scene()?.office.repository();
    let home = &mut stage.scene()?.home;
    let state = home.path("state");
    let manifest = home.slot_file("manifest.json").map_err(words)?;
    let slots = manifest.ancestors().nth(2).unwrap_or(&state).to_owned();
    let installed = fs::read(&manifest).map_err(|e| e.to_string())?;

    // No room for a second release beside the first.
    lacks_room(&home.install(&repository).map_err(words)?, &state)?;
    if names(&slots)? != ["A"] || fs::read(&manifest).ok() != Some(installed.clone()) {
        return Err(format!("an update that did not fit left {:?}", names(&slots)?).into());
    }

    // No room at all.
    let filler = disk.fill().map_err(words)?;
    home.start_kontord().map_err(words)?;
    lacks_room(&home.kontor(&["start", "--headless"]).map_err(words)?, &state)?;
    let status = home.status().map_err(words)?;
    if status["state"] != "not-started" || status["not_started"]["exit"] != LACKS {
        return Err(format!("on a full disk the status says {status}").into());
    }
    fs::remove_file(&filler).map_err(|e| e.to_string())?;
    starts(stage)?;

    // A disk that fills up later does not disturb what runs.
    let filler = disk.fill().map_err(words)?;
    page_is_read(stage)?;
    closes(stage)?;
    fs::remove_file(&filler).map_err(|e| e.to_string())?;

    // A PC without a release yet.
    let home = &mut stage.scene()?.home;
    fs::remove_dir_all(slots.join("A")).map_err(|e| e.to_string())?;
    disk.resize(TOO_SMALL).map_err(words)?;
    lacks_room(&home.install(&repository).map_err(words)?, &state)?;
    if !names(&slots)?.is_empty() {
        return Err(format!("a release that did not fit left {:?}", names(&slots)?).into());
    }
    let output = home.kontor(&["start", "--headless"]).map_err(words)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() != Some(LACKS) || !said.contains("no release is installed") {
        return Err(format!("a start without a release: {} {said}", output.status).into());
    }
    disk.resize(FOR_TWO).map_err(words)?;
    let output = home.install(&repository).map_err(words)?;
    if output.status.success() && fs::read(&manifest).ok() == Some(installed) {
        return Ok(());
    }
    Err(format!("with room: {} {}", output.status, String::from_utf8_lossy(&output.stderr)).into())
}

/// A repository on a disk that is too small: readers see nothing of what does not fit.
pub(super) fn repository(stage: &mut Stage) -> Outcome {
    let release = stage.plan.scratch.join("release");
    let office = &mut stage.scene()?.office;
    let disk = Disk::new(office.path("small-repository"), TOO_SMALL).map_err(words)?;
    for directory in ["metadata", "targets"] {
        let path = disk.0.join(directory);
        fs::create_dir(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let (from, root) =
        (office.repository().join("metadata/1.root.json"), disk.0.join("metadata/1.root.json"));
    fs::copy(&from, &root).map_err(|e| format!("{}: {e}", root.display()))?;

    // Some pieces fit and some do not; and then, with all pieces there, the list of them does not.
    lacks_room(&run(publish(office, &release, &disk.0))?, &disk.0)?;
    nothing_is_seen(&disk.0)?;
    disk.resize(FOR_TWO).map_err(words)?;
    let filler = disk.fill().map_err(words)?;
    lacks_room(&run(publish(office, &release, &disk.0))?, &disk.0)?;
    nothing_is_seen(&disk.0)?;
    fs::remove_file(&filler).map_err(|e| e.to_string())?;
    let output = run(publish(office, &release, &disk.0))?;
    let waits = disk.0.join("pending.targets.json").exists();
    if output.status.success() && waits {
        return Ok(());
    }
    Err(format!("with room: {} {}", output.status, String::from_utf8_lossy(&output.stderr)).into())
}

fn publish(office: &Office, release: &Path, repository: &Path) -> Command {
    office.publishing("publish", &["targets-ci"], release, repository)
}

fn run(mut command: Command) -> std::result::Result<Output, Failed> {
    command.output().map_err(|source| words(Error::Start(text(&command), source)))
}

/// Nothing in the repository is named by its metadata, and nothing is left that was begun.
fn nothing_is_seen(repository: &Path) -> Outcome {
    let mut all = names(repository)?;
    for directory in ["metadata", "targets"] {
        all.extend(names(&repository.join(directory))?);
    }
    let begun = |name: &String| name.starts_with(".kontor-") || name.starts_with("pending");
    if names(&repository.join("metadata"))? == ["1.root.json"] && !all.iter().any(begun) {
        return Ok(());
    }
    Err(format!("what did not fit left {all:?}").into())
}

/// The program says that there is no room, and where.
fn lacks_room(output: &Output, place: &Path) -> Outcome {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let why = said.to_lowercase().contains("no space left");
    if output.status.code() == Some(LACKS) && why && said.contains(&*place.to_string_lossy()) {
        return Ok(());
    }
    Err(format!("without room in {}: {} {said}", place.display(), output.status).into())
}

fn names(directory: &Path) -> std::result::Result<Vec<String>, Failed> {
    let failed = |e: std::io::Error| format!("{}: {e}", directory.display());
    let entries = fs::read_dir(directory).map_err(failed)?;
    let mut names = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<std::io::Result<Vec<_>>>()
        .map_err(failed)?;
    names.sort();
    Ok(names)
}
