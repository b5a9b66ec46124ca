"""Who has died: what turns an exchange that failed into the name of the process that is to blame.

A process group tells that a connection was closed, or that a time is up, and seldom whose fault
that is: where one process ends, its neighbours fail, and theirs fail because of them. Hence each
process notes in the store of the process group, twice a second, that it lives and in which exchange
it is; where an exchange fails, the notes of the others are read twice. The first process that finds
out writes the verdict down for the others.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch.distributed.distributed_c10d import _get_default_store

from vstar_kernels.models.sharded.ranks import RankFailure

PERIOD = 0.5  # seconds between two notes
PATIENCE = 3.0  # seconds without a new one after which a process is taken to be dead
_MADE: Counter[tuple[int, ...]] = Counter()  # heartbeats of the same processes, in this one


class Heartbeat:
    """What notes that this process lives, and reads the notes of the others.

    Args:
        ranks: The ranks, in the whole job, of the processes that share a video.
        here: Which of them this is, an index.
    """

    def __init__(self, ranks: Sequence[int], here: int) -> None:
        self._ranks, self._here = list(ranks), here
        self._exchange = 0
        # All processes make them in the same order, or their exchanges would not fit either.
        _MADE[tuple(ranks)] += 1
        self._prefix = f"vstar_kernels/{'-'.join(map(str, ranks))}/{_MADE[tuple(ranks)]}"
        self._store: Any = _get_default_store()
        # A connection of its own, lest a wait of the process group holds a note up.
        self._own: Any = self._store.clone() if hasattr(self._store, "clone") else self._store
        self._stopped = threading.Event()
        self._name = f"pid {os.getpid()} on {socket.gethostname()}"
        self._beats = 0
        self._note()
        self._thread = threading.Thread(target=self._run, name="vstar-heartbeat", daemon=True)
        self._thread.start()

    def next_exchange(self) -> int:
        """Returns the number of the exchange that begins."""
        self._exchange += 1
        return self._exchange

    def stop(self) -> None:
        """Ends the notes; nothing happens the second time."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(PERIOD):
            try:
                self._note()
            except RuntimeError:  # the store is gone, as the whole job soon will be
                return

    def _note(self) -> None:
        self._beats += 1
        note = f"{self._beats}|{self._exchange}|{self._name}"
        self._own.set(f"{self._prefix}/{self._here}", note)

    def _read(self, index: int) -> tuple[str, int, str]:
        key = f"{self._prefix}/{index}"
        if not self._own.check([key]):
            return "", 0, "not begun"
        beat, exchange, name = self._own.get(key).decode().split("|", 2)
        return beat, int(exchange), name

    def diagnose(self, purpose: str, exchange: int, error: Exception) -> RankFailure:
        """Returns the error that tells which process is to blame for an exchange that failed.

        It takes the seconds of ``PATIENCE``.

        Args:
            purpose: Of the exchange.
            exchange: Its number.
            error: How it failed.
        """
        where = f"rank {self._ranks[self._here]} waited in exchange {exchange} ({purpose})"
        found: list[Any] = []
        # Aside, as the store, too, may be gone: then it does not answer for a long time.
        asking = threading.Thread(target=self._ask, args=(exchange, found), daemon=True)
        asking.start()
        asking.join(3 * PATIENCE)
        if not found:
            return RankFailure(
                f"the store of the process group does not answer: the process that keeps it (rank "
                f"0, or torchrun) has died. {where}: {_first_line(error)}",
                (),
            )
        (dead, late), before = found
        dead, late = ([i for i in half if i != self._here] for half in (dead, late))
        blamed = [
            *(f"rank {self._ranks[i]} ({before[i][2]}) has died" for i in dead),
            *(
                f"rank {self._ranks[i]} ({before[i][2]}) lives but has not come, it is at exchange "
                f"{before[i][1]}"
                for i in late
            ),
        ]
        reason = "; ".join(blamed) or "every process lives and has come"
        ranks = [self._ranks[i] for i in (*dead, *late)]
        return RankFailure(f"{reason}. {where}: {_first_line(error)}", ranks)

    def _ask(self, exchange: int, found: list[Any]) -> None:
        """Adds to ``found`` which processes are dead and which are late, and all first notes."""
        others = [index for index in range(len(self._ranks)) if index != self._here]
        try:
            before = {index: self._read(index) for index in others}
            time.sleep(PATIENCE)
            after = {index: self._read(index) for index in others}
            dead = [index for index in others if after[index][0] == before[index][0]]
            late = [i for i in others if i not in dead and after[i][1] < exchange]
            verdict = ",".join(map(str, dead)) + "|" + ",".join(map(str, late))
            if dead or late:  # who comes later may find more dead, who died of these
                key = f"{self._prefix}/verdict"
                verdict = self._own.compare_set(key, "", verdict).decode() or verdict
        except (RuntimeError, OSError):
            return
        halves = [[int(i) for i in half.split(",") if i] for half in verdict.split("|")]
        found += [halves, {**before, self._here: ("", exchange, self._name)}]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
