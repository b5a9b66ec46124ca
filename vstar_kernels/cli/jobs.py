"""Many results in one folder: what is there is not made again, and what fails stops nothing.

A job is a folder in the folder of all, ``001-a-kite``, made aside and renamed when it is complete.
Its :data:`RECORD` has the job's hash, of all that decides the results; a job whose hash is found in
any of the folders is done. Nothing else is kept about what is done, so that to go on is to run the
command again. ``index.jsonl`` has a line for each job.

Several processes, on one machine or several that share the folder, may work on it at once: a job is
locked by whoever makes it, and the system releases the lock of a process that dies.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from vstar_kernels.cli.options import CommandError
from vstar_kernels.files import IncompleteError, resolve, results_folder, write_atomically
from vstar_kernels.models.progress import OnStep
from vstar_kernels.reading import FormatError, decode, read_text, shorten

RECORD = "generation.json"
INDEX = "index.jsonl"
LOCK = ".lock"
PART, PART_DIGITS = ".part-", 16  # of a job that is being made: before how much of its hash
LOCK_DIGITS = 15  # of its hash, a byte's place in the file
LONGEST_SLUG = 48  # characters of a folder's name
SHOWN = 500  # characters of an error
SHOWN_KEPT = 4000  # of one that says in the end where results are kept
WRONG = (TypeError, ValueError, NotImplementedError, CommandError)  # arguments
# After which there is no other try: it would not change them, or leave more that is kept.
FINAL = (*WRONG, IncompleteError)


@dataclass(frozen=True)
class Job:
    """What is to be made into one folder.

    Attributes:
        name: What the folder is called, after a number; any text.
        task: What the maker is given.
        key: JSON of all that decides the results, and of nothing else.
    """

    name: str
    task: Any
    key: Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """A job's folder.

    Attributes:
        number: The job's, from 1.
        job: The job.
        hash: The SHA-256 of its key, and of how many before it have the same.
        folder: The folder's name.
        replaces: The hash of the job whose folder of that name makes way for it, empty of a folder
            that is not complete; None where there is none.
    """

    number: int
    job: Job
    hash: str
    folder: str
    replaces: str | None

    def mark(self, files: Collection[str]) -> dict[str, Any]:
        """Returns what a maker writes into :data:`RECORD` under ``"job"``.

        Args:
            files: The names of all the files that make the folder complete.
        """
        return {"hash": self.hash, "files": sorted({*files, RECORD})}


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a line of the index.

    Attributes:
        number, name, hash: The job's.
        status: Whether its folder is complete.
        folder: The folder's name; None without one.
        error: Why there is none, in a line.
        seconds: How long this run took to make it; None where it was there already.
        facts: More, from its record.
    """

    number: int
    name: str
    hash: str
    status: Literal["done", "failed"]
    folder: str | None = None
    error: str | None = None
    seconds: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Returns a line of JSON, without what it does not have."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(fields | fields.pop("facts"), ensure_ascii=False)


class Make(Protocol):
    """Makes the files of a job."""

    def __call__(self, task: Any, scratch: Path, place: Place, on_step: OnStep) -> None:
        """Writes a job's files into an empty folder, :data:`RECORD` with the place's mark.

        Args:
            task: What is to be made.
            scratch: The empty folder.
            place: Whose :meth:`Place.mark` the record has under ``"job"``.
            on_step: Is to be told the steps, if there are any.
        """


class Report(Protocol):
    """Who is told how far the jobs are."""

    def begins(self, place: Place) -> OnStep:
        """Is told that a job is begun; returns who is told its steps."""

    def ends(self, outcome: Outcome) -> None:
        """Is told what became of a job."""


class JobFolder:
    """The folder of all jobs' folders.

    It may be sent to other processes and machines, for each of which ``path`` must be the same
    folder.

    Args:
        path: Where; made where it is not there yet.
        jobs: All of them, in the order of their numbers.
        names: The names that files of jobs may have, in this run or an earlier one.
        facts: What of a record's fields the index shows.

    Attributes:
        done: What is there already.
        places: Where the others' results go.

    Raises:
        OSError: The folder cannot be made or read.
    """

    def __init__(
        self,
        path: Path,
        jobs: Sequence[Job],
        names: Collection[str],
        *,
        facts: Collection[str] = (),
    ) -> None:
        self.path = resolve(path)
        self._names = frozenset(names)
        self._facts = tuple(facts)
        self.path.mkdir(parents=True, exist_ok=True)
        self._locks = Locks(self.path / LOCK)
        there = {
            entry.name: record
            for entry in sorted(self.path.iterdir())
            if not entry.name.startswith(".") and (record := _complete(entry)) is not None
        }
        by_hash = {record["job"]["hash"]: name for name, record in there.items()}
        hashes = _hashes(jobs)
        taken = {by_hash[digest] for digest in hashes if digest in by_hash}
        self.done: list[Outcome] = []
        self.places: list[Place] = []
        digits = max(3, len(str(len(jobs))))
        for number, (job, digest) in enumerate(zip(jobs, hashes, strict=True), start=1):
            if digest in by_hash:
                place = Place(number, job, digest, by_hash[digest], replaces=None)
                self.done.append(self._is_there(place, there[place.folder]))
                continue
            name = _free(f"{number:0{digits}}-{slug(job.name)}", taken)
            taken.add(name)
            self.places.append(Place(number, job, digest, name, self._hash_in(name)))
        self._clear_abandoned()

    def find(self, place: Place) -> Outcome | None:
        """Returns the outcome of a job whose folder is complete, None if it is not."""
        record = _complete(self.path / place.folder)
        if record is None or record["job"]["hash"] != place.hash:
            return None
        return self._is_there(place, record)

    def make(
        self, place: Place, make: Make, on_step: OnStep, *, retries: int = 0, wait: bool = True
    ) -> Outcome | None:
        """Makes a job's folder, unless it is there meanwhile.

        Args:
            place: The job's.
            make: Makes its files.
            on_step: Is told the steps.
            retries: How often it is made again after an error that arguments are not the cause of.
            wait: Where another process makes it at present, wait for that one to end.

        Returns:
            What became of it; None if another process makes it, and it was not waited for. Only
            what ends the process, such as Ctrl-C, is raised.
        """
        # Its folder, too: another process may have another job for it.
        folder = hashlib.sha256(place.folder.encode()).hexdigest()
        with (
            self._locks.hold(place.hash, wait=wait) as held,
            self._locks.hold(folder, wait=wait) as free,
        ):
            if not (held and free):
                return None
            begun = time.monotonic()
            for trial in range(retries + 1):
                try:
                    found = self.find(place)
                    if found is None:
                        self._make(place, make, on_step)
                        found = self.find(place)
                        assert found is not None, "what makes jobs writes their records"
                        return replace(found, seconds=round(time.monotonic() - begun, 3))
                    return found
                except Exception as error:
                    if trial == retries or isinstance(error, FINAL):
                        return failed(place, describe(error))
        raise AssertionError("a job is made, or fails")

    def write_index(self, outcomes: Collection[Outcome]) -> None:
        """Writes what became of all jobs, in the order of their numbers."""
        lines = [outcome.to_json() for outcome in sorted(outcomes, key=lambda x: x.number)]
        write_atomically(self.path / INDEX, "".join(f"{line}\n" for line in lines))

    def say_how_far(self, error: KeyboardInterrupt, outcomes: Collection[Outcome]) -> None:
        """Adds to an interruption how many jobs are done."""
        count = sum(outcome.status == "done" for outcome in outcomes)
        total = len(self.done) + len(self.places)
        error.args = (*error.args, f"{count} of {total} are done; the same command goes on")

    def clear(self, place: Place) -> None:
        """Deletes what a process that has died has left of a job; it must not be running."""
        shutil.rmtree(self._scratch(place), ignore_errors=True)

    def _clear_abandoned(self) -> None:
        """Deletes what processes that have died have left of any jobs; those that live hold locks.

        A job's own is deleted when it is made again, but perhaps nobody wants it any more.
        """
        for scratch in self.path.glob(f"{PART}*"):
            start = scratch.name.removeprefix(PART)  # of its hash, which is enough for its lock
            if re.fullmatch(rf"[0-9a-f]{{{PART_DIGITS}}}", start) is None:
                continue
            with self._locks.hold(start, wait=False) as held:
                if held and self._locks.work:
                    shutil.rmtree(scratch, ignore_errors=True)

    def _scratch(self, place: Place) -> Path:
        return self.path / f"{PART}{place.hash[:PART_DIGITS]}"

    def _hash_in(self, folder: str) -> str | None:
        """Returns the hash of the job in a folder, empty if it is not complete; None without it."""
        if not (self.path / folder).exists():
            return None
        record = _complete(self.path / folder)
        return "" if record is None else str(record["job"]["hash"])

    def _make(self, place: Place, make: Make, on_step: OnStep) -> None:
        target = self.path / place.folder
        if self._hash_in(place.folder) not in (None, place.replaces):
            raise FileExistsError(
                f"{target} has been made meanwhile, by another process with other jobs: run the "
                "command again"
            )
        self.clear(place)
        scratch = self._scratch(place)
        overwrite = place.replaces is not None
        with results_folder(target, self._names, overwrite=overwrite, scratch=scratch) as part:
            make(place.job.task, part, place, on_step)

    def _is_there(self, place: Place, record: Mapping[str, Any]) -> Outcome:
        facts = {name: record[name] for name in self._facts if name in record}
        return Outcome(place.number, place.job.name, place.hash, "done", place.folder, facts=facts)


def run_jobs(folder: JobFolder, make: Make, report: Report, *, retries: int = 0) -> list[Outcome]:
    """Makes one job after another in this process; returns what became of all.

    Jobs that another process is at are left to the end, and are made here if it has died by then.

    Raises:
        KeyboardInterrupt: It was interrupted; the index is written, and the message says how far
            it came.
    """
    outcomes = list(folder.done)

    def attempt(place: Place, *, wait: bool) -> bool:
        outcome = folder.make(place, make, report.begins(place), retries=retries, wait=wait)
        if outcome is not None:
            outcomes.append(outcome)
            report.ends(outcome)  # first: where the disk is full, it says where results are
            folder.write_index(outcomes)
        return outcome is not None

    try:
        waiting = [place for place in folder.places if not attempt(place, wait=False)]
        for place in waiting:
            attempt(place, wait=True)
    except KeyboardInterrupt as error:
        folder.say_how_far(error, outcomes)
        raise
    finally:
        folder.write_index(outcomes)
    return sorted(outcomes, key=lambda outcome: outcome.number)


def failed(place: Place, error: str) -> Outcome:
    """Returns the outcome of a job that failed."""
    return Outcome(place.number, place.job.name, place.hash, "failed", error=error)


def describe(error: BaseException) -> str:
    """Returns an error in a line; with its kind where the message is not ours."""
    limit = SHOWN_KEPT if isinstance(error, IncompleteError) else SHOWN
    text = shorten(str(error), limit)
    if isinstance(error, (*WRONG, OSError)):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def slug(text: str) -> str:
    """Returns a text as a part of a folder's name: words of small letters, joined by hyphens."""
    words = re.findall(r"\w+", text.lower())
    joined = ""
    for word in words:
        if joined and len(joined) + 1 + len(word) > LONGEST_SLUG:
            break
        joined = f"{joined}-{word}" if joined else word[:LONGEST_SLUG]
    return joined or "video"


class Locks:
    """Locks of jobs, each one byte of a file, which end with the process at the latest.

    Byte locks (POSIX) hold over NFS, too, and between processes only, not between threads.

    Attributes:
        work: Whether the system has not refused to lock: otherwise nobody is kept out.
    """

    def __init__(self, path: Path) -> None:
        self.work = True
        self._path = path
        self._file: Any = None

    def __reduce__(self) -> Any:
        """Is opened anew in another process."""
        return type(self), (self._path,)

    @contextmanager
    def hold(self, digest: str, *, wait: bool) -> Iterator[bool]:
        """Locks a job by its hash for a while; gives whether it could be without waiting."""
        try:
            import fcntl
        except ImportError:  # Windows, where the folders' being renamed must do
            self.work = False
            yield True
            return
        if self._file is None:
            self._file = self._path.open("ab")
        place = int(digest[:LOCK_DIGITS], 16)
        how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            fcntl.lockf(self._file, how, 1, place)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                yield False
                return
            self.work = False
            warnings.warn(
                f"{self._path} cannot be locked ({error}): let one process at a time work there",
                stacklevel=2,
            )
        try:
            yield True
        finally:
            with suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)


def _hashes(jobs: Sequence[Job]) -> list[str]:
    """Returns each job's hash; those with equal keys have different ones."""
    seen: dict[str, int] = {}
    hashes = []
    for job in jobs:
        text = json.dumps(job.key, ensure_ascii=True, sort_keys=True)
        before = seen.get(text, 0)
        seen[text] = before + 1
        hashes.append(hashlib.sha256(f"{before}:{text}".encode()).hexdigest())
    return hashes


def _complete(folder: Path) -> dict[str, Any] | None:
    """Returns the record of a job's folder, None if it is not complete or is not a job's."""
    try:
        record = decode(read_text(folder / RECORD))
        mark = record["job"]
        # An exchange of files that a power cut ends may leave some.
        are_there = all((folder / name).is_file() for name in mark["files"])
        return record if are_there and isinstance(mark["hash"], str) else None
    except (OSError, FormatError, KeyError, TypeError):
        return None


def _free(name: str, taken: Collection[str]) -> str:
    """Returns a name that is not taken."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}-{count}"
    return candidate
