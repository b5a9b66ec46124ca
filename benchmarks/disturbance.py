"""How much of the processor others took while something was measured.

Two threads that wait for each other at every call take many times as long when a third process
wants a core, and no median undoes that.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
# Of all cores' time: more than a quiet machine's own chores.
MUCH = 0.1
# Columns of /proc/stat's first line in which no process of this machine runs.
IDLE, IOWAIT, GUEST = 3, 4, 8


class Watch:
    """Started when it is made."""

    def __init__(self) -> None:
        self._start = self._read()

    def others(self) -> float | None:
        """The share of all cores' time that others took; None where it cannot be told."""
        end = self._read()
        if self._start is None or end is None:
            return None
        busy, own, now = (x - y for x, y in zip(end, self._start, strict=True))
        return max(0.0, (busy - own) / (now * (os.cpu_count() or 1))) if now else None

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds: of all processes on all cores, of this one, on the clock."""
        if not STAT.exists():
            return None
        ticks = [int(x) for x in STAT.read_text().split("\n", 1)[0].split()[1:]]
        busy = sum(ticks[:GUEST]) - ticks[IDLE] - ticks[IOWAIT]
        return busy / os.sysconf("SC_CLK_TCK"), time.process_time(), time.monotonic()
