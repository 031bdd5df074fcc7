//! What the crates ask of a device: features, configuration, and the work when a queue is kicked.

use std::io::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{new_event_consumer_and_notifier, EventConsumer, EventFlag, EventNotifier};

use crate::disk::{Disk, MAX_WRITE_ZEROES_SECTORS};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

const QUEUE_SIZE: usize = 1024;
const SEG_MAX: u32 = 126;
/// What Cloud Hypervisor, Firecracker and libblkio read; a byte more is refused, as their back-ends do.
const CONFIG_SIZE: usize = 60;
const WRITEBACK_OFFSET: usize = 32;

/// A disk behind one connection.
pub(crate) struct Device {
    disk: Arc<Disk>,
    num_queues: usize,
    protocol_features: VhostUserProtocolFeatures,
    event_idx: AtomicBool,
    memory: Mutex<Option<Memory>>,
    exit: (EventConsumer, EventNotifier),
}

impl Device {
    pub(crate) fn new(disk: Arc<Disk>, num_queues: usize, protocol_features: VhostUserProtocolFeatures) -> Device {
        let exit = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).expect("an eventfd");
        Device {
            disk,
            num_queues,
            protocol_features,
            event_idx: AtomicBool::new(false),
            memory: Mutex::new(None),
            exit,
        }
    }

    /// Ends the threads that the crate made for the queues.
    pub(crate) fn end_workers(&self) {
        let _ = self.exit.1.notify();
    }

    fn config(&self) -> [u8; CONFIG_SIZE] {
        let mut bytes = [0; CONFIG_SIZE];
        let mut put = |offset: usize, value: &[u8]| bytes[offset..offset + value.len()].copy_from_slice(value);
        put(0, &self.disk.num_sectors().to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &512u32.to_le_bytes());
        put(WRITEBACK_OFFSET, &[u8::from(self.disk.writeback())]);
        put(34, &(self.num_queues as u16).to_le_bytes());
        put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        bytes
    }

    fn serve(&self, memory: &GuestMemoryLoadGuard<GuestMemoryMmap>, vring: &VringMutex) -> Result<()> {
        loop {
            let next = vring.get_mut().get_queue_mut().pop_descriptor_chain(memory.clone());
            let Some(chain) = next else { return Ok(()) };
            let head = chain.head_index();
            let written = self.disk.answer(memory, &chain);
            vring.add_used(head, written).map_err(Error::other)?;
            if vring.needs_notification().map_err(Error::other)? {
                vring.signal_used_queue()?;
            }
        }
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        self.num_queues
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_MQ,
            VIRTIO_BLK_F_WRITE_ZEROES,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_F_VERSION_1,
        ];
        bits.iter().fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |all, bit| all | 1 << bit)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol_features
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let (start, length) = (offset as usize, size as usize);
        self.config().get(start..start + length).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<()> {
        match (offset as usize, bytes) {
            (WRITEBACK_OFFSET, &[value @ (0 | 1)]) => self.disk.set_writeback(value == 1),
            _ => Err(ErrorKind::InvalidInput.into()),
        }
    }

    fn update_memory(&self, memory: Memory) -> Result<()> {
        *self.memory.lock().expect("no thread panics here") = Some(memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.num_queues).map(|index| 1 << index).collect()
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some((self.exit.0.try_clone().ok()?, self.exit.1.try_clone().ok()?))
    }

    fn handle_event(&self, event: u16, events: EventSet, vrings: &[VringMutex], _thread_id: usize) -> Result<()> {
        let Some(vring) = vrings.get(event as usize).filter(|_| events == EventSet::IN) else {
            return Err(Error::other("an event that is no kick"));
        };
        let Some(memory) = self.memory.lock().expect("no thread panics here").as_ref().map(|all| all.memory()) else {
            return Ok(());
        };
        if !self.event_idx.load(Ordering::Relaxed) {
            return self.serve(&memory, vring);
        }
        loop {
            vring.disable_notification().map_err(Error::other)?;
            self.serve(&memory, vring)?;
            if !vring.enable_notification().map_err(Error::other)? {
                return Ok(());
            }
        }
    }
}
