"""Lower ranks for layers as they are now: of matrices, of sums, and inside of factors.

    low rank           W ≈ U S Vᵀ                   by the SVD of the current kernel
    Kronecker sums     R(K) = Σ_k a_k b_kᵀ ≈ U S Vᵀ by QR of both sides and a small SVD
    inside of factors  A_k ≈ L_k R_k                by an SVD of each factor

`to_fraction` picks the ranks that fit a part of the parameters of the dense kernel, and
`fractions` the parts for stages that fall to it geometrically: progressive low rank
trains between them. Sums that were trained are not orthogonal any more; truncating
them makes them so again before the smallest singular values are dropped.

References: Hajimolahoseini et al. (2022), for progressive low rank; Van Loan and
Pitsianis (1993).

>>> [round(x, 3) for x in fractions(0.5, 3)]
[0.794, 0.63, 0.5]
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax import nn
from kronjax import recipe as recipes
from kronjax.kronecker import KroneckerTerms, interpolative_rank
from kronjax.lm.compression.fit import LowRank, Target
from kronjax.lm.compression.moments import Moments
from kronjax.lm.models.base import LanguageModel

Method = Literal["low-rank", "interpolative"]

_AFTER = (
    "masks, and low rank inside of factors, come after truncation, which would undo "
    "them"
)


def fractions(to: float, stages: int) -> list[float]:
    """Return the parts of the parameters that are left after each stage.

    Args:
        to: Between 0 and 1, what is left in the end.
        stages: How many.

    Raises:
        ValueError: If either is out of range.
    """
    if not 0 < to < 1:
        raise ValueError(
            f"low rank keeps {to} of the parameters; write a part between 0 and 1"
        )
    if stages < 1:
        raise ValueError(f"{stages} stages; at least one is needed")
    return [to ** (i / stages) for i in range(1, stages + 1)]


def to_fraction(
    model: LanguageModel,
    fraction: float,
    *,
    match: str | Sequence[str] = "*",
    moments: Moments | None = None,
    method: Method = "low-rank",
) -> list[str]:
    """Lower the ranks of layers until they have a part of the dense parameters.

    Args:
        model: Changed in place.
        fraction: Of the parameters of each dense kernel.
        match: Names of layers, as in recipes; the head is left out.
        moments: Of inputs, and of gradients perhaps, to weigh errors by. Of Kronecker
            sums the plain error counts, whatever is given.
        method: What dense and low-rank layers become.

    Returns:
        The names of those that changed; those that are small enough stay.

    Raises:
        ValueError: If none matches, or one cannot be truncated; names it.
    """
    layers = {k: v for k, v in nn.linear_layers(model).items() if k != "lm_head"}
    changed = []
    for name in recipes.matching(match, layers):
        layer = layers[name]
        room = fraction * math.prod(nn.shape_of(layer))
        try:
            made = _smaller(layer, room, name, moments, method)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if made is not layer:
            nn.replace(model, name, made)
            changed.append(name)
    return changed


def low_rank(
    layer: nn.Layer,
    rank: int,
    left: np.ndarray | None = None,
    right: np.ndarray | None = None,
    *,
    method: Method = "low-rank",
) -> nn.Layer:
    """Return the layer of rank `rank` whose kernel is nearest to that of a layer.

    Args:
        layer: Of any kind; left as it is.
        rank: From 1 on.
        left: Moment of the input, `[n_in, n_in]`, to weigh the error by, or None.
        right: Moment of the gradient at the output, `[n_out, n_out]`, or None.
        method: What it becomes.
    """
    kernel = nn.dense(layer).kernel[...]
    target = Target("", np.asarray(kernel, np.float32), left, right)
    (terms,) = LowRank.of(target).fit(rank).terms
    bias = None if layer.bias is None else layer.bias[...]
    if method == "interpolative":
        a, b = terms.a[:, :, 0].T, terms.b[:, 0]
        return nn.InterpolativeLinear.of(a, b, bias, kernel.dtype)
    return nn.KroneckerLinear([_cast(terms, kernel.dtype)], bias)


def kronecker(layer: nn.KroneckerLinear, ranks: Sequence[int]) -> nn.KroneckerLinear:
    """Return a Kronecker layer with fewer terms of each configuration.

    Args:
        layer: Left as it is. The scales of its terms go into the factors, and begin
            again with ones.
        ranks: For each configuration, at least 1; no more are made than there are.

    Returns:
        The layer whose sums are nearest to those of `layer`, each by itself, with
        orthogonal factors: of each term both have the root of its singular value as
        their norm.

    Raises:
        ValueError: If a factor is masked or of low rank, which this would undo.
    """
    if not _is_whole(layer):
        raise ValueError(_AFTER)
    pairs = zip(layer.terms, ranks, strict=True)
    terms = [_truncated(one, rank) for one, rank in pairs]
    scales = None
    if layer.scales is not None:
        scales = [jnp.ones(len(one.a), one.a.dtype) for one in terms]
    bias = None if layer.bias is None else layer.bias[...]
    rows = None if layer.inputs is None else layer.inputs[...]
    columns = None if layer.outputs is None else np.argsort(layer.outputs[...])
    return nn.KroneckerLinear(terms, bias, rows=rows, columns=columns, scales=scales)


def inside(layer: nn.KroneckerLinear, side: Literal["a", "b"], rank: int) -> None:
    """Give all factors of one side of a Kronecker layer low rank, where that is less.

    Args:
        layer: Changed in place; factors that would not become smaller stay.
        side: `a` or `b`.
        rank: Of each factor.

    Raises:
        ValueError: If a factor is masked.
    """
    held: Any = getattr(layer, side)
    for c, part in enumerate(held):
        if isinstance(part, nn.MaskedFactor):
            raise ValueError("low rank inside of a factor would undo its mask")
        value = part[...]
        _, m, n = value.shape
        if rank * (m + n) >= m * n:
            continue
        u, s, vt = np.linalg.svd(np.asarray(value, np.float64), full_matrices=False)
        root = np.sqrt(s[:, :rank])
        left, right = u[:, :, :rank] * root[:, None], root[:, :, None] * vt[:, :rank]
        held[c] = nn.LowRankFactor(
            jnp.asarray(left, value.dtype), jnp.asarray(right, value.dtype)
        )


def _smaller(layer, room, name, moments, method):
    """Return a layer with at most `room` parameters in its kernel, or itself."""
    m, n = nn.shape_of(layer)
    if nn.describe(layer)["kind"] == "masked" or not _is_whole(layer):
        raise ValueError(_AFTER)
    if isinstance(layer, nn.KroneckerLinear) and not _is_low_rank(layer):
        each = [
            math.prod(a.shape[1:]) + math.prod(b.shape[1:]) for a, b in _pairs(layer)
        ]
        ranks = [a.shape[0] for a, _ in _pairs(layer)]
        total = sum(r * x for r, x in zip(ranks, each, strict=True))
        if total <= room:
            return layer
        return kronecker(layer, [max(int(r * room / total), 1) for r in ranks])
    rank = interpolative_rank((m, n), room)
    if method == "low-rank":
        rank = int(room // (m + n))
    rank = max(rank, 1)
    if _rank(layer) <= rank:
        return layer
    left = right = None
    if moments is not None:
        left = moments.input(name)
        right = moments.output(name) if moments.outputs else None
    return low_rank(layer, rank, left, right, method=method)


def _is_whole(layer) -> bool:
    """Say whether all parts of a layer are plain parameters."""
    parts = []
    if isinstance(layer, nn.KroneckerLinear):
        parts = [*layer.a, *layer.b]
    elif isinstance(layer, nn.InterpolativeLinear):
        parts = [layer.columns, layer.rest]
    return all(isinstance(x, nnx.Param) for x in parts)


def _pairs(layer):
    return list(zip(layer.a, layer.b, strict=True))


def _is_low_rank(layer) -> bool:
    """Say whether a Kronecker layer is columns times rows, and in no other order."""
    (a, b), *rest = _pairs(layer)
    is_plain = layer.inputs is None and layer.outputs is None and layer.scales is None
    return is_plain and not rest and a.shape[2] == 1 and b.shape[1] == 1


def _rank(layer) -> int:
    """Return the rank that a layer has by how it is held."""
    if isinstance(layer, nn.InterpolativeLinear):
        return layer.rest.shape[0]
    if isinstance(layer, nn.KroneckerLinear):
        return layer.a[0].shape[0]
    return min(nn.shape_of(layer))


def _truncated(terms: KroneckerTerms, rank: int) -> KroneckerTerms:
    """Return the nearest sum of fewer terms, in the Frobenius norm; in float64."""
    (r, m1, n1), (_, m2, n2) = terms.a.shape, terms.b.shape
    a, b = (np.asarray(x, np.float64).reshape(r, -1).T for x in (terms.a, terms.b))
    (qa, ra), (qb, rb) = np.linalg.qr(a), np.linalg.qr(b)
    u, s, vt = np.linalg.svd(ra @ rb.T)
    rank = min(rank, len(s))
    root = np.sqrt(s[:rank])
    left, right = (qa @ u[:, :rank] * root).T, (qb @ vt[:rank].T * root).T
    made = KroneckerTerms(
        jnp.asarray(left.reshape(rank, m1, n1)),
        jnp.asarray(right.reshape(rank, m2, n2)),
    )
    return _cast(made, terms.a.dtype)


def _cast(terms: KroneckerTerms, dtype: Any) -> KroneckerTerms:
    return KroneckerTerms(terms.a.astype(dtype), terms.b.astype(dtype))
