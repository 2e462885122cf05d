"""Kernels of layers and their weights, computed when a run reads them.

>>> numbers = Computed(["a", "b"], len)
>>> list(numbers), numbers["a"]
(['a', 'b'], 1)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kronjax import nn
from kronjax.lm.compression import plan
from kronjax.lm.compression.moments import Moments
from kronjax.lm.models.base import LanguageModel
from kronjax.recipe import Assignment
from kronjax.runs.joint import Target
from kronjax.runs.plan import Weights


class Computed(Mapping):
    """A mapping whose values are computed at each access."""

    def __init__(self, names: Sequence[str], compute: Callable[[str], Any]) -> None:
        """Keep the names, and the function from a name to its value."""
        self._names, self._compute = tuple(names), compute

    def __getitem__(self, name: str) -> Any:
        """Return the value of a name, computed now."""
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        """Return an iterator over the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._names)


class Targets:
    """Kernels and weights of the layers that rules change, by name."""

    def __init__(
        self,
        model: LanguageModel,
        assignments: Sequence[Assignment],
        moments: Moments | None,
    ) -> None:
        """Keep the layers as they are now, for the model replaces them later."""
        layers: dict[str, Any] = {**nn.tables(model), **nn.linear_layers(model)}
        self._rules = {x.name: x.rule for x in assignments}
        self._layers = {name: layers[name] for name in self._rules}
        self._moments = moments

    @property
    def matrices(self) -> Mapping[str, np.ndarray]:
        """The kernels `[n_in, n_out]`, float32."""
        return Computed(list(self._rules), lambda name: self.target(name).matrix)

    @property
    def weights(self) -> Mapping[str, Weights]:
        """Moments of inputs and of output gradients."""

        def sides(name) -> Weights:
            target = self.target(name)
            return target.left, target.right

        return Computed(list(self._rules), sides)

    def target(self, name: str) -> Target:
        """Return the kernel of a layer with its weights."""
        weighting = self._rules[name].weighting
        return plan.target(self._layers[name], name, self._moments, weighting)
