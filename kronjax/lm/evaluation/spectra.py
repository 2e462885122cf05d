"""Spectral norms and stable ranks of layers, and a bound that is made of them.

    srank(W) = ‖W‖_F² / ‖W‖_2²
    bound    ∝ Π_i ‖W_i‖_2² · Σ_i srank(W_i)

The bound holds for networks of plain layers; for a transformer, with its residual
stream and its norms, the product says nothing absolute. So it is given as a ratio of
two models of one architecture, in powers of ten, with both factors apart.

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
    """The size of one kernel.

    Attributes:
        name: Of the layer.
        spectral: `‖W‖_2`.
        frobenius: `‖W‖_F`.
        stable_rank: `‖W‖_F² / ‖W‖_2²`, at most the rank; 0 of a kernel of zeros.
        rank: Singular values above `max(m, n)` roundings of the largest.
    """

    name: str
    spectral: float
    frobenius: float
    stable_rank: float
    rank: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models, layer by layer.

    Attributes:
        before: Of the first.
        after: Of the second, in the same order.
        log10_product: Of the ratio of `Π ‖W_i‖²`, after over before.
        log10_ranks: Of the ratio of `Σ srank`.
    """

    before: tuple[Spectrum, ...]
    after: tuple[Spectrum, ...]
    log10_product: float
    log10_ranks: float

    @property
    def log10_bound(self) -> float:
        """Of the ratio of the bounds: below zero, that of the second is the lower."""
        return self.log10_product + self.log10_ranks

    def plain(self) -> dict[str, Any]:
        """Return everything as values that JSON holds."""
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
    """Return the size of a kernel `[n_in, n_out]`, in float64.

    Raises:
        ValueError: If an entry is not finite; names the layer.
    """
    kernel = np.asarray(kernel, np.float64)
    if not np.isfinite(kernel).all():
        raise ValueError(f"{name} has entries that are not finite")
    values = np.linalg.svd(kernel, compute_uv=False)
    top = float(values[0])
    # Kernels are stored in float32 at best, whatever they are computed in.
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

    Costs the singular values of all kernels of the first, and of those of the second
    that differ.

    Raises:
        ValueError: If they have other layers, or an entry is not finite.
    """
    old, new = map(_kernels, (before, after))
    if list(old) != list(new):
        raise ValueError("the models have other layers: they cannot be compared")
    first = {name: of_kernel(name, kernel) for name, kernel in old.items()}
    second = {
        name: first[name]
        if np.array_equal(kernel, old[name])
        else of_kernel(name, kernel)
        for name, kernel in new.items()
    }

    def product(spectra):
        # A layer of zeros would make it zero; the bound is then of no use.
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
    """Return means over the layers of a kind as words, of what `plain` returned.

    Returns:
        Kind, spectral norm, stable rank and rank, each before and after.
    """
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in comparison["layers"]:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", one["name"]), []).append(one)
    made = []
    for kind, members in kinds.items():
        cells = [kind]
        for key, form in (("spectral", ".3g"), ("stable_rank", ".2f"), ("rank", ".0f")):
            for when in ("before", "after"):
                cells.append(f"{np.mean([one[when][key] for one in members]):{form}}")
        made.append(tuple(cells))
    return made


def verdict(comparison: dict[str, Any]) -> str:
    """Say what `plain` returned in a sentence."""
    layers = comparison["layers"]
    old, new = (
        np.mean([one[when]["stable_rank"] for one in layers])
        for when in ("before", "after")
    )
    return (
        f"Bound Π‖W‖² Σ srank(W): times 10^{comparison['log10_bound']:+.2f} "
        f"(norms 10^{comparison['log10_product']:+.2f}, stable ranks "
        f"10^{comparison['log10_ranks']:+.2f}); mean stable rank {old:.2f} before, "
        f"{new:.2f} after."
    )


def _kernels(model: LanguageModel) -> dict[str, np.ndarray]:
    """Return the kernels of all linear layers but the head, multiplied out."""
    return {
        name: np.asarray(nn.dense(layer).kernel[...], np.float64)
        for name, layer in inner_layers(model).items()
    }


def _without_name(spectrum: Spectrum) -> dict[str, Any]:
    values = dataclasses.asdict(spectrum)
    del values["name"]
    return values
