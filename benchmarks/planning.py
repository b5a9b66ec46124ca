"""What a run measures: the command line's options, and what they are where they are not given."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch

from benchmarks.peers import PEERS, VSTAR_KERNELS
from benchmarks.results import Plan, ResultsError
from benchmarks.run import tasks
from benchmarks.suites import (
    CPU_ELEMENTS,
    QUICK_ELEMENTS,
    SUITES,
    Selection,
    cases,
    workloads,
)


@dataclass(frozen=True)
class Defaults:
    """A run without options."""

    models: tuple[str, ...]
    frames: tuple[int, ...]
    long_frames: tuple[int, ...]
    dtypes: tuple[str, ...]
    suites: tuple[str, ...] = tuple(SUITES)
    rounds: int = 15
    seconds: float = 4.0
    elements: int | None = None
    unet_frames: tuple[int, ...] = (16, 64)
    unet_width: int = 320
    unet_latents: tuple[int, int] = (40, 64)
    allocators: tuple[str, ...] = ("warm", "default")


def defaults(device: str, quick: bool) -> Defaults:
    """For a device, and for a short look."""
    table = workloads()
    found = Defaults(
        tuple(table["models"]),
        tuple(table["frames"]),
        tuple(table["long"]["frames"]),
        ("bfloat16",),
    )
    if device == "cpu":
        found = replace(
            found,
            dtypes=("float32",),
            elements=CPU_ELEMENTS,
            unet_frames=(16, 32),
            unet_width=64,
            unet_latents=(20, 32),
        )
    if quick:
        found = replace(
            found,
            models=found.models[:1],
            frames=(16, 64),
            long_frames=(1024,),
            rounds=7,
            seconds=0.5,
            elements=found.elements and QUICK_ELEMENTS,
            unet_frames=(16,),
            unet_latents=(10, 16),
            allocators=("warm",),
        )
    return found


def plan(args: argparse.Namespace) -> Plan:
    """The run that the options ask for. Raises ResultsError for what does not exist."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ResultsError("--device cuda: torch finds no GPU")
    chosen = defaults(device, args.quick)
    for name in vars(chosen):
        given = getattr(args, name, None)
        if given is not None:
            chosen = replace(chosen, **{name: tuple(given) if isinstance(given, list) else given})
    if args.full_rows:
        chosen = replace(chosen, elements=None)
    _check("--models", chosen.models, tuple(workloads()["models"]))
    names = tuple(peer.name for peer in PEERS)
    usual = tuple(peer.name for peer in PEERS if not peer.extra)
    peers = _check("--peers", tuple(args.peers or usual), names)
    threads = args.threads or torch.get_num_threads()
    selection = Selection(
        models=chosen.models,
        frames=chosen.frames,
        long_frames=chosen.long_frames,
        dtypes=chosen.dtypes,
        threads=_doubled(threads) if device == "cpu" else (),
        elements=chosen.elements,
        unet_frames=chosen.unet_frames,
        unet_width=chosen.unet_width,
        unet_latents=chosen.unet_latents,
    )
    return Plan(
        device=device,
        threads=threads,
        isa=args.isa,
        peers=tuple(x for x in names if x in peers or x == VSTAR_KERNELS.name),
        rounds=chosen.rounds,
        seconds=chosen.seconds,
        unet_width=chosen.unet_width,
        tasks=tasks(cases(chosen.suites, selection), device, chosen.allocators),
    )


def _doubled(most: int) -> tuple[int, ...]:
    """1, 2, 4 and so on, and ``most``."""
    return (*(2**i for i in range(most.bit_length()) if 2**i < most), most)


def _check(option: str, given: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := [x for x in given if x not in known]:
        raise ResultsError(f"{option}: there is no {', '.join(unknown)}; known: {', '.join(known)}")
    return given
