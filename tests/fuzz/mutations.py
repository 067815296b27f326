"""Bytes that were damaged, and JSON whose values are others: as hypothesis's strategies."""

from typing import Any

from hypothesis import strategies as st

TELLING = [
    b"\0" * 4,
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x7f\xff\xff\xff",
    b"\0" * 64,
    b"\x80\x04",
    b"PK\x03\x04",
    b"{",
    b'"',
    b"[",
]
"""Bytes that file formats give a meaning to: lengths, signs, beginnings."""


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Draw one to four damages: a byte or a bit changed, a cut, bytes put in, left out or repeated."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        # Half of the places are near the beginning, where headers are.
        most = max(len(result) - 1, 0)
        at = draw(st.integers(0, min(most, 300)) | st.integers(0, most))
        kind = draw(st.sampled_from(("bit", "byte", "cut", "put in", "overwrite", "leave out", "repeat")))
        if kind == "bit" and result:
            result[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and result:
            result[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del result[at:]
        elif kind == "put in":
            result[at:at] = draw(st.sampled_from(TELLING) | st.binary(min_size=1, max_size=16))
        elif kind == "overwrite":
            new = draw(st.sampled_from(TELLING) | st.binary(min_size=1, max_size=8))
            result[at : at + len(new)] = new
        else:
            length = draw(st.integers(1, 200))
            if kind == "leave out":
                del result[at : at + length]
            else:
                result[at:at] = result[at : at + length]
    return bytes(result)


NUMBERS = st.integers() | st.floats() | st.sampled_from([10**30, -(10**30), 2**31, 2**63, 1e300, 5e-324])
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", "\0", "\ud800", "../..", "/", "hf:a/b", "nan", "1", "eps", "auto", "x" * 300]
)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5
)
"""JSON of any type."""


def places(value: Any) -> list[tuple[Any, ...]]:
    """Return the path to the whole of a JSON value, and to each of its parts."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(), *((key, *path) for key, part in parts for path in places(part))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a JSON value with another part at a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


@st.composite
def exchanged(draw: st.DrawFn, value: Any) -> Any:
    """Draw a JSON value of which one to three parts are others, of any type, or of their own type and out of bounds."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        value = put(value, path, draw(NUMBERS | ANYTHING))
    return value
