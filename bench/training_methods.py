"""Methods that halve the parameters of linear layers, and the model for them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from kronjax import lm, nn
from kronjax.lm.compression import pipeline
from kronjax.lm.compression.moments import (
    Moments,
    load_moments,
    measure_moments,
    save_moments,
)
from kronjax.lm.evaluation import perplexity
from kronjax.lm.models.base import LanguageModel
from kronjax.lm.text import documents as texts
from kronjax.lm.training import staged, trainer
from kronjax.lm.training.pruning import Gradual, begin, prune
from kronjax.lm.training.settings import Optimizer, Pruning, Settings, Weights
from kronjax.recipe import Recipe, Rule, Term

HALF = 0.5
"""Fraction of the parameters of linear layers that remains."""

WAYS = {
    "vanilla": None,
    "distillation": Weights(next_token=0.0, logits=1.0),
}
"""Objectives: the next-token loss, or the divergence from the dense model."""

NEAR_RATE, FAR_RATE = 2e-4, 1e-3
"""Largest learning rates, for models that begin near the dense model and for Kronecker
terms, which begin two nats away. With 1e-3 the loss of the dense model rose by 0.09
nats in 40 steps of further training: its own training had ended with a fiftieth of that
rate."""


@dataclasses.dataclass
class Study:
    """The model, the texts, and the amount of training.

    Attributes:
        model: The dense model.
        tokens: Tokens to train on, `[n]`.
        held_out: Text to measure losses on.
        work: Folder of finished parts.
        steps: Number of steps of a training.
        long_steps: Number of steps of a long training.
        batch: Number of windows in a step.
        length: Number of tokens in a window.
        seeds: Seeds of the order of the data.
        calibration: Number of tokens for moments.
        only: Names of methods; all methods if empty.
        long: Names of methods that are also trained for long.
    """

    model: LanguageModel
    tokens: np.ndarray
    held_out: texts.Text
    work: Path
    steps: int = 40
    long_steps: int = 200
    batch: int = 2
    length: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 16_384
    only: tuple[str, ...] = ()
    long: tuple[str, ...] = ()
    _moments: Any = None

    def moments(self) -> Moments:
        """Return moments of inputs and gradients, measured once."""
        path = self.work / "moments.safetensors"
        if self._moments is None:
            if not path.exists():
                taken = self.tokens[: self.calibration]
                made = measure_moments(
                    self.model, taken, gradients=True, progress=False
                )
                save_moments(made, path)
            self._moments = load_moments(path)
        return self._moments

    def loss(self, model: LanguageModel) -> float:
        """Return nats per held-out token; dense models of one kind share a program."""
        dense = nn.multiplied_out(model)
        dense.recipe, dense.tokenizer = None, self.model.tokenizer
        found = perplexity.perplexity(dense, self.held_out, "krony-pt", progress=False)
        return found.nll

    def compressed(self, name: str, rules: Recipe) -> LanguageModel:
        """Return the model compressed by rules, which is stored in a folder."""
        folder = self.work / "models" / name.replace(" ", "-").replace(",", "")
        if not (folder / "config.json").exists():
            made = pipeline.run(self.model, rules, self.moments(), progress=False).model
            made.tokenizer = self.model.tokenizer
            lm.save(made, folder)
        return lm.load(folder, dtype="float32")

    def settings(self, rate: float, way: str, seed: int, steps: int) -> Settings:
        """Return the settings of training, which differ only in the rate by method."""
        return Settings(
            steps=steps,
            batch=self.batch,
            length=self.length,
            optimizer=Optimizer(rate=rate),
            weights=WAYS[way] or Weights(),
            seed=seed,
        )


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to halve the parameters.

    Attributes:
        name: Name in words.
        start: Function that returns the smaller model before any training.
        begin: Function that returns the model to train, if that is another one.
        hook: Function from the number of steps to the hook of the training.
        in_stages: Function that returns the stages, if there are several.
        ways: Names of the objectives that it is trained by.
        is_extra: Whether it is trained with one seed only.
        rate: Largest learning rate.
    """

    name: str
    start: Callable[[], LanguageModel]
    begin: Callable[[], LanguageModel] | None = None
    hook: Callable[[int], Any] | None = None
    in_stages: Callable[[], list[staged.Stage]] | None = None
    ways: tuple[str, ...] = tuple(WAYS)
    is_extra: bool = False
    rate: float = NEAR_RATE


def halves(model: LanguageModel, **options: Any) -> Recipe:
    """Return rules for one term (n_in / 2, n_out) ⊗ (2, 1) in every linear layer."""
    rules = []
    for name, layer in nn.linear_layers(model).items():
        m, n = nn.shape_of(layer)
        term = Term(a_shape=(m // 2, n))
        rules.append(Rule(match=name, method="kronecker", terms=(term,), **options))
    return Recipe(rules=tuple(rules))


def low_rank(weighting: Any) -> Recipe:
    """Return rules for low rank in every linear layer."""
    rule = Rule(
        match="*",
        method="low-rank",
        fraction=HALF,
        norm="frobenius",
        weighting=weighting,
    )
    return Recipe(rules=(rule,))


def methods_of(study: Study) -> list[Method]:
    """Return all methods, at equal numbers of parameters."""
    plain: Any = {"norm": "frobenius", "weighting": "none"}
    kinds = {
        "low rank, data-aware": low_rank("input+gradient"),
        "Kronecker, Van Loan": halves(study.model, **plain),
        "Kronecker, spectral": halves(study.model, norm="spectral", weighting="none"),
        "Kronecker, pruning start": halves(study.model, start="pruning", **plain),
    }

    def copied(**_: Any) -> LanguageModel:
        return nnx.clone(study.model)

    def pruned(pruning: Pruning, moments: bool, final: bool) -> LanguageModel:
        model = copied()
        if final:
            prune(model, pruning, study.moments() if moments else None)
        else:
            begin(model, pruning)
        return model

    def pruning(name: str, asked: Pruning, moments: bool) -> Method:
        extra: Any = {"ways": ("distillation",), "is_extra": True} if moments else {}
        return Method(
            name,
            **extra,
            start=lambda: pruned(asked, moments, True),
            begin=lambda: pruned(asked, moments, False),
            hook=lambda steps: Gradual(
                asked, steps, study.moments() if moments else None
            ),
        )

    methods = [
        Method(
            name,
            start=lambda n=name, r=rules: study.compressed(n, r),
            rate=FAR_RATE if name.startswith("Kronecker") else NEAR_RATE,
        )
        for name, rules in kinds.items()
    ]
    aware_svd, van_loan = methods[:2]
    progressive = Method(
        "low rank, progressive",
        start=aware_svd.start,
        begin=copied,
        in_stages=lambda: staged.progressive(HALF, 4, moments=study.moments()),
        ways=("distillation",),
        is_extra=True,
    )
    in_turn = Method(
        "Kronecker, layer by layer",
        start=van_loan.start,
        begin=copied,
        in_stages=lambda: staged.layer_by_layer(study.model, kinds[van_loan.name]),
        rate=FAR_RATE,
        ways=("distillation",),
        is_extra=True,
    )
    return [
        *methods,
        progressive,
        in_turn,
        pruning("pruning, gradual", Pruning(HALF), False),
        pruning("pruning, data-aware", Pruning(HALF, "output"), True),
    ]


def trained(
    study: Study, method: Method, way: str, seed: int, steps: int
) -> LanguageModel:
    """Return the model of a method after training."""
    settings = study.settings(method.rate, way, seed, steps)
    given: Any = {
        "teacher": None if WAYS[way] is None else study.model,
        "held_out": np.zeros(0, np.int32),
        "progress": False,
    }
    model = (method.begin or method.start)()
    if method.in_stages is not None:
        done = staged.run(model, method.in_stages(), study.tokens, settings, **given)
        return done[-1].model
    hook = None if method.hook is None else method.hook(steps)
    return trainer.train(model, study.tokens, settings, hook=hook, **given).model
