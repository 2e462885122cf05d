"""Compression methods, the alternatives that a rule of a recipe can choose from.

A method is one object in a registry, found by its name in recipes. It checks
the fields of a rule, counts parameters, finds the factors of a kernel (or says which
Kronecker sum the solver fits), and makes the layer that replaces the dense one.
Kernels are `[n_in, n_out]`: `kronjax.nn.layers` defines the orientation.

    class Columns(Method):                      # a method outside of kronjax
        name, required = "columns", ("rank",)
        def num_parameters(self, rule, shape): ...
        def fit(self, kernel, left, right, rule): ...
        def matrix(self, factors): ...
        def layer(self, factors, dense, dtype, rule): ...
    register(Columns())

>>> find("low-rank").required
('rank', 'fraction')
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from kronjax.linalg.dense import multiply_out

if TYPE_CHECKING:
    from kronjax.kronecker import Configuration

FIELDS = ("terms", "rank", "fraction", "scalars")
"""Fields of a rule that belong to some methods only."""


class Method:
    """Base class of all methods; a `rule` is a `kronjax.recipe.Rule` with the method.

    Attributes:
        name: Name in recipes.
        required: Fields of a rule, exactly one of which must be given.
        optional: Fields that may be given beside it.
        takes_tables: Whether embeddings can be compressed by it.
        changes: Whether layers change at all.
    """

    name: ClassVar[str] = ""
    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    takes_tables: ClassVar[bool] = False
    changes: ClassVar[bool] = True

    def __repr__(self) -> str:
        """Return the name, which stands for the method in keys of caches."""
        return f"Method({self.name})"

    def validate(self, rule: Any) -> None:
        """Check that the fields of a rule belong together.

        Raises:
            ValueError: If they do not; says which fields the method takes.
        """
        given = {
            name for name in FIELDS if getattr(rule, name) not in (None, (), False)
        }
        refused = [x for x in FIELDS if x not in (*self.required, *self.optional)]
        if given & set(refused) or (
            self.required and len(given & set(self.required)) != 1
        ):
            either = "either " * (len(self.required) > 1)
            takes = [either + " or ".join(self.required)] if self.required else []
            neither = "neither " if len(refused) > 1 else "no "
            lacks = [neither + " nor ".join(refused)] if refused else []
            words = ", and ".join(takes + lacks)
            raise ValueError(f"method {self.name} takes {words}")

    def configurations(
        self, rule: Any, shape: tuple[int, int]
    ) -> tuple["Configuration", ...]:
        """Return the Kronecker sum that the solver fits to a kernel.

        Args:
            rule: A rule with this method.
            shape: `(n_in, n_out)`.

        Returns:
            The configurations; none where the method fits kernels by itself.

        Raises:
            ValueError: If the rule does not fit the shape.
        """
        return ()

    def fields(self, configurations: Sequence["Configuration"]) -> dict[str, Any]:
        """Return the fields of a rule that asks for given configurations."""
        raise NotImplementedError

    def num_parameters(self, rule: Any, shape: tuple[int, int]) -> int:
        """Return the number of parameters that replace a kernel.

        Args:
            rule: A rule with this method.
            shape: `(n_in, n_out)`.

        Raises:
            ValueError: If the rule does not fit the shape.
        """
        raise NotImplementedError

    def num_bytes(self, rule: Any, shape: tuple[int, int], width: int) -> int:
        """Return the bytes of everything that replaces a kernel.

        Args:
            rule: A rule with this method.
            shape: `(n_in, n_out)`.
            width: Bytes of a parameter.
        """
        return width * self.num_parameters(rule, shape)

    def flops(self, rule: Any, shape: tuple[int, int]) -> int:
        """Return the operations of the kernel for one row of `x`, bias left out."""
        return 2 * self.num_parameters(rule, shape)

    def fit(
        self,
        kernel: np.ndarray,
        left: np.ndarray | None,
        right: np.ndarray | None,
        rule: Any,
    ) -> dict[str, np.ndarray]:
        """Return the factors that approximate a kernel, by name.

        It is called only where `configurations` is empty.

        Args:
            kernel: `[n_in, n_out]`, float32 or float64.
            left: Second moment of the inputs, `[n_in, n_in]`, or None.
            right: Second moment of the gradients at the outputs, `[n_out, n_out]`, or
                None.
            rule: A rule with this method.
        """
        raise NotImplementedError(f"the solver fits what method {self.name} stores")

    def matrix(self, factors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the kernel `[n_in, n_out]` that factors stand for, multiplied out."""
        raise NotImplementedError

    def layer(
        self, factors: Mapping[str, Any], dense: Any, dtype: Any, rule: Any
    ) -> Any:
        """Return the `nnx.Module` that replaces a layer.

        Args:
            factors: Arrays by name, from `fit` or from the solver.
            dense: The `nnx.Linear` or `nnx.Embed` to replace; its bias is taken over.
            dtype: Dtype of the parameters.
            rule: A rule with this method.
        """
        raise NotImplementedError

    def outline(self, rule: Any, dense: Any) -> Any:
        """Return the layer with abstract float32 parameters, to count them.

        The default makes it from the fit of a kernel of zeros; masks are not abstract.

        Args:
            rule: A rule with this method.
            dense: The layer to replace; its arrays may be abstract.
        """
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from kronjax import nn

        factors = self.fit(np.zeros(nn.shape_of(dense), np.float32), None, None, rule)
        graph, state = nnx.split(dense)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
        layer = self.layer(factors, nnx.merge(graph, zeros), jnp.float32, rule)
        graph, parameters, rest = nnx.split(layer, nnx.Param, ...)
        return nnx.merge(graph, jax.eval_shape(lambda: parameters), rest)


class _Sum(Method):
    """A method whose factors are those of a Kronecker sum, named `a`, `b`, `a1`, ..."""

    takes_tables: ClassVar[bool] = True

    def configurations(
        self, rule: Any, shape: tuple[int, int]
    ) -> tuple["Configuration", ...]:
        """Return the Kronecker sum that the solver fits to a kernel."""
        configurations = self._configurations(rule, shape)
        for configuration in configurations:
            most = configuration.max_rank(shape)
            if configuration.rank > most:
                raise ValueError(
                    f"rank {configuration.rank} is more than the {most} that is exact"
                )
        return configurations

    def _configurations(self, rule, shape) -> tuple["Configuration", ...]:
        raise NotImplementedError

    def num_parameters(self, rule: Any, shape: tuple[int, int]) -> int:
        """Return the number of entries of all factors, and of scalars."""
        configurations = self.configurations(rule, shape)
        factors = sum(x.num_parameters(shape) for x in configurations)
        return factors + sum(x.rank for x in configurations) * rule.scalars

    def matrix(self, factors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the sum multiplied out, `[n_in, n_out]`, in float64."""
        from kronjax.kronecker import from_arrays

        terms = from_arrays({k: np.asarray(x, np.float64) for k, x in factors.items()})
        return np.sum([multiply_out(x.a, x.b) for x in terms], axis=0)

    def layer(
        self, factors: Mapping[str, Any], dense: Any, dtype: Any, rule: Any
    ) -> Any:
        """Return a `KroneckerLinear`, or a `KroneckerEmbedding` for a table."""
        import jax.numpy as jnp

        from kronjax import nn
        from kronjax.kronecker import from_arrays

        terms = from_arrays({k: jnp.asarray(x, dtype) for k, x in factors.items()})
        if isinstance(dense, nn.Table):
            return nn.KroneckerEmbedding(terms)
        bias = nn.as_layer(dense).bias_value
        scales = [jnp.ones(x.rank, dtype) for x in terms] if rule.scalars else None
        return nn.KroneckerLinear(terms, bias, scales=scales)

    def outline(self, rule: Any, dense: Any) -> Any:
        """Return the layer with abstract float32 arrays, to count its parameters."""
        from kronjax import nn

        shape = nn.shape_of(dense)
        terms = [
            {"a": [x.rank, *x.a_shape], "b": [x.rank, *x.b_shape(shape)]}
            for x in self.configurations(rule, shape)
        ]
        if isinstance(dense, nn.Table):
            return nn.KroneckerEmbedding.outline({"terms": terms})
        bias = dense.bias is not None
        facts = {"terms": terms, "bias": bias, "scales": rule.scalars}
        return nn.KroneckerLinear.outline(facts)


class Kronecker(_Sum):
    """A sum of Kronecker products, of one or several configurations."""

    name: ClassVar[str] = "kronecker"
    required: ClassVar[tuple[str, ...]] = ("terms",)
    optional: ClassVar[tuple[str, ...]] = ("scalars",)

    def _configurations(self, rule, shape) -> tuple["Configuration", ...]:
        from kronjax.kronecker import Configuration

        return tuple(Configuration(x.a_shape, x.rank) for x in rule.terms)

    def fields(self, configurations: Sequence["Configuration"]) -> dict[str, Any]:
        """Return the fields of a rule that asks for given configurations."""
        terms = [{"a_shape": x.a_shape, "rank": x.rank} for x in configurations]
        return {"terms": tuple(terms)}

    def flops(self, rule: Any, shape: tuple[int, int]) -> int:
        """Return the operations of the sum for one row of `x`, never multiplied out."""
        import jax

        from kronjax.kronecker import KroneckerTerms, matmul_cost

        configurations = self.configurations(rule, shape)
        flops = (len(configurations) - 1) * shape[1]
        for x in configurations:
            sides = x.a_shape, x.b_shape(shape)
            a, b = (jax.ShapeDtypeStruct((x.rank, *side), np.float32) for side in sides)
            stand_in: Any = KroneckerTerms
            flops += 2 * matmul_cost(stand_in(a, b))
        return flops


class LowRank(_Sum):
    """A product of two matrices `[n_in, r] [r, n_out]`."""

    name: ClassVar[str] = "low-rank"
    required: ClassVar[tuple[str, ...]] = ("rank", "fraction")

    def _configurations(self, rule, shape) -> tuple["Configuration", ...]:
        from kronjax.kronecker import Configuration

        rank = rule.rank
        if rank is None:
            assert rule.fraction is not None
            budget = int(rule.fraction * math.prod(shape))
            rank = max(self._rank_within(shape, budget), 1)
        return (Configuration((shape[0], 1), rank),)

    def _rank_within(self, shape: tuple[int, int], budget: int) -> int:
        """Return the largest rank with at most `budget` parameters."""
        return budget // sum(shape)

    def fields(self, configurations: Sequence["Configuration"]) -> dict[str, Any]:
        """Return the fields of a rule that asks for given configurations."""
        (configuration,) = configurations
        return {"rank": configuration.rank}


class Interpolative(LowRank):
    """Low rank with fewer parameters: some columns, and combinations of them."""

    name: ClassVar[str] = "interpolative"
    takes_tables: ClassVar[bool] = False

    def _rank_within(self, shape: tuple[int, int], budget: int) -> int:
        from kronjax.kronecker import interpolative_rank

        return interpolative_rank(shape, budget)

    def num_parameters(self, rule: Any, shape: tuple[int, int]) -> int:
        """Return `r (n_in + n_out − r)`."""
        (configuration,) = self.configurations(rule, shape)
        return configuration.rank * (sum(shape) - configuration.rank)

    def num_bytes(self, rule: Any, shape: tuple[int, int], width: int) -> int:
        """Return the bytes of the parameters, and of the order of the outputs."""
        return super().num_bytes(rule, shape, width) + 4 * shape[1]

    def layer(
        self, factors: Mapping[str, Any], dense: Any, dtype: Any, rule: Any
    ) -> Any:
        """Return an `InterpolativeLinear` of the product of both factors."""
        from kronjax import nn

        left, right = factors["a"][:, :, 0].T, factors["b"][:, 0]
        bias = nn.as_layer(dense).bias_value
        return nn.InterpolativeLinear.of(left, right, bias, dtype)

    def outline(self, rule: Any, dense: Any) -> Any:
        """Return the layer with abstract float32 arrays, to count its parameters."""
        from kronjax import nn

        shape = nn.shape_of(dense)
        (configuration,) = self.configurations(rule, shape)
        facts = {"shape": shape, "rank": configuration.rank}
        facts |= {"bias": dense.bias is not None}
        return nn.InterpolativeLinear.outline(facts)


class Keep(Method):
    """The dense layer as it is."""

    name: ClassVar[str] = "keep"
    takes_tables: ClassVar[bool] = True
    changes: ClassVar[bool] = False

    def num_parameters(self, rule: Any, shape: tuple[int, int]) -> int:
        """Return the number of entries of the kernel."""
        return math.prod(shape)


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the registry, and return it.

    Raises:
        ValueError: If it has no name, or the name belongs to another class.
    """
    known = _METHODS.get(method.name)
    if not method.name or known is not None and type(known) is not type(method):
        raise ValueError(f"a method needs a name of its own; got {method.name!r}")
    _METHODS[method.name] = method
    return method


def registered() -> list[Method]:
    """Return all methods, by name."""
    return [_METHODS[name] for name in sorted(_METHODS)]


def find(name: str) -> Method:
    """Return the method with a name.

    Raises:
        ValueError: If there is none; lists the known methods and the nearest.
    """
    if name in _METHODS:
        return _METHODS[name]
    close = difflib.get_close_matches(name, _METHODS, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    raise ValueError(
        f"no method {name}; {guess}known methods: {', '.join(sorted(_METHODS))}"
    )


for _method in (Kronecker(), LowRank(), Interpolative(), Keep()):
    register(_method)
