"""Jobs on a cluster: an actor pool of Ray Data, of which each actor holds a model of its own.

All machines share the folder of the jobs. What is done is in it and nowhere else, so whatever Ray
runs twice, after a machine has left, is found done. Imported on demand: it needs ``ray[data]``.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from vstar_kernels.cli.jobs import JobFolder, Make, Outcome, Place, Report, failed
from vstar_kernels.cli.options import CommandError
from vstar_kernels.reading import shorten

ANSWER_SECONDS = 5  # in which a cluster's head takes a connection
TRIES = ".tries"  # a file for each job that is being made, longer by a byte for each try


class Worker:
    """An actor of the pool: makes the jobs that it is sent, by their places in the list.

    Args:
        folder: Of the jobs.
        load: Returns what makes them, on the actor's machine.
        retries: How often a job is tried again that failed, or that ended its worker.
        threads: Of torch, as in the process that began this, so that results have the same bits.
        here: The folder of that process, from which relative names of files are looked for; Ray
            begins its workers in another one.
    """

    def __init__(
        self, folder: JobFolder, load: Callable[[], Make], retries: int, threads: int, here: Path
    ) -> None:
        torch.set_num_threads(threads)
        with suppress(OSError):  # a machine that has it not may have all that is named
            os.chdir(here)
        self._folder = folder
        self._retries = retries
        self._make = load()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns what became of the job of a row."""
        place = self._folder.places[row["index"]]
        with _counted(self._folder, place) as tries:
            if tries > self._retries + 1:
                self._folder.clear(place)
                outcome: Outcome | None = failed(
                    place,
                    f"its worker died, {tries - 1} times: it was killed, for its memory say, or "
                    "crashed",
                )
            else:
                outcome = self._folder.make(place, self._make, _ignore, retries=self._retries)
        assert outcome is not None
        return {"index": row["index"], "outcome": vars(outcome)}


def run_on_ray(
    folder: JobFolder,
    load: Callable[[], Make],
    report: Report,
    *,
    address: str,
    workers: int | None,
    retries: int,
    gpus: bool,
) -> list[Outcome]:
    """Makes all jobs on a cluster; returns what became of each.

    Args:
        folder: Of the jobs, which all machines of the cluster find under its path.
        load: Returns what makes them; runs once in each actor.
        report: Is told of each job when it ends.
        address: Of the cluster, as ``ray.init`` takes it.
        workers: How many actors; None is one for each GPU, or for each machine if there is none.
        retries: As for :class:`Worker`.
        gpus: Whether the jobs run on GPUs, where there are any.

    Raises:
        CommandError: Ray is not installed, the cluster cannot be reached, or the model cannot be
            loaded there.
        KeyboardInterrupt: It was interrupted; the index is written, and the message says how far
            it came.
    """
    ray = _import_ray()
    _quiet(ray)
    shutil.rmtree(folder.path / TRIES, ignore_errors=True)
    outcomes = {outcome.number: outcome for outcome in folder.done}
    try:
        with _connected(ray, address):
            for outcome in _stream(ray, folder, load, workers, retries, gpus=gpus):
                is_new = outcome.number not in outcomes
                outcomes[outcome.number] = outcome
                if is_new:
                    report.ends(outcome)
                folder.write_index(outcomes.values())
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise CommandError(_reason(error)) from error
    except KeyboardInterrupt as error:
        folder.say_how_far(error, outcomes.values())
        raise
    finally:
        folder.write_index(outcomes.values())
        shutil.rmtree(folder.path / TRIES, ignore_errors=True)
    return [outcomes[number] for number in sorted(outcomes)]


def _stream(
    ray: Any,
    folder: JobFolder,
    load: Callable[[], Make],
    workers: int | None,
    retries: int,
    *,
    gpus: bool,
) -> Iterator[Outcome]:
    """Yields what became of jobs, as they end; some twice where a machine has left."""
    there = ray.cluster_resources()
    num_gpus = int(there.get("GPU", 0)) if gpus else 0
    nodes = sum(node["Alive"] for node in ray.nodes())
    size = min(workers or num_gpus or nodes, len(folder.places))
    rows = [{"index": index} for index in range(len(folder.places))]
    # A block for each job, so that it is sent, retried and told by itself; and each actor gets
    # another one only when it is done, so that the last ones are not all one actor's. (Ray Data
    # spreads actors over machines, restarts those that die, and sends their jobs again.)
    outcomes = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Worker,
        fn_constructor_args=[folder, load, retries, torch.get_num_threads(), Path.cwd()],
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
        num_cpus=1,
        num_gpus=1 if num_gpus else 0,
    )
    for row in outcomes.iter_rows():
        yield Outcome(**row["outcome"])


@contextmanager
def _counted(folder: JobFolder, place: Place) -> Iterator[int]:
    """Counts the tries of a job that did not come to an end; gives the number of this one."""
    path = folder.path / TRIES / place.hash[:16]
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        file.write(b".")
    yield path.stat().st_size
    with suppress(OSError):
        path.unlink()


def _ignore(step: int, total: int) -> None:
    """Is told the steps on another machine, of which nobody sees anything."""


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise CommandError(
            f"--ray needs Ray Data ({error}): pip install 'vstar_kernels[ray]'"
        ) from error
    return ray


def _quiet(ray: Any) -> None:
    """Leaves the terminal to this command's own report."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are raised, too


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Connects to a cluster, unless the process is connected already."""
    if ray.is_initialized():
        yield
        return
    _check_answers(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of an address that is none, too many kinds
        reason = shorten(str(error)) or type(error).__name__
        raise CommandError(f"--ray {address!r}: cannot connect: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises CommandError where nothing answers at a host and port: Ray asks for two minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "://" in host or not port.isdecimal():
        return  # auto, local, or a name that Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:  # of no port, of no host's name
        raise CommandError(f"--ray {address!r}: nothing answers there: {error}") from error


def _reason(error: Exception) -> str:
    """Returns what is wrong, of an exception that shows the tracebacks of other processes."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    _, is_ours, message = last.partition(f"{CommandError.__name__}: ")
    return message if is_ours else f"--ray: {shorten(last)}"
