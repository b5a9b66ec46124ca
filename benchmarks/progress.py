"""How far a worker has come in a case: kept beside a run's file, for the worker that follows.

A worker is lost where a peer hangs, ends the process or leaves a GPU that nothing runs on any more.
The file says who was at work, and what is known of a case's peers, so that another worker measures
the rest of that case.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vstar_kernels.files import write_atomically

RESTART = 75  # a worker's exit status: a new process is needed, and can go on


@dataclass(frozen=True)
class Trouble:
    """What a peer did to a process: ``fatal`` where it has no times, else it cannot be captured."""

    reason: str
    fatal: bool


class RestartError(Exception):
    """A peer has made this process useless."""

    def __init__(self, peer: str, trouble: Trouble) -> None:
        super().__init__(f"{peer}: {trouble.reason}")
        self.peer, self.trouble = peer, trouble


@dataclass
class Progress:
    """The case that is measured, by its task's key, the peer at work, and the peers' troubles."""

    path: Path
    task: str = ""
    peer: str = ""
    troubles: dict[str, Trouble] = field(default_factory=dict)

    @classmethod
    def beside(cls, results: Path) -> Progress:
        """Returns what is known of the case in progress of a run's file."""
        path = results.with_suffix(".progress")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(path)
        troubles = {name: Trouble(**x) for name, x in found["troubles"].items()}
        return cls(path, found["task"], found["peer"], troubles)

    def begin(self, task: str) -> None:
        """Begins a case; what is known of its peers stays, if an earlier worker began it."""
        if task != self.task:
            self.task, self.troubles = task, {}
        self.at("")

    def at(self, peer: str) -> None:
        """Notes who is at work; nobody by name where all are."""
        self.peer = peer
        self._write()

    def add(self, peer: str, trouble: Trouble) -> None:
        """Notes what a peer did to a process, which has been left by all."""
        self.troubles[peer], self.peer = trouble, ""
        self._write()

    def still(self) -> float:
        """Returns for how many seconds nobody has begun anything."""
        try:
            return max(0.0, time.time() - self.path.stat().st_mtime)
        except FileNotFoundError:
            return 0.0

    def _write(self) -> None:
        troubles = {name: asdict(x) for name, x in self.troubles.items()}
        found = {"task": self.task, "peer": self.peer, "troubles": troubles}
        write_atomically(self.path, json.dumps(found))
