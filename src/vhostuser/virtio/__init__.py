"""The virtio specification as data: feature bits, device status, the block device. Touches nothing."""
