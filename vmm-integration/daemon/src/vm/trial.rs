//! Whether KVM runs a guest here. A device that opens is not enough: there are hosts, virtual machines
//! themselves as a rule, on which it opens and a stock kernel hangs. So the release's own kernel and
//! initrd are started under KVM without a disk, and `kontor-init` has to say that there is none.

use super::{
    VmError,
    machine::{no_jail, pair},
};
use crate::{
    control_group::{Delegated, Place},
    host::{Accelerator, Trial},
    qemu::{self, Backend, Inherited, Machine},
    slots::Ready,
};
use kontor_wire::{
    Decoder,
    control::{FromGuest, FromHost, MAX_FROM_GUEST, VERSION},
    encode,
    reason::StopReason,
};
use std::{io, path::Path, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

/// How long the answer may take. Where KVM works it is there within a second.
const ANSWER: Duration = Duration::from_secs(10);
/// Memory of the machine that is tried, in MiB.
const MEMORY_MIB: u32 = 256;

/// Tries it.
///
/// # Errors
/// [`VmError`] when the trial itself could not be made: no verdict then.
pub(crate) async fn kvm_runs_a_guest(
    jailer: &Path,
    program: &Path,
    delegated: Option<&Delegated>,
    ready: &Ready,
) -> Result<Trial, VmError> {
    let (control, control_theirs) = pair()?;
    // Nobody listens to these; their other ends close when this function returns.
    let (_console, console) = pair()?;
    let (_qmp, qmp) = pair()?;
    let (_uplink, uplink) = pair()?;
    let machine = Machine {
        accelerator: Accelerator::Kvm,
        cpus: 1,
        memory_mib: MEMORY_MIB,
        cmdline: ready.manifest.image.cmdline.clone(),
        probe: false,
        uplink: Backend::Port,
    };
    let inherited = Inherited {
        kernel: ready.kernel.try_clone().map_err(VmError::Channels)?.into(),
        initrd: ready.initrd.try_clone().map_err(VmError::Channels)?.into(),
        root: None,
        console,
        qmp,
        control: control_theirs,
        uplink,
        probe: None,
    };
    let group = machine.group(delegated, Place::Trial);
    let mut child = qemu::start(jailer, program, &machine, group, inherited)
        .map_err(|source| VmError::Qemu { program: program.into(), source })?;
    // No verdict on KVM, where the jail could not be made.
    let Some(pid) = child.entered().await else { return Err(no_jail(child, program.into()).await) };
    tracing::debug!(pid, "a trial of KVM has begun");
    let trial = match timeout(ANSWER, says_no_disk(control)).await {
        Ok(Ok(true)) => Trial::Works,
        Ok(Ok(false) | Err(_)) => Trial::Fails,
        Err(_) => Trial::Silent,
    };
    child.kill();
    if let Err(error) = child.wait().await {
        tracing::warn!(%error, "the machine that KVM was tried with cannot be ended");
    }
    Ok(trial)
}

/// Speaks to the guest until it stops; whether it stopped for want of a disk.
async fn says_no_disk(mut control: UnixStream) -> io::Result<bool> {
    let mut decoder = Decoder::new(MAX_FROM_GUEST);
    let mut chunk = [0; MAX_FROM_GUEST];
    control.write_all(&encode(&FromHost::Hello { version: VERSION, features: 0 })).await?;
    loop {
        match decoder.next_message::<FromGuest>() {
            Ok(Some(FromGuest::Stop(reason))) => return Ok(reason == StopReason::NoDisk),
            Ok(Some(FromGuest::Hello { .. } | FromGuest::State { .. })) => {}
            Ok(Some(FromGuest::Challenge(_) | FromGuest::Ready)) | Err(_) => return Ok(false),
            Ok(None) => {
                let room = decoder.room().min(chunk.len());
                match control.read(&mut chunk[..room]).await? {
                    0 => return Ok(false),
                    count => decoder.push(&chunk[..count]),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kontor_wire::control::BootState;

    /// What is concluded from a guest that sends `messages` and goes.
    async fn verdict(messages: &[FromGuest]) -> bool {
        let (ours, mut guests) = UnixStream::pair().unwrap();
        for message in messages {
            guests.write_all(&encode(message)).await.unwrap();
        }
        drop(guests.shutdown().await);
        says_no_disk(ours).await.unwrap_or(false)
    }

    #[tokio::test]
    async fn only_a_guest_that_misses_its_disk_shows_that_kvm_works() {
        let early = FromGuest::State { state: BootState::Early, at_ms: 3 };
        assert!(verdict(&[early.clone(), FromGuest::Stop(StopReason::NoDisk)]).await);
        assert!(!verdict(&[early.clone(), FromGuest::Stop(StopReason::NoModule)]).await);
        assert!(!verdict(&[early]).await);
        assert!(!verdict(&[FromGuest::Ready]).await);
        assert!(!verdict(&[]).await);
    }

    #[tokio::test]
    async fn garbage_is_no_proof() {
        let (ours, mut guests) = UnixStream::pair().unwrap();
        guests.write_all(&[0xff; 64]).await.unwrap();
        assert!(!says_no_disk(ours).await.unwrap());
    }
}
