//! Ways in which root in the work VM tries to get a packet out beside the tunnel.
//!
//! Each attempt runs as root with every capability, carries a marker of 16 bytes, and prints how far
//! it came. It is stopped when the marker is in no capture: neither on the employee's link, nor
//! anywhere in the office, behind the gateway.

use crate::{
    capture::holds,
    probe::Probe,
    run::Result,
    scene::{PATIENCE, Recording},
    world::{HOME_ADDRESS, INTRANET_ADDRESS, LAN_NEIGHBOUR},
};
use kontor_wire::probe::End;

/// One way to try.
pub(crate) struct Attempt {
    pub(crate) name: &'static str,
    script: &'static str,
}

/// An attempt that was made.
pub(crate) struct Made {
    pub(crate) name: &'static str,
    pub(crate) marker: String,
    /// What the attempt itself saw.
    pub(crate) said: String,
}

/// Every marker begins so; four digits follow.
pub(crate) const MARKER_PREFIX: &str = "kontor-leak-";
/// Bytes of a marker.
pub(crate) const MARKER_LEN: usize = MARKER_PREFIX.len() + 4;
/// Number of [`CANARY`], which no attempt has.
pub(crate) const CANARY_NUMBER: usize = 999;

/// Perl that every script begins with: `M` is the marker; `say` tells what happened.
const PRELUDE: &str = r"
use strict; use Socket; use POSIX ();
our $M = $ENV{MARKER}; our $LAN = $ENV{LAN}; our $HOME_PC = $ENV{HOME_PC};
sub said { print join(' ', @_), qq(\n); exit 0 }
sub failed { said(shift, 'failed:', qq($!)) }
sub udp4 { my ($to, $port) = @_;
  socket(my $s, PF_INET, SOCK_DGRAM, 17) or failed('socket');
  setsockopt($s, SOL_SOCKET, SO_BROADCAST, 1);
  send($s, $M x 4, 0, pack_sockaddr_in($port, inet_aton($to))) or failed('send');
  'sent into the tunnel, the gateway drops it' }
sub udp6 { my ($to, $port, $scope) = @_;
  socket(my $s, PF_INET6, SOCK_DGRAM, 17) or failed('socket');
  send($s, $M x 4, 0, pack_sockaddr_in6($port, Socket::inet_pton(AF_INET6, $to), $scope // 0)) or failed('send');
  'sent into the tunnel, the gateway drops it' }
";

/// Not an attempt: a marked packet to where policy lets it go. That it is recorded behind the gateway, and
/// cannot be read on the employee's link, shows that the recordings would show a leak.
pub(crate) const CANARY: Attempt = Attempt { name: "canary", script: "said(udp4($ENV{INTRANET}, 53))" };

/// Every attempt.
pub(crate) const ATTEMPTS: &[Attempt] = &[
    Attempt { name: "udp-to-the-home-lan", script: "said(udp4($LAN, 9))" },
    Attempt { name: "udp-to-the-host-itself", script: "said(udp4($HOME_PC, 9))" },
    Attempt { name: "udp-broadcast", script: "said(udp4('255.255.255.255', 67))" },
    Attempt {
        name: "dns-to-a-public-resolver",
        script: r"my $q = pack('n6', 1, 256, 1, 0, 0, 0) . pack('C/a*C', $M, 0) . pack('nn', 1, 1);
socket(my $s, PF_INET, SOCK_DGRAM, 17) or failed('socket');
send($s, $q, 0, pack_sockaddr_in(53, inet_aton('9.9.9.9'))) or failed('send');
said('sent into the tunnel, the gateway drops it')",
    },
    Attempt { name: "ipv6-to-the-internet", script: "said(udp6('2001:db8::1', 9))" },
    Attempt { name: "ipv6-multicast", script: "said(udp6('ff02::1', 9))" },
    Attempt {
        name: "tcp-to-the-home-lan",
        script: r"socket(my $s, PF_INET, SOCK_STREAM, 6) or failed('socket');
setsockopt($s, SOL_SOCKET, SO_SNDTIMEO, pack('q2', 3, 0));
connect($s, pack_sockaddr_in(80, inet_aton($LAN))) or failed('connect');
send($s, $M, 0); said('CONNECTED')",
    },
    Attempt {
        name: "raw-ip-with-another-source",
        script: r"socket(my $s, PF_INET, SOCK_RAW, 255) or failed('raw socket');
my $p = pack('CCnnnCCna4a4', 0x45, 0, 20 + 8 + 64, 1, 0, 64, 17, 0, inet_aton('10.88.0.10'), inet_aton('10.88.0.10'))
  . pack('nnnn', 80, 80, 72, 0) . $M x 4;
send($s, $p, 0, pack_sockaddr_in(0, inet_aton('10.88.0.10'))) or failed('send');
said('sent with a forged source; the tunnel or the gateway drops it')",
    },
    Attempt {
        name: "packet-socket-on-every-interface",
        script: r"socket(my $s, 17, SOCK_RAW, 0x0300) or failed('packet socket');
my @seen;
opendir(my $d, '/sys/class/net'); for my $if (sort grep { !/^\./ } readdir $d) {
  open(my $f, '<', qq(/sys/class/net/$if/ifindex)); my $index = <$f>;
  my $r = send($s, chr(255) x 6 . $M . $M x 4, 0, pack('SnlSCCa8', 17, 0x0800, $index, 1, 0, 6, chr(255) x 6));
  push @seen, qq($if: ) . ($r ? 'sent' : $!) }
said('interfaces', join(', ', @seen))",
    },
    Attempt {
        name: "load-a-driver",
        script: r"open(my $f, '<', '/bin/true'); my $o = '';
my $r = syscall(313, fileno($f), $o, 0);
# Whether loading is forbidden is asked before the file is read; any other error is an open door.
said('finit_module: ' . ($r == -1 && $! == POSIX::EPERM() ? $! : 'ALLOWED, ' . $!))",
    },
    Attempt {
        name: "load-another-kernel",
        script: r"my $r = syscall(246, 0, 0, 0, 0); said('kexec_load: ' . ($r == 0 ? 'ALLOWED' : $!))",
    },
    Attempt {
        name: "write-physical-memory",
        script: r"open(my $f, '+<', '/dev/mem') or failed('/dev/mem'); said('OPENED')",
    },
    Attempt {
        name: "write-pci-configuration",
        script: r"my @seen; for my $c (glob '/sys/bus/pci/devices/*/config') {
  if (open(my $f, '+<', $c)) { sysseek($f, 4, 0);
    push @seen, defined(syswrite($f, pack('S', 7))) ? 'WROTE ' . $c : qq($!) } else { push @seen, qq($!) } }
my %n; $n{$_}++ for @seen; said(map { qq($n{$_} devices: $_) } sort keys %n)",
    },
    Attempt {
        name: "map-a-device-bar",
        script: r"my @seen; for my $c (glob '/sys/bus/pci/devices/*/resource[0-9]') {
  if (open(my $f, '+<', $c)) { my $r = syscall(9, 0, 4096, 3, 1, fileno($f), 0);
    push @seen, $r == -1 ? qq($!) : 'MAPPED ' . $c } else { push @seen, qq($!) } }
my %n; $n{$_}++ for @seen; said(map { qq($n{$_} regions: $_) } sort keys %n)",
    },
    Attempt {
        name: "take-the-uplink-device",
        script: r"my @seen; my @d = grep { !m{/vfio$} } glob '/dev/vfio/*';
for my $n (glob '/sys/class/virtio-ports/*/name') { open(my $f, '<', $n); my $name = <$f>;
  push @d, '/dev/' . (split m{/}, $n)[4] if $name =~ /uplink/ }
for my $d (@d) { push @seen, qq($d: ) . (sysopen(my $f, $d, POSIX::O_RDWR()) ? 'OPENED' : $!) }
said(@seen ? join(', ', @seen) : 'FOUND none at all')",
    },
    Attempt {
        name: "take-the-uplink-from-its-holders",
        script: r"my @seen;
for my $comm (glob '/proc/[0-9]*/comm') { open(my $f, '<', $comm) or next; my $name = <$f>; chomp $name;
  my $pid = (split m{/}, $comm)[2]; next unless $pid == 1 || $name eq 'kontor-tunnel';
  # pidfd_open, then pidfd_getfd of each.
  my $process = syscall(434, $pid + 0, 0);
  for my $file (glob qq(/proc/$pid/fd/*)) { my $to = readlink($file) // next; next unless $to =~ /vport|vfio/;
    my $r = syscall(438, $process, (split m{/}, $file)[4] + 0, 0);
    push @seen, qq($name: $to: ) . ($r == -1 ? $! : 'OPENED') } }
said(@seen ? join(', ', @seen) : 'FOUND no holder')",
    },
    Attempt {
        name: "io-ports",
        script: r"my $r = syscall(172, 3); said('iopl: ' . ($r == 0 ? 'ALLOWED' : $!))",
    },
    Attempt {
        name: "vsock-to-the-host",
        script: r"socket(my $s, 40, SOCK_STREAM, 0) or failed('vsock socket');
connect($s, pack('SSLLC4', 40, 0, 9, 2, 0, 0, 0, 0)) or failed('vsock connect'); said('CONNECTED')",
    },
    Attempt {
        name: "mount-a-host-folder",
        script: r"my @seen; for my $t ('9p', 'virtiofs', 'nfs', 'cifs') {
  my ($s, $d, $k, $o) = ('host', '/tmp', $t, 'trans=virtio'); my $r = syscall(165, $s, $d, $k, 0, $o);
  push @seen, qq($t: ) . ($r == 0 ? 'MOUNTED' : $!) } said(join(', ', @seen))",
    },
    Attempt {
        name: "usb-devices",
        script: r"my @d = glob '/sys/bus/usb/devices/*'; said(@d ? 'FOUND ' . @d : 'no USB controller')",
    },
    Attempt {
        name: "write-the-root-disk",
        script: r"my @seen; for my $d ('/dev/vda', '/dev/dm-0') {
  syscall(16, 0, 0, 0); if (open(my $f, '+<', $d)) { my $r = syswrite($f, $M); $r = defined $r && $f->sync ? 1 : 0 if defined $r;
    push @seen, qq($d: ) . ($r ? 'WROTE' : $!) } else { push @seen, qq($d: $!) } } said(join(', ', @seen))",
    },
];

impl Attempt {
    /// Makes the attempt, as root in the work VM.
    pub(crate) fn make(&self, probe: &Probe, number: usize) -> Result<Made> {
        let marker = format!("{MARKER_PREFIX}{number:04}");
        let script = format!("{PRELUDE}\nuse IO::Handle;\n{}\n", self.script);
        let variables = [
            format!("MARKER={marker}"),
            format!("LAN={LAN_NEIGHBOUR}"),
            format!("HOME_PC={HOME_ADDRESS}"),
            format!("INTRANET={INTRANET_ADDRESS}"),
        ];
        let mut argv = vec!["/usr/bin/env"];
        argv.extend(variables.iter().map(String::as_str));
        argv.extend(["/usr/bin/perl", "-e", &script]);
        let output = probe.run(0, &argv, b"", PATIENCE)?;
        let text = if output.end == End::Exit(0) { output.stdout } else { output.stderr };
        let mut said = String::from_utf8_lossy(&text).trim().to_owned();
        if said.is_empty() || output.end != End::Exit(0) {
            said = format!("BROKEN ATTEMPT ({:?}): {said}", output.end);
        }
        Ok(Made { name: self.name, marker, said })
    }
}

impl Made {
    /// For [`CANARY`]: whether it is seen where it has to be and nowhere else.
    pub(crate) fn sang(&self, recording: &Recording) -> bool {
        let marker = self.marker.as_bytes();
        holds(&recording.office, marker) && !holds(&recording.link, marker)
    }

    /// Whether nothing of it got out, and the attempt itself saw no door open. An attempt that did not
    /// run proves nothing, so it counts as not stopped.
    pub(crate) fn stopped(&self, recording: &Recording) -> bool {
        const DOORS: &[&str] =
            &["BROKEN", "CONNECTED", "LOADED", "ALLOWED", "OPENED", "WROTE", "MAPPED", "MOUNTED", "FOUND"];
        let captured = [&recording.link, &recording.office].iter().any(|p| holds(p, self.marker.as_bytes()));
        !captured && !DOORS.iter().any(|door| self.said.contains(door))
    }
}
