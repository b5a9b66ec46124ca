"""Jobs in folders: what is there is not made again, what fails stops nothing, two may work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT
from vstar_kernels.cli.jobs import INDEX, RECORD, Job, JobFolder, run_jobs, slug
from vstar_kernels.files import IncompleteError

NAMES = (RECORD, "text.txt")


class Maker:
    """Writes each task's text; and notes which it was asked for."""

    def __init__(self, **broken):
        self.asked = []
        self.broken = broken

    def __call__(self, task, scratch, place, on_step):
        self.asked.append(task)
        if task in self.broken:
            raise self.broken[task]
        (scratch / "text.txt").write_text(task)
        on_step(0, 1)
        record = {"job": place.mark(["text.txt"]), "seed": 3}
        (scratch / RECORD).write_text(json.dumps(record))


class Silent:
    def __init__(self):
        self.told = []

    def begins(self, place):
        return lambda step, total: self.told.append((place.number, step, total))

    def ends(self, outcome):
        self.told.append((outcome.number, outcome.status))


def jobs(*names, **more):
    return [Job(name, name, {"text": name, **more}) for name in names]


def run(path, wanted, maker=None, *, retries=0, report=None):
    maker = maker or Maker()
    folder = JobFolder(path, wanted, NAMES, facts=["seed"])
    outcomes = run_jobs(folder, maker, report or Silent(), retries=retries)
    index = [json.loads(line) for line in (path / INDEX).read_text().splitlines()]
    assert [line["number"] for line in index] == list(range(1, len(wanted) + 1))
    assert not list(path.glob(".part*"))
    return maker.asked, [outcome.status for outcome in outcomes], index


def folders(path):
    return sorted(x.name for x in path.iterdir() if x.is_dir())


def texts(path):
    return {name: (path / name / "text.txt").read_text() for name in folders(path)}


def test_run_again(tmp_path):
    report = Silent()
    wanted = jobs("a kite", "a dog")
    asked, statuses, index = run(tmp_path, wanted, report=report)
    assert (asked, statuses) == (["a kite", "a dog"], ["done"] * 2)
    assert report.told == [(1, 0, 1), (1, "done"), (2, 0, 1), (2, "done")]
    assert texts(tmp_path) == {"001-a-kite": "a kite", "002-a-dog": "a dog"}
    assert [(x["folder"], x["seed"]) for x in index] == [("001-a-kite", 3), ("002-a-dog", 3)]
    assert all(x["seconds"] >= 0 for x in index)
    asked, statuses, index = run(tmp_path, wanted)
    assert (asked, statuses) == ([], ["done"] * 2)
    assert "seconds" not in index[0]
    # What is not complete, or not a record, is made again.
    (tmp_path / "001-a-kite/text.txt").unlink()
    (tmp_path / "002-a-dog" / RECORD).write_text('{"job": 3}')
    (tmp_path / "002-a-dog/notes.txt").write_text("mine")
    assert run(tmp_path, wanted)[0] == ["a kite", "a dog"]
    assert (tmp_path / "002-a-dog/notes.txt").read_text() == "mine"


def test_jobs_are_known_by_what_they_make(tmp_path):
    run(tmp_path, jobs("a", "b", "b"))  # as often as it is there
    assert folders(tmp_path) == ["001-a", "002-b", "003-b"]
    before = {x: (tmp_path / x / RECORD).stat().st_ino for x in folders(tmp_path)}
    # One more before them, one of them away: nothing of the others is made again or moved.
    asked, _, index = run(tmp_path, jobs("a", "new", "b"))
    assert asked == ["new"]
    assert [x["folder"] for x in index] == ["001-a", "002-new", "002-b"]
    after = {x: (tmp_path / x / RECORD).stat().st_ino for x in before}
    assert after == before
    # A name that another job's folder has.
    asked, _, index = run(tmp_path, [*jobs("b", steps=2), *jobs("a", "b")])
    assert [x["folder"] for x in index] == ["001-b", "001-a", "002-b"]
    asked, _, index = run(tmp_path, [*jobs("x"), *jobs("b", steps=3), *jobs("b")])
    assert [x["folder"] for x in index] == ["001-x", "002-b-2", "002-b"]
    # Other settings replace what nobody wants any more.
    asked, _, index = run(tmp_path, jobs("a", steps=4))
    assert asked == ["a"]
    assert index[0]["folder"] == "001-a"


def test_a_failing_job_stops_nothing(tmp_path):
    maker = Maker(
        b=ValueError("frames must be\n\x1b[31mmore"), c=RuntimeError("x" * 9999), d=OSError()
    )
    asked, statuses, index = run(tmp_path, jobs("a", "b", "c", "d", "e"), maker, retries=2)
    assert statuses == ["done", "failed", "failed", "failed", "done"]
    assert asked == ["a", "b", "c", "c", "c", "d", "d", "d", "e"]  # arguments are wrong once
    assert index[1]["error"] == "frames must be more"
    assert index[2]["error"].startswith("RuntimeError: xxx")
    assert len(index[2]["error"]) < 600
    assert index[3]["error"] == "OSError"
    assert "folder" not in index[1]
    assert folders(tmp_path) == ["001-a", "005-e"]
    asked, statuses, _ = run(tmp_path, jobs("a", "b", "c", "d", "e"))
    assert asked == ["b", "c", "d"]
    assert statuses == ["done"] * 5


def test_an_interruption(tmp_path):
    maker = Maker(b=KeyboardInterrupt())
    folder = JobFolder(tmp_path, jobs("a", "b", "c"), NAMES)
    with pytest.raises(KeyboardInterrupt, match="1 of 3 are done; the same command goes on"):
        run_jobs(folder, maker, Silent())
    assert folders(tmp_path) == ["001-a"]
    assert len((tmp_path / INDEX).read_text().splitlines()) == 1
    assert run(tmp_path, jobs("a", "b", "c"))[0] == ["b", "c"]


def test_two_with_other_jobs(tmp_path):
    """Nobody's folder is replaced that has come since the jobs were looked up."""
    folder = JobFolder(tmp_path, jobs("a"), NAMES)
    run(tmp_path, jobs("a", steps=2))
    (outcome,) = run_jobs(folder, Maker(), Silent())
    assert outcome.status == "failed"
    assert "001-a has been made meanwhile, by another process" in outcome.error


def test_two_that_replace_the_same(tmp_path):
    """What makes way is what was there when the jobs were looked up, and nothing later."""
    run(tmp_path, jobs("a"))
    one, other = (JobFolder(tmp_path, jobs("a", steps=n), NAMES) for n in (2, 3))
    (outcome,) = run_jobs(one, Maker(), Silent())
    assert (outcome.status, outcome.folder) == ("done", "001-a")
    (late,) = run_jobs(other, Maker(), Silent())
    assert late.status == "failed"
    assert "001-a has been made meanwhile, by another process" in late.error
    assert JobFolder(tmp_path, jobs("a", steps=2), NAMES).done


WORKER = """
import sys, time
from pathlib import Path
from tests.cli.test_jobs import NAMES, Maker, Silent, jobs
from vstar_kernels.cli.jobs import JobFolder, run_jobs
path, seconds = Path(sys.argv[1]), float(sys.argv[2])
class Slow(Maker):
    def __call__(self, task, scratch, place, on_step):
        (scratch / "text.txt").write_text("half")
        print(task, flush=True)
        time.sleep(seconds)
        super().__call__(task, scratch, place, on_step)
outcomes = run_jobs(JobFolder(path, jobs(*"abcd"), NAMES), Slow(), Silent())
sys.exit(any(outcome.status == "failed" for outcome in outcomes))
"""


def start(path, seconds):
    command = [sys.executable, "-c", WORKER, str(path), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name != "posix", reason="no locks")
def test_two_processes_share_the_jobs_and_one_may_die(tmp_path):
    dies = start(tmp_path, 600)
    try:
        assert dies.stdout.readline() == "a\n"
        # What no living process has begun goes; what is not a job's stays.
        (part,) = tmp_path.glob(".part-*")
        abandoned, mine = tmp_path / ".part-0123456789abcdef", tmp_path / ".part-mine"
        for folder in (abandoned, mine):
            folder.mkdir()
            (folder / "text.txt").touch()
        # Nor does another job come into the folder that it is to have.
        other = JobFolder(tmp_path, jobs("a", steps=2), NAMES)
        assert other.make(other.places[0], Maker(), print, wait=False) is None
        assert set(tmp_path.glob(".part-*")) == {part, mine}
        shutil.rmtree(mine)
        lives = start(tmp_path, 0)
        others = [lives.stdout.readline().strip() for _ in range(3)]
        assert others == ["b", "c", "d"]  # not what the other one is at
        time.sleep(0.05)
        assert lives.poll() is None  # it waits for that
        dies.send_signal(signal.SIGKILL)
        assert lives.communicate()[0] == "a\n"
        assert lives.returncode == 0
    finally:
        dies.kill()
        dies.communicate()
    assert texts(tmp_path) == {f"00{n}-{x}": x for n, x in enumerate("abcd", start=1)}
    assert not list(tmp_path.glob(".part*"))
    assert len((tmp_path / INDEX).read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A kite rises, over a beach!", "a-kite-rises-over-a-beach"),
        ("../../etc/passwd", "etc-passwd"),
        ("…", "video"),
        ("x" * 100, "x" * 48),
        ("many words " * 20, "many-words-many-words-many-words-many-words-many"),
        ("Ein Bär läuft", "ein-bär-läuft"),
    ],
)
def test_names_of_folders(text, expected):
    assert slug(text) == expected


def test_what_is_kept_is_kept_once(tmp_path):
    maker = Maker(a=IncompleteError("x" * 999 + "the video is in /tmp/x"))
    asked, statuses, index = run(tmp_path, jobs("a", "b"), maker, retries=2)
    assert (asked, statuses) == (["a", "b"], ["failed", "done"])
    assert index[0]["error"].endswith("the video is in /tmp/x")


def test_a_full_disk_does_not_hide_where_results_are(tmp_path, monkeypatch):
    folder, report = JobFolder(tmp_path, jobs("a"), NAMES), Silent()

    def write(outcomes):
        raise OSError("no space left")

    monkeypatch.setattr(folder, "write_index", write)
    with pytest.raises(OSError, match="no space left"):
        run_jobs(folder, Maker(), report)
    assert report.told[-1] == (1, "done")


@pytest.mark.skipif(os.name != "posix", reason="links are POSIX's")
def test_a_folder_that_is_a_link_in_a_circle(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="circle"):
        JobFolder(tmp_path / "circle", jobs("a"), NAMES)
