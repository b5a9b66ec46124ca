"""The C++ kernels against the float64 oracle, for every instruction set that can execute here."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import vstar_kernels as vk
from tests.helpers import on_threads
from vstar_kernels.testing import CELL, assert_exact, inputs, largest_error, oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("isa", "several_threads", "poison")


def tar(*args, **options):
    return vk.tar_attention(*args, backend="cpu", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 48, 64, 65, 127, 130])
def test_frames(frames, dtype):
    q, k, v = inputs(3, frames, 2, 40, dtype=dtype)
    assert_exact(tar(q, k, v, vk.GaussianBias(1.0)), q, k, v, vk.GaussianBias(1.0))


@pytest.mark.parametrize("frames", [512, 513, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_frames(frames, dtype):
    q, k, v = inputs(1, frames, 2, 64, dtype=dtype)
    assert_exact(tar(q, k, v, vk.GaussianBias(8.0)), q, k, v, vk.GaussianBias(8.0))


@functools.cache
def long_call():
    """A call, what comes of it and PyTorch's error, the same for every instruction set."""
    q, k, v = inputs(1, 4096, 1, 64)
    bias = vk.GaussianBias(8.0)
    expected = oracle(q, k, v, bias)
    plain = (vk.reference.tar_attention(q, k, v, bias) - expected).square().mean().sqrt()
    return (q, k, v, bias), expected, plain


def test_long_sums():
    """A running sum over thousands of keys would err several times as much as PyTorch's."""
    (q, k, v, bias), expected, plain = long_call()
    assert (tar(q, k, v, bias) - expected).square().mean().sqrt() <= 1.2 * plain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 8, 9, 31, 40, 64, 72, 80, 96, 128, 160, 200, 256])
def test_head_dims(head_dim, dtype):
    q, k, v = inputs(2, 19, 3, head_dim, dtype=dtype)
    assert_exact(tar(q, k, v, vk.GaussianBias(2.0)), q, k, v, vk.GaussianBias(2.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strength_zero_is_sdpa(dtype):
    q, k, v = inputs(2, 33, 3, 64, dtype=dtype)
    out = tar(q, k, v, vk.GaussianBias(1.0, strength=0.0))
    assert torch.equal(out, tar(q, k, v))
    sdpa = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(
        out.double(), sdpa.transpose(1, 2), rtol=0, atol=1e-6 + 2 * torch.finfo(dtype).eps
    )


def biases(frames, heads):
    table = torch.rand(heads, frames + 3)
    return {
        "gaussian": lambda **o: vk.GaussianBias(1.5, **o),
        "toeplitz": lambda **o: vk.ToeplitzBias(table[0], **o),
        "toeplitz by head": lambda **o: vk.ToeplitzBias(table, **o),
        "signed": lambda **o: vk.ToeplitzBias(torch.rand(2 * frames + 5), signed=True, **o),
        "dense": lambda **o: vk.DenseBias(torch.rand(frames, frames), **o),
        "dense by head": lambda **o: vk.DenseBias(torch.rand(heads, frames, frames), **o),
        "dense bfloat16": lambda **o: vk.DenseBias(torch.rand(frames, frames).bfloat16(), **o),
    }


@pytest.mark.parametrize("form", biases(1, 1))
@pytest.mark.parametrize("stat", ["row_max", "map_max", "none", "tensor"])
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("frames", [13, 70])
def test_options(form, stat, clamp, frames):
    q, k, v = inputs(2, 3, frames, 4, 24)
    # A statistic of an odd layout, with both signs.
    stat_tensor = torch.randn(4, frames, 3, 2).permute(3, 2, 1, 0)
    options = {"strength": -0.7 if clamp else 1.3, "clamp_negative": clamp}
    bias = biases(frames, 4)[form](stat=stat_tensor if stat == "tensor" else stat, **options)
    assert_exact(tar(q, k, v, bias), q, k, v, bias)


def test_three_forms_agree():
    q, k, v = inputs(2, 21, 3, 8)
    gaussian = vk.GaussianBias(1.3)
    table = gaussian.matrix(25)[0]
    expected = tar(q, k, v, gaussian)
    for bias in [
        vk.ToeplitzBias(table),
        vk.ToeplitzBias(table.expand(3, -1)),
        vk.DenseBias(gaussian.matrix(21)),
        vk.DenseBias(gaussian.matrix(21).expand(3, -1, -1)),
    ]:
        assert torch.equal(tar(q, k, v, bias), expected)


def test_subnormal_entries_are_zero():
    """Each would cost a hundred cycles; this strength would show them."""
    q, k, v = inputs(2, 9, 2, 16)
    table, matrix = torch.zeros(9), torch.zeros(9, 9)
    table[1::3], matrix[2, 1::2] = 1e-39, -1e-39
    for form, entries in (
        (vk.ToeplitzBias, table),
        (vk.DenseBias, matrix),
        (vk.DenseBias, matrix.mT.contiguous().mT),
    ):
        found = tar(q, k, v, form(entries, strength=1e38, stat="none"))
        zeros = form(torch.zeros_like(entries), strength=1e38, stat="none")
        assert torch.equal(found, tar(q, k, v, zeros))


@pytest.mark.parametrize("clamp", [False, True])
def test_negative_row_maxima(clamp):
    q, k, v = inputs(2, 21, 3, 16)
    q, k = q.abs(), -k.abs()
    bias = vk.GaussianBias(1.0, clamp_negative=clamp)
    out = tar(q, k, v, bias)
    assert_exact(out, q, k, v, bias)
    assert torch.equal(out, tar(q, k, v)) == clamp


def test_equal_logits():
    v = inputs(2, 21, 3, 16)[2]
    ones = torch.ones_like(v)
    for bias in (vk.GaussianBias(1.0), vk.GaussianBias(0.0), vk.GaussianBias(1e30)):
        assert_exact(tar(ones, ones, v, bias), ones, ones, v, bias)


@pytest.mark.parametrize("frames", [48, 128, 1000])
def test_equal_weights_sum_to_one(isa, frames):
    """The rounding of a running sum of equal terms is to one side all the time."""
    query, key, value = (torch.zeros(40, frames, 1, 8) for _ in range(3))
    stat = torch.randn(40, frames, 1, generator=torch.Generator().manual_seed(0))
    bias = vk.GaussianBias(0.0, strength=2.5, stat=stat)
    _, maps = vk.tar_attention(query, key, value, bias, return_map=True, backend="cpu")
    assert (maps.double().sum(-1) - 1).abs().max().item() <= CELL


@pytest.mark.parametrize("scale", [0.0, 1e-20, 30.0, -0.3])
def test_scale(scale):
    q, k, v = inputs(2, 21, 3, 16)
    bias = vk.GaussianBias(1.0)
    assert_exact(tar(q, k, v, bias, scale=scale), q, k, v, bias, scale=scale)


def layouts(shape):
    """The same numbers in memory orders that models and users have."""
    order = range(len(shape))
    moved = [*order[1:-1], 0, order[-1]]

    def permuted(x):
        back = [moved.index(d) for d in order]
        return x.permute(moved).contiguous().permute(back)

    def sliced(x):
        return torch.cat([x, x, x], dim=-1)[..., shape[-1] : 2 * shape[-1]]

    def odd_offset(x):
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(shape)

    return {"permuted": permuted, "sliced": sliced, "odd offset": odd_offset}


@pytest.mark.parametrize("shape", [(3, 35, 2, 20), (2, 3, 17, 4, 16), (2, 5, 70, 2, 8)])
@pytest.mark.parametrize("layout", layouts((1,)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(shape, layout, dtype):
    q, k, v = inputs(*shape, dtype=dtype)
    bias = vk.GaussianBias(1.0)
    expected = tar(q, k, v, bias)
    change = layouts(shape)[layout]
    for moved in [(change(q), k, v), (q, change(k), v), (q, k, change(v)), map(change, (q, k, v))]:
        assert torch.equal(tar(*moved, bias), expected)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_expanded(dim):
    q, k, v = (
        x.narrow(dim, 0, 1).expand(3, 35, 4, 20) if dim < 3 else x for x in inputs(3, 35, 4, 20)
    )
    if dim == 3:  # one number for the whole sequence, and an expanded query
        q = q[:1, :1, :1].expand(3, 35, 4, 20)
        v = v[:1].expand(3, 35, 4, 20)
    bias = vk.GaussianBias(1.0)
    assert_exact(tar(q, k, v, bias), q, k, v, bias)


def test_spatial_order_without_a_copy():
    """(B·F, H·W, C) memory, as a UNet has it, attended over its frames through strides."""
    batch, frames, space, heads, head_dim = 2, 9, 12, 3, 16
    memory = torch.randn(3, batch * frames, space, heads * head_dim)
    q, k, v = (
        x.view(batch, frames, space, heads, head_dim).transpose(1, 2) for x in memory.unbind()
    )
    bias = vk.GaussianBias(1.0)
    out = tar(q, k, v, bias)
    assert_exact(out, q, k, v, bias)
    assert out.stride() == q.stride()


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 4, 2, 8), (2, 4, 0, 8)])
def test_empty(shape):
    q, k, v = inputs(*shape)
    assert tar(q, k, v, vk.GaussianBias(1.0)).shape == shape


@pytest.mark.parametrize("sequences", [65_535, 65_536, 131_073])
def test_many_sequences(sequences):
    """Where kernels with a grid of 65,535 stop."""
    q, k, v = inputs(sequences, 3, 1, 8)
    bias = vk.GaussianBias(1.0)
    assert_exact(tar(q, k, v, bias), q, k, v, bias)


def test_offsets_beyond_32_bits():
    """Rows 2^29 elements apart: the last lies beyond 2^31 elements."""
    frames, stride = 6, 1 << 29
    if not _memory_allows(2 * frames * stride):
        pytest.skip("needs 6 GiB of address space")
    memory = torch.empty_strided((frames * stride,), (1,), dtype=torch.bfloat16)
    view = memory.as_strided((1, frames, 1, 8), (0, stride, 0, 1))
    q, k, v = inputs(1, frames, 1, 8, dtype=torch.bfloat16)
    view.copy_(k)
    bias = vk.GaussianBias(1.0)
    assert torch.equal(tar(q, view, v, bias), tar(q, k, v, bias))


def _memory_allows(size: int) -> bool:
    try:  # an untouched mapping costs nothing
        torch.empty_strided((size,), (1,), dtype=torch.uint8)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("frames", [9, 70])
def test_containment(value, frames):
    """Not finite in a query stays in its row, in a key or value in its sequence."""
    bias = vk.GaussianBias(1.0)
    clean = inputs(2, frames, 3, 16)
    expected = tar(*clean, bias)
    for which in range(3):
        tensors = [x.clone() for x in clean]
        tensors[which][1, 4, 2, 5] = value
        out = tar(*tensors, bias)
        touched = torch.zeros_like(out, dtype=torch.bool)
        touched[1, 4, 2] = True
        if which > 0:
            touched[1, :, 2] = True
        assert torch.equal(out[~touched], expected[~touched])
        if value != value:
            where = (1, 4, 2) if which == 0 else (1, slice(None), 2)
            columns = slice(5, 6) if which == 2 else slice(None)
            assert out[where][..., columns].isnan().all()


def test_overflow_of_float16_is_infinite():
    q, k, v = inputs(1, 4, 1, 8, dtype=torch.float16)
    v = torch.full_like(v, 65504.0)
    assert torch.equal(tar(q, k, v), v)


def test_bits_do_not_depend_on_threads():
    # Few long sequences are cut into runs of rows, many short ones shared out whole. The last
    # output is stored past the caches by one thread, and by more of them not.
    for shape in [(1, 700, 2, 40), (37, 33, 3, 40), (430, 16, 5, 64)]:
        q, k, v = inputs(*shape)
        bias = vk.GaussianBias(2.0)
        results = []
        for threads in (1, 2, 5):
            with on_threads(threads):
                results.append(tar(q, k, v, bias))
        assert all(torch.equal(result, results[0]) for result in results[1:])


def test_an_output_that_is_stored_past_the_caches_lies_anywhere():
    shape = (430, 16, 5, 64)  # 8.4 MiB
    q, k, v = inputs(*shape)
    expected = tar(q, k, v)
    for offset, row in ((0, 64), (1, 64), (8, 64), (0, 65), (0, 80)):
        memory = torch.full((q.numel() // 64 * row + offset,), torch.nan)
        out = memory[offset:].view(*shape[:-1], row)[..., :64]
        with on_threads(1):
            assert torch.equal(tar(q, k, v, out=out), expected)
        assert memory[offset:].view(-1, row)[:, 64:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_neighbours(dtype):
    q, k, v = inputs(4, 37, 3, 40, dtype=dtype)
    bias = vk.GaussianBias(2.0)
    out = tar(q, k, v, bias)
    for b in range(4):
        for h in range(3):
            one = (slice(b, b + 1), slice(None), slice(h, h + 1))
            assert torch.equal(tar(q[one], k[one], v[one], bias), out[one])


def test_bits_repeat():
    q, k, v = inputs(3, 70, 2, 64)
    bias = vk.GaussianBias(1.0)
    first = tar(q, k, v, bias)
    assert all(torch.equal(tar(q, k, v, bias), first) for _ in range(50))


def test_inputs_are_not_written():
    q, k, v = inputs(2, 40, 3, 24)
    copies = [x.clone() for x in (q, k, v)]
    tar(q, k, v, vk.GaussianBias(1.0))
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, v), copies, strict=True))


@given(
    batch=st.integers(1, 3),
    space=st.integers(0, 3),
    frames=st.integers(1, 90),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    sigma=st.sampled_from([0.0, 0.2, 1.0, 8.0, 1e4]),
    strength=st.floats(-2, 3, width=32),
    stat=st.sampled_from(["row_max", "map_max", "none"]),
    seed=st.integers(0, 1 << 30),
)
def test_anything(batch, space, frames, heads, head_dim, dtype, sigma, strength, stat, seed):
    shape = (batch, *([space] if space else []), frames, heads, head_dim)
    q, k, v = inputs(*shape, dtype=dtype, seed=seed)
    bias = vk.GaussianBias(sigma, strength=strength, stat=stat)
    assert_exact(tar(q, k, v, bias), q, k, v, bias)


def test_real_shapes():
    """VideoCrafter2's levels at 320×512, a sixteenth of the rows."""
    for rows, heads in [(320, 5), (80, 10), (20, 20)]:
        q, k, v = inputs(rows, 16, heads, 64)
        bias = vk.GaussianBias(1.0)
        assert_exact(tar(q, k, v, bias), q, k, v, bias)


def test_oracle_is_not_the_kernel():
    """The comparison would be empty if both took the same path."""
    q, k, v = inputs(2, 16, 2, 64)
    bias = vk.GaussianBias(1.0)
    assert 0 < largest_error(tar(q, k, v, bias), oracle(q, k, v, bias)) < 1e-5
