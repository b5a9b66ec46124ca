"""Which launch configurations the tuner chooses."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from benchmarks.codegen import cases, frame_cases, without_tile
from benchmarks.codegen.binary import Binary
from benchmarks.codegen.cases import Key
from benchmarks.tune import __main__ as tune_main
from benchmarks.tune import candidates, choose, frame_times, times
from benchmarks.tune import frames as tune_frames
from vstar_kernels.attention.frames import composed, reference
from vstar_kernels.attention.triton import configs, devices, frames, frames_forward
from vstar_kernels.attention.triton.configs import FramesConfig, StreamConfig, TileConfig


def test_the_tuner_writes_what_it_read(tmp_path, monkeypatch):
    entries, names = cases.entries(), ("FILE", "BACKWARD_FILE")
    before = {name: getattr(configs, name).read_text() for name in names}
    for name, text in before.items():
        monkeypatch.setattr(configs, name, tmp_path / name)
        getattr(configs, name).write_text(text)
    choose.write({})
    assert {name: getattr(configs, name).read_text() for name in names} == before
    for n in (0, len(entries) - 1):
        key = entries[n].key
        choose.write({key: None})
        assert cases.entries() == entries[:n] + entries[n + 1 :]
        choose.write({key: entries[n]})
        assert cases.entries() == entries


def test_the_tuner_prefers_headroom_and_skips_what_is_unfit(monkeypatch):
    key = Key("sm_90", "16-bit", 64, 64)
    sizes = [(64, 1, 4, 1), (64, 1, 2, 1), (32, 1, 4, 1), (32, 1, 2, 1)]
    monkeypatch.setitem(candidates.SIZES["tile"], "16-bit 64", sizes)
    rooms = dict(zip(sizes, (0.0, 0.5, 0.9, 1.1), strict=True))

    def size(entry):
        config = entry.config
        return config.queries, config.sequences, config.warps, config.stages

    spilling = set[tuple[object, ...]]()  # sizes, and with what they may leave to others

    def fit(entry, unfit=()):
        if {size(entry), (size(entry), unfit)} & spilling:
            return None
        return replace(entry, config=replace(entry.config, unfit=unfit))

    monkeypatch.setattr(choose, "headroom", lambda entry: rooms[size(entry)])
    monkeypatch.setattr(choose, "fit", fit)

    def chosen():
        found = choose.predicted(key)
        return found and (size(found), found.config.unfit)

    assert chosen() == ((32, 1, 2, 1), ())
    spilling.add(((32, 1, 2, 1), ()))
    assert chosen() == ((32, 1, 2, 1), ("map",))
    spilling.add((32, 1, 2, 1))
    assert chosen() == ((32, 1, 4, 1), ())
    spilling.update(((32, 1, 4, 1), unfit) for unfit in ((), ("map",)))
    assert chosen() == ((32, 1, 4, 1), ("map", "delta"))
    rooms[64, 1, 2, 1] = 2.0
    assert chosen() == ((64, 1, 2, 1), ())
    spilling.update(sizes)
    assert chosen() is None


def test_of_gradients_a_tile_ahead_comes_before_all_that_a_tile_leaves(monkeypatch):
    key = Key("sm_90", "16-bit", 64, 64, backward=True)
    sizes = [[64, 1, 8, 1], [64, 1, 8, 2], [64, 1, 4, 2]]
    monkeypatch.setitem(candidates.SIZES["tile_backward"], "16-bit 64", sizes)
    order = [
        (entry.config.warps, entry.config.stages, unfit)
        for entry, unfit in choose.ranked(candidates.candidates(key))
    ]
    fewer = ("map", "delta")
    ahead = [(8, 2, ()), (4, 2, ()), (8, 2, fewer), (4, 2, fewer)]
    assert order == [*ahead, (8, 1, ()), (8, 1, fewer)]


def test_each_kernel_of_a_stream_s_gradients_has_its_first_fit_candidate(monkeypatch):
    key = Key("sm_80", "tf32", None, 256, backward=True)
    wide, small, other = (StreamConfig(*x, 1, 0) for x in ((32, 16, 8), (16, 16, 8), (16, 32, 8)))
    monkeypatch.setattr(candidates, "streams", lambda key: [wide, small, other])
    large = 120 * 1024  # too much for some GPUs that the rows serve
    shared = {
        "grad_delta": {wide: None, small: None, other: 2048},
        "grad_key": {wide: large, small: 512, other: 1},
        "grad_key_full": {wide: 4096, small: 512, other: None},
        "grad_query": {wide: large, small: 256, other: 1},
        "grad_query_full": {wide: 4096, small: 256, other: 1},
        "maps": {wide: None, small: 64, other: 32},
        "statistics": {wide: None, small: 64, other: 32},
    }

    def inspect_fit(case):
        taken = shared[case.kernel][replace(case.entry.config, shared=0)]
        return taken and Binary(40, 0, taken, 5, {16: 1}, {}, {}, {})

    def orders_of_sweeps(entries, names):
        assert set(names) == shared.keys()
        return {name: entries[:: -1 if name == "grad_query" else 1] for name in names}

    monkeypatch.setattr(choose, "inspect_fit", inspect_fit)
    monkeypatch.setattr(choose.units, "orders_of_sweeps", orders_of_sweeps)
    own = {
        "grad_delta": replace(other, shared=2048),
        "grad_key_full": replace(wide, shared=4096),
        "grad_query": replace(other, shared=1),
        "grad_query_full": replace(wide, shared=4096),
    }
    assert choose.predicted(key).config == replace(small, shared=512, overrides=own)
    shared["grad_delta"][other] = None
    assert choose.predicted(key) is None


def test_repair_keeps_what_is_fit_with_the_memory_that_it_takes(monkeypatch):
    shipped = next(x for x in cases.entries() if x.backward and x.frames is None)
    taken = {"bytes": 512}

    def inspect_fit(case):
        n = taken["bytes"]
        return n and Binary(40, 0, n, 5, {16: 1}, {}, {}, {})

    monkeypatch.setattr(choose, "inspect_fit", inspect_fit)
    monkeypatch.setattr(choose, "predicted", lambda key: key)
    found = choose.repaired(shipped.key)
    overrides = {name: replace(x, shared=512) for name, x in shipped.config.overrides.items()}
    assert found.config == replace(shipped.config, shared=512, overrides=overrides)
    for taken["bytes"] in (None, choose.LEAST_SHARED["sm_80"] + 1):
        assert choose.repaired(shipped.key) == shipped.key
    monkeypatch.setattr(cases, "entries", list)
    assert choose.repaired(shipped.key) == shipped.key


def test_sweeps_whose_outputs_fill_the_registers_are_not_tried(monkeypatch):
    full, half = (StreamConfig(64, keys, 4, 1, 0) for keys in (64, 32))
    key = Key("sm_90", "16-bit", None, 256, backward=True)
    monkeypatch.setattr(candidates, "streams", lambda key: [full, half])
    monkeypatch.setattr(choose.units, "orders_of_sweeps", lambda x, names: dict.fromkeys(names, x))
    monkeypatch.setattr(
        choose, "inspect_fit", lambda case: Binary(40, 0, 512, 5, {16: 1}, {}, {}, {})
    )
    overrides = choose.predicted(key).config.overrides
    assert set(overrides) == {"grad_key", "grad_key_full"}
    assert {(x.queries, x.keys) for x in overrides.values()} == {(64, 32)}


def test_no_candidate_is_taken_for_a_tile_that_is_too_large():
    assert candidates.candidates(Key("sm_90", "16-bit", 128, 256))
    assert candidates.candidates(Key("sm_90", "tf32", 128, 256)) == []
    assert candidates.candidates(Key("sm_90", "ieee", 128, 64)) == []
    assert candidates.candidates(Key("gfx942", "ieee", 128, 64))
    streams = candidates.candidates(Key("sm_80", "ieee", None, 256))
    assert all(isinstance(x.config, StreamConfig) for x in streams)


def test_times_are_kept_as_they_are_made_and_taken_over(tmp_path, monkeypatch):
    """In order of value; what the file has is not measured again."""
    monkeypatch.setattr(choose, "compiled", lambda key: None)
    monkeypatch.setattr(choose, "fit", lambda entry, unfit=(): entry)
    monkeypatch.setattr(choose, "seconds", lambda entry: 1.0 / entry.config.warps)
    path = tmp_path / "times.jsonl"
    options = tune_main.Options(width=(80, 64), stop_after=60.0)
    keys = [Key("sm_90", "16-bit", frames, width) for frames in (16, 32) for width in (64, 80)]
    tune_main.measure_into(path, keys[:3], options)
    path.write_text(path.read_text() + '{"torn')
    assert list(times.read(path)) == [keys[2], keys[1], keys[0]]
    path.write_text(path.read_text()[: -len('{"torn')])
    tune_main.measure_into(path, keys, options)
    chosen = times.read(path)
    assert list(chosen) == [keys[2], keys[1], keys[0], keys[3]]
    for key, entry in chosen.items():
        most = max(x.config.warps for x in candidates.candidates(key))
        assert entry.config.warps == most
    taken = []
    monkeypatch.setattr(choose, "write", taken.append)
    monkeypatch.setattr(tune_main, "explain", taken.append)
    tune_main.main(["--take", str(path)])
    assert taken == [chosen, chosen]


@pytest.mark.parametrize(("stop_after", "measured"), [(25.0, 3), (None, 4)])
def test_nothing_is_measured_after_the_time_that_was_given(
    tmp_path, monkeypatch, stop_after, measured
):
    """Each key takes ten seconds here."""
    now = 0.0

    def ten_seconds(key):
        nonlocal now
        now += 10.0
        return None, ""

    monkeypatch.setattr(tune_main, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(choose, "compiled", lambda key: None)
    monkeypatch.setattr(choose, "measured", ten_seconds)
    monkeypatch.setattr(times, "append", lambda path, key, *_: kept.append(key))
    kept = []
    keys = [Key("sm_90", "16-bit", frames, 64) for frames in (16, 32, 64, 128)]
    tune_main.measure_into(tmp_path / "times.jsonl", keys, tune_main.Options(stop_after=stop_after))
    assert len(kept) == measured


def test_what_was_chosen_before_an_interrupt_is_written(monkeypatch):
    written, seen = {}, []

    def predicted(key):
        seen.append(key)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return key.width

    monkeypatch.setattr(choose, "predicted", predicted)
    monkeypatch.setattr(choose, "write", written.update)
    monkeypatch.setattr(tune_main, "explain", lambda chosen: None)
    options = ["--predict", "--kernel", "stream", "--target", "sm_80", "--kind", "tf32"]
    with pytest.raises(KeyboardInterrupt):
        tune_main.main(options)
    assert written == {key: key.width for key in seen[:2]}


def test_a_missing_tile_has_the_reason_of_the_candidate_that_spills_least(tmp_path, monkeypatch):
    monkeypatch.setattr(without_tile, "FILE", tmp_path / "without_tile.json")
    spilling, fit = (Key("sm_90", "16-bit", 128, width) for width in (64, 80))
    without_tile.write({fit: "spills"})

    def inspect(case):
        if case.config.stages == 2:
            raise RuntimeError("the compiler's")
        spilled = 8 * case.config.warps + case.config.queries
        return Binary(255, spilled, 0, 5, {16: 1}, {}, {}, {"HGMMA": 1})

    monkeypatch.setattr(choose, "inspect", inspect)
    tune_main.explain({spilling: None, fit: cases.entries()[0]})
    nearest = "32 queries of a sequence in 4 warps, loads no tile ahead: spills 64 bytes"
    assert without_tile.read() == {spilling: nearest}
    large = Key("sm_90", "tf32", 128, 160)
    assert choose.reason(large) == "loads 245760 bytes, a program has 232448"
    kept = without_tile.FILE.read_text()
    tune_main.explain({})
    assert without_tile.FILE.read_text() == kept


def test_tiles_that_hoist_come_first_whatever_they_leave(monkeypatch):
    key = Key("sm_90", "16-bit", 128, 64)
    monkeypatch.setitem(
        candidates.SIZES["tile"], "16-bit 128", [[64, 1, 4, 1], [128, 1, 8, 1, False]]
    )
    monkeypatch.setattr(choose, "headroom", lambda entry: entry.config.queries / 100)
    found = [(x.config.hoists, unfit) for x, unfit in choose.ranked(candidates.candidates(key))]
    unfit = choose.UNFIT_SETS[False]
    assert found == [*((True, x) for x in unfit), *((False, x) for x in unfit)]


@pytest.mark.parametrize(
    ("backward", "spilling", "unfit", "left"),
    [
        (False, (), (), ()),
        (False, ("map, map_max",), (), ("map_max",)),
        (False, ("dense, tensor, wide",), ("map",), ("map", "wide")),
        (False, ("gaussian, map_max", "gaussian, wide", "map, wide"), ("map", "delta"), ...),
        (False, ("gaussian",), ("map", "delta"), None),
        (True, ("values' gradient, wide",), (), ("wide",)),
        (True, ("gradients, map_max",), ("map", "delta"), ("map", "delta", "map_max")),
    ],
)
def test_a_tile_leaves_what_is_rare_and_spills(backward, spilling, unfit, left, monkeypatch):
    """Of each it is tried what is most demanding of the calls that the tile does."""
    binary = Binary(255, 0, 0, 5, {16: 1}, {}, {}, {"HGMMA": 1})

    def inspect_fit(case):
        return None if case.variant.name in spilling else binary

    monkeypatch.setattr(choose, "inspect_fit", inspect_fit)
    monkeypatch.setattr(choose, "inspect", lambda case: binary)
    frames = 32 if backward else 64
    entry = cases.Entry("sm_90", "16-bit", frames, 64, backward, config=TileConfig(frames, 1, 4))
    found = choose.fit(entry, unfit)
    if left is ...:
        left = (*unfit, "map_max", "wide")
    assert found == left if left is None else found.config.unfit == left


# ---- attention over frames ----


@pytest.fixture
def frames_file(tmp_path, monkeypatch):
    """A copy of the frames' configurations to write to; returns the text of the original."""
    text = configs.FRAMES_FILE.read_text()
    monkeypatch.setattr(configs, "FRAMES_FILE", tmp_path / "frames.json")
    configs.FRAMES_FILE.write_text(text)
    return text


def frame_entry(table, kind="ieee", **sizes):
    config = {"rows": 16, "keys": 16, "warps": 4, "stages": 1, "programs": 1, "shared": 0}
    return frame_cases.entry("sm_80", kind, 16, table, FramesConfig(**(config | sizes)))


def test_the_frames_tuner_writes_what_it_read(frames_file):
    tune_frames.write()
    assert configs.FRAMES_FILE.read_text() == frames_file
    tune_frames.write([frame_entry("forward", registers=128)], {("sm_90", "ieee"): 7})
    first = next(x for x in frame_cases.entries() if (x.kind, x.width) == ("ieee", 16))
    assert first == frame_entry("forward", registers=128)
    assert '"kind": "ieee", "keys": 7}' in configs.FRAMES_FILE.read_text()


def test_the_shipped_revisits_are_the_predicted_ones():
    for architecture in configs.ARCHITECTURES:
        for kind in configs.KINDS:
            predicted = tune_frames.predicted_revisit(architecture, kind)
            assert configs.revisit_below(architecture, kind) == predicted


def test_registers_are_offered_where_the_compiler_spills_for_want_of_nothing(monkeypatch):
    """Told that a thread may take 255, it does not spill; what takes as many does anyhow."""
    taken = {0: 96, 255: 120}

    def inspect(case):
        registers = taken[case.config.registers]
        return Binary(registers, 4 * (case.config.registers == 0), 512, 5, {16: 1}, {}, {}, {})

    def inspect_fit(case):
        found = inspect(case)
        return None if found.spilled else found

    monkeypatch.setattr(tune_frames, "inspect", inspect)
    monkeypatch.setattr(tune_frames, "inspect_fit", inspect_fit)
    assert tune_frames.fit(frame_entry("forward")).config.registers == 255
    taken[0] = 250
    assert tune_frames.fit(frame_entry("forward")) is None


def test_a_gpu_chooses_the_fastest_of_the_fit(frames_file, monkeypatch):
    """With a GPU that is none: every candidate takes as long as it has rows."""
    timed = []

    def seconds(entry, device="cuda", tokens=0):
        timed.append(entry.config)
        if not tokens:
            return entry.config.rows
        # Splitting is faster with frames of 64 tokens and more.
        return tokens if entry.table == "revisit" else 48

    monkeypatch.setattr(tune_frames.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cases, "this_gpu", lambda: devices.Device("sm_80", 2**17, 108))
    monkeypatch.setattr(tune_frames, "fit", lambda x: x if x.config.rows > 16 else None)
    monkeypatch.setattr(frame_times, "seconds", seconds)
    tune_frames.main(["--kind", "16-bit", "--width", "64", "--table", "forward"])
    assert len(timed) > 5
    (chosen,) = (
        x
        for x in frame_cases.entries()
        if (x.architecture, x.kind, x.width, x.table) == ("sm_80", "16-bit", 64, "forward")
    )
    assert chosen.config.rows == min(x.rows for x in timed)
    expected = frame_times.keys_of_a_slot(64, chosen.config.rows)
    assert configs.revisit_below("sm_90", "16-bit") != expected
    assert f'"sm_80", "kind": "16-bit", "keys": {expected}}}' in configs.FRAMES_FILE.read_text()
    monkeypatch.setattr(tune_frames.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        tune_frames.main([])


@pytest.mark.parametrize("table", frame_cases.VARIANTS)
def test_what_is_timed_is_planned_with_the_candidate(table, monkeypatch):
    """Dry, on the CPU: another backend computes, and the plan of each call is looked at."""
    planned = set()

    def forward(call, *, save=False):
        key = frames.frames_plan.frames_key(call, call.query)
        made = frames_forward.make_plan(key, call.device)
        planned.add((made.launch.constants["ROWS"], made.launch.constants["WAY"], key.kind))
        return reference.forward(call, save=save)

    monkeypatch.setattr(frame_times, "TOKENS", 6)
    monkeypatch.setattr(frame_times, "SHORT", 3)
    monkeypatch.setattr(frame_times, "HEADS", 2)
    monkeypatch.setattr(frame_times, "BACKEND", "composed")
    monkeypatch.setattr(composed, "why_not", lambda call: [])
    monkeypatch.setattr(composed, "forward", forward)
    monkeypatch.setattr(composed, "backward", reference.backward)
    described = table.endswith("_described")
    if described:
        hopper = devices.Device("sm_90", 2**17, 132)
        monkeypatch.setattr(devices, "device_of", lambda device: hopper)
    kind = "16-bit" if described else "ieee"
    entry = frame_entry(table, kind, rows=48)
    assert 0 < frame_times.seconds(entry, "cpu") < 10
    way = table.split("_")[0].replace("forward", "split")
    rows = 48
    if entry.backward:  # whose forward pass has the shipped configuration
        kernel = "forward_full" if table.endswith("full") else "forward"
        way, rows = "split", configs.frames("sm_80", "ieee", 16, kernel).rows
    assert planned == {(rows, way, kind)}
    monkeypatch.setattr(composed, "forward", lambda call, *, save=False: wrong(call))
    with pytest.raises(SystemExit, match="wrong result"):
        frame_times.seconds(entry, "cpu")


def wrong(call):
    found = reference.forward(call)
    return found._replace(out=found.out * 1.1)
