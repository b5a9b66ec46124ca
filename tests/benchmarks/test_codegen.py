"""The compiled kernels, for GPUs that need not be there, and what reads them."""

import collections
import functools
import inspect
import itertools
import json
import os
from dataclasses import fields, replace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import triton

from benchmarks.codegen import __main__ as codegen
from benchmarks.codegen import (
    binary,
    cases,
    column_cases,
    compile,
    frame_cases,
    report,
    without_tile,
)
from benchmarks.codegen.cases import Entry
from benchmarks.codegen.targets import TARGETS
from benchmarks.publish import CODEGEN
from benchmarks.tune import choose
from benchmarks.tune import columns as tune_columns
from benchmarks.tune import frames as tune_frames
from vstar_kernels.attention.triton import configs, primitives, stream_backward
from vstar_kernels.attention.triton.configs import (
    ColumnsConfig,
    FramesConfig,
    StreamConfig,
    TileConfig,
)

LOAD_LINE = primitives.load_heads.starting_line_number + 3  # that the gate compiles with
OTHER_LINE = inspect.getsourcelines(primitives.delta_block.fn)[1] + 3

USAGE = " Function k:\n  REG:40 STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:712 TEXTURE:0\n"
SASS = """\
.text.k:
	//## File "/somewhere/primitives.py", line {load_line}
        /*0010*/              @!P1 {load} R4, desc[UR4][R2.64] ;
	//## File "/somewhere/primitives.py", line {other_line} inlined at "/somewhere/tile.py", line 9
        /*0020*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0030*/                   {matrix} R24, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0040*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0050*/                   {last} ;
"""
GCN = """\
k:
	.loc	3 {load_line} 19                         ; primitives.py:{load_line}:19 @[ tile.py:6:6 ]
	{load} v[2:5], v15, s[24:27], 0 offen
	.loc	3 {other_line} 19                         ; primitives.py:{other_line}:19
	global_load_ushort v2, v1, s[2:3]
	{matrix} a[0:15], v[2:3], v[4:5], a[0:15]
	buffer_store_dwordx2 v[2:3], v15, s[24:27], 0 offen
	s_endpgm
		.amdhsa_next_free_vgpr {registers}
    .private_segment_fixed_size: {private}
    .sgpr_spill_count: {sgpr}
    .vgpr_spill_count: {vgpr}
"""


def sass(load="LDG.E.128", matrix="HGMMA.64x64x16.F32.BF16", last="EXIT", stack=0, shared=0):
    text = SASS.format(
        load=load, matrix=matrix, last=last, load_line=LOAD_LINE, other_line=OTHER_LINE
    )
    return binary.from_sass(text, USAGE.format(stack=stack), shared)


def gcn(
    load="buffer_load_dwordx4",
    matrix="v_mfma_f32_32x32x8_bf16",
    sgpr=0,
    vgpr=0,
    private=0,
    shared=0,
):
    text = GCN.format(
        load=load, matrix=matrix, sgpr=sgpr, vgpr=vgpr, private=private, registers=96,
        load_line=LOAD_LINE, other_line=OTHER_LINE,
    )  # fmt: skip
    return binary.from_amdgcn(text, shared)


def sass_loop(*names):
    """Returns the assembly of a loop that the loads of heads are in, behind loads and stores."""
    place = f'\t//## File "/somewhere/primitives.py", line {LOAD_LINE}'
    loop = [".L_x_1:", *names, "BRA `(.L_x_1)"]
    every = ["LDG.E.128", "STS.128", ".L_x_0:", "LDG.E.128", "STS.128", *loop, "BRA `(.L_x_0)"]
    lines = (x if x.startswith(".L") else f"        /*0010*/        {x} ;" for x in every)
    return "\n".join([place, *lines])


def gcn_loop(*names):
    place = f"\t.loc\t3 {LOAD_LINE} 19   ; primitives.py:{LOAD_LINE}:19"
    lines = (f"\t{name} v1, v2" for name in names)
    return "\n".join([place, ".LBB0_5: ; =>This Loop", *lines, "\ts_cbranch_scc1 .LBB0_5"])


def a_case(architecture, kind="16-bit"):
    entry = Entry(architecture, kind, 64, 64, config=TileConfig(64, 1, 4, shared=2**20))
    return cases.cases(entry, cases.GAUSSIAN)[0]


def faults(found, architecture, kind="16-bit"):
    return report.faults(a_case(architecture, kind), found, TARGETS[architecture])


def test_a_sound_nvidia_kernel():
    found = sass()
    assert found == binary.Binary(
        registers=40, spilled=0, shared=0, instructions=5, loads={16: 1}, other_loads={4: 1},
        stores={8: 1}, matrix={"HGMMA": 1}, in_pass=5,
    )  # fmt: skip
    assert faults(found, "sm_90") == []


def test_a_sound_amd_kernel():
    found = gcn()
    assert found == binary.Binary(
        registers=96, spilled=0, shared=0, instructions=5, loads={16: 1}, other_loads={2: 1},
        stores={8: 1}, matrix={"v_mfma_f32_32x32x8_bf16": 1}, in_pass=5,
    )  # fmt: skip
    assert faults(found, "gfx942") == []


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ({"stack": 24}, "spills 24 bytes"),
        ({"last": "STL.64 [R1], R4"}, "spills 4 bytes"),
        ({"load": "LDG.E.64"}, "loads 8 bytes at a time where 16 are aligned"),
        ({"load": "LDGSTS.E"}, "loads 4 bytes at a time where 16 are aligned"),
        ({"load": "LDGSTS.E.BYPASS.LTC128B.64"}, "loads 8 bytes at a time where 16 are aligned"),
        ({"load": "LDG.E.U16"}, "loads 2 bytes at a time where 16 are aligned"),
        ({"load": "LDS.128"}, "no load of queries, keys or values was recognised"),
        ({"matrix": "FFMA"}, "has no matrix instruction"),
        ({"shared": 228 * 1024}, "takes 233472 bytes of shared memory, sm_90 has 232448"),
    ],
)
def test_an_unfit_nvidia_kernel(broken, fault):
    assert faults(sass(**broken), "sm_90") == [fault]


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ({"sgpr": 3, "private": 12}, "spills 12 bytes"),
        ({"vgpr": 2, "private": 4}, "spills 8 bytes"),
        ({"private": 64}, "spills 64 bytes"),
        ({"load": "global_load_dwordx2"}, "loads 8 bytes at a time where 16 are aligned"),
        ({"load": "buffer_load_ushort"}, "loads 2 bytes at a time where 16 are aligned"),
        ({"matrix": "v_fma_f32"}, "has no matrix instruction"),
        ({"shared": 65537}, "takes 65537 bytes of shared memory, gfx942 has 65536"),
    ],
)
def test_an_unfit_amd_kernel(broken, fault):
    assert faults(gcn(**broken), "gfx942") == [fault]


def test_another_triton_may_spill_a_little_and_take_other_shared_memory(monkeypatch):
    entry = replace(a_case("sm_90").entry, config=TileConfig(64, 1, 4, shared=1000))
    (case,) = cases.cases(entry, cases.GAUSSIAN)

    def faults_of_both(**changes):
        found = replace(sass(), **changes)
        monkeypatch.setattr(report, "inspect", lambda case: found)
        return [report.examine(case, other=other)["faults"] for other in (False, True)]

    assert faults_of_both(spilled=96) == [["spills 96 bytes"], []]
    assert faults_of_both(spilled=97) == [["spills 97 bytes"]] * 2
    assert faults_of_both(shared=1001) == [["takes 1001 bytes of shared memory, 1000 stated"], []]
    limit = "takes 1048576 bytes of shared memory, sm_90 has 232448"
    assert faults_of_both(shared=2**20)[1] == [limit]


def test_scalar_registers_in_lanes_of_vector_ones_are_no_spill():
    found = gcn(sgpr=3)
    assert (found.in_lanes, found.spilled) == (3, 0)
    assert faults(found, "gfx942") == []


def test_gradients_may_load_less_than_a_vector_where_threads_have_no_more():
    entry = Entry(
        "sm_90", "16-bit", None, 80, config=StreamConfig(64, 64, 8, 1, 2**17), backward=True
    )
    case = cases.cases(entry, cases.GRADIENTS)[0]
    narrow, narrower = sass(load="LDG.E.64"), sass(load="LDG.E")
    assert report.faults(case, narrow, TARGETS["sm_90"]) == []
    fault = "loads 4 bytes at a time where 8 are aligned"
    assert report.faults(case, narrower, TARGETS["sm_90"]) == [fault]
    assert faults(narrow, "sm_90") == ["loads 8 bytes at a time where 16 are aligned"]


def test_float32_without_matrix_instructions_is_for_nvidia_alone():
    assert faults(sass(matrix="FFMA"), "sm_80", "ieee") == []
    assert faults(gcn(matrix="v_fma_f32"), "gfx942", "ieee") == ["has no matrix instruction"]


def test_a_kernel_without_products_needs_no_matrix_instruction():
    config = StreamConfig(64, 64, 8, 1, 2**17)
    entry = Entry("sm_90", "16-bit", None, 48, config=config, backward=True)
    saved = {variant.name: variant for variant in cases.BACKWARD_PAIRS if variant.saved}
    found = sass(matrix="FFMA")
    for name, expected in (("saved", []), ("saved, map's gradient", ["has no matrix instruction"])):
        (case,) = (x for x in cases.cases(entry, saved[name]) if x.kernel == "statistics")
        assert report.faults(case, found, TARGETS["sm_90"]) == expected


def test_a_kernel_without_products_loads_nothing_ahead():
    config = StreamConfig(64, 64, 8, 2, 2**17)
    entry = Entry("sm_90", "16-bit", None, 48, config=config, backward=True)
    (saved,) = (x for x in cases.BACKWARD_PAIRS if x.name == "saved")
    found = replace(sass(), asynchronous=False)
    for case in cases.cases(entry, saved):
        fault = "has 2 stages, but no load runs ahead of its use"
        expected = [] if case.kernel == "statistics" else [fault]
        assert report.faults(case, found, TARGETS["sm_90"]) == expected, case.kernel


def test_matrix_instructions_of_every_generation_are_known():
    for name in ("HMMA.16816.F32.BF16", "HGMMA.64x64x16.F32", "UTCHMMA", "UTCQMMA.2CTA"):
        assert sass(matrix=name).matrix == {name.split(".")[0]: 1}


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (("LDG.E.128", "LDG.E.128", "STS.128", "STS.128", "HGMMA"), 1),
        (("LDG.E.128", "STS.128", "HMMA.16816.F32", "LDG.E.128", "STS.128", "HMMA.16816.F32"), 2),
        (("STS.128", "HGMMA", "LDG.E.128"), 1),  # for the next pass
        (("LDG.E.128", "STS.128", "HGMMA", "LDG.E.128"), 1),  # the last and the first together
        (("HGMMA", "LDGSTS.E.128", "STSM.16.M88", "LDGSTS.E.128"), 1),  # waits for neither
        (("LDGSTS.E.128", "HGMMA", "LDG.E.128", "STS.128"), 2),
        (("UTMALDG.5D", "HGMMA", "STS.128", "UTMALDG.5D"), 1),
        (("LDG.E.128", "STSM.16.M88", "LDG.E.128", "STS.128", "UTCHMMA"), 2),
        (("LDG.E.128", "STS.128", "FFMA", "LDG.E.128", "STS.128"), 0),  # multiplies nothing
    ],
)
def test_groups_of_loads_are_counted_in_the_innermost_loop_of_products(names, groups):
    assert binary.SASS.load_groups(sass_loop(*names)) == groups


def test_a_pass_is_the_loop_of_products():
    assert binary.SASS.in_pass(sass_loop("HGMMA", "FFMA", "STG.E")) == 4  # with its branch
    assert binary.SASS.in_pass(sass_loop("FFMA")) == 7  # no products: all that there is


def test_a_tile_waits_once_where_two_fit_the_shared_memory():
    """Heads of 160 at 128 frames do not: 240 KiB."""
    twice = replace(sass(), load_groups=2)
    for frames, width, kind, expected in (
        (64, 64, "16-bit", ["waits 2 times for loads in one pass"]),
        (128, 160, "16-bit", []),
        (64, 64, "tf32", []),
    ):
        entry = Entry("sm_90", kind, frames, width, config=TileConfig(frames, 1, 8))
        (case,) = cases.cases(entry, cases.GAUSSIAN)
        assert report.faults(case, twice, TARGETS["sm_90"]) == expected


def test_a_staged_tile_has_loads_that_run_ahead():
    entry = Entry("sm_90", "16-bit", 64, 64, config=TileConfig(64, 1, 4, stages=2))
    (case,) = cases.cases(entry, cases.GAUSSIAN)
    assert report.faults(case, sass(), TARGETS["sm_90"]) == [
        "has 2 stages, but no load runs ahead of its use"
    ]
    assert report.faults(case, replace(sass(), asynchronous=4), TARGETS["sm_90"]) == []


def test_groups_of_loads_are_counted_in_amd_code():
    pairs = ("buffer_load_dwordx4", "ds_write_b128", "v_mfma_f32_32x32x8_bf16") * 2
    assert binary.GCN.load_groups(gcn_loop(*pairs)) == 2
    both = ("buffer_load_dwordx4", "global_load_dwordx4", "ds_write_b128", "v_mfma_f32")
    assert binary.GCN.load_groups(gcn_loop(*both)) == 1


def test_resident_programs_are_limited_by_each_resource():
    target = TARGETS["sm_90"]
    assert report.resident(replace(sass(), registers=128), 4, target) == 4
    assert report.resident(replace(sass(), registers=129), 4, target) == 3
    assert report.resident(replace(sass(), registers=32), 8, target) == 8
    assert report.resident(replace(sass(), registers=32), 1, target) == 32
    assert report.resident(sass(shared=100 * 1024), 4, target) == 2
    amd = TARGETS["gfx942"]
    assert report.resident(replace(gcn(), registers=128), 4, amd) == 4
    assert report.resident(replace(gcn(), registers=256), 4, amd) == 2
    assert report.resident(gcn(shared=40 * 1024), 4, amd) == 1


def test_the_model_by_hand():
    # 64 × 64 in bfloat16 on sm_90: 32 KiB at 4.8 TB/s / 132; a turn of 2000 · 4 cycles and 0.8 µs
    # for each group of loads, but for one that runs ahead; eight side by side.
    case, target = a_case("sm_90"), TARGETS["sm_90"]
    waits = replace(sass(), registers=64, in_pass=2000, load_groups=2)
    memory, own = 32768 / (4.8e12 / 132), 2000 * 4 / 1.98e9
    for binary_, turn in (
        (waits, own + 2 * 0.8e-6),
        (replace(waits, load_groups=1), own + 0.8e-6),
        (replace(waits, load_groups=1, asynchronous=8), own),
        (replace(waits, load_groups=1, asynchronous=8, in_pass=5), 0.8e-6),
        (replace(waits, load_groups=2, asynchronous=8), own + 2 * 0.8e-6),
    ):
        found = report.predict(case, binary_, target)
        assert found.sequence_bytes == 32768
        assert found.sequence_operations == 4 * 64**3
        matrix = 4 * 64**3 / (989e12 / 132)
        issue = binary_.in_pass * 4 / 4 / 1.98e9
        assert found.headroom == pytest.approx(memory / max(matrix, issue, turn / 8))
        assert found.share == min(1.0, found.headroom)
    slow = replace(waits, registers=255, in_pass=10**6)
    found = report.predict(case, slow, target)
    assert found.share == found.headroom < 0.01


def test_every_size_has_a_stream_configuration_and_none_has_two():
    found = collections.Counter(entry.key for entry in cases.entries())
    assert [key for key, count in found.items() if count > 1] == []
    known = set(itertools.chain.from_iterable(map(choose.keys, configs.ARCHITECTURES)))
    assert {key for key in known if key.frames is None} <= set(found) <= known


def test_every_size_has_a_tile_or_the_reason_for_none(tmp_path, monkeypatch):
    assert without_tile.unexplained() == []
    sizes, tiles = without_tile.sizes(), {entry.key for entry in cases.entries()}
    assert len(sizes) == 4 * len(without_tile.KINDS) * 4 * len(configs.WIDTHS)
    has, has_not = (next(x for x in sizes if (x in tiles) == found) for found in (True, False))
    reasons = without_tile.read()
    monkeypatch.setattr(without_tile, "FILE", tmp_path / "without_tile.json")
    without_tile.write(reasons)
    assert without_tile.read() == reasons
    del reasons[has_not]
    without_tile.write(reasons | {has: "spills"})
    one, other = sorted(without_tile.unexplained(), key=lambda x: "and a reason" in x)
    assert one.endswith(f"N={has_not.frames} D={has_not.width}: no tile, and no reason")
    assert other.endswith(f"N={has.frames} D={has.width}: has a tile, and a reason for none")


def own_configs(entry):
    """Those of single kernels."""
    return entry.config.overrides.values() if isinstance(entry.config, StreamConfig) else ()


def test_which_kernels_have_configurations_of_their_own():
    sweeps = {field.name for field in fields(stream_backward.StreamBackwardPlan)}
    gradients = sweeps | {"maps", "grad_query_full", "grad_key_full"}
    for entry in cases.entries():
        if own_configs(entry):
            kernels = {"stream", "pointers"} if not entry.backward else gradients
            assert entry.config.overrides.keys() < kernels, entry
        if not entry.backward:
            assert {x.queries for x in own_configs(entry)} <= {entry.config.queries}, entry


@pytest.mark.parametrize("variant", [cases.GAUSSIAN, cases.DENSE, cases.MAP_GRADIENT])
def test_a_case_is_of_any_number_of_heads(variant, monkeypatch):
    """What is compiled for one is what a launch with another looks for."""
    backward = variant is cases.MAP_GRADIENT
    every = (x for x in cases.entries() if (x.kind, x.width) == ("16-bit", 64))
    chosen = [x for x in every if x.backward == backward and cases.cases(x, variant)]
    for entry in {(x.architecture, x.family): x for x in chosen}.values():
        sources = set()
        for heads in (cases.HEADS, 5, 10, 20):
            monkeypatch.setattr(cases, "HEADS", heads)
            sources |= {compile.source(case)[0].hash() for case in cases.cases(entry, variant)[:1]}
        assert len(sources) == 1, entry


def test_configurations_are_of_sizes_that_the_kernels_take():
    own = [replace(entry, config=x) for entry in cases.entries() for x in own_configs(entry)]
    for entry in [*cases.entries(), *own]:
        config = entry.config
        numbers = vars(config).copy()
        shared = numbers.pop("shared")
        assert 0 < shared <= TARGETS[entry.architecture].shared_program, entry
        assert config.queries >= 16, entry
        for name in {"queries", "keys", "sequences", "warps"} & set(numbers):
            assert numbers[name].bit_count() == 1, entry
        if isinstance(config, TileConfig):
            assert entry.frames % config.queries == 0, entry
            assert config.queries == entry.frames or not entry.backward, entry
        else:
            assert config.stages >= 1, entry
            assert config.keys >= 16, entry


def test_smaller_relatives_of_sm_80_can_stream():
    for entry in cases.entries():
        if entry.architecture == "sm_80" and entry.family == "stream":
            for config in (entry.config, *own_configs(entry)):
                assert config.shared <= 99 * 1024, entry


def test_the_pairs_of_options_are_all_there():
    options = {
        "form": {"none", "gaussian", "symmetric", "signed", "dense"},
        "stat": {"none", "row_max", "map_max", "tensor"},
        "clamp": {False, True},
        "negative": {False, True},
        "even": {False, True},
        "wide": {False, True},
        "per_head": {False, True},
    }
    variants = [*cases.ALWAYS["tile", False], *cases.PAIRS]
    for one, other in itertools.combinations(options, 2):
        found = {(getattr(x, one), getattr(x, other)) for x in variants}
        missing = set(itertools.product(options[one], options[other])) - found
        assert not {pair for pair in missing if possible(one, other, *pair)}, (one, other, missing)


def possible(one, other, value, other_value):
    """Some options mean nothing together."""
    pair = {one: value, other: other_value}
    if pair.get("form") == "none":
        pairless = pair.get("stat", "none") == "none" and not pair.get("clamp")
        return pairless and not pair.get("per_head")
    if pair.get("form") == "gaussian" and pair.get("per_head"):
        return False
    return not (pair.get("stat") == "none" and pair.get("clamp"))


def test_a_variant_is_what_its_name_says():
    entry = Entry("sm_90", "16-bit", 64, 64, config=TileConfig(64, 1, 4))
    gradients = replace(entry, config=TileConfig(32, 1, 4), frames=32, backward=True)
    forward = dict.fromkeys((*cases.ALWAYS["tile", False], *cases.PAIRS), entry)
    backward = (*cases.ALWAYS["tile", True], *cases.BACKWARD_PAIRS)
    for variant, entry_of in (forward | dict.fromkeys(backward, gradients)).items():
        if variant.wide and variant.stat == "map_max":  # which tiles leave to streams
            assert not cases.cases(entry_of, variant)
            continue
        constants = cases.cases(entry_of, variant)[0].launch.constants
        head, bias = constants["HEAD"], constants["BIAS"]
        assert variant.form == bias.FORM
        assert constants["STAT"] == variant.stat
        assert variant.clamp == bias.CLAMP
        assert variant.per_head == bias.PER_HEAD
        assert variant.negative == head.NEGATIVE
        assert variant.even == head.EVEN
        assert (head.OFFSET.name == "int64") == variant.wide
        assert head.UNIT == 8
        assert constants["GRAD_MAP" if entry_of.backward else "MAP"] == variant.map
        assert constants.get("GRAD_DELTA", False) == variant.grad_delta
    stream = replace(gradients, config=StreamConfig(64, 64, 4, 1, shared=0), frames=None)
    for variant in backward:
        found = {case.kernel: case.launch for case in cases.cases(stream, variant)}
        assert found["statistics"].constants["SAVED"] == variant.saved


def test_the_map_and_the_gradients_have_kernels_of_their_own():
    def names(entry, variant):
        return {case.kernel for case in cases.cases(entry, variant)}

    config = StreamConfig(64, 64, 4, 1, shared=0)
    stream = Entry("sm_90", "16-bit", None, 64, config=config)
    for variant in (cases.GAUSSIAN, cases.MAP):
        assert names(stream, variant) == {"stream", "pointers"}
        assert names(replace(stream, kind="tf32"), variant) == {"stream"}
        assert names(replace(stream, architecture="sm_80"), variant) == {"stream"}
    stream = replace(stream, backward=True)
    assert names(stream, cases.GRADIENTS) == {"statistics", "grad_query", "grad_key"}
    sweeps = {"statistics", "grad_query_full", "grad_key_full"}
    assert names(stream, cases.VALUES) == sweeps | {"grad_delta", "map_max", "maps"}
    own = {"grad_query": StreamConfig(32, 32, 2, 1, shared=0)}
    stream = replace(stream, config=replace(config, overrides=own))
    found = {case.kernel: case for case in cases.cases(stream, cases.GRADIENTS)}
    assert (found["grad_query"].config, found["grad_key"].config) == (
        own["grad_query"],
        stream.config,
    )
    assert found["grad_query"].launch.constants["num_warps"] == 2
    tile = Entry("sm_90", "16-bit", 64, 64, config=TileConfig(32, 1, 4))
    assert names(tile, cases.MAP) == set()  # the plan has the stream kernel for it
    tile = replace(tile, config=TileConfig(64, 1, 8), backward=True)
    assert names(tile, cases.VALUES) == set()
    assert names(replace(tile, frames=32), cases.VALUES) == {"tile_backward"}


def test_offenders_are_named():
    good = {"name": "a", "faults": []}
    bad = {"name": "b", "faults": ["spills 8 bytes", "has no matrix instruction"]}
    assert report.offenders([good, bad]) == ["b: spills 8 bytes; has no matrix instruction"]


@functools.cache
def every_case():
    return list(itertools.chain.from_iterable(map(cases.shipped, cases.entries())))


def test_the_subset_has_every_kernel_kind_and_variant():
    shipped = every_case()
    chosen = cases.subset(shipped)
    assert len(chosen) <= 64
    for shown in (
        lambda x: (x.entry.architecture[:2], x.kernel),  # of each vendor
        lambda x: (x.entry.architecture, x.entry.family, x.entry.backward),
        lambda x: (x.entry.architecture[:2], x.entry.kind, x.entry.family, x.entry.backward),
    ):
        assert set(map(shown, chosen)) == set(map(shown, shipped))
    kinds = {(x.entry.kind, x.kernel) for x in shipped if x.entry.width in (48, 64)}
    assert {(x.entry.kind, x.kernel) for x in chosen} == kinds
    every = itertools.chain(*cases.ALWAYS.values(), cases.PAIRS, cases.BACKWARD_PAIRS)
    assert {x.variant for x in chosen} >= set(every)
    widths = {(x.kernel, x.entry.width) for x in shipped if x.entry.width in (48, 64)}
    assert {(x.kernel, x.entry.width) for x in chosen} == widths  # heads of one part and of two


FRAME_KERNELS = (
    "forward",
    "forward by descriptors",
    "known",
    "known by descriptors",
    "revisit",
    "grad_query",
    "grad_key",
)


def every_frame_case():
    return list(itertools.chain.from_iterable(map(frame_cases.shipped, frame_cases.entries())))


def test_every_table_of_frames_has_every_size_once():
    found = [(x.table, x.architecture, x.kind, x.width) for x in frame_cases.entries()]
    known = (frame_cases.VARIANTS, configs.ARCHITECTURES, configs.KINDS, configs.WIDTHS)
    every = [x for x in itertools.product(*known) if frame_cases.has_lines(*x[:3])]
    assert sorted(found) == sorted(every)
    described = {x[1:3] for x in every if x[0].endswith("_described")}
    assert described == {("sm_90", "16-bit"), ("sm_100", "16-bit")}
    for entry in frame_cases.entries():
        config = entry.config
        assert 0 < config.shared <= choose.LEAST_SHARED[entry.architecture], entry
        # What multiplies without matrix instructions takes fewer rows, too.
        least = 8 if entry.kind == "ieee" and entry.architecture != "gfx942" else 16
        assert config.rows >= least, entry
        assert config.keys >= 16, entry
        assert min(config.stages, config.programs) >= 1, entry
        most = TARGETS[entry.architecture].most_registers(config.warps)
        assert config.registers in (0, most), entry


@pytest.mark.parametrize(
    ("rows", "kind", "width", "table", "enough"),
    [
        (64, "16-bit", 64, "forward", True),
        (64, "16-bit", 80, "forward", False),  # 64 × 16 halves for 256 threads, 8 bytes each
        (64, "16-bit", 80, "forward_full", True),
        (16, "16-bit", 80, "forward_full", False),  # 2 bytes
        (16, "16-bit", 80, "grad_key", True),
        (16, "ieee", 80, "forward", True),
    ],
)
def test_threads_of_frames_have_enough_to_load(rows, kind, width, table, enough):
    entry = frame_cases.entry("sm_90", kind, width, table, FramesConfig(rows, 64, 8, 1, 1, 2**16))
    assert tune_frames.loads_enough(entry) == enough


def test_shipped_threads_of_frames_have_enough_to_load():
    short = [x for x in frame_cases.entries() if not tune_frames.loads_enough(x)]
    assert [(x.architecture, x.kind, x.width, x.table) for x in short] == []


def test_small_blocks_of_frames_in_many_warps_may_load_less_than_a_vector():
    config = FramesConfig(64, 32, 8, 1, 1, 2**17)
    fault = "loads 4 bytes at a time where {} are aligned".format
    for kind, table, expected in (
        ("16-bit", "forward_full", []),  # 32 × 16 halves for 256 threads
        ("tf32", "forward", [fault(8)]),
        ("16-bit", "forward", [fault(16)]),
    ):
        (case, *_) = frame_cases.shipped(frame_cases.entry("sm_90", kind, 80, table, config))
        assert report.faults(case, sass(load="LDG.E"), TARGETS["sm_90"]) == expected


def test_the_subset_of_frames_has_every_table():
    chosen = frame_cases.subset(every_frame_case())
    assert {x.entry.table for x in chosen} == set(frame_cases.VARIANTS)
    forward = {x.entry.architecture for x in chosen if not x.entry.backward}
    assert forward == set(configs.ARCHITECTURES)
    assert {x.entry.width for x in chosen} == {64, 128}
    assert len(chosen) == len(frame_cases.VARIANTS) + 1


def test_a_variant_of_frames_is_for_the_table_that_it_is_listed_in():
    for table, variants in frame_cases.VARIANTS.items():
        config = FramesConfig(128, 16, 4, 1, 1, 0)
        entry = frame_cases.entry("sm_90", "16-bit", 64, table, config)
        for variant in variants:
            key = frame_cases.plan_key(entry, variant, 64)
            kernel = table.removesuffix("_full").removesuffix("_described")
            found = key.table(kernel.replace("known", "forward"), key.rule_tables())
            assert found == table.removesuffix("_described"), variant
            assert not (entry.is_described and key.sums_by_frame(key.rule_tables())), variant
            launch = frame_cases.FrameCase(entry, variant, 64).launch
            rule, head = launch.constants["RULE"], launch.constants["HEAD"]
            assert (variant.stat, variant.clamp) == (rule.STAT, rule.CLAMP)
            assert ("factor" in variant.tables) == rule.FACTOR
            assert ("band" in variant.tables) == rule.BAND
            assert (variant.lengths, variant.interleaved) == (rule.LENGTHS, rule.ORDERED)
            assert (head.OFFSET.name == "int64") == variant.wide
            assert head.UNIT == 8


def test_stages_without_loads_that_run_ahead_are_a_fault():
    config = FramesConfig(64, 64, 4, 2, 1, 2**17)
    entry = frame_cases.entry("sm_90", "16-bit", 64, "forward", config)
    (case, *_) = frame_cases.shipped(entry)
    ahead = sass(load="LDGSTS.E.BYPASS.LTC128B.128")
    assert ahead.asynchronous == 1
    assert report.faults(case, ahead, TARGETS["sm_90"]) == []
    fault = "has 2 stages, but no load runs ahead of its use"
    assert report.faults(case, sass(), TARGETS["sm_90"]) == [fault]


def test_blocks_that_descriptors_load_run_ahead():
    (case, *_) = cases.cases(
        Entry("sm_90", "16-bit", None, 64, config=StreamConfig(128, 64, 8, 3, 2**17)),
        cases.GAUSSIAN,
    )
    fault = "has 3 stages, but no load runs ahead of its use"
    assert report.faults(case, sass(), TARGETS["sm_90"]) == [fault]
    described = sass(matrix="UTMALDG.5D")
    assert (described.asynchronous, described.loads) == (1, {16: 1})
    assert report.faults(case, replace(described, matrix={"HGMMA": 1}), TARGETS["sm_90"]) == []


def test_halves_of_frames_wait_once_for_keys_and_values():
    config = FramesConfig(64, 32, 8, 1, 1, 2**17)
    twice = replace(sass(), load_groups=2)
    fault = "waits 2 times for loads in one pass"
    for kind, table, expected in (
        ("16-bit", "forward_full", [fault]),
        ("tf32", "forward", []),
        ("16-bit", "grad_query", []),
    ):
        (case, *_) = frame_cases.shipped(frame_cases.entry("sm_90", kind, 64, table, config))
        assert report.faults(case, twice, TARGETS["sm_90"]) == expected
        assert report.faults(case, replace(twice, load_groups=1), TARGETS["sm_90"]) == []


# ---- column_attention ----


def every_column_case():
    return list(itertools.chain.from_iterable(map(column_cases.shipped, column_cases.entries())))


def test_every_table_of_columns_has_every_size_once():
    """But tiles, where the registers do not hold one."""
    found = [(x.table, x.architecture, x.kind, x.width) for x in column_cases.entries()]
    known = (configs.ARCHITECTURES, configs.KINDS, configs.WIDTHS)
    others = [x for x in column_cases.TABLES if not tune_columns.is_tile(x)]
    assert len(set(found)) == len(found)
    assert set(itertools.product(others, *known)) <= set(found)
    assert set(found) <= set(itertools.product(column_cases.TABLES, *known))
    for entry in column_cases.entries():
        config, is_tile = entry.config, tune_columns.is_tile(entry.table)
        assert 0 < config.shared <= choose.LEAST_SHARED[entry.architecture], entry
        assert config.rows >= 16, entry
        assert (config.keys == 0) == is_tile, entry
        assert is_tile or config.keys >= 16, entry
        for number in (config.rows, config.warps, config.keys or 1):
            assert number.bit_count() == 1, entry
        assert config.stages >= 1, entry


def test_a_variant_of_columns_is_what_its_name_says():
    for table in column_cases.TABLES:
        config = ColumnsConfig(32, 0 if tune_columns.is_tile(table) else 32, 4, 1, 0)
        entry = column_cases.entry("sm_90", "16-bit", 64, table, config)
        for variant in [*entry.variants, *(() if entry.backward else (column_cases.WIDE,))]:
            for case in column_cases.cases(entry, variant, 64):
                launch, constants = case.launch, case.launch.constants
                head = constants["HEAD"]
                assert (8, variant.negative) == (head.UNIT, head.NEGATIVE)
                assert (head.OFFSET.name == "int64") == variant.wide
                if case.part == "maps":
                    continue
                assert constants["GRAD_OUT" if entry.backward else "OUT"] == variant.value
                assert launch.needed.v == variant.value
                if table.startswith("grad_query"):
                    assert constants["DOT"] == variant.wants_keys


def test_keys_of_a_text_come_with_one_wait():
    config = ColumnsConfig(64, 0, 4, 1, 2**17)
    twice = replace(sass(), load_groups=2)
    fault = "waits 2 times for loads in one pass"
    for table, expected in (("forward_80", [fault]), ("grad_query_128", [fault]), ("grad_key", [])):
        small = config if expected else replace(config, keys=64)
        entry = column_cases.entry("sm_90", "16-bit", 64, table, small)
        case = column_cases.shipped(entry)[0]
        assert report.faults(case, twice, TARGETS["sm_90"]) == expected
        assert report.faults(case, sass(), TARGETS["sm_90"]) == []
    narrow = sass(load="LDG.E.64")
    for width, expected in ((64, True), (80, False)):  # 16 of 77 keys by 16 of 80 are few bytes
        entry = column_cases.entry("sm_90", "16-bit", width, "forward_80", config)
        found = report.faults(column_cases.shipped(entry)[0], narrow, TARGETS["sm_90"])
        assert (found == ["loads 8 bytes at a time where 16 are aligned"]) == expected


def test_the_subset_of_columns_has_every_table():
    chosen = column_cases.subset(every_column_case())
    assert {x.entry.table for x in chosen} == set(column_cases.TABLES)
    assert {x.entry.architecture for x in chosen} == set(configs.ARCHITECTURES)
    assert {x.part for x in chosen} == {"", "maps"}
    assert len(chosen) <= 10


@pytest.mark.long
@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_a_representative_subset_compiles_without_fault(architecture, tmp_path):
    path = tmp_path / "report.json"
    chosen_with = json.loads(CODEGEN.read_text())["triton"]
    other = ["--other-triton"] if triton.__version__ != chosen_with else []
    codegen.main(["--subset", "--target", architecture, "--json", str(path), *other])
    kernels = json.loads(path.read_text())["kernels"]
    of_frames = {x["kernel"] for x in kernels if x["kernel"].startswith("frames")}
    assert of_frames <= {f"frames, {x}" for x in FRAME_KERNELS}
    assert any("grad" not in x for x in of_frames)
    assert any(x["kernel"].startswith("columns, ") for x in kernels)
    every = [*cases.subset(every_case()), *frame_cases.subset(every_frame_case())]
    every += column_cases.subset(every_column_case())
    chosen = (x for x in every if x.entry.architecture == architecture)
    assert [x["name"] for x in kernels] == [x.name for x in chosen]
    assert path.with_suffix(".md").read_text().startswith("# Compiled kernels\n\nTriton ")


def test_an_updated_report_keeps_what_is_shipped_still(tmp_path):
    every = every_frame_case()[:3]
    kept, changed, again = (
        {"name": case.name, "config": report.config_of(case), "faults": []} for case in every
    )
    changed["config"] = changed["config"] | {"rows": 1}
    before = [again | {"registers": 1}, kept, changed, {"name": "of no case"}]
    assert report.merged(before, [again], every) == [kept, again]
    assert report.merged(before, [changed], every)[1] == changed  # as it was examined now
    stored = kept | {"loads": {16: 2, 4: 1}}
    (tmp_path / "report.json").write_text(json.dumps({"kernels": [stored]}))
    assert report.read(tmp_path / "report.json") == [stored]


def test_the_command_exits_with_the_offenders(monkeypatch):
    monkeypatch.setattr(
        report, "examine", lambda case, other: {"name": case.name, "faults": ["spills"]}
    )
    monkeypatch.setattr(without_tile, "unexplained", lambda: ["no tile, and no reason"])
    offenders = (
        r"Not fit to ship:\nsm_80 tile 16-bit N=16 .*: spills\n(.*\n)*no tile, and no reason$"
    )
    with pytest.raises(SystemExit, match=offenders):
        codegen.main(["--target", "sm_80", "--kind", "16-bit", "--width", "48"])
