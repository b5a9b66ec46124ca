"""Runs checks in several processes that share a gloo process group, in a process of its own.

    python -m tests.models.sharded.processes PROCESSES OUTPUT [NAME…]

The modules are imported once, and the processes forked. Each check is run by all processes, which
then agree on whether to go on: after one that fails anywhere, nothing further is run.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def join(rank: int, size: int, port: int, timeout: float = TIMEOUT) -> None:
    """Joins the process group of all processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=timeout))


def _run(rank: int, size: int, port: int, names: list[str], output: Path) -> None:
    from tests.models.sharded.checks import CHECKS

    torch.set_num_threads(1)
    join(rank, size, port)
    mesh = dist.init_device_mesh("cpu", (size,))
    results: dict[str, str] = {}
    for name in names or CHECKS:
        try:
            CHECKS[name](mesh)
            results[name] = ""
        except BaseException:
            results[name] = f"rank {rank}: {traceback.format_exc()}"
        output.with_suffix(f".{rank}").write_text(json.dumps(results))  # one check kills a process
        if results[name]:
            break
    # A process that has failed is the others' failure, too: they are not waited for.
    os._exit(0)


def main() -> None:
    size, output, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import tests.models.sharded.checks  # noqa: F401 - before the processes are forked

    context = multiprocessing.get_context("fork")
    port = free_port()
    processes = [
        context.Process(target=_run, args=(rank, size, port, names, output)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    merged: dict[str, str] = {}
    for rank in range(size):
        for name, result in json.loads(output.with_suffix(f".{rank}").read_text()).items():
            merged[name] = "\n".join(filter(None, (merged.get(name, ""), result)))
    output.write_text(json.dumps(merged))


if __name__ == "__main__":
    main()
