"""Training in stages, with a compression step before each stage.

    progressive low rank    lower all ranks a little, train, lower them again, train, …
    layer by layer          compress one block, train, compress the next, train, …

Both end with the same layers as compression in one step. Every stage is a separate
training, with its own warm-up and cosine, and gets an equal part of the steps. Each
stage stores its state in its own subfolder, so that the same call resumes.

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
        name: Short description.
        change: Function that changes a model in place, and depends on nothing else.
    """

    name: str
    change: Callable[[LanguageModel], Any]


def share(steps: int, count: int) -> list[int]:
    """Return the number of steps of each stage, as equal as possible.

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
    """Change and train a model, one stage after the other.

    Args:
        model: The model; not modified.
        stages: The stages, in order.
        tokens: `[n]`, as for `trainer.train`.
        settings: Settings of all stages, which share the steps.
        teacher: A model to match, or None.
        held_out: Tokens to evaluate on, or None.
        folder: Folder for the state of every stage; None writes nothing.
        progress: Whether to draw bars.

    Returns:
        The result of each stage; the last one has the final model.

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
                # Each stage reads the text in a different order.
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
        to: Fraction of the parameters of the dense kernels after the last stage.
        count: Number of stages.
        match: Names of layers, as in recipes.
        moments: Moments of the dense model that weight the errors, or None.
        method: Kind of the layers after the last stage; before it they are low rank.

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
    return [stage(*x) for x in zip(parts, [*kinds, method], strict=True)]


def layer_by_layer(
    model: LanguageModel,
    recipe: Recipe,
    moments: Moments | None = None,
    *,
    order: Order = "forward",
    max_products: int | None = None,
) -> list[Stage]:
    """Return one stage for every block, which compresses its layers by the rules.

    Args:
        model: A dense model, of which only the shapes are used. Every stage fits the
            weights that its block has at that time.
        recipe: Rules for any of its layers.
        moments: Moments of the dense model, if the rules use weights.
        order: From the first block to the last, or from the last to the first.
        max_products: Products that a fit may spend, as for `pipeline.run`.

    Raises:
        ValueError: If the rules do not fit the model.
    """
    blocks: dict[int, list[Rule]] = {}
    tables = nn.tables(model)
    assignments = plan.resolve(recipe, model)
    for layer in assignments:
        # Embeddings belong to the stage of the first block.
        block = 0 if layer.name in tables else candidates.kind_of_layer(layer.name)[1]
        rule = layer.rule.model_copy(update={"match": layer.name})
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
