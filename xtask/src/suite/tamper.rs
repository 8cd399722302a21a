//! Trials in which a byte was changed that something vouches for.

use super::{Outcome, Stage, words};
use crate::{run::within, scene::PATIENCE};
use libtest_mimic::Failed;
use std::path::Path;

/// A byte changed in a piece that is verified before the start: exit code 3, and the piece is named.
pub(super) fn tampered_pieces(stage: &mut Stage) -> Outcome {
    stage.quiet()?;
    let scene = stage.scene()?;
    for piece in ["kernel", "initrd", "segment"] {
        let file = scene.home.slot_file(piece).map_err(words)?;
        flip(&file, 1000.min(length(&file)? / 2))?;
        let output = scene.home.kontor(&["start", "--headless"]).map_err(words)?;
        flip(&file, 1000.min(length(&file)? / 2))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.code() != Some(3) || !said.contains(piece) {
            return Err(format!("changed {piece}: {} {said}", output.status).into());
        }
    }
    Ok(())
}

/// A byte changed in what vouches for the installed release: exit code 3, and the file is named.
pub(super) fn tampered_metadata(stage: &mut Stage) -> Outcome {
    stage.quiet()?;
    let scene = stage.scene()?;
    for (name, said) in [
        ("manifest.json", "manifest.json"),
        ("tuf/1.root.json", "1.root.json"),
        ("tuf/timestamp.json", "timestamp.json"),
        ("tuf/1.snapshot.json", "1.snapshot.json"),
        ("tuf/1.targets.json", "1.targets.json"),
    ] {
        let file = scene.home.slot_file(name).map_err(words)?;
        flip(&file, length(&file)? / 2)?;
        let output = scene.home.kontor(&["start", "--headless"]).map_err(words)?;
        flip(&file, length(&file)? / 2)?;
        let heard = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.code() != Some(3) || !heard.contains(said) {
            return Err(format!("changed {name}: {} {heard}", output.status).into());
        }
    }
    Ok(())
}

/// A byte changed in what the host keeps of the office's documents: exit code 3, and the document is named.
pub(super) fn tampered_documents(stage: &mut Stage) -> Outcome {
    stage.quiet()?;
    let home = &stage.scene()?.home;
    let memory = home.device_file("memory.json");
    let keyset = home.device_file("keysets/00000001.json");
    let (memory_bytes, keyset_bytes) = (read(&memory)?, read(&keyset)?);
    let mut other_keyset = keyset_bytes.clone();
    super::lies::flip(&mut other_keyset);
    let mut cases = vec![("the stored keyset 1", &keyset, other_keyset)];
    for (document, said) in
        [("device", "the device record is not signed"), ("bundle", "the bundle is not signed")]
    {
        let mut kept: serde_json::Value = serde_json::from_slice(&memory_bytes)?;
        let envelope = &mut kept["documents"][document];
        let mut changed = envelope.as_str().ok_or("no such document is kept")?.as_bytes().to_vec();
        super::lies::flip(&mut changed);
        *envelope = String::from_utf8(changed)?.into();
        cases.push((said, &memory, serde_json::to_vec(&kept)?));
    }
    let mut other_memory = memory_bytes.clone();
    other_memory[0] = !other_memory[0];
    cases.push(("memory.json", &memory, other_memory));
    for (said, file, bytes) in cases {
        std::fs::write(file, bytes)?;
        let output = home.kontor(&["start", "--headless"]).map_err(words)?;
        std::fs::write(&memory, &memory_bytes)?;
        std::fs::write(&keyset, &keyset_bytes)?;
        let heard = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.code() != Some(3) || !heard.contains(said) {
            return Err(format!("changed {}: {} {heard}", file.display(), output.status).into());
        }
    }
    Ok(())
}

/// A byte changed in what control answers from: it does not start, exit code 3, and the file is named. What is
/// changed on the way, or by control itself, is a lie: see `lies`.
pub(super) fn tampered_office(stage: &mut Stage) -> Outcome {
    let copy = stage.plan.scratch.join("tampered-control");
    let program = stage.plan.bin.join("kontor-control");
    let original = stage.scene()?.office.control_directory();
    for name in ["keysets/00000001.json", "devices/anna-1.json", "bundles/sales.json"] {
        let _ = std::fs::remove_dir_all(&copy);
        crate::build::copy(&original, &copy).map_err(words)?;
        let mut bytes = read(&copy.join(name))?;
        super::lies::flip(&mut bytes);
        std::fs::write(copy.join(name), bytes)?;
        // One that found nothing wrong would serve for ever.
        let mut serve = std::process::Command::new(&program);
        let output = within(PATIENCE, serve.args(["serve", "--dir"]).arg(&copy)).map_err(words)?;
        let heard = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.code() != Some(3) || !heard.contains(name) {
            return Err(format!("changed {name}: {} {heard}", output.status).into());
        }
    }
    Ok(std::fs::remove_dir_all(&copy)?)
}

/// A byte changed in each file of the repository: nothing is installed, exit code 3, and the part is named.
pub(super) fn tampered_repository(stage: &mut Stage) -> Outcome {
    let scene = stage.scene()?;
    let repository = scene.office.repository();
    let installed = std::fs::read(scene.home.slot_file("manifest.json").map_err(words)?).ok();
    let mut files = Vec::new();
    for directory in ["metadata", "targets"] {
        let entries = std::fs::read_dir(repository.join(directory)).map_err(|e| e.to_string())?;
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // A keyset is no part of a release, and the slot keeps the first root.
        if name.contains("keyset-") || name == "1.root.json" {
            continue;
        }
        // `1.snapshot.json` is the role snapshot, `DIGEST.smoke.root.img` the piece root.img.
        let part = match name.strip_suffix(".json").and_then(|stem| stem.split('.').next_back()) {
            Some(role) if file.parent() == Some(&repository.join("metadata")) => role.to_owned(),
            _ => name.splitn(3, '.').last().unwrap_or_default().to_owned(),
        };
        // What the slot has is not fetched, so it has to lack the piece.
        let own = scene.home.slot_file(&part).ok().filter(|own| part != "manifest.json" && own.is_file());
        let both = [Some(file), own].into_iter().flatten();
        let flip_both = || both.clone().try_for_each(|file| flip(&file, length(&file)? / 2));
        flip_both()?;
        let output = scene.home.install(&repository).map_err(words)?;
        flip_both()?;
        let heard = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.code() != Some(3) || !heard.contains(&part) {
            return Err(format!("changed {name}: {} {heard}", output.status).into());
        }
    }
    let now = std::fs::read(scene.home.slot_file("manifest.json").map_err(words)?).ok();
    if installed.is_none() || installed != now {
        return Err("the installed release changed".into());
    }
    let output = scene.home.install(&repository).map_err(words)?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("the whole repository: {}", String::from_utf8_lossy(&output.stderr)).into())
}

/// Bytes changed in the root image, which is verified as it is read: the work VM stops itself, and
/// the host says that it was dm-verity.
pub(super) fn changed_root(stage: &mut Stage) -> Outcome {
    const BLOCK: u64 = 4096;
    stage.quiet()?;
    let scene = stage.scene()?;
    let file = scene.home.slot_file("root.img").map_err(words)?;
    let manifest = std::fs::read(scene.home.slot_file("manifest.json").map_err(words)?)?;
    let manifest: serde_json::Value = serde_json::from_slice(&manifest)?;
    let blocks = manifest["image"]["verity"]["data_blocks"].as_u64().ok_or("no data blocks")?;
    let cases: [(&str, Vec<u64>); 3] = [
        ("its first block", vec![BLOCK / 2]),
        ("its hash tree", vec![blocks * BLOCK + 100]),
        // The file system's own structures stand at the beginning; what a program is read from, behind.
        ("the data of its files", (blocks / 8..blocks).map(|block| block * BLOCK + 100).collect()),
    ];
    for (what, offsets) in cases {
        offsets.iter().try_for_each(|offset| flip(&file, *offset))?;
        let output = scene.home.kontor(&["start", "--headless"]).map_err(words)?;
        offsets.iter().try_for_each(|offset| flip(&file, *offset))?;
        let stop = scene.home.status().map_err(words)?["stop"].clone();
        let verity = stop["detail"].as_str().is_some_and(|detail| detail.contains("dm-verity"));
        if output.status.code() != Some(3) || stop["reason"] != "kernel-panic" || !verity {
            return Err(format!("changed in {what}: {} {stop}", output.status).into());
        }
    }
    Ok(())
}

fn read(file: &Path) -> std::result::Result<Vec<u8>, Failed> {
    Ok(std::fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?)
}

fn length(file: &Path) -> std::result::Result<u64, Failed> {
    Ok(std::fs::metadata(file).map_err(|e| format!("{}: {e}", file.display()))?.len())
}

/// Inverts the byte of `file` at `offset`; twice restores it.
fn flip(file: &Path, offset: u64) -> Outcome {
    use std::os::unix::fs::FileExt;
    let failed = |e: std::io::Error| Failed::from(format!("{}: {e}", file.display()));
    let open = std::fs::OpenOptions::new().read(true).write(true).open(file).map_err(failed)?;
    let mut byte = [0];
    open.read_exact_at(&mut byte, offset).map_err(failed)?;
    open.write_all_at(&[!byte[0]], offset).map_err(failed)
}
