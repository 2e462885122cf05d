"""GGUF files of Llama type: round trips, quantised tensors, and damaged files."""

import struct
import sys

import gguf as gguf_package
import numpy as np
import pytest

from bench import gguf_files
from kronjax import lm
from kronjax.lm.checkpoints import gguf
from kronjax.lm.models import llama


def logits(model):
    tokens = np.arange(22, dtype=np.int32).reshape(2, 11) * 7 % 250
    return np.asarray(model(tokens))


@pytest.fixture(scope="module")
def model():
    return gguf_files.random_model()


@pytest.fixture
def path(tmp_path, model):
    gguf_files.write(tmp_path / "model.gguf", model)
    return tmp_path / "model.gguf"


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": None},
        {"head_dim": 10, "attention_bias": True, "mlp_bias": True},
        {"rope_theta": 500.0, "rope_type": "linear", "rope_factor": 4.0},
    ],
    ids=["tied", "untied", "biases", "linear"],
)
def test_a_model_survives_a_round_trip(tmp_path, sizes):
    model = gguf_files.random_model(**sizes)
    settings = {}
    if "rope_type" in sizes:
        settings = {
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": sizes["rope_factor"],
        }
    gguf_files.write(tmp_path / "a.gguf", model, settings=settings)
    loaded = lm.load(tmp_path / "a.gguf")
    assert loaded.config == llama.Config(
        **{
            **vars(model.config),
            "origin": loaded.config.origin,
            "num_key_value_heads": model.config.kv_heads,
        }
    )
    np.testing.assert_array_equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("quantization", "tolerance"),
    [("F16", 3e-3), ("BF16", 3e-2), ("Q8_0", 5e-2), ("Q4_1", 0.5)],
)
def test_quantised_matrices_are_read_exactly(tmp_path, model, quantization, tolerance):
    gguf_files.write(tmp_path / "a.gguf", model, quantization)
    kind = gguf_package.GGMLQuantizationType[quantization]
    _, tensors, _ = gguf.read(tmp_path / "a.gguf")
    kernel = np.asarray(model.layers[1].mlp.down_proj.kernel.get_value()).T
    rounded = gguf_package.quants.dequantize(
        gguf_package.quants.quantize(np.ascontiguousarray(kernel), kind), kind
    )
    tensor = tensors["model.layers.1.mlp.down_proj.weight"]
    assert tensor.shape == kernel.shape
    np.testing.assert_array_equal(np.asarray(tensor), rounded)
    scale = np.abs(logits(model)).max()
    error = np.abs(logits(lm.load(tmp_path / "a.gguf")) - logits(model)).max()
    assert error < tolerance * scale


def test_a_tensor_is_dequantised_only_when_it_is_used(path, monkeypatch):
    def refuse(*_):
        raise AssertionError("dequantised")

    monkeypatch.setattr(gguf_package.quants, "dequantize", refuse)
    _, tensors, _ = gguf.read(path)
    assert tensors["model.embed_tokens.weight"].shape[1] == 64
    with pytest.raises(AssertionError, match="dequantised"):
        tensors["model.norm.weight"].load()


@pytest.mark.parametrize("heads", [1, 3])
def test_unpermute_turns_neighbouring_channels_into_halves(heads):
    """The rotations of llama.cpp and of kronjax give the same numbers."""
    rng = np.random.default_rng(heads)
    d, angles = 8, rng.standard_normal(4)
    stored = rng.standard_normal((heads * d, 5))
    x = rng.standard_normal(5)
    turn = np.exp(1j * angles)
    neighbours = (stored @ x).reshape(heads, d // 2, 2)
    turned = (neighbours[..., 0] + 1j * neighbours[..., 1]) * turn
    halves = (gguf.unpermute(stored, heads) @ x).reshape(heads, 2, d // 2)
    np.testing.assert_allclose((halves[:, 0] + 1j * halves[:, 1]) * turn, turned)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_frequencies_of_llama_3_are_recognised(tmp_path, factor):
    scaled = {"rope_type": "llama3", "rope_factor": factor}
    sizes = {"rope_theta": 500000.0, "hidden_size": 128, "num_attention_heads": 2}
    scaled = gguf_files.random_model(**sizes, **scaled)
    plain = llama.Config(rope_theta=500000.0, head_dim=64).frequencies()
    factors = (plain / scaled.config.frequencies()).astype(np.float32)
    gguf_files.write(tmp_path / "a.gguf", scaled, tensors={gguf.FACTORS: factors})
    loaded = lm.load(tmp_path / "a.gguf")
    assert (loaded.config.rope_type, loaded.config.rope_factor) == ("llama3", factor)
    np.testing.assert_array_equal(logits(loaded), logits(scaled))
    ones = np.ones_like(factors)
    gguf_files.write(tmp_path / "b.gguf", scaled, tensors={gguf.FACTORS: ones})
    assert lm.load(tmp_path / "b.gguf").config.rope_type == "default"
    others = factors * np.linspace(1, 2, len(ones), dtype=np.float32)
    gguf_files.write(tmp_path / "c.gguf", scaled, tensors={gguf.FACTORS: others})
    with pytest.raises(ValueError, match=r"c.gguf: rope_freqs.weight is of no known"):
        lm.load(tmp_path / "c.gguf")


def test_a_git_lfs_pointer_is_named_with_its_remedy(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="model.gguf: this is a Git LFS pointer: run"):
        lm.load(path)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(tmp_path, model, key):
    settings = {f"llama.{key}": 4.0, "llama.attention.causal": True}
    gguf_files.write(tmp_path / "a.gguf", model, settings=settings)
    config = lm.load(tmp_path / "a.gguf").config
    assert (config.rope_type, config.rope_factor) == ("linear", 4.0)


def test_a_folder_saved_from_a_gguf_file_holds_the_same_model(tmp_path, path):
    model = lm.load(path)
    lm.save(model, tmp_path / "out")
    again = lm.load(tmp_path / "out")
    assert again.config == model.config
    assert again.tokenizer == model.tokenizer
    np.testing.assert_array_equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"general.architecture": "qwen2"}, "'qwen2'; of GGUF files only llama"),
        ({"llama.expert_count": 8}, "mixture of 8 experts"),
        ({"split.count": 3}, "one of 3 parts; join them"),
        ({"llama.context_length": None}, "llama.context_length is missing"),
        ({"llama.context_length": 0}, "is 0, not one positive integer"),
        ({"llama.context_length": "long"}, "is 'long', not one positive integer"),
        ({"llama.rope.freq_base": -1.0}, "is -1.0, not a positive number"),
        ({"llama.embedding_length": 65}, r"\(262, 64\), but the settings say"),
        ({"llama.vocab_size": 2**31}, r"\(262, 64\), but the settings say"),
        ({"llama.block_count": 2**32 - 1}, "4294967295, but there are tensors of 2"),
        (
            {"llama.attention.head_count": 7},
            "rope.dimension_count is not 16|not form pairs",
        ),
        ({"llama.rope.dimension_count": 8}, "is not 16, the width of a head"),
        ({"llama.attention.head_count_kv": [2, 1]}, "not one positive integer"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not supported"),
        ({"llama.attention.sliding_window": 16}, "sliding_window 16 is not supported"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale 0.5 is not supported"),
        ({"llama.feed_forward_length": 95}, r"has shape .* asks for"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "holds a token twice"),
        ({"tokenizer.ggml.token_type": [1]}, "not an array of 262 numbers"),
        ({"tokenizer.ggml.merges": ["ab"]}, "an entry that is not a pair"),
        ({"tokenizer.ggml.merges": ["no such"]}, "its tokenizer cannot be used"),
        ({"tokenizer.ggml.bos_token_id": 262}, "bos_token_id is 262"),
        ({"tokenizer.ggml.pre": "viking"}, "'viking', which cannot be rebuilt; put"),
        ({"tokenizer.ggml.pre": None}, "'default', which cannot be rebuilt"),
        ({"tokenizer.ggml.model": "t5"}, "kind 't5', which cannot be rebuilt"),
    ],
)
def test_unsupported_settings_raise_an_error(tmp_path, model, settings, message):
    path = tmp_path / "odd.gguf"
    if settings.get("general.architecture"):
        gguf_files.write(path, model)
        content = path.read_bytes()  # the writer would change other keys, too
        path.write_bytes(content.replace(b"\0llama\x11", b"\0qwen2\x11", 1))
    else:
        gguf_files.write(path, model, settings=settings)
    with pytest.raises(ValueError, match=f"odd.gguf: .*({message})"):
        lm.load(path)


def header(tensors=0, settings=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, settings) + rest


def text(content):
    return struct.pack("<Q", len(content)) + content


HUGE = struct.pack("<Q", 2**62)
ENTRY = text(b"output.weight") + struct.pack("<I", 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"GGU", "not a GGUF file"),
        (b"PK\3\4" + bytes(60), "this is a zip archive"),
        (b"JUNK" + bytes(60), "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "is a version 1 GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "is a big-endian GGUF file"),
        (header(2**62), "cut short"),
        (header(0, 2**62), "cut short"),
        (header(0, 1, HUGE), "cut short"),
        (header(0, 1, text(b"a") + struct.pack("<II", 9, 8) + HUGE), "cut short"),
        (header(0, 1, text(b"a") + struct.pack("<II", 9, 0) + HUGE), "cut short"),
        (header(0, 1, text(b"a") + struct.pack("<II", 9, 9) + HUGE), "of the kind 9"),
        (header(0, 1, text(b"a") + struct.pack("<I", 77)), "unknown kind 77"),
        (
            header(0, 2, 2 * (text(b"a") + struct.pack("<II", 4, 1))),
            "the setting a twice",
        ),
        (header(1, 0, text(b"t") + struct.pack("<I", 99)), "t has 99 axes"),
        (header(1, 0, ENTRY + HUGE + HUGE + bytes(12)), "output.weight ends at byte"),
        (header(1, 0, ENTRY + bytes(28)), "whose rows are not positive multiples"),
        (
            header(1, 0, ENTRY + struct.pack("<QQIQ", 32, 1, 99, 0)),
            "of the unknown kind 99",
        ),
        (
            header(1, 0, ENTRY + struct.pack("<QQIQ", 33, 1, 8, 0)),
            "multiples of the 32 numbers in a block of Q8_0",
        ),
        (
            header(2, 0, 2 * (ENTRY + struct.pack("<QQIQ", 1, 1, 0, 0)) + bytes(64)),
            "holds the tensor output.weight twice",
        ),
        (
            header(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 0)),
            "is 0; it must be a power of two",
        ),
    ],
)
def test_a_damaged_file_raises_an_error_that_names_it(tmp_path, content, message):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.gguf: .*{message}"):
        gguf.read(tmp_path / "bad.gguf")


def test_a_file_cut_anywhere_raises_an_error(tmp_path, path):
    content = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(1, 400, 7), *range(400, len(content) - 64, 20011)]:
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut.gguf: it is (cut short|not a GGUF)"):
            gguf.read(cut)


def test_unknown_tensors_raise_an_error_that_names_them(tmp_path, model):
    for name in ("blk.0.ffn_gate_exps.weight", "v.patch_embd.weight", "blk.00.attn_q"):
        extra = {name: np.zeros(32, np.float32)}
        gguf_files.write(tmp_path / "a.gguf", model, tensors=extra)
        with pytest.raises(ValueError, match=f"a.gguf: it holds the tensor {name}"):
            gguf.read(tmp_path / "a.gguf")


def test_a_missing_package_raises_an_error_that_names_the_extra(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'kronjax\[gguf\]'"):
        gguf.read(path)
