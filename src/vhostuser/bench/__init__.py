"""Measuring a back-end. Public names, nothing else."""

from vhostuser.bench.compare import Interval, alternate, median, median_interval
from vhostuser.bench.latency import PERCENTILES, Latencies
from vhostuser.bench.load import PATTERNS, Load, Measured, Pattern, Target

__all__ = [
    "PATTERNS",
    "PERCENTILES",
    "Interval",
    "Latencies",
    "Load",
    "Measured",
    "Pattern",
    "Target",
    "alternate",
    "median",
    "median_interval",
]
