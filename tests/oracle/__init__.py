"""The native split ring held against a slow, obvious one in Python."""
