"""The protocol of hooks, which change a model between two steps of training."""

from collections.abc import Mapping
from typing import Any, Protocol

from kronjax.lm.models.base import LanguageModel


class Hook(Protocol):
    """A function called between two steps.

    Its `repr` contains everything that decides what it does: a run is only resumed with
    a hook of the same `repr`.
    """

    def due(self, step: int) -> bool:
        """Return whether to call the hook after `step` steps; 0 is before the first."""
        ...

    def __call__(self, step: int, model: LanguageModel) -> None:
        """Change numbers of the model in place.

        Args:
            step: Number of steps done.
            model: The model, whose parameters, masks and orders may be set to others of
                the same shape and dtype. The next step invalidates its arrays: copy
                what must be kept.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned. Masks are restored with the model."""
        ...
