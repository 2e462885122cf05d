"""How a model is trained, and what may happen between two steps.

>>> Settings(steps=10, batch=8, accumulate=2).rows
4
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Protocol

from kronjax.lm.models.base import LanguageModel
from kronjax.lm.text import blocks
from kronjax.lm.training.objectives import Weights
from kronjax.lm.training.optimizer import Optimizer
from kronjax.lm.training.sharding import Shard
from kronjax.lm.training.step import Precision

LENGTH = 1024
"""Tokens of a window at most, unless asked for."""


COUNTS = (
    "steps",
    "batch",
    "accumulate",
    "length",
    "evaluate_every",
    "evaluate_blocks",
    "patience",
    "checkpoint_every",
    "keep",
)
"""Settings that are at least 1, or None."""


class Hook(Protocol):
    """What happens between two steps; its `repr` says all that decides what it does."""

    def due(self, step: int) -> bool:
        """Say whether to be called after so many steps; 0 is before the first."""
        ...

    def __call__(self, step: int, model: LanguageModel) -> None:
        """Change numbers of the model, in place.

        Args:
            step: The steps that were made.
            model: Whose parameters, masks and orders may be set to others of the same
                shape and dtype. Its arrays are gone after the next step: copy what is
                to be kept.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return what is kept in a checkpoint, as JSON holds it."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned. Masks are restored with the model."""
        ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: Number of updates; None for one pass over the data.
        batch: Windows in each.
        accumulate: Parts in which they are taken, to save memory.
        length: Tokens that are read of a window; None for the context of the model, at
            most 1024.
        optimizer: How parameters are moved.
        weights: Of the terms of the loss; without a teacher only the first counts.
        precision: Of products; parameters are float32.
        remat: Whether to compute blocks twice, to save memory.
        freeze: Patterns of names of what is not trained, such as `wte` or `h.*.ln_1`.
        shard: `none`, `data` or `full`; see `kronjax.lm.training.sharding`.
        held_out: Part of the tokens that is held out, where no others are given.
        evaluate_every: Steps between two evaluations; None for a tenth of all.
        evaluate_blocks: Windows that are evaluated on, at most.
        patience: Evaluations without a lower loss after which to stop, with the best
            parameters; None never stops.
        checkpoint_every: Steps between two checkpoints.
        keep: How many checkpoints stay.
        seed: Of the order of the data.
    """

    steps: int | None = None
    batch: int = 8
    accumulate: int = 1
    length: int | None = None
    optimizer: Optimizer = Optimizer()
    weights: Weights = Weights()
    precision: Precision = "float32"
    remat: bool = False
    freeze: tuple[str, ...] = ()
    shard: Shard = "none"
    held_out: float = blocks.HELD_OUT
    evaluate_every: int | None = None
    evaluate_blocks: int = 64
    patience: int | None = None
    checkpoint_every: int = 500
    keep: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.batch % self.accumulate:
            raise ValueError(
                f"a batch of {self.batch} windows has no {self.accumulate} equal parts"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(
                f"precision is {self.precision!r}; write float32 or bfloat16"
            )

    @property
    def rows(self) -> int:
        """Windows in each part of a batch."""
        return self.batch // self.accumulate

    def decisive(self) -> dict[str, Any]:
        """Return, as JSON holds it, what decides the outcome up to rounding."""
        found = json.loads(json.dumps(dataclasses.asdict(self)))
        free = ["accumulate", "remat", "shard", "checkpoint_every", "keep"]
        if self.patience is None:
            free += ["evaluate_every", "evaluate_blocks"]
        for name in free:
            del found[name]
        return found
