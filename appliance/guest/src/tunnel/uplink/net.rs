//! A virtio network device (virtio 1.2, 5.1) with one queue each way, as the uplink.
//!
//! ```text
//!  0..12   virtio-net header: all zero, nothing is offloaded
//! 12..26   Ethernet header, fixed (`kontor_wire::uplink`)
//! 26..     uplink frame
//! ```
//!
//! The device is the host's, and no byte of it is believed. It must take its addresses through the IOMMU
//! (`VIRTIO_F_ACCESS_PLATFORM`), or it would be handed addresses of this process that mean something else
//! to it; whatever else it offers is left alone. Nothing here makes a system call but the read of the
//! interrupt's counter.

use super::ring::{BUFFER, Ring, RingFault, SIZE, Used, Way};
use super::{Losses, Rest, Uplink};
use kontor_wire::uplink::{
    ETHERNET_LEN, Frame, GUEST_TO_RELAY, GatewayId, HEADER_LEN, MAX_FRAME_VFIO, PORT_PREFIX_LEN, Packer,
    RELAY_TO_GUEST,
};
use rustix::io::{Errno, read};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use virtio_drivers::Hal;
use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};

/// `VIRTIO_F_VERSION_1`: the device speaks the standard, not what came before it.
const VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_ACCESS_PLATFORM`: the device is behind the IOMMU.
const ACCESS_PLATFORM: u64 = 1 << 33;
/// What is asked of the device, and all that is accepted of it. Not among it, each for its reason:
/// `INDIRECT_DESC` (28) and `EVENT_IDX` (29), with which the crate's queue loses notifications for good
/// once its 16-bit index has gone round.
const FEATURES: u64 = VERSION_1 | ACCESS_PLATFORM;
/// Number of the receive queue.
const RECEIVE: u16 = 0;
/// Number of the transmit queue.
const TRANSMIT: u16 = 1;
/// Bytes of the virtio-net header of a device of version 1.
const NET_HEADER_LEN: usize = 12;
/// No checksum to compute, no segmentation, one buffer.
const NET_HEADER: [u8; NET_HEADER_LEN] = [0; NET_HEADER_LEN];
/// How often the device is asked whether its reset is done.
const RESET_READS_MAX: u32 = 100_000;
/// Frames taken in one batch.
const BATCH_MAX: usize = 64;

/// Bytes in front of a datagram in its buffer.
const OVERHEAD: usize = NET_HEADER_LEN + ETHERNET_LEN + HEADER_LEN;
const _: () = assert!(OVERHEAD + kontor_vpn::DATAGRAM_MAX <= BUFFER);
const _: () = assert!(NET_HEADER_LEN + ETHERNET_LEN + MAX_FRAME_VFIO == BUFFER);

/// Why the device is not used, or not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum NetFault {
    #[error("the uplink's device is no network device")]
    Kind,
    #[error("the uplink's device does not reset")]
    Reset,
    #[error("the uplink's device is not behind an IOMMU (features {0:#x})")]
    NotTranslated(u64),
    #[error("the uplink's device is of the time before virtio 1 (features {0:#x})")]
    Legacy(u64),
    #[error("the uplink's device refuses what it offered itself")]
    FeaturesRefused,
    #[error("queue {0} of the uplink's device cannot interrupt or be notified")]
    NotWired(u16),
    #[error(transparent)]
    Ring(#[from] RingFault),
}

impl From<NetFault> for io::Error {
    fn from(fault: NetFault) -> Self {
        io::Error::other(fault)
    }
}

/// A transport that also has its interrupts and doorbells in order.
pub(crate) trait Device: Transport {
    /// Whether queue `index`, which was set up, has the interrupt that it was given, and a doorbell.
    fn is_wired(&self, index: u16) -> bool;
}

/// The device as an uplink.
pub(crate) struct Net<D, H: Hal> {
    device: D,
    /// Counts the device's interrupts.
    interrupts: OwnedFd,
    rings: Option<Rings<H>>,
    /// What went wrong where no error can be returned.
    fault: Option<NetFault>,
    scratch: Box<[u8; BUFFER]>,
    /// At most one frame behind its length, which may grow until the batch is sent.
    waiting: Vec<u8>,
    packer: Packer,
    losses: Losses,
}

struct Rings<H: Hal> {
    receive: Ring<H>,
    transmit: Ring<H>,
}

impl<D: Device, H: Hal> Net<D, H> {
    /// Takes a device whose interrupts are counted by `interrupts`, which does not block.
    pub(super) fn new(device: D, interrupts: OwnedFd) -> Self {
        let scratch = Box::new([0; BUFFER]);
        Self {
            device,
            interrupts,
            rings: None,
            fault: None,
            scratch,
            waiting: Vec::with_capacity(PORT_PREFIX_LEN + MAX_FRAME_VFIO),
            packer: Packer::new(MAX_FRAME_VFIO),
            losses: Losses::default(),
        }
    }

    /// Brings the device up as virtio 1.2, 3.1.1 says.
    fn negotiate(&mut self) -> Result<Rings<H>, NetFault> {
        let device = &mut self.device;
        if device.device_type() != DeviceType::Network {
            return Err(NetFault::Kind);
        }
        device.set_status(DeviceStatus::empty());
        if !(0..RESET_READS_MAX).any(|_| device.get_status().is_empty()) {
            return Err(NetFault::Reset);
        }
        let known = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        device.set_status(DeviceStatus::ACKNOWLEDGE);
        device.set_status(known);
        let offered = device.read_device_features();
        if offered & ACCESS_PLATFORM == 0 {
            return Err(NetFault::NotTranslated(offered));
        }
        if offered & VERSION_1 == 0 {
            return Err(NetFault::Legacy(offered));
        }
        device.write_driver_features(FEATURES);
        let agreed = known | DeviceStatus::FEATURES_OK;
        device.set_status(agreed);
        if !device.get_status().contains(DeviceStatus::FEATURES_OK) {
            return Err(NetFault::FeaturesRefused);
        }
        let mut receive = Ring::new(device, RECEIVE, Way::In)?;
        let transmit = Ring::new(device, TRANSMIT, Way::Out)?;
        if let Some(queue) = [RECEIVE, TRANSMIT].into_iter().find(|queue| !device.is_wired(*queue)) {
            return Err(NetFault::NotWired(queue));
        }
        receive.offer()?;
        device.set_status(agreed | DeviceStatus::DRIVER_OK);
        receive.announce(device);
        Ok(Rings { receive, transmit })
    }

    /// Takes back what the device has sent. An interrupt comes for it only while no buffer is free.
    fn reclaim(rings: &mut Rings<H>) -> Result<(), NetFault> {
        let transmit = &mut rings.transmit;
        transmit.interrupt(false);
        // Each buffer is in flight at most once, so a device that gives back without end is found out.
        loop {
            while transmit.take()?.is_some() {}
            if transmit.free() > 0 {
                return Ok(());
            }
            transmit.interrupt(true);
            if !transmit.has_used() {
                return Ok(());
            }
        }
    }

    fn receive(&mut self, take: &mut dyn FnMut(GatewayId, &[u8])) -> Result<Rest, NetFault> {
        let Some(rings) = &mut self.rings else { return Ok(Rest::None) };
        Self::reclaim(rings)?;
        rings.receive.interrupt(false);
        let mut rest = Rest::More;
        for _ in 0..BATCH_MAX {
            if let Some(used) = rings.receive.take()? {
                match frame(&rings.receive, &used, &mut self.scratch) {
                    Some(frame) => frame.segments().for_each(|segment| take(frame.gateway(), segment)),
                    None => self.losses.malformed += 1,
                }
                continue;
            }
            rings.receive.interrupt(true);
            if !rings.receive.has_used() {
                rest = Rest::None;
                break;
            }
            rings.receive.interrupt(false);
        }
        rings.receive.offer()?;
        rings.receive.announce(&mut self.device);
        Ok(rest)
    }

    /// `false` when the datagram is not taken.
    fn queue(&mut self, to: GatewayId, datagram: &[u8]) -> Result<bool, NetFault> {
        if !self.packer.joins(to, datagram, &self.waiting) {
            self.hand_over()?;
            if !self.has_room() {
                return Ok(false);
            }
        }
        Ok(self.packer.push(to, datagram, &mut self.waiting).is_ok())
    }

    /// Puts the waiting frame into the ring, where a buffer is kept for it.
    fn hand_over(&mut self) -> Result<(), NetFault> {
        self.packer.close();
        if let (Some(rings), Some(frame)) = (&mut self.rings, self.waiting.get(PORT_PREFIX_LEN..))
            && !rings.transmit.send(&[&NET_HEADER, &GUEST_TO_RELAY, frame])?
        {
            self.losses.dropped += 1;
        }
        self.waiting.clear();
        Ok(())
    }
}

/// The uplink frame in a buffer, `None` where there is none.
fn frame<'s, H: Hal>(ring: &Ring<H>, used: &Used, scratch: &'s mut [u8; BUFFER]) -> Option<Frame<'s>> {
    let bytes = ring.copy_out(used, scratch)?;
    Frame::parse_ethernet(bytes.get(NET_HEADER_LEN..)?, &RELAY_TO_GUEST).ok()
}

impl<D: Device, H: Hal> Uplink for Net<D, H> {
    fn begin(&mut self) -> io::Result<()> {
        self.rings = Some(self.negotiate()?);
        Ok(())
    }

    fn recv_batch(&mut self, take: &mut dyn FnMut(GatewayId, &[u8])) -> io::Result<Rest> {
        // How many there were does not matter: what there is to do says the ring.
        match read(&self.interrupts, &mut [0; 8]) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.receive(take)?)
    }

    fn has_room(&self) -> bool {
        let kept = usize::from(!self.waiting.is_empty());
        self.rings.as_ref().is_some_and(|rings| rings.transmit.free() > kept)
    }

    fn push(&mut self, to: GatewayId, datagram: &[u8]) {
        match self.queue(to, datagram) {
            Ok(true) => {}
            Ok(false) => self.losses.dropped += 1,
            Err(fault) => self.fault = Some(fault),
        }
    }

    fn send_batch(&mut self) -> io::Result<()> {
        if let Some(fault) = self.fault {
            return Err(fault.into());
        }
        self.hand_over()?;
        let Some(rings) = &mut self.rings else { return Ok(()) };
        rings.transmit.announce(&mut self.device);
        Ok(Self::reclaim(rings)?)
    }

    fn readable(&self) -> BorrowedFd<'_> {
        self.interrupts.as_fd()
    }

    fn losses(&self) -> Losses {
        self.losses
    }
}

const _: () = assert!(SIZE > BATCH_MAX);

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeDevice, FakeMemory};
    use super::*;
    use kontor_wire::uplink::header;
    use rustix::event::{EventfdFlags, eventfd};

    const GATEWAY: GatewayId = GatewayId(4);
    const DATAGRAM: [u8; 148] = [7; 148];
    /// Two of these do not fit one frame.
    const LARGE: [u8; 1456] = [7; 1456];
    /// Everything that QEMU's device offers, event indices and indirect descriptors included.
    const OFFERED: u64 = 0x103_30bf_8024;

    type Uut = Net<FakeDevice, FakeMemory>;

    fn device() -> FakeDevice {
        FakeDevice::offering(OFFERED)
    }

    fn net(device: &FakeDevice) -> Uut {
        Net::new(device.clone(), eventfd(0, EventfdFlags::NONBLOCK).unwrap())
    }

    fn up() -> (FakeDevice, Uut) {
        let device = device();
        let mut net = net(&device);
        net.begin().unwrap();
        (device, net)
    }

    /// Why bringing up fails.
    fn refused(device: &FakeDevice) -> NetFault {
        net(device).negotiate().map(|_| ()).unwrap_err()
    }

    /// As the relay sends it.
    fn from_relay(datagram: &[u8]) -> Vec<u8> {
        let inner = header(GATEWAY, datagram.len(), datagram).unwrap();
        [&NET_HEADER[..], &RELAY_TO_GUEST, &inner, datagram].concat()
    }

    fn received(net: &mut Uut) -> Result<Vec<Vec<u8>>, NetFault> {
        let mut all = Vec::new();
        while net.receive(&mut |from, bytes| {
            assert_eq!(from, GATEWAY);
            all.push(bytes.to_vec());
        })? == Rest::More
        {}
        Ok(all)
    }

    #[test]
    fn datagram_goes_out_as_one_ethernet_frame() {
        let (device, mut net) = up();
        net.push(GATEWAY, &DATAGRAM);
        net.send_batch().unwrap();
        let sent = device.transmit_all();
        let inner = header(GATEWAY, DATAGRAM.len(), &DATAGRAM).unwrap();
        assert_eq!(sent, [[&NET_HEADER[..], &GUEST_TO_RELAY, &inner, &DATAGRAM].concat()]);
    }

    #[test]
    fn datagram_comes_in_and_its_buffer_is_offered_again() {
        let (device, mut net) = up();
        assert_eq!(device.offered_buffers(), SIZE);
        for round in 0..3 * SIZE {
            device.deliver(&from_relay(&DATAGRAM));
            assert_eq!(received(&mut net).unwrap(), [DATAGRAM], "{round}");
        }
        assert_eq!(device.offered_buffers(), SIZE);
    }

    #[test]
    fn largest_datagram_passes_each_way() {
        let (device, mut net) = up();
        let largest = [9; kontor_vpn::DATAGRAM_MAX];
        net.push(GATEWAY, &largest);
        net.send_batch().unwrap();
        assert_eq!(device.transmit_all()[0].len(), OVERHEAD + largest.len());
        device.deliver(&from_relay(&largest));
        assert_eq!(received(&mut net).unwrap(), [largest]);
    }

    #[test]
    fn datagram_that_no_buffer_can_carry_is_dropped() {
        let (device, mut net) = up();
        net.push(GATEWAY, &[0; BUFFER - OVERHEAD]);
        net.push(GATEWAY, &[0; BUFFER - OVERHEAD + 1]);
        net.push(GATEWAY, &[0; 31]);
        net.send_batch().unwrap();
        assert_eq!((net.losses().dropped, device.transmit_all().len()), (2, 1));
    }

    #[test]
    fn datagrams_of_one_batch_go_in_trains_that_fit_a_buffer() {
        let (device, mut net) = up();
        for _ in 0..2 {
            for _ in 0..20 {
                net.push(GATEWAY, &DATAGRAM);
            }
            net.send_batch().unwrap();
            let sent = device.transmit_all();
            let counts: Vec<usize> = sent
                .iter()
                .map(|bytes| {
                    let frame = Frame::parse_ethernet(&bytes[NET_HEADER_LEN..], &GUEST_TO_RELAY).unwrap();
                    assert!(frame.segments().all(|segment| segment == DATAGRAM));
                    frame.segments().count()
                })
                .collect();
            assert_eq!(counts, [13, 7]);
        }
        assert_eq!(net.losses(), Losses::default());
    }

    #[test]
    fn train_that_waits_keeps_a_buffer_for_itself() {
        let (device, mut net) = up();
        let mut pushed = 0;
        while net.has_room() {
            net.push(GATEWAY, &LARGE);
            pushed += 1;
        }
        assert_eq!((pushed, net.losses().dropped), (SIZE, 0));
        net.send_batch().unwrap();
        assert_eq!(device.transmit_all().len(), SIZE);
    }

    #[test]
    fn batch_is_announced_once() {
        let (device, mut net) = up();
        let before = device.kicks(TRANSMIT);
        for _ in 0..10 {
            net.push(GATEWAY, &LARGE);
        }
        assert_eq!(device.kicks(TRANSMIT), before);
        net.send_batch().unwrap();
        net.send_batch().unwrap();
        assert_eq!(device.kicks(TRANSMIT), before + 1);
        assert_eq!(device.transmit_all().len(), 10);
    }

    #[test]
    fn device_without_an_iommu_is_refused() {
        let device = FakeDevice::offering(OFFERED & !ACCESS_PLATFORM);
        assert_eq!(refused(&device), NetFault::NotTranslated(OFFERED & !ACCESS_PLATFORM));
        assert_eq!(device.accepted(), None, "it was told nothing, addresses least of all");
    }

    #[test]
    fn device_from_before_version_1_is_refused() {
        let offered = OFFERED & !VERSION_1;
        assert_eq!(refused(&FakeDevice::offering(offered)), NetFault::Legacy(offered));
    }

    #[test]
    fn device_that_refuses_the_features_is_refused() {
        let device = device();
        device.set(|state| state.refuses_features = true);
        assert_eq!(refused(&device), NetFault::FeaturesRefused);
    }

    #[test]
    fn device_that_never_resets_is_refused() {
        let device = device();
        device.set(|state| state.never_resets = true);
        assert_eq!(refused(&device), NetFault::Reset);
    }

    #[test]
    fn device_of_another_kind_is_refused() {
        let device = device();
        device.set(|state| state.kind = DeviceType::Block);
        assert_eq!(refused(&device), NetFault::Kind);
    }

    #[test]
    fn device_with_short_queues_or_used_ones_is_refused() {
        let short = device();
        short.set(|state| state.queue_size = 128);
        assert_eq!(refused(&short), NetFault::Ring(RingFault::Refused(RECEIVE)));
        let used = device();
        used.set(|state| state.claims_used = true);
        assert_eq!(refused(&used), NetFault::Ring(RingFault::Refused(RECEIVE)));
    }

    #[test]
    fn device_without_its_interrupt_is_refused() {
        let device = device();
        device.set(|state| state.unwired = Some(TRANSMIT));
        assert_eq!(refused(&device), NetFault::NotWired(TRANSMIT));
    }

    #[test]
    fn event_indices_and_indirect_descriptors_are_never_accepted() {
        let (device, _net) = up();
        assert_eq!(device.accepted(), Some(FEATURES));
        let device = FakeDevice::offering(u64::MAX);
        net(&device).begin().unwrap();
        assert_eq!(device.accepted(), Some(FEATURES));
    }

    #[test]
    fn descriptor_out_of_range_ends_the_uplink() {
        for id in [u32::try_from(SIZE).unwrap(), 999, 65_535, u32::MAX] {
            let (device, mut net) = up();
            device.complete(RECEIVE, id, 100);
            let low = u16::try_from(id & 0xffff).unwrap();
            assert_eq!(received(&mut net), Err(NetFault::Ring(RingFault::NotInFlight(low))));
        }
    }

    #[test]
    fn descriptor_that_is_not_in_flight_ends_the_uplink() {
        let (device, mut net) = up();
        net.push(GATEWAY, &DATAGRAM);
        net.send_batch().unwrap();
        // One is in flight, and this is another.
        device.complete(TRANSMIT, 5, 0);
        assert!(net.send_batch().unwrap_err().to_string().contains("descriptor 5"));
    }

    #[test]
    fn descriptor_given_back_twice_ends_the_uplink() {
        let (device, mut net) = up();
        net.push(GATEWAY, &DATAGRAM);
        net.send_batch().unwrap();
        device.complete(TRANSMIT, 0, 0);
        device.complete(TRANSMIT, 0, 0);
        assert!(net.send_batch().unwrap_err().to_string().contains("descriptor 0"));
    }

    #[test]
    fn received_descriptor_given_back_twice_ends_the_uplink() {
        let (device, mut net) = up();
        let id = device.deliver(&from_relay(&DATAGRAM));
        device.complete(RECEIVE, id, 100);
        let fault = received(&mut net).unwrap_err();
        assert_eq!(fault, NetFault::Ring(RingFault::NotInFlight(u16::try_from(id).unwrap())));
    }

    #[test]
    fn used_index_that_jumps_ahead_ends_the_uplink() {
        let (device, mut net) = up();
        device.jump(RECEIVE, 40_000);
        // Every entry is 0: the first is taken, since it is in flight, the next one is not.
        assert_eq!(received(&mut net), Err(NetFault::Ring(RingFault::NotInFlight(0))));
    }

    #[test]
    fn length_beyond_the_buffer_is_no_frame() {
        let longest = u32::try_from(BUFFER).unwrap();
        for length in [longest + 1, 1 << 30, u32::MAX] {
            let (device, mut net) = up();
            device.deliver_as(&from_relay(&DATAGRAM), length);
            assert_eq!(received(&mut net).unwrap(), Vec::<Vec<u8>>::new());
            assert_eq!(net.losses().malformed, 1);
            // The buffer is not lost with it.
            device.deliver(&from_relay(&DATAGRAM));
            assert_eq!(received(&mut net).unwrap(), [DATAGRAM]);
            assert_eq!(device.offered_buffers(), SIZE);
        }
    }

    #[test]
    fn frames_of_another_type_or_none_at_all_are_counted() {
        let (device, mut net) = up();
        let mut arp = from_relay(&DATAGRAM);
        arp[NET_HEADER_LEN + 12..NET_HEADER_LEN + 14].copy_from_slice(&[0x08, 0x06]);
        for bytes in
            [&arp[..], &[], &NET_HEADER, &NET_HEADER[..3], &from_relay(&DATAGRAM)[..30], &[0xff; BUFFER]]
        {
            device.deliver(bytes);
        }
        assert_eq!(received(&mut net).unwrap(), Vec::<Vec<u8>>::new());
        assert_eq!(net.losses().malformed, 6);
    }

    #[test]
    fn device_that_never_completes_makes_no_growth_and_no_panic() {
        let (device, mut net) = up();
        for _ in 0..10 * SIZE {
            net.push(GATEWAY, &DATAGRAM);
            net.send_batch().unwrap();
            assert!(received(&mut net).unwrap().is_empty());
        }
        assert!(!net.has_room());
        assert_eq!(net.losses().dropped, u64::try_from(9 * SIZE).unwrap());
        assert!(device.wants_interrupt(TRANSMIT), "it is waited for room");
        assert_eq!(device.transmit_all().len(), SIZE);
        net.send_batch().unwrap();
        assert!(net.has_room());
        assert!(!device.wants_interrupt(TRANSMIT));
    }

    #[test]
    fn no_notification_is_lost_while_the_index_goes_round() {
        /// Three times round the 16 bits of the ring's index, in batches that do not divide it.
        const FRAMES: usize = 3 * 65_536;
        let (device, mut net) = up();
        let (mut sent, mut arrived, mut kicks) = (0, 0, device.kicks(TRANSMIT));
        for batch in (1..=61).cycle() {
            for _ in 0..batch {
                net.push(GATEWAY, &LARGE);
            }
            sent += batch;
            net.send_batch().unwrap();
            // The device looks only when it is told to.
            assert_eq!(device.kicks(TRANSMIT), kicks + 1, "after {sent} frames");
            kicks += 1;
            arrived += device.transmit_all().len();
            assert_eq!(arrived, sent);
            if sent > FRAMES {
                break;
            }
        }
        assert_eq!(net.losses(), Losses::default());
    }

    #[test]
    fn device_that_looks_by_itself_is_not_notified() {
        let (device, mut net) = up();
        let before = device.kicks(TRANSMIT);
        device.set_no_notify(TRANSMIT, true);
        net.push(GATEWAY, &DATAGRAM);
        net.send_batch().unwrap();
        assert_eq!(device.kicks(TRANSMIT), before);
        device.set_no_notify(TRANSMIT, false);
        net.push(GATEWAY, &DATAGRAM);
        net.send_batch().unwrap();
        assert_eq!(device.kicks(TRANSMIT), before + 1);
    }

    #[test]
    fn interrupt_is_wanted_only_while_nothing_is_left_to_take() {
        let (device, mut net) = up();
        for _ in 0..=BATCH_MAX {
            device.deliver(&from_relay(&DATAGRAM));
        }
        assert_eq!(net.receive(&mut |_, _| {}).unwrap(), Rest::More);
        assert!(!device.wants_interrupt(RECEIVE));
        assert_eq!(net.receive(&mut |_, _| {}).unwrap(), Rest::None);
        assert!(device.wants_interrupt(RECEIVE));
    }

    #[test]
    fn nothing_is_sent_or_received_before_the_device_is_up() {
        let device = device();
        let mut net = net(&device);
        assert!(!net.has_room());
        net.push(GATEWAY, &DATAGRAM);
        net.send_batch().unwrap();
        assert_eq!(net.recv_batch(&mut |_, _| panic!("nothing came")).unwrap(), Rest::None);
        assert_eq!((net.losses().dropped, device.accepted()), (1, None));
    }

    #[test]
    fn garbage_in_the_whole_used_ring_harms_nothing() {
        let mut seed: u64 = 0x9E37_79B9_7F4A_7C15;
        let mut random = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for _ in 0..500 {
            let (device, mut net) = up();
            for _ in 0..20 {
                let queue = u16::try_from(random() & 1).unwrap();
                let id = u32::try_from(random() % 300).unwrap();
                device.complete(queue, id, u32::try_from(random() & 0xffff_ffff).unwrap());
                net.push(GATEWAY, &DATAGRAM);
                if net.send_batch().is_err() || received(&mut net).is_err() {
                    break;
                }
            }
        }
    }
}
