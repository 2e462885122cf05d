"""The result of a compression: a smaller model, and a record of every layer."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from kronjax import recipe as recipes
from kronjax.kronecker import Configuration
from kronjax.lm.compression import refine as refinement
from kronjax.lm.compression.moments import Moments
from kronjax.lm.compression.plan import Plan
from kronjax.lm.models import sizes
from kronjax.lm.models.base import LanguageModel
from kronjax.recipe import Assignment, Recipe


@dataclasses.dataclass(frozen=True)
class Layer:
    """The compression of one layer.

    Attributes:
        name: Name of the layer.
        rule: The rule that made it: of the recipe, or the one for low rank of the same
            size where the plan was free to choose and that was better.
        configurations: Configurations of its sum; none for other methods.
        parameters: Number of parameters of its kernel.
        dense_parameters: Number of entries of the dense kernel.
        relative: Weighted Frobenius error over the weighted norm of the kernel; None
            for a layer that failed, as are `damage` and `gap`.
        damage: Half the squared weighted error, an estimate of the increase of the loss
            per token; `relative**2` without gradients.
        predicted: The damage that the plan predicted; None without a plan.
        low_rank: Relative weighted error of low rank of the same size; None for a layer
            that failed.
        gap: Proven gap: no change of all left or of all right factors lowers the
            spectral error by more than this part of it. None where nothing is proven.
        status: Status of the solver, or why the layer stays dense: "failed", or
            "dense" where its factors would not be smaller.
        seconds: Seconds of the fit.
        reason: The reason for the choice.
    """

    name: str
    rule: recipes.Rule
    configurations: tuple[Configuration, ...]
    parameters: int
    dense_parameters: int
    relative: float | None
    damage: float | None
    predicted: float | None
    low_rank: float | None
    gap: float | None
    status: str
    seconds: float
    reason: str

    @classmethod
    def left_dense(
        cls,
        assignment: Assignment,
        status: str,
        reason: str,
        *,
        predicted: float | None = None,
        seconds: float = 0.0,
    ) -> "Layer":
        """Return a layer that a rule did not change.

        Args:
            assignment: The layer and its rule.
            status: "failed" or "dense".
            reason: The reason, in words.
            predicted: The damage that the plan predicted.
            seconds: Seconds of the fit.
        """
        size = int(np.prod(assignment.shape))
        return cls(
            name=assignment.name,
            rule=assignment.rule,
            configurations=(),
            parameters=size,
            dense_parameters=size,
            relative=None,
            damage=None,
            predicted=predicted,
            low_rank=None,
            gap=None,
            status=status,
            seconds=seconds,
            reason=reason,
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """A smaller model, and the record of its compression.

    Attributes:
        model: The smaller model.
        recipe: The rules that were carried out.
        plan: The plan, if there was a budget.
        layers: The layers that changed, before any refinement.
        blocks: The results of refinement, or None without it.
        moments: Moments that the errors were weighted by, or None.
        before: Sizes of the given model.
        after: Sizes of the smaller model.
        seconds: Seconds by stage.
    """

    model: LanguageModel
    recipe: Recipe
    plan: Plan | None
    layers: tuple[Layer, ...]
    blocks: tuple[refinement.Block | None, ...] | None
    moments: Moments | None
    before: sizes.Sizes
    after: sizes.Sizes
    seconds: Mapping[str, float]

    @property
    def failed(self) -> list[Layer]:
        """The layers that stay dense because their fit has failed."""
        return [layer for layer in self.layers if layer.status == "failed"]

    def __repr__(self) -> str:
        """Return the sizes, errors and times in at most ten lines."""
        before, after = self.before, self.after
        changed = [x.relative for x in self.layers if x.relative is not None]
        gaps = [x.gap for x in self.layers if x.gap is not None]
        lines = [
            f"{len(changed)} layers compressed; {after.parameters:,} of "
            f"{before.parameters:,} parameters ({_percent(after, before)})",
            f"{after.bytes / 2**20:,.1f} of {before.bytes / 2**20:,.1f} MiB; "
            f"{after.flops / 1e6:,.1f} of {before.flops / 1e6:,.1f} MFLOP a token",
        ]
        if changed:
            lines.append(
                f"relative weighted errors: median {np.median(changed):.3f}, "
                f"worst {max(changed):.3f}"
            )
        if gaps:
            lines.append(f"proven gaps: worst {max(gaps):.2%}, of {len(gaps)} layers")
        if self.plan is not None:
            lines.append(f"predicted damage {self.plan.damage:.3g}")
        if self.failed:
            lines.append(f"{len(self.failed)} layers failed and stay dense")
        times = ", ".join(f"{name} {s:,.1f} s" for name, s in self.seconds.items())
        return "\n".join([*lines, times])


def _percent(after: sizes.Sizes, before: sizes.Sizes) -> str:
    return f"{100 * after.parameters / max(before.parameters, 1):.1f} %"
