"""Conversion of GGUF files of Llama type to the content of Hugging Face folders.

llama.cpp rotates neighbouring channels of a head, Hugging Face those half a head apart.
So the converter of llama.cpp permutes the rows of the query and key matrices of the
architecture `llama`, and this module reverts it:

    stored row  2 i + s  of a head  =  row  s d/2 + i,        0 <= i < d/2,  s in {0, 1}

Tensors stay in the file until they are used: one matrix at a time is dequantised.

References: the specification of the format, ggml-org/ggml, docs/gguf.md.

>>> unpermute(np.arange(4.0), 1)
array([0., 2., 1., 3.])
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kronjax.io import stand_ins
from kronjax.lm.checkpoints import gguf_tokenizer
from kronjax.lm.checkpoints.gguf_header import MAGIC, Header, Tensor, read_header
from kronjax.lm.models import llama
from kronjax.lm.text import chat, special_tokens
from kronjax.lm.text.special_tokens import CONFIG
from kronjax.lm.text.tokenizer import Tokenizer, read_tokenizer

ARCHITECTURES = ("llama",)
"""Supported values of `general.architecture`."""

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": llama.Model.HEAD,
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names in Hugging Face by those in llama.cpp; in blocks, without the block number."""

_COMPUTED = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
}
"""Settings about attention and positions that are read; others are refused."""

FACTORS = "rope_freqs.weight"
"""Name of the tensor by which the frequencies of Llama 3 are divided."""

_LLAMA3 = [
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 16.0, 32.0)
]


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Tokenizer | None]:
    """Read a GGUF file of Llama type.

    Args:
        path: The file. If its tokenizer is of a kind that cannot be rebuilt, a
            `tokenizer.json` in the same folder is used. A chat template may come from
            either.

    Returns:
        The values of a `config.json`; the tensors under the names of Hugging Face, with
        matrices `[n_out, n_in]`; the tokenizer, or None if the file has none.

    Raises:
        ValueError: If the file is damaged, split, not of Llama type, or needs a feature
            that the port lacks; the message begins with the name of the file.
        ImportError: If the package `gguf` is missing; the message names the extra.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        with open(path, "rb") as file:
            head = file.read(512)
        other = None if head.startswith(MAGIC) else stand_ins.describe(head)
        if other is not None:
            raise ValueError(other)
        # Not the subclass: its views would keep asking after the file.
        header = read_header(np.asarray(np.memmap(path, np.uint8, mode="r")))
        _check_kind(header.settings)
        config = _config(header)
        tensors = _tensors(header, config)
        tokenizer = _tokenizer(path, header.settings)
        if tokenizer is not None and tokenizer.size > config["vocab_size"]:
            raise ValueError(
                f"its tokenizer has {tokenizer.size} tokens, its embedding only "
                f"{config['vocab_size']} rows"
            )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config, tensors, tokenizer


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of queries or keys in the order of Hugging Face.

    Args:
        rows: A matrix `[n_out, n_in]` or a bias, `[heads d, ...]`, in the order of
            llama.cpp.
        heads: Number of heads.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _check_kind(settings: Mapping[str, Any]) -> None:
    """Check that a file holds a complete Llama model."""
    architecture = settings.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"its architecture is {architecture!r}; of GGUF files only "
            f"{', '.join(ARCHITECTURES)} is supported"
        )
    parts = settings.get("split.count", 1)
    if parts != 1:
        raise ValueError(
            f"it is one of {parts} parts; join them with llama-gguf-split --merge"
        )
    for key, value in settings.items():
        family, _, name = key.partition(".")
        if family in ARCHITECTURES and name not in _COMPUTED and _matters(name, value):
            raise ValueError(f"{key} {value!r} is not supported")
    experts = settings.get("llama.expert_count", 0)
    if experts:
        raise ValueError(
            f"it is a mixture of {experts} experts, which is not supported"
        )


def _matters(name: str, value: Any) -> bool:
    """Return whether a setting changes attention, positions or scales."""
    known = re.search(r"attention|rope|scale|softcap", name)
    neutral = [x in (0, 1) for x in np.ravel(np.asarray(value, object)).tolist()]
    return known is not None and not all(neutral)


def _config(header: Header) -> dict[str, Any]:
    """Return the values of a `config.json`."""
    settings = header.settings
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("it has no matrix token_embd.weight")
    heads = _size(settings, "attention.head_count")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": _size(settings, "vocab_size", embedding.shape[0]),
        "hidden_size": _size(settings, "embedding_length"),
        "intermediate_size": _size(settings, "feed_forward_length"),
        "num_hidden_layers": _size(settings, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(settings, "attention.head_count_kv", heads),
        "max_position_embeddings": _size(settings, "context_length"),
        "rms_norm_eps": _number(settings, "attention.layer_norm_rms_epsilon"),
        "rope_theta": _number(settings, "rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
    }
    if embedding.shape != (config["vocab_size"], config["hidden_size"]):
        raise ValueError(
            f"token_embd.weight has shape {embedding.shape}, but the settings say "
            f"{(config['vocab_size'], config['hidden_size'])}"
        )
    width = config["hidden_size"] // heads
    d = _size(settings, "attention.key_length", width)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _size(settings, key, d) != d:
            raise ValueError(f"llama.{key} is not {d}, the width of a head")
    if d != width or config["hidden_size"] % heads:
        config["head_dim"] = d
    for name in ("bos", "eos", "padding"):
        number = settings.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(number, int):
            config[f"{name.replace('padding', 'pad')}_token_id"] = number
    scaling = _scaling(header, config)
    return {**config, "rope_scaling": scaling} if scaling else config


def _size(settings, key, default=None) -> int:
    """Return a size; an array with one size for each layer must have equal entries."""
    value = settings.get(f"llama.{key}", default)
    if isinstance(value, np.ndarray) and len({*value.tolist()}) == 1:
        value = value.tolist()[0]
    if value is None:
        raise ValueError(f"the setting llama.{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"llama.{key} is {value!r}, not one positive integer")
    return value


def _number(settings, key, default=None) -> float:
    value = settings.get(f"llama.{key}", default)
    if not isinstance(value, float) or not 0 < value < float("inf"):
        raise ValueError(f"llama.{key} is {value!r}, not a positive number")
    # The shortest decimal of the float32: 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(value)))


def _scaling(header: Header, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return `rope_scaling`, or None if the frequencies are not scaled."""
    settings = header.settings
    kind = settings.get("llama.rope.scaling.type", "linear")  # as in llama.cpp
    if kind not in ("none", "linear"):
        raise ValueError(f"llama.rope.scaling.type {kind!r} is not supported")
    linear = None
    older = settings.get("llama.rope.scale_linear", 1.0)
    factor = _number(settings, "rope.scaling.factor", older)
    if kind == "linear" and factor != 1:
        linear = {"rope_type": "linear", "factor": factor}
    if FACTORS not in header.tensors:
        return linear
    factors = header.tensors[FACTORS].load()
    if np.all(factors == 1):
        return linear
    # The file holds the quotients; find the settings of config.json that yield them.
    plain = llama.Config.from_hugging_face(config)
    for scaling in _LLAMA3 if linear is None else ():
        values = {**config, "rope_scaling": scaling}
        scaled = llama.Config.from_hugging_face(values)
        quotients = plain.frequencies() / scaled.frequencies()
        if factors.shape == quotients.shape and np.allclose(
            factors, quotients, rtol=1e-4
        ):
            return scaling
    raise ValueError(
        f"{FACTORS} is of no known rope_scaling: only Llama 3's with factor 8, 16 or "
        "32 is supported"
    )


def _tensors(header: Header, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors under the names of Hugging Face."""
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    tensors, blocks = {}, set()
    for name, tensor in header.tensors.items():
        if name == FACTORS:
            continue
        match = re.fullmatch(r"(?:blk\.(0|[1-9]\d*)\.)?(\w+)\.(weight|bias)", name)
        if not match or match[2] not in NAMES:
            raise ValueError(f"it holds the tensor {name}, which no Llama has")
        block, part, ending = match.groups()
        new = f"{NAMES[part]}.{ending}"
        if block is not None:
            blocks.add(int(block))
            new = f"model.layers.{block}.{new}"
        if part in heads:
            tensor = _unpermuted(name, tensor, heads[part])
        tensors[new] = tensor
    # Checked before the model is built: a file may claim to have a billion layers.
    num_layers = config["num_hidden_layers"]
    if len(blocks) != num_layers or max(blocks) != num_layers - 1:
        raise ValueError(
            f"llama.block_count is {num_layers}, but there are tensors of "
            f"{len(blocks)} blocks"
        )
    return tensors


def _unpermuted(name: str, tensor: Tensor, heads: int) -> Tensor:
    if tensor.shape[0] % (2 * heads):
        raise ValueError(
            f"{name} has shape {tensor.shape}, whose rows do not form pairs in "
            f"{heads} heads"
        )
    return Tensor(tensor.shape, lambda: unpermute(tensor.load(), heads))


def _tokenizer(path: Path, settings: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer of a file, completed from its folder."""
    try:
        tokenizer = gguf_tokenizer.build(settings)
    except gguf_tokenizer.UnknownTokenizer:
        if not (path.parent / "tokenizer.json").is_file():
            raise
        tokenizer = read_tokenizer(path.parent)
    if tokenizer is None or chat.templates(tokenizer.files):
        return tokenizer
    files, beside = dict(tokenizer.files), path.parent / chat.FILE
    template = gguf_tokenizer.chat_template(settings)
    if template is not None:
        config = {**special_tokens.read(files, CONFIG), "chat_template": template}
        files[CONFIG] = json.dumps(config, indent=2).encode()
    elif beside.is_file():
        files[chat.FILE] = beside.read_bytes()
    return Tokenizer(files)
