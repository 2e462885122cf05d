"""The ports, by the `model_type` of their configurations."""

from collections.abc import Mapping
from typing import Any

from kronjax.lm.models import gpt2, llama, opt

PORTS = {"gpt2": gpt2, "opt": opt, "llama": llama}
"""The ports by the `model_type` of their `config.json`."""


def port_of(values: Mapping[str, Any]) -> Any:
    """Return the port for the values of a `config.json`.

    Raises:
        ValueError: If the architecture is unknown; lists those known.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in PORTS:
        raise ValueError(
            f"the architecture {kind!r} is not supported; those of model_type "
            f"{', '.join(PORTS)} are"
        )
    return PORTS[kind]
