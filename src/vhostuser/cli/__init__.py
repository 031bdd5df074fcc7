"""The programs `vhostuser` and `vhost-user-blk`: short, over public names. Touches what the package does."""

CONTROL_SUFFIX = ".ctl"
"""Added to the path of a disk's socket it makes that of its control socket."""
