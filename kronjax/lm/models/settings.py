"""Settings of a `config.json` that change what a model computes, and their refusal.

A port computes the settings that its `Config` has as fields. Any other setting about
positions, windows, soft caps, scaling, norms, biases or experts must have the value
that changes nothing, or the model is refused by the name of the setting: a model that
computes something else without a word is worse than none. Settings of training, such as
dropout, are ignored.

>>> check({"final_logit_softcapping": None, "attention_dropout": 0.1}, known=set())
>>> check({"final_logit_softcapping": 30.0}, known=set())
Traceback (most recent call last):
ValueError: config.json: final_logit_softcapping 30.0 is not supported
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

_FAMILIES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    # Names, and the values besides null, false and empty ones that change nothing.
    (r"attention_multiplier|query_pre_attn_scalar|softmax_scale|attn_scale", ()),
    (r"max_window_layers|init.*|.*loss.*", (...,)),
    (r"(partial_)?(rotary|rope)_(factor|pct|percent|ratio)", (1,)),
    (r".*(rope|rotary|alibi).*|relative_(attention|position).*", ()),
    (r"position_(embedding|encoding)_type|is_causal|no_bias", (True,)),
    (r".*(sliding|window).*|attention_chunk_size|attention_types?", ()),
    (r"layer_types", ()),
    (r".*(soft_?cap|logit_cap|clip_qkv).*", ()),
    (r".*(multiplier|scale|scaling).*|dim_model_base", (1,)),
    (r".*norm.*", ()),
    (r".*bias.*", ()),
    (r".*experts.*", (0,)),
    (r"(use_)?parallel_(attn|attention|residual)|(add|use)_cross_attention", ()),
    (r"is_encoder_decoder", ()),
)

_EPSILON = r"(rms_|layer_?)?norm_(eps|epsilon)"


def check(
    values: Mapping[str, Any],
    *,
    known: Collection[str],
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
    epsilon: float | None = None,
) -> None:
    """Refuse settings that would change what a model computes, and are not computed.

    Args:
        values: The content of `config.json`.
        known: Names of the settings that the port computes.
        neutral: Values of further settings that change nothing, by name; `...` stands
            for any value.
        epsilon: The epsilon of all norms.

    Raises:
        ValueError: If there is such a setting; the message names it.
    """
    _check_quantization(values)
    for name, value in values.items():
        if name in known or value is None or value is False or value in ([], {}, ""):
            continue
        same = (neutral or {}).get(name, _neutral(name))
        if same is None or same == (...,) or _is_among(value, same):
            continue
        if re.fullmatch(_EPSILON, name) and value == epsilon:
            continue
        full = isinstance(value, list) and all(x == "full_attention" for x in value)
        if name == "layer_types" and full:
            continue
        raise ValueError(f"config.json: {name} {value!r} is not supported")


def without_window(values: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Return the settings without a sliding window that is switched off or too wide.

    Args:
        values: The content of `config.json`.
        context: Largest number of positions.
    """
    values, window = dict(values), values.get("sliding_window")
    is_off = values.get("use_sliding_window") is False
    is_wide = isinstance(window, int) and window >= context
    if is_off or is_wide or window is None:
        values.pop("sliding_window", None)
        values.pop("use_sliding_window", None)
    return values


def with_aliases(
    values: Mapping[str, Any], aliases: Mapping[str, str]
) -> dict[str, Any]:
    """Return the settings with other names of a setting replaced by its own.

    >>> with_aliases({"hidden_size": 8}, {"hidden_size": "n_embd"})["n_embd"]
    8

    Args:
        values: The content of `config.json`.
        aliases: The names of the port, by the other names.

    Raises:
        ValueError: If a setting has different values under its names.
    """
    values = dict(values)
    for other, name in aliases.items():
        given = values.get(other)
        if given is None:
            continue
        if values.get(name) not in (None, given):
            raise ValueError(
                f"config.json: {name} {values[name]!r} contradicts {other} {given!r}, "
                "which is another name of it; remove one of them"
            )
        values[name] = given
    return values


def _neutral(name: str) -> tuple[Any, ...] | None:
    """Return the values of a setting that change nothing; None if none matters."""
    for pattern, values in _FAMILIES:
        if re.fullmatch(pattern, name):
            return values
    return None


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
    return any(value == x and isinstance(value, bool) == (x is True) for x in values)


def _check_quantization(values: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are quantised; the message names the scheme.

    Raises:
        ValueError: If they are.
    """
    for name in ("quantization_config", "compression_config"):
        given = values.get(name)
        if not given:
            continue
        facts = given if isinstance(given, Mapping) else {}
        scheme = facts.get("quant_method") or facts.get("quantization") or "unknown"
        off = [facts.get(key) is False for key in ("load_in_4bit", "load_in_8bit")]
        if all(off):
            continue
        bits = facts.get("bits") or facts.get("w_bit")
        words = f"{scheme}, {bits} bits" if bits else f"{scheme}"
        raise ValueError(
            f"config.json: the weights are quantised ({name}: {words}), which is not "
            "supported; give the model before quantisation"
        )
