"""Small inputs that the tests of every backend of column_attention share.

A case is a dictionary of names in the tables below, drawn by ``pairwise`` so that every two of them
meet in some case; :func:`make` turns it into a call's arguments.
"""

import dataclasses

import torch

from tests.attention.frames.cases import heads_outermost, packed, with_gaps
from vstar_kernels.attention.columns import reference
from vstar_kernels.attention.columns.call import ColumnWanted, check_call
from vstar_kernels.testing import eager_columns


def one_text(x):
    """The first sequence for all of the batch, of stride 0, as a text expanded over frames."""
    return x[:1].expand_as(x)


# Of queries, and of keys and values.
STRIDES = {
    "contiguous": (torch.clone, torch.clone),
    "heads outermost": (heads_outermost, heads_outermost),
    "gaps": (with_gaps, with_gaps),
    "one text": (torch.clone, one_text),
    "one text, packed": (packed, lambda x: one_text(packed(x))),
    "one query": (one_text, torch.clone),
}


def one_hot(keys, count, generator):
    """Columns that each choose a key, some of them the same."""
    chosen = torch.randint(keys, (count,), generator=generator)
    return torch.nn.functional.one_hot(chosen, keys).T.float()


def words(keys, count, generator):
    """Columns that are the means of a few keys."""
    chosen = (torch.rand(keys, count, generator=generator) < 0.2).float()
    return chosen / chosen.sum(0).clamp(min=1)


def dense(keys, count, generator):
    """Columns of any weights of both signs."""
    return torch.randn(keys, count, generator=generator)


def dense_by_sequence(keys, count, generator):
    """Other columns for each of the two sequences."""
    return torch.randn(2, keys, count, generator=generator)


def strided(keys, count, generator):
    """A transposed view with gaps."""
    return torch.randn(count, keys, 2, generator=generator)[..., 0].T


COLUMNS = {f.__name__: f for f in (one_hot, words, dense, dense_by_sequence, strided)}

OPTIONS = {
    "queries": [1, 5, 37, 130],
    "keys": [1, 16, 77, 128, 226, 512],
    "count": [1, 4, 8, 13],
    "heads": [1, 2, 5],
    "head_dim": [8, 40, 64, 80, 160],
    "strides": list(STRIDES),
    "columns": list(COLUMNS),
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "scale": [None, 0.3, -0.2],
    "value": [True, False],
}


def make(case, *, seed=0):
    """Returns ``(query, key, value, columns)`` and the options of column_attention's call."""
    generator = torch.Generator().manual_seed(seed)
    of_query, of_key = STRIDES[case["strides"]]

    def draw(tokens, lay):
        shape = (2, tokens, case["heads"], case["head_dim"])
        return lay(torch.randn(shape, generator=generator).to(case["dtype"]))

    query = draw(case["queries"], of_query)
    key, value = draw(case["keys"], of_key), draw(case["keys"], of_key)
    columns = COLUMNS[case["columns"]](case["keys"], case["count"], generator)
    return (query, key, value if case["value"] else None, columns), {"scale": case["scale"]}


def identify(case):
    """Returns a test's name for a case."""
    names = ("queries", "keys", "count", "heads", "head_dim", "columns", "strides")
    return "-".join(str(case[x]).replace(" ", "_") for x in names)


class Gradients:
    """The gradients of a call, a backend's own and autograd's, for the same random ones of results.

    ``wanted`` names the tensors whose gradients are asked for.
    """

    def __init__(self, arguments, options, wanted, *, seed=1):
        self.call, self.wanted = check_call(*arguments, **options), tuple(wanted)
        generator = torch.Generator().manual_seed(seed)
        query = self.call.query
        # The maps' as large as the other gradients are, in spite of the mean over heads.
        self.grad_map = self.call.heads * torch.randn(self.call.map_shape, generator=generator)
        self.grad_out = None
        if self.call.value is not None:
            self.grad_out = torch.randn(query.shape, generator=generator).to(query.dtype)

    def by(self, backend, *, save=True):
        """Returns what the backend's backward gives, after its forward if that may save."""
        saved = backend.forward(self.call, save=True).saved if save else ()
        wanted = ColumnWanted(**{name: name in self.wanted for name in ColumnWanted._fields})
        found = backend.backward(self.call, None, saved, self.grad_out, self.grad_map, wanted)
        for name, gradient in zip(found._fields, found, strict=True):
            assert (gradient is not None) == (name in self.wanted), name
        return {name: getattr(found, name) for name in self.wanted}

    def autograd(self, change):
        """Returns autograd's through the reference, of inputs that went through ``change``."""
        return self._through(reference.forward, change)

    def eager(self, change):
        """Returns autograd's through the formula in the inputs' type, step by step."""

        def forward(call):
            found = eager_columns(
                call.query, call.key, call.value, call.columns, scale=call.options.scale
            )
            return (None, found) if call.value is None else found

        return self._through(forward, change)

    def _through(self, forward, change):
        changed = {name: change(x.detach()) for name, x in self.call.tensors().items()}
        for name in self.wanted:
            changed[name].requires_grad_()
        out, maps, *_ = forward(dataclasses.replace(self.call, **changed))
        # Of columns there are only the maps, of values only the output.
        pairs = [
            (x, change(grad).to(x))
            for x, grad in ((out, self.grad_out), (maps, self.grad_map))
            if grad is not None and x.requires_grad
        ]
        results, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(results, [changed[x] for x in self.wanted], grads)
        return dict(zip(self.wanted, found, strict=True))
