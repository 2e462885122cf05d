"""The table of ports, and the interface that each of them implements.

A new architecture needs three things: its module, an entry in `PORTS`, and a row in the
table of the tests (`tests/ports.py`).

>>> port_of({"model_type": "opt"}).ARCHITECTURE
'OPTForCausalLM'
"""

from collections.abc import Mapping
from typing import Any, Protocol

from kronjax.lm.models import gpt2, llama, opt
from kronjax.lm.models.base import BaseConfig, LanguageModel


class Port(Protocol):
    """An architecture: a module of `kronjax.lm.models` with these names.

    The names of the embedding and of the head are attributes of its model class,
    `LanguageModel.EMBEDDING` and `LanguageModel.HEAD`.
    """

    @property
    def Config(self) -> type[BaseConfig]:
        """The configuration class; its `model_type` is that of `config.json`."""
        ...

    @property
    def Model(self) -> type[LanguageModel]:
        """The model class, called with `(config, *, rngs)`."""
        ...

    @property
    def ARCHITECTURE(self) -> str:
        """Name of the class of transformers that opens an export."""
        ...

    @property
    def PREFIXES(self) -> tuple[str, ...]:
        """Prefixes of tensor names in files; the first one is written."""
        ...

    @property
    def TRANSPOSED(self) -> str:
        """Regular expression of the layers whose kernels are stored `[n_out, n_in]`."""
        ...

    @property
    def BUFFERS(self) -> str:
        """Regular expression of tensors in files that are not parameters."""
        ...


_ALL: tuple[Port, ...] = (gpt2, opt, llama)

PORTS: dict[str, Port] = {port.Config.model_type: port for port in _ALL}
"""The ports by the `model_type` of their `config.json`."""


def port_of(values: Mapping[str, Any]) -> Port:
    """Return the port for the values of a `config.json`.

    Raises:
        ValueError: If the architecture is unknown; the message lists the known ones.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in PORTS:
        raise ValueError(
            f"config.json: model_type {kind!r} is not supported; supported are "
            f"{', '.join(PORTS)}"
        )
    return PORTS[kind]
