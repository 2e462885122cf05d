"""The settings of training as frozen dataclasses; without jax.

The command line makes an option of every field, and shows the text of the field here as
its help.

>>> Settings(steps=10, batch=8, accumulate=2).rows
4
>>> Pruning(0.5).kept(100)
50
>>> Course().changes
False
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

LENGTH = 1024
"""Largest default number of tokens of a window."""

Precision = Literal["float32", "bfloat16"]
"""Precision of products: float32, on accelerators too, or bfloat16."""

Shard = Literal["none", "data", "full"]
Scope = Literal["layer", "global", "output"]
Method = Literal["low-rank", "interpolative"]

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


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with warm-up and a cosine schedule.

    Attributes:
        rate: The largest learning rate; a cosine lowers it to a tenth.
        warmup: Steps in which the rate rises from near zero; by default a tenth of all
            steps, at most 200.
        final: Ratio of the last learning rate to the largest.
        decay: Weight decay of matrices and factors, times the learning rate, per step.
        clip: The largest norm of the gradient; 0 does not clip.
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
    """

    rate: float = 3e-4
    warmup: int | None = None
    final: float = 0.1
    decay: float = 0.1
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.98

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name in ("rate", "final", "decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be at least 0")
        if not self.clip >= 0:
            raise ValueError(f"clip is {self.clip}; it must be at least 0")
        if self.warmup is not None and self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}; it must be at least 0")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of the terms of the loss; all but the first need a teacher.

    Attributes:
        next_token: Weight of the next-token loss.
        logits: Weight of the divergence from the predictions of the teacher.
        hidden: Weight of the relative squared error of hidden states.
        attention: Weight of the divergence from the attention of the teacher.
        temperature: Temperature by which logits are divided before they are compared.
        layers: Pairs of a block of the student and the block of the teacher that it
            matches, counted from 0, such as 0:1,1:3; spread evenly by default.
    """

    next_token: float = 1.0
    logits: float = 1.0
    hidden: float = 0.0
    attention: float = 0.0
    temperature: float = 1.0
    layers: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        """Validate the fields."""
        terms = (self.next_token, self.logits, self.hidden, self.attention)
        if not all(math.isfinite(x) and x >= 0 for x in terms) or not any(terms):
            raise ValueError(
                f"weights of losses are {terms}; they must be at least 0, and one "
                "positive"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature {self.temperature}; it must be positive")

    @property
    def looks_inside(self) -> bool:
        """Whether hidden states or attention are compared."""
        return self.hidden > 0 or self.attention > 0


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a training run.

    Attributes:
        steps: Number of updates; by default one pass over the data.
        batch: Number of windows in a batch.
        accumulate: Number of parts in which a batch is processed, to save memory.
        length: Number of tokens of a window; by default the context of the model, at
            most 1024.
        optimizer: Settings of the optimiser.
        weights: Weights of the terms of the loss; without a teacher only the first term
            is used.
        precision: Precision of products; parameters are float32 during training.
        remat: Compute the blocks twice, to save memory.
        freeze: Names of parameters that are not trained, such as wte or h.*.attn.*.
        shard: Distribute batches over all devices, with parameters copied (data) or
            split (full).
        held_out: Fraction of the data, at its end, used for evaluation.
        evaluate_every: Steps between two evaluations; by default a tenth of all steps.
        evaluate_blocks: The largest number of windows of an evaluation.
        patience: Stop after this number of evaluations without a lower loss, with the
            best parameters.
        checkpoint_every: Steps between two checkpoints.
        keep: Number of checkpoints to keep.
        seed: Seed of the order of the data.
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
    held_out: float = 0.05
    evaluate_every: int | None = None
    evaluate_blocks: int = 64
    patience: int | None = None
    checkpoint_every: int = 500
    keep: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the fields."""
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
        """Number of windows in each part of a batch."""
        return self.batch // self.accumulate

    def decisive(self) -> dict[str, Any]:
        """Return the settings that affect the result beyond rounding, for JSON."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        free = ["accumulate", "remat", "shard", "checkpoint_every", "keep"]
        if self.patience is None:
            free += ["evaluate_every", "evaluate_blocks"]
        for name in free:
            del values[name]
        return values


@dataclasses.dataclass(frozen=True)
class Pruning:
    """The layers to prune, the sparsity and the schedule.

    Attributes:
        sparsity: Fraction of the entries of the linear layers to prune gradually, below
            1; the other entries are trained further.
        scope: The entries that are compared with one another: those of a layer, of all
            layers (global), or the weights of each output, as in Wanda.
        pattern: Numbers n and m, such as 2:4, instead of the sparsity: n of every m
            consecutive inputs of each output are kept.
        match: Names of layers, as in recipes; the head is left out.
        begin: The step from which on sparsity rises.
        steps: Number of steps in which sparsity rises; by default six tenths of all.
        every: Steps between changes of masks; by default as many as make 50 changes.
    """

    sparsity: float | None = None
    scope: Scope = "layer"
    pattern: tuple[int, int] | None = None
    match: str | Sequence[str] = "*"
    begin: int = 0
    steps: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.pattern is not None:
            n, m = self.pattern
            if not 0 < n < m:
                raise ValueError(
                    f"pattern {n}:{m} keeps {n} of every {m}; write 2:4, for example"
                )
            if self.sparsity is not None or self.scope != "layer":
                raise ValueError(
                    f"the pattern {n}:{m} decides what is kept: leave out the sparsity "
                    "and the scope"
                )
        elif self.sparsity is None or not 0 <= self.sparsity < 1:
            raise ValueError(
                f"sparsity is {self.sparsity}; it must be at least 0 and below 1, and "
                "0.5 prunes half"
            )
        if self.scope not in ("layer", "global", "output"):
            raise ValueError(f"scope {self.scope!r}; write layer, global or output")
        for name, least in (("begin", 0), ("steps", 0), ("every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")

    @property
    def final(self) -> float:
        """The sparsity at the end."""
        if self.pattern is not None:
            return 1 - self.pattern[0] / self.pattern[1]
        assert self.sparsity is not None
        return self.sparsity

    def kept(self, entries: int, sparsity: float | None = None) -> int:
        """Return the number of entries to keep, at least one."""
        sparsity = self.final if sparsity is None else sparsity
        return max(round((1 - sparsity) * entries), 1)


@dataclasses.dataclass(frozen=True)
class Course:
    """Changes of a model while it is trained.

    Attributes:
        pruning: The pruning, or None.
        low_rank_to: Lower ranks in stages to this fraction of the parameters.
        stages: Number of stages, with as many steps each.
        match: Names of the layers that become smaller, as in recipes; all by default.
        method: Kind of the layers after the last stage.
    """

    pruning: Pruning | None = None
    low_rank_to: float | None = None
    stages: int = 4
    match: tuple[str, ...] = ("*",)
    method: Method = "low-rank"

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.low_rank_to is None:
            return
        from kronjax.lm.compression import truncate  # loads jax

        truncate.fractions(self.low_rank_to, self.stages)
        if self.pruning is not None:
            raise ValueError(
                "one training either lowers ranks or prunes entries: prune in another "
                "training, which starts from the result of the first"
            )

    @property
    def changes(self) -> bool:
        """Whether layers change at all."""
        return self.pruning is not None or self.low_rank_to is not None
