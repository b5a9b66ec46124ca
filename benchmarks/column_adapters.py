"""How a peer is asked for attention and the maps of some of its columns: the ``cross`` suite's.

Each adapter takes query ``(batch, queries, heads, head_dim)``, key and value of a text, and the
columns ``(keys, columns)`` in float32, and returns the output and the maps ``(batch, queries,
columns)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import vstar_kernels as vk
from benchmarks.adapters import AttentionWithMap, Inputs
from vstar_kernels.testing import eager_columns

ColumnAttention = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
FAST_DIMS = 8  # SDPA's fused kernels take multiples of it as they are
WORDS = ((3,), (5, 6), (9,), (11,))  # the tokens of four words of a prompt


def columns_of_words(keys: int, words: Sequence[Sequence[int]] = WORDS) -> Tensor:
    """Returns a column for each word, the mean of its tokens, ``(keys, words)``."""
    columns = torch.zeros(keys, len(words))
    for k, tokens in enumerate(words):
        columns[list(tokens), k] = 1 / len(tokens)
    return columns


def eager(query: Tensor, key: Tensor, value: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the formula with all weights in memory, as methods that need maps do."""
    out, maps = eager_columns(query, key, value, columns)
    return out, maps


def sdpa_and_maps(
    query: Tensor, key: Tensor, value: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the output by PyTorch's fused attention, and all weights again for the maps."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    weights = (q @ k.mT * query.shape[-1] ** -0.5).softmax(-1)
    return out, weights.mean(1) @ columns.to(weights)


def sdpa_with_columns(
    query: Tensor, key: Tensor, value: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes both by PyTorch's fused attention of V' = [V | G], a few more values of each key.

    Its fused kernels want all head sizes alike, so queries and keys are padded with zeros.
    """
    dim, count = query.shape[-1], columns.shape[-1]
    padded = -(-(dim + count) // FAST_DIMS) * FAST_DIMS
    spread = columns.to(value)[:, None].expand(*value.shape[:3], count)
    values = F.pad(torch.cat([value, spread], -1), (0, padded - dim - count))
    q, k, v = (
        x.transpose(1, 2)
        for x in (F.pad(query, (0, padded - dim)), F.pad(key, (0, padded - dim)), values)
    )
    both = F.scaled_dot_product_attention(q, k, v, scale=dim**-0.5).transpose(1, 2)
    return both[..., :dim], both[..., dim : dim + count].mean(2, dtype=torch.float32)


def kernels(columns: Tensor) -> AttentionWithMap:
    """Returns this package's operation for inputs where the columns are."""
    backend = "triton" if columns.is_cuda else "cpu"
    return partial(vk.column_attention, columns=columns, backend=backend)


def bound(attend: ColumnAttention) -> Callable[[Tensor], AttentionWithMap]:
    """Returns what gives the attention of query, key and value for columns."""
    return lambda columns: partial(attend, columns=columns)


def trial(attend: ColumnAttention) -> Callable[[Inputs], AttentionWithMap]:
    """Returns what gives such an attention for any inputs."""
    return lambda inputs: partial(
        attend, columns=columns_of_words(inputs[1].shape[1]).to(inputs[1].device)
    )


PEERS: dict[str, ColumnAttention] = {
    "eager": eager,
    "SDPA, weights again": sdpa_and_maps,
    "SDPA of [V, G]": sdpa_with_columns,
}
