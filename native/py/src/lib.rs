//! The Python shell over `vhostuser-core`.
