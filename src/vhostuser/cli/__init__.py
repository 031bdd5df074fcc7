"""The programs `vhostuser` and `vhost-user-blk`: short, over public names. Touches what the package does."""
