"""A long mixed load on back-ends, with memory, descriptors and threads watched: ``python -m tests.soak``."""
