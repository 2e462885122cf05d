"""Training in stages, between which the model becomes smaller.

    progressive low rank    all layers a little smaller, train, smaller again, train, …
    layer by layer          one block is compressed, train, the next one, train, …

Both end with the same layers as compressing at once. Every stage is a training of its
own, with its own warm-up and cosine, and gets an equal part of the steps. In a folder
each keeps its state in one of its own, so that the same call goes on where it stopped.

References: Hajimolahoseini et al. (2022); Abronin et al. (2024), TQCompressor, for
layer by layer.

>>> share(10, 4)
[3, 3, 2, 2]
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

from kronjax import nn
from kronjax.lm.compression import candidates, pipeline, plan, truncate
from kronjax.lm.compression.moments import Moments
from kronjax.lm.models.base import LanguageModel
from kronjax.lm.training import trainer
from kronjax.lm.training.settings import Settings
from kronjax.recipe import Recipe, Rule

Order = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A change of a model, after which it is trained.

    Attributes:
        name: In a few words.
        change: Changes a model in place; what it does follows from the model alone.
    """

    name: str
    change: Callable[[LanguageModel], Any]


def share(steps: int, count: int) -> list[int]:
    """Return the steps of each stage, as equal as can be.

    Raises:
        ValueError: If there are more stages than steps.
    """
    if steps < count:
        raise ValueError(f"{count} stages need as many steps; there are {steps}")
    return [steps // count + (i < steps % count) for i in range(count)]


def run(
    model: LanguageModel,
    stages: Sequence[Stage],
    tokens: np.ndarray,
    settings: Settings,
    *,
    teacher: LanguageModel | None = None,
    held_out: np.ndarray | None = None,
    folder: Path | None = None,
    progress: bool | None = None,
) -> list[trainer.Result]:
    """Change a model and train it, one stage after the other.

    Args:
        model: Left as it is.
        stages: In order.
        tokens: `[n]`, as for `trainer.train`, and so are the others.
        settings: Of all stages; their steps are divided among them.
        teacher: To follow.
        held_out: To evaluate on.
        folder: For the state of every stage; None keeps nothing.
        progress: Whether to draw bars.

    Returns:
        What came of each stage; the last one has the model.

    Raises:
        ValueError: If there are fewer steps than stages, or as `trainer.train`.
    """
    total = trainer.steps_of(model, tokens, settings, held_out)
    results = []
    for i, (stage, steps) in enumerate(
        zip(stages, share(total, len(stages)), strict=True)
    ):
        model = nnx.clone(model)
        stage.change(model)
        results.append(
            trainer.train(
                model,
                tokens,
                # Each stage goes through the text in an order of its own.
                dataclasses.replace(
                    settings, steps=steps, seed=settings.seed + 1_000_003 * i
                ),
                teacher=teacher,
                held_out=held_out,
                folder=folder and folder / f"stage-{i + 1}",
                progress=progress,
            )
        )
        model = results[-1].model
    return results


def progressive(
    to: float,
    count: int,
    *,
    match: str | Sequence[str] = "*",
    moments: Moments | None = None,
    method: truncate.Method = "low-rank",
) -> list[Stage]:
    """Return the stages of progressive low rank.

    Args:
        to: Part of the parameters of the dense kernels that is left in the end.
        count: Of stages.
        match: Names of layers, as in recipes.
        moments: To weigh errors by, those of the dense model.
        method: What layers become in the end. On the way they are plain low rank.

    Raises:
        ValueError: If `to` is not between 0 and 1, or there are no stages.
    """

    def stage(fraction, kind):
        def change(model):
            truncate.to_fraction(
                model, fraction, match=match, moments=moments, method=kind
            )

        return Stage(f"{100 * fraction:.0f} % of the parameters", change)

    parts = truncate.fractions(to, count)
    kinds: list[truncate.Method] = ["low-rank"] * (count - 1)
    return [stage(*one) for one in zip(parts, [*kinds, method], strict=True)]


def layer_by_layer(
    model: LanguageModel,
    recipe: Recipe,
    moments: Moments | None = None,
    *,
    order: Order = "forward",
    max_products: int | None = None,
) -> list[Stage]:
    """Return one stage for every block, in which its layers become what rules say.

    Args:
        model: Dense; only its shapes matter. Every stage fits the weights of its block
            as they are then.
        recipe: Rules for any of its layers.
        moments: Of the dense model, if the rules weigh by them.
        order: From the first block to the last, or from the last to the first.
        max_products: Products that a fit may spend, as for `pipeline.run`.

    Raises:
        ValueError: If the rules do not fit the model.
    """
    blocks: dict[int, list[Rule]] = {}
    tables = nn.tables(model)
    assignments = plan.resolve(recipe, model)
    for one in assignments:
        # Embeddings go with the first block.
        block = 0 if one.name in tables else candidates.kind_of_layer(one.name)[1]
        rule = one.rule.model_copy(update={"match": one.name})
        blocks.setdefault(block, []).append(rule)

    def stage(block, rules):
        names = [rule.match for rule in rules]
        rest = [Rule(match="*", method="keep")]
        if not set(plan.compressible(model)) - set(names):
            rest = []

        def change(model):
            fitted = pipeline.compress(
                nn.multiplied_out(model),
                Recipe(rules=(*rules, *rest)),
                moments,
                max_products=max_products,
                progress=False,
            )
            layers: dict[str, Any] = {**nn.tables(fitted), **nn.linear_layers(fitted)}
            for name in names:
                nn.replace(model, name, layers[name])

        return Stage(f"block {block}", change)

    numbers = sorted(blocks, reverse=order == "backward")
    return [stage(block, blocks[block]) for block in numbers]
