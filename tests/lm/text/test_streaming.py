"""Text in pieces: together the whole text, and never half a character."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from kronjax.lm.models.generation import continuation
from kronjax.lm.text.streaming import TextStream
from kronjax.lm.text.tokenizer import Tokenizer

HALF = "\N{REPLACEMENT CHARACTER}"
TEXTS = st.text(st.sampled_from("ab e\n.é本😀 "), max_size=12)


def sentence_piece():
    """A tokenizer of characters and bytes that drops the first space of a text."""
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abe"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return Tokenizer({"tokenizer.json": backend.to_str().encode()})


@pytest.fixture(scope="module", params=["bytes", "sentence piece"])
def kind(request, tokenizer):
    return tokenizer if request.param == "bytes" else sentence_piece()


def pieces(tokenizer, tokens, before=()):
    stream = TextStream(tokenizer, before)
    return [*map(stream.add, tokens), stream.end()]


@given(text=TEXTS)
def test_the_pieces_of_a_text_are_whole_characters(kind, text):
    tokens = kind.encode(text, special=False).tolist()
    parts = pieces(kind, tokens)
    assert "".join(parts) == kind.decode(tokens)
    assert not any(HALF in part for part in parts)


@given(before=TEXTS, text=TEXTS)
def test_what_follows_a_prompt_keeps_its_first_space(kind, before, text):
    first = kind.encode(before, special=False)
    new = kind.encode(text, special=False).tolist()
    parts = pieces(kind, new, first)
    assert "".join(parts) == continuation(kind, first, new)


def test_text_is_returned_as_soon_as_it_is_complete(tokenizer):
    tokens = tokenizer.encode("né😀!", special=False).tolist()
    assert pieces(tokenizer, tokens) == ["n", "", "é", "", "", "", "😀", "!", ""]


def test_half_a_character_at_the_end_is_returned_last(tokenizer):
    tokens = tokenizer.encode("a😀", special=False).tolist()[:-1]
    assert pieces(tokenizer, tokens) == ["a", "", "", "", HALF]
    # The text of bytes that never become a character.
    tokens.append(tokenizer.encode("b")[0])
    assert pieces(tokenizer, tokens) == ["a", "", "", "", HALF + "b", ""]


def test_special_tokens_have_no_text(tokenizer):
    tokens = [*tokenizer.encode("a the"), tokenizer.eos, *tokenizer.encode(" the")]
    assert "".join(pieces(tokenizer, tokens)) == "a the the"
