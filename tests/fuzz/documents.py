"""Documents as they should not be: valid ones, parts of which are dropped, doubled, changed."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

KEY = "sk-proj/Ab42_cd43+Ef44"


class Raw(str):
    """JSON as it stands, such as a number that Python cannot write."""


class Object(list):
    """The pairs of a JSON object, in which a name may be there twice."""


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**70, 0.5, 1e300, "", " ", "text", "01", "1", "é", "…"),
    *(
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
        "\x00",
        "\u202eback",
        "\n\r\n",
        "\u2028",
        "x" * 5000,
    ),
    *(KEY, "%73k-proj%2fAb42_cd43%2bEf44", "sk-proj/\\u0041b42_cd43+Ef44", "<b>".join(KEY)),
    *([], Object(), [[]], [None], Object([("a", 1)]), Object([("form", "dense")])),
    *map(Raw, ("NaN", "-Infinity", "1e400", "-1e-400", "9" * 400, "9" * 5000, "0." + "3" * 3000)),
    *map(Raw, ('"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\u001b[2J"', "01", "'text'")),
    *map(Raw, ("[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "[" * 9_000)),
]
NAMES = [
    "",
    "a",
    "0",
    "00",
    "1",
    "-1",
    "٣",
    "stages",
    "prompt",
    "form",
    "\x1b[31m0",
    "\0stages",
    KEY,
]
PIECES = [b"", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x1b[31m", b'"', b"\\", b"\\u"]
PIECES += [b"[", b"]", b"{", b"}", b",", b":", b"\n", b"\r", b"```", b"</think>", KEY.encode()]


def tree(value: Any) -> Any:
    """The value with its objects as pairs."""
    if isinstance(value, dict):
        return Object((name, tree(item)) for name, item in value.items())
    return [tree(item) for item in value] if isinstance(value, list) else value


def write(value: Any) -> str:
    """The JSON of a tree."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Object):
        return "{" + ", ".join(f"{json.dumps(n)}: {write(x)}" for n, x in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(write, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def places(value: Any, found: list | None = None) -> list[tuple[list, int]]:
    """Every list of a tree, with every index in it."""
    found = [] if found is None else found
    if isinstance(value, list):
        for index, item in enumerate(value):
            found.append((value, index))
            places(item[1] if isinstance(value, Object) else item, found)
    return found


def change(value: Any, how: str, where: int, what: int) -> Any:
    """The tree, changed at one of its places; it is not used any more."""
    root = [value]
    found = places(root)
    holder, index = found[where % len(found)]
    named = isinstance(holder, Object)
    name, item = holder[index] if named else (None, holder[index])
    new = copy.deepcopy(VALUES[what % len(VALUES)])  # a later change would be in it for good
    if how == "drop" and holder is not root:
        del holder[index]
        return root[0]
    if how == "double" and holder is not root:
        twin = copy.deepcopy(item)
        holder.insert(index, (name, new if what % 2 else twin) if named else twin)
        return root[0]
    if how == "rename" and named:
        holder[index] = (NAMES[what % len(NAMES)], item)
        return root[0]
    if how == "many" and not named and holder is not root:
        holder[index:index] = [copy.deepcopy(item) for _ in range(what % 300)]
        return root[0]
    changed = [item] if how == "nest" else new
    holder[index] = (name, changed) if named else changed
    return root[0]


def tear(data: bytes, how: str, where: int, what: int) -> bytes:
    """The bytes, changed at one place."""
    where %= len(data) + 1
    if how == "truncate":
        return data[:where]
    if how == "remove":
        return data[:where] + data[where + 1 + what % 8 :]
    return data[:where] + PIECES[what % len(PIECES)] + data[where:]


@st.composite
def documents(draw: Any, valid: list[Any]) -> bytes:
    """One of the valid values' JSON, or texts, after up to four changes and two tears."""
    numbers = st.integers(0, 2**16)
    value = valid[draw(st.integers(0, len(valid) - 1))]
    if isinstance(value, dict | list):
        value = tree(value)
        hows = st.sampled_from(["retype", "drop", "double", "rename", "nest", "many"])
        for change_ in draw(st.lists(st.tuples(hows, numbers, numbers), max_size=4)):
            value = change(value, *change_)
        value = write(value)
    data = value.encode("utf-8", "surrogatepass")
    tears = st.tuples(st.sampled_from(["insert", "truncate", "remove"]), numbers, numbers)
    for tear_ in draw(st.lists(tears, max_size=2)):
        data = tear(data, *tear_)
    return data
