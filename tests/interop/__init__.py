"""Real peers other than guests: QEMU's tools through libblkio, against images that we serve."""
