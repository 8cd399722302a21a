//! The gateway's side (`lease.md` 12 to 14). That an address is free, or this device's already, is for the
//! gateway's table of peers to say.

use super::{Admit, Checked, LeaseError, Untrusted, lease_answers_request};
use ipnet::{Ipv4Net, Ipv6Net};
use kontor_trust::{DeviceId, Kind, Line, RequestKind, TrustedKeyset, verify_request};

/// How far control's clock may be ahead of the gateway's, in seconds.
pub const CLOCK_SKEW_S: u64 = 60;

/// What a gateway knows of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnGateway {
    /// Its number in bundles and leases.
    pub id: u8,
    /// The IPv4 addresses that its guests have.
    pub pool_v4: Ipv4Net,
    /// The IPv6 addresses that its guests have.
    pub pool_v6: Ipv6Net,
}

/// What a gateway remembers about a device, a boot and a line; `None` where it has seen nothing yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GatewayMemory {
    /// Highest serial of the device's record.
    pub serial: Option<u64>,
    /// When the device's last lease was issued, in Unix seconds.
    pub issued_at: Option<u64>,
    /// Last challenge of this boot key.
    pub seq: Option<u64>,
    /// Highest revision of the line's bundle.
    pub revision: Option<u64>,
}

/// Checks a lease as gateway `own`, at `now` (Unix seconds). `floor` is the highest keyset that it has
/// stored. `recall` is asked once, after all signatures were found good, for what the gateway remembers
/// about the device, the boot key and the line.
///
/// # Errors
/// [`LeaseError`] says what is wrong.
pub fn for_gateway(
    floor: &TrustedKeyset,
    untrusted: &Admit,
    now: u64,
    own: &OwnGateway,
    recall: impl FnOnce(&DeviceId, &[u8; 32], &Line) -> GatewayMemory,
) -> Result<Checked, LeaseError> {
    let Admit { keysets, device, request, bundle, lease } = untrusted;
    let checked = Untrusted { keysets, device, bundle, lease }.check(floor)?;
    let request = verify_request(request, &checked.device.host_key)
        .map_err(|source| LeaseError::Envelope { kind: RequestKind::NAME, source })?;
    lease_answers_request(&checked.lease, &request)?;
    lease_runs(&checked, now)?;
    lease_is_for(&checked, own)?;
    lease_is_newest(&checked, &recall(&checked.lease.device, &checked.lease.boot_key, &checked.lease.line))?;
    Ok(checked)
}

fn lease_runs(Checked { lease, .. }: &Checked, now: u64) -> Result<(), LeaseError> {
    if lease.issued_at.saturating_sub(CLOCK_SKEW_S) > now {
        Err(LeaseError::NotYet { issued_at: lease.issued_at, now })
    } else if now >= lease.not_after {
        Err(LeaseError::Expired { not_after: lease.not_after, now })
    } else {
        Ok(())
    }
}

fn lease_is_for(Checked { lease, bundle, .. }: &Checked, own: &OwnGateway) -> Result<(), LeaseError> {
    let named = lease.gateways.iter().find(|gateway| gateway.id == own.id);
    let (Some(named), Some(gateway)) = (named, bundle.gateway(own.id)) else {
        return Err(LeaseError::NotNamed(own.id));
    };
    if !own.pool_v4.contains(&named.v4) || named.v4 == gateway.v4 {
        return Err(LeaseError::ForeignAddress(named.v4.into()));
    }
    if !own.pool_v6.contains(&named.v6) || named.v6 == gateway.v6 {
        return Err(LeaseError::ForeignAddress(named.v6.into()));
    }
    Ok(())
}

fn lease_is_newest(
    Checked { lease, device, .. }: &Checked,
    memory: &GatewayMemory,
) -> Result<(), LeaseError> {
    if let Some(known) = memory.serial.filter(|known| device.serial < *known) {
        return Err(LeaseError::OldSerial { record: device.serial, known });
    }
    if let Some(known) = memory.issued_at.filter(|known| lease.issued_at <= *known) {
        return Err(LeaseError::OldIssue { lease: lease.issued_at, known });
    }
    if let Some(known) = memory.seq.filter(|known| lease.seq <= *known) {
        return Err(LeaseError::OldSeq { lease: lease.seq, known });
    }
    if let Some(known) = memory.revision.filter(|known| lease.revision < *known) {
        return Err(LeaseError::OldRevision { lease: lease.revision, known });
    }
    Ok(())
}
