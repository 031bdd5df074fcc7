"""Our front-end against back-ends that are not ours: of packages, of other people's crates, and of recorded bytes."""
