"""Small GGUF files in llama.cpp's layout, for the scripts and the tests."""

import gguf
import jax
import numpy as np
from flax import nnx
from tokenizers import pre_tokenizers

from kronjax.lm.models import llama

END = "<|endoftext|>"

PARTS = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def vocabulary():
    """Return tokens and merges of a byte-level BPE: all bytes, and two common words."""
    merges = ["Ġ t", "h e", "Ġt he", "a n", "an d"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [END, *letters, *(merge.replace(" ", "") for merge in merges)], merges


def random_model(seed=0, **sizes):
    """Return a Llama with random weights; its default vocabulary is `vocabulary`."""
    sizes = {
        "vocab_size": len(vocabulary()[0]),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        **sizes,
    }
    model = llama.Model(llama.Config(**sizes), rngs=nnx.Rngs(seed))
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [  # norms and biases are random, too
        x + 0.1 * jax.random.normal(key, x.shape, x.dtype)
        for x, key in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graph, tree.unflatten(leaves))


def tensors_of(model):
    """Return the tensors of a model with llama.cpp's names and order of rows."""
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.kv_heads}
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        *place, leaf = map(str, path)
        array = np.asarray(variable.get_value())
        array = array.T if leaf == "kernel" else array
        block = f"blk.{place[1]}." if place[0] == "layers" else ""
        part = PARTS[".".join(place[2:] if block else place)]
        if part in heads:  # halves of a head become neighbouring rows
            halves = array.reshape(heads[part], 2, -1, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        ending = "bias" if leaf == "bias" else "weight"
        tensors[f"{block}{part}.{ending}"] = np.ascontiguousarray(array)
    return tensors


def write(path, model, quantization="F32", *, settings=None, tensors=None):
    """Write a model with the tokenizer of `vocabulary`.

    Args:
        path: Path of the file.
        model: A `llama.Model`.
        quantization: Format of the matrices, such as `"Q8_0"`.
        settings: Settings by key that are added or replaced; None leaves a key out.
        tensors: Further tensors by llama.cpp's names.
    """
    writer = gguf.GGUFWriter(path, "llama")
    tokens, merges = vocabulary()
    config = model.config
    values = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.attention.key_length": config.head_width,
        "llama.attention.value_length": config.head_width,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_width,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        **(settings or {}),
    }
    for key, value in values.items():
        if value is not None:
            add_setting(writer, key, value)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, array in {**tensors_of(model), **(tensors or {})}.items():
        if array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_setting(writer, key, value):
    """Add a setting, in the GGUF type that belongs to its Python type."""
    kinds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)
