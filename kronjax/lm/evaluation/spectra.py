"""Spectral norms and stable ranks of layers, and a generalisation bound made of them.

    srank(W) = ‖W‖_F² / ‖W‖_2²
    bound    ∝ Π_i ‖W_i‖_2² · Σ_i srank(W_i)

The bound holds for feed-forward networks; for a transformer, with its residual stream
and its norms, the value of the product has no meaning by itself. So only the ratio of
two models of one architecture is given, in powers of ten, and separately for both
factors.

References: Arora, Ge, Neyshabur and Zhang (2018); Rudelson and Vershynin (2007), for
the stable rank.

>>> row = of_kernel("fc", np.diag([2.0, 1.0, 1.0]))
>>> row.spectral, row.stable_rank, row.rank
(2.0, 1.5, 3)
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from kronjax import nn
from kronjax.lm.models.base import LanguageModel, inner_layers


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Norms and ranks of a kernel.

    Attributes:
        name: Name of the layer.
        spectral: Spectral norm `‖W‖_2`.
        frobenius: Frobenius norm `‖W‖_F`.
        stable_rank: `‖W‖_F² / ‖W‖_2²`, at most the rank; 0 if all entries are zero.
        rank: Number of singular values above `max(m, n)` roundings of the largest one.
    """

    name: str
    spectral: float
    frobenius: float
    stable_rank: float
    rank: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Comparison of two models, layer by layer.

    Attributes:
        before: Spectra of the first model.
        after: Spectra of the second model, in the same order.
        log10_product: Logarithm of the ratio of `Π ‖W_i‖²`, after over before.
        log10_ranks: Logarithm of the ratio of `Σ srank`, after over before.
    """

    before: tuple[Spectrum, ...] = dataclasses.field(repr=False)
    after: tuple[Spectrum, ...] = dataclasses.field(repr=False)
    log10_product: float
    log10_ranks: float

    @property
    def log10_bound(self) -> float:
        """Logarithm of the ratio of the bounds: negative if the second one is lower."""
        return self.log10_product + self.log10_ranks

    def plain(self) -> dict[str, Any]:
        """Return all fields as values for JSON."""
        return {
            "log10_bound": self.log10_bound,
            "log10_product": self.log10_product,
            "log10_ranks": self.log10_ranks,
            "layers": [
                {
                    "name": old.name,
                    "before": _without_name(old),
                    "after": _without_name(new),
                }
                for old, new in zip(self.before, self.after, strict=True)
            ],
        }


def of_kernel(name: str, kernel: np.ndarray) -> Spectrum:
    """Return the spectrum of a kernel `[n_in, n_out]`, computed in float64.

    Raises:
        ValueError: If an entry is not finite; the message names the layer.
    """
    kernel = np.asarray(kernel, np.float64)
    if not np.isfinite(kernel).all():
        raise ValueError(f"{name} has entries that are not finite")
    values = np.linalg.svd(kernel, compute_uv=False)
    top = float(values[0])
    # Kernels are stored in at most float32, whatever dtype they are given in.
    floor = max(kernel.shape) * float(np.finfo(np.float32).eps) * top
    scaled = values / top if top > 0 else values
    return Spectrum(
        name,
        spectral=top,
        frobenius=top * math.sqrt(float(np.sum(scaled**2))),
        stable_rank=float(np.sum(scaled**2)),
        rank=int(np.sum(values > floor)),
    )


def compare(before: LanguageModel, after: LanguageModel) -> Comparison:
    """Compare two models of one architecture.

    The cost is that of the singular values of all kernels of the first model, and of
    those kernels of the second that differ.

    Raises:
        ValueError: If the models have different layers, or an entry is not finite.
    """
    old, new = map(_kernels, (before, after))
    if list(old) != list(new):
        raise ValueError("the models have different layers: they cannot be compared")
    first = {name: of_kernel(name, kernel) for name, kernel in old.items()}
    second = {
        name: first[name]
        if np.array_equal(kernel, old[name])
        else of_kernel(name, kernel)
        for name, kernel in new.items()
    }

    def product(spectra):
        # A layer of zeros makes the bound zero, and useless; log10 must not fail.
        return sum(2 * math.log10(max(x.spectral, 1e-300)) for x in spectra.values())

    def ranks(spectra):
        total = sum(x.stable_rank for x in spectra.values())
        return math.log10(max(total, 1e-300))

    return Comparison(
        tuple(first.values()),
        tuple(second.values()),
        log10_product=product(second) - product(first),
        log10_ranks=ranks(second) - ranks(first),
    )


def rows(comparison: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of a table of means over the layers of each kind.

    Args:
        comparison: The result of `Comparison.plain`.

    Returns:
        Rows of text: kind, spectral norm, stable rank and rank, each before and after.
    """
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in comparison["layers"]:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", layer["name"]), []).append(layer)
    lines = []
    for kind, members in kinds.items():
        cells = [kind]
        for key, form in (("spectral", ".3g"), ("stable_rank", ".2f"), ("rank", ".0f")):
            for when in ("before", "after"):
                mean = np.mean([layer[when][key] for layer in members])
                cells.append(f"{mean:{form}}")
        lines.append(tuple(cells))
    return lines


def verdict(comparison: dict[str, Any]) -> str:
    """Return a sentence about the result of `Comparison.plain`."""
    layers = comparison["layers"]
    old, new = (
        np.mean([layer[when]["stable_rank"] for layer in layers])
        for when in ("before", "after")
    )
    return (
        f"Bound Π‖W‖² Σ srank(W): times 10^{comparison['log10_bound']:+.2f} "
        f"(norms 10^{comparison['log10_product']:+.2f}, stable ranks "
        f"10^{comparison['log10_ranks']:+.2f}); mean stable rank {old:.2f} before, "
        f"{new:.2f} after."
    )


def _kernels(model: LanguageModel) -> dict[str, np.ndarray]:
    """Return the kernels of all linear layers except the head, multiplied out."""
    return {
        name: np.asarray(nn.dense(layer).kernel[...], np.float64)
        for name, layer in inner_layers(model).items()
    }


def _without_name(spectrum: Spectrum) -> dict[str, Any]:
    values = dataclasses.asdict(spectrum)
    del values["name"]
    return values
