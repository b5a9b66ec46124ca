"""Jobs on a cluster of two nodes that lives on this machine, and loses workers and a node.

They are run by ``make test-ray`` alone, but for those without Ray.
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.cli.test_jobs import NAMES, jobs
from tests.helpers import ROOT
from vstar_kernels.cli import cluster as cluster_module
from vstar_kernels.cli.cluster import TRIES, Worker, run_on_ray
from vstar_kernels.cli.jobs import INDEX, RECORD, JobFolder
from vstar_kernels.cli.main import main
from vstar_kernels.cli.options import CommandError

on_ray = pytest.mark.ray
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


class Maker:
    """Writes a task's text on any machine, and what its name asks for before."""

    def __call__(self, task, scratch, place, on_step):
        tried = scratch.parent / f"tried-{task}"
        with tried.open("a") as file:
            print(os.getpid(), file=file)
        count = len(tried.read_text().split())
        if task.startswith("wrong"):
            raise ValueError("wrong\nfor ever")
        if task.startswith("kills") or (task.startswith("dies") and count == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if task.startswith("slow"):
            time.sleep(8)
        (scratch / "text.txt").write_text(task)
        (scratch / RECORD).write_text(json.dumps({"job": place.mark(["text.txt"]), "seed": 3}))


class Silent:
    def __init__(self):
        self.ended = []

    def begins(self, place):
        raise AssertionError("steps are told by nobody")

    def ends(self, outcome):
        self.ended.append(outcome.number)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{before}"  # of the workers, for the tests
    head = {**NODE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    os.environ["PYTHONPATH"] = before


def run(path, wanted, *, retries=1, workers=None):
    folder = JobFolder(path, wanted, NAMES, facts=["seed"])
    report = Silent()
    outcomes = run_on_ray(
        folder, Maker, report, address="auto", workers=workers, retries=retries, gpus=True
    )
    assert [outcome.number for outcome in outcomes] == list(range(1, len(wanted) + 1))
    assert sorted(report.ended) == [place.number for place in folder.places]
    assert not (path / TRIES).exists()
    assert not list(path.glob(".part*"))
    lines = [json.loads(line) for line in (path / INDEX).read_text().splitlines()]
    assert [line["status"] for line in lines] == [outcome.status for outcome in outcomes]
    for line in lines:
        if line["status"] == "done":
            assert (path / line["folder"] / "text.txt").read_text() == line["name"]
    tries = {x.name[6:]: len(x.read_text().split()) for x in path.glob("tried-*")}
    return outcomes, tries


def pids(path):
    """The processes that have tried a job."""
    return {pid for x in path.glob("tried-*") for pid in x.read_text().split()}


@on_ray
def test_workers_that_die(cluster, tmp_path):
    """One that is killed in the middle of a job, one that every try of a job ends, one error."""
    wanted = jobs("a", "dies once", "kills its workers", "wrong", "b", "c")
    outcomes, tries = run(tmp_path, wanted)
    status = [outcome.status for outcome in outcomes]
    assert status == ["done", "done", "failed", "failed", "done", "done"]
    assert tries == {"a": 1, "dies once": 2, "kills its workers": 2, "wrong": 1, "b": 1, "c": 1}
    assert outcomes[2].error.startswith("its worker died, 2 times: it was killed")
    assert outcomes[3].error == "wrong for ever"
    # Only what failed is made again.
    outcomes, tries = run(tmp_path, wanted, retries=0)
    assert [outcome.status for outcome in outcomes] == status
    assert (tries["a"], tries["kills its workers"], tries["wrong"]) == (1, 3, 2)


@on_ray
def test_a_node_that_leaves(cluster, tmp_path):
    """Its job goes to the other one, and what is done stays so."""
    node = next(iter(cluster.worker_nodes))

    def leave():
        deadline = time.monotonic() + 120
        while len(pids(tmp_path)) < 2 and time.monotonic() < deadline:  # until both nodes work
            time.sleep(0.5)
        time.sleep(1)
        cluster.remove_node(node, allow_graceful=False)

    leaving = threading.Thread(target=leave)
    leaving.start()
    try:
        outcomes, tries = run(tmp_path, jobs(*(f"slow {n}" for n in range(5))), workers=2)
    finally:
        leaving.join()
        cluster.add_node(**NODE)
        cluster.wait_for_nodes()
    assert [outcome.status for outcome in outcomes] == ["done"] * 5
    assert sum(tries.values()) == 6  # the job that the node had begun, twice


@on_ray
def test_the_same_bytes(cluster, tmp_path, capsys, one_thread, monkeypatch):
    pytest.importorskip("av")
    pytest.importorskip("diffusers")
    from examples import tiny

    tiny.text_to_video().save_pretrained(tmp_path / "model")
    lines = [{"prompt": "a kite", "seed": seed} for seed in range(4)]
    lines.append({"prompt": "a dog", "preset": "999D1"})
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)  # where no machine of the cluster is
    given = ["--model", "model", "--prompts", "prompts.jsonl", "--frames", 3]
    given += ["--steps", 2, "--size", "16x16", "--device", "cpu"]
    for output, more in (("here", []), ("there", ["--ray", "auto"])):
        status = main(["generate", *map(str, [*given, "--output", tmp_path / output, *more])])
        assert status == 1
        printed = capsys.readouterr().out
        assert "4 made, 0 there already, 1 failed" in printed
        assert "  5: a dog: no temporal attention has width 999" in printed
    for place in sorted((tmp_path / "here").glob("0*")):
        for name in ("video.mp4", "video.gif", "maps.png", "config.json"):
            there = tmp_path / "there" / place.name / name
            assert there.read_bytes() == (place / name).read_bytes()


@on_ray
def test_a_model_that_cannot_be_loaded(cluster, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text('{"_class_name": "Nobody"}')
    (tmp_path / "prompts").write_text("a kite")
    given = ["--model", tmp_path / "model", "--prompts", tmp_path / "prompts", "--ray", "auto"]
    assert main(["generate", *map(str, [*given, "--output", tmp_path / "out"])]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vstar-kernels generate: error: --model: cannot load ")


def test_names_are_looked_for_where_the_command_runs(tmp_path, monkeypatch):
    """Ray begins workers elsewhere, where ``--model tiny`` would be nothing."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "model").touch()
    monkeypatch.chdir(there)
    folder = JobFolder(tmp_path / "out", [], NAMES)
    loaded = []
    Worker(folder, lambda: loaded.append(Path("model").exists()), 0, torch.get_num_threads(), here)
    Worker(folder, lambda: loaded.append(True), 0, torch.get_num_threads(), tmp_path / "nowhere")
    assert loaded == [True, True]


def test_an_interruption_says_how_far_it_came(tmp_path, monkeypatch):
    folder = JobFolder(tmp_path, jobs("a", "b"), NAMES)

    def stream(*_, **__):
        yield folder.make(folder.places[0], Maker(), lambda *_: None)
        raise KeyboardInterrupt

    ray = SimpleNamespace(exceptions=SimpleNamespace(RayError=RuntimeError))
    monkeypatch.setattr(cluster_module, "_import_ray", lambda: ray)
    monkeypatch.setattr(cluster_module, "_quiet", lambda ray: None)
    monkeypatch.setattr(cluster_module, "_connected", lambda *_: nullcontext())
    monkeypatch.setattr(cluster_module, "_stream", stream)
    more = {"address": "auto", "workers": None, "retries": 0, "gpus": False}
    with pytest.raises(KeyboardInterrupt, match="1 of 2 are done; the same command goes on"):
        run_on_ray(folder, Maker, Silent(), **more)
    assert len((tmp_path / INDEX).read_text().splitlines()) == 1


@pytest.fixture
def connect(tmp_path, monkeypatch):
    """Run a job on a cluster at an address, by a Ray that connects to nothing."""

    def init(**_):
        raise ValueError("Invalid address format")  # Ray's own, as is many another kind

    errors = SimpleNamespace(RayError=RuntimeError)
    ray = SimpleNamespace(exceptions=errors, is_initialized=lambda: False, init=init)
    monkeypatch.setattr(cluster_module, "_import_ray", lambda: ray)
    monkeypatch.setattr(cluster_module, "_quiet", lambda ray: None)
    folder = JobFolder(tmp_path, jobs("a"), NAMES)
    more = {"workers": None, "retries": 0, "gpus": False}
    return lambda address: run_on_ray(folder, Maker, Silent(), address=address, **more)


def test_an_address_that_is_none(connect):
    for address in ("nonsense", "auto", "anyscale://a:1"):
        with pytest.raises(CommandError, match=f"--ray '{address}': cannot connect: Invalid addr"):
            connect(address)


@pytest.mark.parametrize("kind", ["{}", "ray://{}"])
def test_an_address_where_nothing_answers(connect, kind):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        address = kind.format(f"127.0.0.1:{port}")
        with pytest.raises(CommandError, match="cannot connect: Invalid address"):
            connect(address)
    for dead in (address, kind.format("127.0.0.1:99999"), kind.format("[::1]:1"), "a..b:1"):
        start = time.monotonic()
        with pytest.raises(CommandError, match=f"--ray '{re.escape(dead)}': nothing answers there"):
            connect(dead)
        assert time.monotonic() - start < 60  # Ray waits for two minutes


def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        CommandError, match=r"needs Ray Data \(.*pip install 'vstar_kernels\[ray\]'"
    ):
        run(tmp_path, jobs("a"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "p", "--ray"], "--ray is for --prompts"),
        (["--prompts", "p", "--workers", "2"], "--workers is for --ray"),
    ],
)
def test_options_that_do_not_fit(tmp_path, capsys, wide_terminal, arguments, message):
    given = ["generate", "--model", "a/b", "--output", str(tmp_path / "out"), *arguments]
    with pytest.raises(SystemExit):
        main(given) and sys.exit(2)
    assert message in capsys.readouterr().err
