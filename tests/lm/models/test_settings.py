"""Settings of `config.json`: what is computed, what is neutral, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import ports
import pytest

from kronjax import lm
from kronjax.lm.models import gpt2, llama, opt
from kronjax.lm.models.base import activation

CONFIGS = {"gpt2": gpt2.Config, "opt": opt.Config, "llama": llama.Config}
LLAMA3 = {k: v for k, v in ports.LLAMA3.items() if k != "rope_theta"}

# What transformers and users write without any effect on the model.
NEUTRAL = {
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": ["full_attention", "full_attention"],
    "attention_dropout": 0.1,
    "partial_rotary_factor": 1.0,
    "rotary_pct": 1,
    "rope_interleaved": False,
    "final_logit_softcapping": None,
    "logits_scaling": 1.0,
    "embedding_multiplier": 1,
    "use_qk_norm": False,
    "num_experts": 0,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "quantization_config": None,
    "use_cache": True,
    "transformers.js_config": {"dtype": "q4"},
}

REFUSED = {
    "sliding_window": 16,
    "layer_types": ["full_attention", "sliding_attention"],
    "attention_chunk_size": 8192,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 32,
    "alibi": True,
    "position_embedding_type": "relative_key",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 1.0,
    "query_pre_attn_scalar": 1.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.22,
    "logit_scale": 0.0625,
    "scale_emb": 12,
    "use_qk_norm": True,
    "norm_type": "layernorm_without_mean",
    "clip_qkv": 8.0,
    "num_local_experts": 8,
    "use_parallel_residual": True,
    "add_cross_attention": True,
}


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_neutral_settings_load_and_are_written_back(kind):
    values = ports.VARIANTS[kind]
    config = CONFIGS[kind].from_hugging_face(values | NEUTRAL)
    assert config == CONFIGS[kind].from_hugging_face(values)
    written = config.to_hugging_face()
    assert {key: written[key] for key in NEUTRAL} == NEUTRAL


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_settings_that_change_the_mathematics_are_refused_by_name(kind, name):
    values = ports.VARIANTS[kind] | {name: REFUSED[name]}
    with pytest.raises(ValueError, match=f"config.json: {name} .*not supported"):
        CONFIGS[kind].from_hugging_face(values)


@pytest.mark.parametrize(
    "more",
    [{"sliding_window": 64}, {"sliding_window": 9, "use_sliding_window": False}],
)
def test_a_window_that_is_off_or_too_wide_changes_nothing(more):
    config = llama.Config.from_hugging_face(ports.LLAMA | more)
    assert config == llama.Config.from_hugging_face(ports.LLAMA)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling lacks rope_type.* factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "of linear lacks factor"),
        (
            {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5 in rope_scaling is not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
            "factor 4.0 .* where rope_type is 'default'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "turns": 3}},
            "turns 3 in rope_scaling",
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}},
            "rope_type 'llama3' and type 'linear'",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "rope_theta is 500000.0 in rope_parameters and 10000.0 at the top",
        ),
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            "factor is 2.0 in rope_scaling and 4.0 in rope_parameters",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supp"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not"),
        ({"rope_type": "linear"}, "rope_type has no effect outside of rope_scaling"),
        ({"rope_factor": 4.0}, "rope_factor has no effect outside"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters lacks rope_type.* full_attention",
        ),
        (
            {"rope_scaling": LLAMA3 | {"factor": None}},
            "rope_scaling of llama3 lacks factor",
        ),
    ],
)
def test_incomplete_or_contradicting_rotary_settings_are_refused(more, words):
    with pytest.raises(ValueError, match=words):
        llama.Config.from_hugging_face(ports.LLAMA | more)


@pytest.mark.parametrize(
    "more",
    [
        {"rope_scaling": None, "rope_parameters": None},
        {"rope_scaling": {}},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_theta": 10000.0}},
        {"rope_scaling": {"type": "default", "rope_type": "default", "factor": 1.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
        {"rope_theta": 10000, "rope_parameters": {"rope_theta": 10000.0}},
    ],
)
def test_rotary_settings_at_their_neutral_values_load(more):
    config = llama.Config.from_hugging_face(ports.LLAMA | more)
    assert config == llama.Config.from_hugging_face(ports.LLAMA)


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "factor": 2.0}])
def test_scaled_positions_survive_a_round_trip(rope, tmp_path):
    model = ports.make("llama", rope_scaling=rope)
    lm.save(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_scaling"] == rope
    assert lm.load(tmp_path).config == model.config


@pytest.mark.parametrize(
    ("given", "scheme"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"load_in_4bit": True, "load_in_8bit": False}, "unknown"),
    ],
)
def test_quantised_checkpoints_are_refused_with_their_scheme(given, scheme):
    values = ports.LLAMA | {"quantization_config": given}
    words = rf"quantised \(quantization_config: {scheme}\)"
    with pytest.raises(ValueError, match=words):
        llama.Config.from_hugging_face(values)
    off = {"load_in_4bit": False, "load_in_8bit": False, "quant_method": "bitsandbytes"}
    llama.Config.from_hugging_face(ports.LLAMA | {"quantization_config": off})


def test_gpt2_reads_the_common_names_of_its_settings():
    common = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    values = {"model_type": "gpt2", "vocab_size": 60, "max_position_embeddings": 32}
    config = gpt2.Config.from_hugging_face(values | common)
    assert config == gpt2.Config.from_hugging_face(ports.GPT2)
    with pytest.raises(ValueError, match="n_layer 2 contradicts num_hidden_layers 3"):
        gpt2.Config.from_hugging_face(ports.GPT2 | {"num_hidden_layers": 3})


def test_activations_are_known_by_all_of_their_names():
    x = jnp.linspace(-4, 4, 33)
    pairs = {
        "swish": "silu",
        "gelu_python": "gelu",
        "gelu_fast": "gelu_new",
        "gelu_accurate": "gelu_new",
    }
    for name, same in pairs.items():
        np.testing.assert_array_equal(activation(name)(x), activation(same)(x))
    np.testing.assert_allclose(
        activation("quick_gelu")(x), x / (1 + np.exp(-1.702 * x)), atol=1e-5
    )
    np.testing.assert_array_equal(activation("relu2")(x), jax.nn.relu(x) ** 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_types", [["full_attention"]]),
        ("layer_types", 5),
        ("sliding_window", "wide"),
        ("partial_rotary_factor", True),
        ("logits_scaling", True),
        ("attn_logit_softcapping", {"a": 1}),
    ],
)
def test_values_of_odd_types_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} .*not supported"):
        llama.Config.from_hugging_face(ports.LLAMA | {name: value})
