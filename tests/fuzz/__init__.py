"""Coverage-guided fuzzing: `python -m tests.fuzz`. What it finds becomes an ordinary test."""
