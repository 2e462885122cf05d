"""Windows of the protocols, token by token."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronjax.lm.evaluation.protocols import PROTOCOLS, find


def covered(windows):
    return [i for window in windows for i in range(window.first, window.end)]


@given(tokens=st.integers(0, 400), context=st.sampled_from([2, 7, 64, 100]))
def test_adjacent_windows(tokens, context):
    windows = PROTOCOLS["krony-pt"].windows(tokens, context)
    # Windows follow each other; the first token of each is not scored.
    assert covered(windows) == [i for i in range(tokens) if i % context]
    assert len(windows) == -(-tokens // context) - (tokens % context == 1)
    whole = PROTOCOLS["gptq-2048"].windows(tokens, context)
    assert whole == windows[: tokens // context]
    assert all(window.scored == context - 1 for window in whole)


@given(tokens=st.integers(0, 400), context=st.sampled_from([2, 8, 64, 100]))
def test_strided_windows(tokens, context):
    """The loop in the documentation of transformers, with a set in place of a mask."""
    windows = PROTOCOLS["hf-strided"].windows(tokens, context)
    assert covered(windows) == list(range(1, tokens))
    scored = set()
    for number, window in enumerate(windows):
        begin = number * (context // 2)
        end = min(begin + context, tokens)
        assert (window.begin, window.end) == (begin, end)
        new = set(range(begin, end)) - scored - {0}
        assert set(range(window.first, window.end)) == new
        scored |= new
        # At least half of the window precedes the scored tokens, if there are enough.
        assert window.first - window.begin >= min(context // 2, window.first)


def test_the_settings_are_the_published_ones():
    settings = {
        name: (p.context, p.stride, p.average, p.remainder, p.version)
        for name, p in PROTOCOLS.items()
    }
    assert settings == {
        "krony-pt": (1024, 1024, "windows", "score", 1),
        "gptq-2048": (2048, 2048, "tokens", "drop", 1),
        "hf-strided": (1024, 512, "tokens", "score", 1),
    }
    assert PROTOCOLS["gptq-2048"].fitted(8192) is PROTOCOLS["gptq-2048"]
    smaller = dataclasses.replace(PROTOCOLS["hf-strided"], context=64, stride=32)
    assert PROTOCOLS["hf-strided"].fitted(64) == smaller


def test_an_unknown_protocol_raises_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"krony-pt, gptq-2048, hf-strided; did you.*"):
        find("gptq")
    with pytest.raises(ValueError, match="no protocol 'c4'; there are"):
        find("c4")
