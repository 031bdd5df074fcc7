"""Back-ends that replay what other people's programs answer, byte by byte, over a device half of plain Python.

Nothing here uses the package under test: messages are bytes, rings are read with `struct`.
"""
