"""Options of a compression that need a text, and refusals of those without effect.

>>> understood("0.8").measure
'fraction'
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kronjax import recipe as recipes
from kronjax.lm.compression import plan
from kronjax.lm.compression import refine as refinement
from kronjax.lm.compression.budget import Budget
from kronjax.lm.compression.moments import Moments
from kronjax.lm.models.base import LanguageModel
from kronjax.lm.models.reading import tokens_of
from kronjax.recipe import Assignment, Recipe, Weighting
from kronjax.runs.settings import SolveSettings

TOKENS = 32_768
"""Number of tokens of the text that calibration reads by default."""

_WEIGHTINGS: tuple[Weighting, ...] = ("none", "input", "input+gradient")


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """The options of a compression that need a text.

    Attributes:
        weighting: Moments that a budget is planned by, or None for all that the text
            allows.
        tokens: Number of tokens of the text to read, or None for `TOKENS`.
        refine: Steps of refinement.
        sequential: Whether blocks are fitted in sequence.
    """

    weighting: Weighting | None = None
    tokens: int | None = None
    refine: int = 0
    sequential: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the text to read."""
        return TOKENS if self.tokens is None else self.tokens

    def check(self, rules: Recipe | Budget, calibration: Any) -> None:
        """Refuse options that would have no effect, before anything takes time.

        Args:
            rules: Rules or a budget.
            calibration: Text or moments, or None.

        Raises:
            ValueError: If there is such an option, or a number makes no sense.
        """
        if self.num_tokens < 1:
            raise ValueError(f"tokens is {self.tokens}: it must be at least 1")
        if self.refine < 0:
            raise ValueError(f"refine is {self.refine}: it must not be negative")
        if isinstance(rules, Recipe) and self.weighting is not None:
            raise ValueError(
                "a recipe says itself how layers are weighted: leave out the weighting"
            )
        is_text = calibration is not None and not isinstance(calibration, Moments)
        for option, lacks_text in (
            ("refinement", self.refine > 0 and not is_text),
            ("fitting in sequence", self.sequential and not is_text),
            ("the number of tokens", self.tokens is not None and not is_text),
            ("weighting", self.weighting is not None and calibration is None),
        ):
            if lacks_text:
                raise ValueError(
                    f"{option} needs the text: give one to calibrate with "
                    "(--calibrate FILE), or leave the option out"
                )

    def needed(
        self,
        rules: Recipe | Budget,
        assignments: Sequence[Assignment],
        calibration: Any,
    ) -> Weighting:
        """Return the moments to measure.

        Args:
            rules: Rules or a budget.
            assignments: The layers that rules change.
            calibration: Text or moments, or None.

        Raises:
            ValueError: If blocks are to be fitted in sequence and nothing is weighted.
        """
        if isinstance(rules, Recipe):
            order = (_WEIGHTINGS.index(x.rule.weighting) for x in assignments)
            weighting = _WEIGHTINGS[max(order, default=0)]
        elif self.weighting is not None or calibration is None:
            weighting = self.weighting or "none"
        elif isinstance(calibration, Moments):
            weighting = plan.best_weighting(calibration)
        else:
            weighting = "input+gradient"
        if self.sequential and weighting == "none":
            raise ValueError(
                "fitting in sequence measures the weights of every block again, and no "
                "layer is weighted: it would have no effect"
            )
        return weighting

    def read(self, model: LanguageModel, calibration: Any) -> np.ndarray | None:
        """Return the tokens that go through the model again, or None."""
        if not self.refine and not self.sequential:
            return None
        tokens = tokens_of(model, calibration)[: self.num_tokens]
        if self.refine:
            refinement.check(model, tokens, self.refine)
        return tokens


def understood(recipe: Recipe | Budget | str | Path | float) -> Recipe | Budget:
    """Return the rules or the budget that is meant.

    Raises:
        ValueError: If it is neither.
        OSError: If a file of rules cannot be read.
    """
    if isinstance(recipe, Recipe | Budget):
        return recipe
    try:
        return Budget.parse(str(recipe))
    except ValueError:
        if isinstance(recipe, int | float):
            raise
    return recipes.load(recipe)


def refuse_starts_of_budgets(rules: Recipe | Budget, settings: SolveSettings) -> None:
    """Refuse several starts, or a seed, for a budget, which would have no effect.

    Raises:
        ValueError: If they are given.
    """
    several = settings.num_starts > 1 or settings.seed != 0
    if isinstance(rules, Budget) and several:
        raise ValueError(
            "the sums of a budget are fitted at p = 2 from one start: a number of "
            "starts and a seed would have no effect"
        )
