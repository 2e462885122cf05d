"""The settings of rotary positions in a `config.json`, complete and consistent.

They are in the mapping `rope_parameters`, or, in older files, in `rope_scaling` beside
a `rope_theta`. A mapping that lacks a setting, has one without effect, or contradicts
another mapping is refused by the name of the key.

>>> read({"rope_scaling": {"type": "linear", "factor": 4.0}})
{'factor': 4.0, 'rope_type': 'linear'}
"""

from collections.abc import Mapping
from typing import Any

KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "original_max_position_embeddings",
    ),
}
"""Settings of the supported scalings of the rotary frequencies, by `rope_type`."""

THETA = "rope_theta"

_MAPPINGS = ("rope_parameters", "rope_scaling")
_NEUTRAL = {"factor": 1, "attention_factor": 1, "partial_rotary_factor": 1}
"""Values of settings that change nothing where a scaling has no such setting."""
_IGNORED = ("original_max_position_embeddings", "finetuned")
"""Settings that describe the training, where a scaling does not use them."""


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the rotary positions.

    Args:
        values: The content of `config.json`.

    Returns:
        `rope_type` and the settings that belong to it, and `rope_theta` if it is given;
        nothing where frequencies are not scaled and the default applies.

    Raises:
        ValueError: If a setting is missing, unknown, without effect, or contradicts
            another; the message names it.
    """
    read = {x: _of_mapping(x, values[x]) for x in _MAPPINGS if values.get(x)}
    theta = values.get(THETA)
    found: dict[str, Any] = {} if theta is None else {THETA: theta}
    where = dict.fromkeys(found, "at the top level")
    for name, rope in read.items():
        for key, value in rope.items():
            if found.setdefault(key, value) != value:
                raise ValueError(
                    f"config.json: {key} is {value!r} in {name} and {found[key]!r} "
                    f"{where[key]}; remove one of them"
                )
            where.setdefault(key, f"in {name}")
    return found


def _of_mapping(name: str, given: Any) -> dict[str, Any]:
    """Return the settings of one mapping, after checking that they are complete."""
    if not isinstance(given, Mapping):
        raise ValueError(f"config.json: {name} is {given!r}, not a mapping")
    rope = {key: value for key, value in given.items() if value is not None}
    old = rope.pop("type", None)  # the older name
    kind = rope.get("rope_type", old)
    if old is not None and old != kind:
        raise ValueError(
            f"config.json: {name} says rope_type {kind!r} and type {old!r}; remove one "
            "of them"
        )
    if kind is None and rope.keys() - {THETA}:
        raise ValueError(
            f"config.json: {name} lacks rope_type, which says what "
            f"{', '.join(sorted(rope.keys() - {THETA}))} means"
        )
    kind = rope["rope_type"] = kind or "default"
    if not isinstance(kind, str) or kind not in KEYS:
        raise ValueError(
            f"config.json: rope_type {kind!r} is not supported; {', '.join(KEYS)} are"
        )
    missing = [key for key in KEYS[kind] if key not in rope]
    if missing:
        raise ValueError(f"config.json: {name} of {kind} lacks {', '.join(missing)}")
    for key in sorted(rope.keys() - {"rope_type", THETA, *KEYS[kind]}):
        value = rope.pop(key)
        if key in _IGNORED:
            continue
        if isinstance(value, bool) or value != _NEUTRAL.get(key):
            raise ValueError(
                f"config.json: {key} {value!r} in {name} is not supported where "
                f"rope_type is {kind!r}"
            )
    return rope
