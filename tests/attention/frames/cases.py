"""Small layouts, rules and inputs that the tests of every backend of frame_attention share.

A case is a dictionary of names in the tables below, drawn by ``pairwise`` so that every two of them
meet in some case; :func:`make` turns it into a call's arguments.
"""

import torch

import vstar_kernels as vk

NAN = float("nan")

# Layouts of queries, and where keys have another one, of keys.
LAYOUTS = {
    "no text": lambda p: vk.Layout(vk.Frames(3, p)),
    "text first": lambda p: vk.Layout(vk.Text(5), vk.Frames(3, p)),
    "text last": lambda p: vk.Layout(vk.Frames(3, p), vk.Text(9)),
    "text on both sides": lambda p: vk.Layout(vk.Text(1), vk.Frames(4, p), vk.Text(3)),
    "one frame": lambda p: vk.Layout(vk.Frames(1, p), vk.Text(2)),
    "only text": lambda p: vk.Layout(vk.Text(p)),
    # FramePack: history of other sizes with coordinates of its own
    "sizes differ": lambda p: vk.Layout(
        vk.Frames(2, p, first=-4, step=2), vk.Frames(2, 2 * p + 1), vk.Text(4)
    ),
    # a grid image of 1 × 2 frames, each of 3 rows: many runs a frame, and text between
    "grid": lambda p: vk.Layout(
        vk.Frames(2, p), vk.Text(3), vk.Frames(2, p + 1), vk.Frames(2, p, first=1, step=-1)
    ),
    "appended condition": lambda p: vk.Layout(vk.Frames(3, p), vk.Frames(1, p, first=1)),
}
KEY_LAYOUTS = {  # of which the queries' frames are a part, as with a cache
    "same": lambda layout, p: None,
    "cache before": lambda layout, p: vk.Layout(vk.Frames(2, p, first=-2), *layout.segments),
    "other": lambda layout, p: vk.Layout(vk.Frames(2, p + 2), vk.Text(3), vk.Frames(2, 3, first=2)),
}
TOKENS = [1, 7, 64]  # of a frame


def table(layout, key_layout, *heads, seed=3):
    """Entries of both signs for each pair of frames."""
    generator = torch.Generator().manual_seed(seed)
    keys = layout if key_layout is None else key_layout
    return torch.randn(*heads, layout.frames, keys.frames, generator=generator)


def masked(entries):
    """Half of a table's entries −inf."""
    return entries.masked_fill(entries < 0, -torch.inf)


# From (layout, key_layout, heads); what needs frames of one size is in EVEN_RULES.
R = vk.FrameRule
RULES = {
    "none": lambda layout, keys, h: None,
    "tar frame_max": lambda layout, keys, h: R.tar(1.0, 0.8),
    "tar row_max": lambda layout, keys, h: R.tar(1.5, -0.6, stat="row_max"),
    "tar frame_max clamped": lambda layout, keys, h: R.tar(1.0, clamp_negative=True),
    "tar row_max clamped": lambda layout, keys, h: R.tar(1.0, 0.5, "row_max", True),
    "tar none": lambda layout, keys, h: R.tar(2.0, 1.3, stat="none"),
    "bias": lambda layout, keys, h: R.bias(table(layout, keys)),
    "bias by head": lambda layout, keys, h: R.bias(table(layout, keys, h), 0.7),
    "bias by stat and head": lambda layout, keys, h: R.bias(
        table(layout, keys, h), 0.3, "frame_max"
    ),
    "mask by head": lambda layout, keys, h: R.bias(masked(table(layout, keys, h))),
    "window": lambda layout, keys, h: R.window(1),
    "window and sink": lambda layout, keys, h: R.window(0, sink=1),
    "causal": lambda layout, keys, h: R.causal(2),
    "keyframes": lambda layout, keys, h: R.keyframes(1, 2, 1, w=0),
    "attenuate": lambda layout, keys, h: R.attenuate(0.6, 2),
    "attenuate bands": lambda layout, keys, h: R.attenuate(0.9, 3, bands=((1, 1),), beta=0.3),
    "reference": lambda layout, keys, h: R.reference(0.4) if (keys or layout).frames else R(),
    "band": lambda layout, keys, h: R.band(2),
    "tar in a window": lambda layout, keys, h: R.tar(1.0) + R.window(1),
    "tar row_max in a mask by head": lambda layout, keys, h: (
        R.tar(1.0, stat="row_max") + R.bias(masked(table(layout, keys, h)))
    ),
    "tar, attenuated, band, bias": lambda layout, keys, h: (
        R.tar(1.0) + R.attenuate(0.6, 1) + R.band(3) + R.bias(table(layout, keys))
    ),
}
EVEN_RULES = {
    "attenuate tokens": lambda layout, keys, h: R.attenuate(0.5, 2, metric="token"),
    "tar of attenuated tokens": lambda layout, keys, h: (
        R.tar(1.0, stat="row_max") + R.attenuate(0.5, 2, metric="token")
    ),
    "radial": lambda layout, keys, h: R.radial(block=2, neighbour=0.5),
}


def heads_outermost(x):
    """A view whose memory is (batch, heads, tokens, head_dim)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def with_gaps(x):
    """A view whose every row is followed by three elements of NaN."""
    return torch.nn.functional.pad(x, (0, 3), value=NAN)[..., :-3]


def packed(x):
    """A view into one tensor that holds other things between the tokens."""
    return torch.stack([torch.full_like(x, NAN), x], dim=2)[:, :, 1]


STRIDES = {
    "contiguous": lambda x: x,
    "heads outermost": heads_outermost,
    "gaps": with_gaps,
    "packed": packed,
    "expanded": lambda x: x[:1].expand_as(x),
}
LENGTHS = {  # from the number of keys; of two sequences
    "none": lambda keys: None,
    "all": lambda keys: torch.tensor([keys, keys], dtype=torch.int32),
    "zero and one": lambda keys: torch.tensor([0, 1], dtype=torch.int32),
    "some": lambda keys: torch.tensor([max(keys - 3, 0), (keys + 1) // 2], dtype=torch.int32),
    "beyond": lambda keys: torch.tensor([keys + 5, -2], dtype=torch.int32),
}

OPTIONS = {
    "layout": list(LAYOUTS),
    "keys": list(KEY_LAYOUTS),
    "tokens": TOKENS,
    "rule": [*RULES, *EVEN_RULES],
    "lengths": list(LENGTHS),
    "strides": list(STRIDES),
    "heads": [(2, 2), (4, 2), (3, 1)],
    "head_dim": [16, 40, 64],
    "map": ["none", "mean", "heads"],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "scale": [None, 0.3, -0.2],
}


def make(case, *, seed=0):
    """Returns ``(query, key, value, layout, rule)`` and the options of frame_attention's call.

    A rule that needs frames of one size is exchanged where the layouts have others.
    """
    (heads, key_heads), tokens = case["heads"], case["tokens"]
    layout = LAYOUTS[case["layout"]](tokens)
    key_layout = KEY_LAYOUTS[case["keys"]](layout, tokens)
    keys = layout if key_layout is None else key_layout
    name = case["rule"]
    if name in EVEN_RULES and len({*layout.frame_tokens, *keys.frame_tokens}) > 1:
        name = "attenuate bands"
    rule = {**RULES, **EVEN_RULES}[name](layout, key_layout, heads)
    generator = torch.Generator().manual_seed(seed)

    def draw(length, count):
        x = torch.randn(2, length, count, case["head_dim"], generator=generator)
        return STRIDES[case["strides"]](x.to(case["dtype"]))

    query = draw(layout.tokens, heads)
    key, value = draw(keys.tokens, key_heads), draw(keys.tokens, key_heads)
    options = {
        "key_layout": key_layout,
        "key_lengths": LENGTHS[case["lengths"]](keys.tokens),
        "scale": case["scale"],
        "return_map": case["map"] != "none",
        "map_heads": case["map"] == "heads",
    }
    return (query, key, value, layout, rule), options


def with_given_statistic(rule, query, *, seed=5):
    """Returns the rule weighed by a given statistic of both signs instead of its own."""
    generator = torch.Generator().manual_seed(seed)
    stat = torch.randn(query.shape[:-1][::-1], generator=generator).permute(2, 1, 0)
    return vk.FrameRule(rule.terms, stat=stat, clamp_negative=rule.clamp_negative)


def identify(case):
    """Returns a test's name for a case."""
    return f"{case['layout']}-{case['keys']}-{case['tokens']}-{case['rule']}".replace(" ", "_")
