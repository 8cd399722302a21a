//! What is missing for a start, in words.

use crate::{config::ConfigError, daemon::Daemon, exit::chain, host::Accelerator, slots, verbs::Check};
use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};
use tokio::{process::Command, time::timeout};

/// How long QEMU may take to say its version.
const VERSION: Duration = Duration::from_secs(10);

pub(crate) async fn examine(daemon: &Arc<Daemon>) -> Vec<Check> {
    let mut checks = vec![qemu(&daemon.config().qemu).await, jail(&daemon.config().jail()).await];
    let daemon = Arc::clone(daemon);
    let rest = tokio::task::spawn_blocking(move || on_disk(&daemon)).await;
    checks.extend(rest.unwrap_or_else(|error| vec![found("kontord", Err(error.to_string()))]));
    checks
}

fn found(name: &str, result: Result<String, String>) -> Check {
    let ok = result.is_ok();
    Check { name: name.to_owned(), ok, words: result.unwrap_or_else(|words| words) }
}

async fn qemu(program: &Path) -> Check {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).kill_on_drop(true);
    let result = match timeout(VERSION, command.output()).await {
        Ok(Ok(output)) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            Ok(text.lines().next().unwrap_or_default().to_owned())
        }
        Ok(Ok(output)) => Err(format!("{} does not run ({})", program.display(), output.status)),
        Ok(Err(error)) => Err(format!("{} does not run: {error}; install QEMU", program.display())),
        Err(_) => Err(format!("{} does not answer", program.display())),
    };
    found("qemu", result)
}

async fn jail(path: &Result<PathBuf, ConfigError>) -> Check {
    let result = match path {
        Ok(path) => crate::jail::check(path).await,
        Err(error) => Err(chain(error)),
    };
    found("jail", result.map(|()| "QEMU and the relay can be jailed".to_owned()))
}

fn on_disk(daemon: &Daemon) -> Vec<Check> {
    let (config, store) = (daemon.config(), daemon.store());
    let mut checks = vec![found("relay", relay(config.relay().map_err(|error| chain(&error))))];

    let key = store.host_key();
    let key_words = match &key {
        Ok(key) => Ok(format!("the host key is {}", key.public())),
        Err(error) if error.is_missing() => Err("there is no host key; run kontord host-key".to_owned()),
        Err(error) => Err(chain(error)),
    };
    checks.push(found("host key", key_words));

    let records = match key {
        Ok(key) => store.records(&key.public()).map_err(|error| {
            let words = chain(&error);
            if error.is_missing() { format!("{words}; run kontord provision") } else { words }
        }),
        Err(_) => Err("they cannot be checked without the host key".to_owned()),
    };
    let release = slots::verify_all(store, &config.release_root);
    checks.push(found(
        "documents",
        records.as_ref().map_err(Clone::clone).map(|records| {
            let (keyset, revision) = (records.keyset.version(), records.bundle.revision);
            format!("keyset {keyset}, device {}, bundle {revision} verify", records.device.device)
        }),
    ));
    checks.push(found(
        "release",
        release
            .as_ref()
            .map_err(|error| format!("{}; run kontord install", chain(error)))
            .map(|manifest| format!("{} (version {}) is whole", manifest.image.release, manifest.version)),
    ));
    let emulation = records.as_ref().is_ok_and(|records| records.bundle.settings.allow_emulation);
    checks.push(found("kvm", kvm(&daemon.config().kvm, store.kvm_verdict(), emulation)));
    if let (Ok(records), Ok(manifest)) = (&records, &release) {
        let fits = crate::daemon::allowed(&records.bundle, manifest, Accelerator::Kvm);
        checks.push(found(
            "policy",
            fits.map_err(|error| chain(&error)).map(|()| "it allows this release".to_owned()),
        ));
    }
    checks
}

fn relay(path: Result<PathBuf, String>) -> Result<String, String> {
    let path = path?;
    if path.is_file() {
        Ok(format!("{} is there", path.display()))
    } else {
        Err(format!("{} is missing; install Kontor again", path.display()))
    }
}

fn kvm(path: &Path, verdict: Option<bool>, emulation: bool) -> Result<String, String> {
    match Accelerator::best(path) {
        Accelerator::Kvm if verdict == Some(false) => {
            let words = format!("{} opens, but a guest does not run on it", path.display());
            if emulation { Ok(format!("{words}; the policy allows emulation")) } else { Err(words) }
        }
        Accelerator::Kvm => Ok(format!("{} can be used", path.display())),
        Accelerator::Tcg if emulation => Ok(format!(
            "{} cannot be used; the policy allows emulation, which is slow and no security boundary",
            path.display()
        )),
        Accelerator::Tcg if path.exists() => {
            Err(format!("{} may not be used by this user; add it to the group kvm", path.display()))
        }
        Accelerator::Tcg => {
            Err(format!("{} does not exist; enable virtualisation in the firmware", path.display()))
        }
    }
}
