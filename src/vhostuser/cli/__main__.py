"""`python -m vhostuser.cli` is the program `vhostuser`."""

from vhostuser.cli.main import main

main()
