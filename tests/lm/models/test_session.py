"""Conversations whose cache is kept give the tokens of those that are read anew."""

import numpy as np
import ports
import pytest
from flax import nnx

from kronjax.lm.models import generation, session
from kronjax.lm.models.generation import generate_tokens
from kronjax.lm.models.session import Session


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(session, "CHUNK", 8)
    monkeypatch.setattr(session, "SMALLEST", 16)


def turns(seed=0):
    """Lengths of the parts of a conversation, and its tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 300, n).tolist() for n in (3, 5, 1, 9, 2)]


@pytest.mark.parametrize("variant", ["gpt2", "llama", "opt"])
def test_turns_continue_as_if_they_were_read_anew(variant):
    model = ports.make(variant)
    options = {"max_new_tokens": 3, "temperature": 1.0, "seed": 3}
    kept, history = Session(), []
    for part in turns():
        history += [token % 60 for token in part[:6]]
        (new,) = generate_tokens(model, [history], session=kept, **options)
        assert [new] == generate_tokens(model, [history], **options)
        history += new


def test_a_conversation_may_change_at_any_place(tiny):
    kept = Session()
    first, *others = turns()
    for history in ([*first, *x] for x in (others[2], others[0], others[2][:4], [])):
        got = generate_tokens(tiny, [history], max_new_tokens=3, session=kept)
        assert got == generate_tokens(tiny, [history], max_new_tokens=3)


def test_a_stopped_or_failed_turn_leaves_a_session_that_works(tiny):
    kept, history = Session(), turns()[3]
    expected = generate_tokens(tiny, [history], max_new_tokens=6)
    options = {"max_new_tokens": 6, "session": kept}

    def fail(drawn):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_tokens(tiny, [history], on_token=fail, **options)
    stopped = generate_tokens(tiny, [history], stop=[expected[0][2]], **options)
    assert stopped[0] == expected[0][: expected[0].index(expected[0][2])]
    assert generate_tokens(tiny, [history], **options) == expected


def test_tokens_are_read_once_and_programs_compiled_for_each_doubling(
    tiny, monkeypatch
):
    read, slots = [], []
    begin = Session.begin

    def counted(self, model, prompt, room, append):
        def call(tokens, mask, cache):
            read.append(int(mask.sum()))
            slots.append(cache.slots)
            return append(tokens, mask, cache)

        return begin(self, model, prompt, room, call)

    monkeypatch.setattr(Session, "begin", counted)
    generation._programs.cache_clear()
    kept, history = Session(), []
    for _ in range(9):
        history += [5]
        (new,) = generate_tokens(tiny, [history], max_new_tokens=4, session=kept)
        history += new
    # The last token of a reply and that of the user; more only in a larger cache.
    # Most turns read the last token of a reply and that of the user.
    assert read.count(2) >= 5 and sum(read) < sum(range(1, 45, 5)) / 2
    _, step, append = generation._programs(nnx.split(tiny)[0], False)
    assert len(set(slots)) == step._cache_size() == append._cache_size() == 2
