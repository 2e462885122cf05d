"""Records of compressed models: all results, as values for JSON.

A record adds to the results of compression: the errors of every layer in three norms,
in float64; perplexities before and after, by a named protocol; the prediction of the
plan; sizes; the speed of both models. Reports are made from these records alone:
`kronjax report` needs no model.

>>> NAME
'report.json'
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kronjax import __version__, nn
from kronjax.io import atomic
from kronjax.io.cache import digest
from kronjax.io.json_values import jsonable
from kronjax.io.storage import LocalFolder, Storage
from kronjax.lm.compression.budget import Budget
from kronjax.lm.compression.moments import is_foreign
from kronjax.lm.compression.pipeline import precise
from kronjax.lm.compression.result import Result
from kronjax.lm.evaluation import latency, perplexity, spectra
from kronjax.lm.models.base import LanguageModel, fingerprint
from kronjax.lm.models.sizes import Sizes
from kronjax.lm.text.documents import Text
from kronjax.recipe import Recipe

NAME = "report.json"
"""The file beside the weights."""

FORMAT = 1
"""Version of the record; a reader refuses later ones."""

_TINY = 1e-300

EXPONENTS = (2, 4, 6, 10, 18, 34, 66, 130, 258)
"""Exponents of the Schatten norms in which errors are shown."""


def of(
    result: Result,
    model: LanguageModel,
    *,
    source: str,
    text: Text | None = None,
    protocol: str = "krony-pt",
    request: str | None = None,
    timed: bool = True,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Return the record of a compression.

    Args:
        result: The result of the compression.
        model: The dense model that was compressed.
        source: The place that the model was loaded from.
        text: The text to measure perplexities on, or None for none.
        protocol: Name of the protocol of perplexities.
        request: Digest of the command, from `request`, or None.
        timed: Whether to measure speeds, which takes a few seconds.
        progress: Whether to draw bars.
    """
    moments, plan = result.moments, result.plan
    record: dict[str, Any] = {
        "format": FORMAT,
        "kronjax": __version__,
        "jax": jax.__version__,
        "source": source,
        "request": request,
        "recipe": result.model.recipe,
        "budget": None if plan is None else str(plan.budget),
        "weighting": None if plan is None else plan.weighting,
        "calibration": moments
        and {
            "tokens": moments.tokens,
            "tokens_sha256": moments.tokens_sha256,
            "gradients": bool(moments.outputs),
            "perplexity": moments.nll and math.exp(min(moments.nll, 700)),
            "is_foreign": is_foreign(model, moments),
        },
        "before": _size(result.before, result.model.HEAD),
        "after": _size(result.after, result.model.HEAD),
        "layers": _layers(result, model),
        "probes": [] if plan is None else [list(probe) for probe in plan.ratios],
        "predicted_nats": _predicted(result),
        "analysis": _analysis(result, model),
        "blocks": result.blocks
        and [block and dataclasses.asdict(block) for block in result.blocks],
        "perplexity": None,
        "latency": None,
        "seconds": dict(result.seconds),
    }
    if text is not None:
        pair = [
            perplexity.perplexity(precise(x), text, protocol, progress=progress)
            for x in (model, result.model)
        ]
        dense, ours = map(perplexity.summary, pair)
        record["perplexity"] = {"dense": dense, "compressed": ours}
        record["measured_nats"] = pair[1].nll - pair[0].nll
    if timed:
        context = min(128, model.config.context // 2)
        times = latency.measure_latency(
            result.model, context=context, new_tokens=8, repeats=3, progress=progress
        )
        record["latency"] = latency.summary(times)
    return record


def request(
    model: LanguageModel,
    rules: Recipe | Budget,
    texts: Sequence[Text | None],
    *options: Any,
) -> str:
    """Return a digest of everything that decides a compression and its measurements.

    Args:
        model: The dense model.
        rules: Rules or a budget.
        texts: The texts to calibrate with and to measure perplexities on.
        options: Any other options, with an unambiguous `repr`.
    """
    read = [None if text is None else (text.sha256, text.join) for text in texts]
    tokens = None if model.tokenizer is None else model.tokenizer.digest
    return digest(fingerprint(model), tokens, rules, read, options)


def write(record: dict[str, Any], folder: Path) -> Path:
    """Write a record into the folder of a model; return its path."""
    path = folder / NAME
    text = json.dumps(jsonable(record), indent=1, allow_nan=False)
    atomic.write(path, text.encode() + b"\n")
    return path


def read(folder: Path) -> dict[str, Any]:
    """Return the record in a folder.

    Raises:
        ValueError: If it is damaged or of a later version.
        OSError: If there is none; names the command that writes it.
    """
    return load(LocalFolder(folder))


def load(place: Storage) -> dict[str, Any]:
    """Return the record in a folder or behind a URL; see `read`."""
    content = place.read(NAME)
    if content is None:
        raise FileNotFoundError(
            f"{place} has no {NAME}: kronjax compress writes one beside the weights"
        )
    path = f"{place}/{NAME}"
    try:
        record = json.loads(content)
        version = record["format"]
        if version == FORMAT:
            _ = [record[key] for key in ("source", "before", "after", "layers")]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if version != FORMAT:
        raise ValueError(f"{path} is of format {version}: update kronjax")
    return record


def _size(counted: Sizes, head: str) -> dict[str, Any]:
    linear = [layer for layer in counted.layers if layer.name != head]
    return {
        "parameters": counted.parameters,
        "linear_parameters": sum(layer.parameters for layer in linear),
        "bytes": counted.bytes,
        "flops": counted.flops,
    }


def _predicted(result):
    if result.plan is None or result.plan.weighting != "input+gradient":
        return None
    return sum(layer.damage or 0.0 for layer in result.layers)


def _analysis(result: Result, model: LanguageModel) -> dict[str, Any] | None:
    """Return norms and ranks of both models, or None if a kernel holds NaN."""
    try:
        return spectra.compare(model, result.model).plain()
    except ValueError:
        return None


def _layers(result: Result, model: LanguageModel) -> list[dict[str, Any]]:
    """Return the facts about each layer, dense layers included."""
    after: dict[str, Any] = _all_layers(result.model)
    done = {x.name: x for x in result.layers}
    choices = {x.name: x for x in result.plan.choices} if result.plan else {}
    counted = result.after
    sizes = {x.name: x for x in (*counted.tables, *counted.layers)}
    tables = nn.tables(model)
    rows = []
    for name, layer in _all_layers(model).items():
        if name not in done and name in tables:
            continue
        size, cost = sizes[name], nn.cost(layer)
        row: dict[str, Any] = {
            "name": name,
            "shape": list(size.shape),
            "kind": size.kind,
            "parameters": size.parameters,
            "bytes": size.bytes,
            "dense_bytes": cost.bytes,
            "fraction": size.parameters / max(cost.parameters, 1),
            "flops": size.flops,
        }
        if name in done and done[name].status in ("failed", "dense"):
            row |= {k: getattr(done[name], k) for k in ("gap", "status", "reason")}
        elif name in done:
            kernel = np.asarray(nn.materialize(layer), np.float64)
            left = kernel - np.asarray(nn.materialize(after[name]), np.float64)
            error, whole = (np.linalg.svd(x, compute_uv=False) for x in (left, kernel))
            schatten = [
                _norm(error, p) / max(_norm(whole, p), _TINY) for p in EXPONENTS
            ]
            row |= {
                **{
                    k: v
                    for k, v in dataclasses.asdict(done[name]).items()
                    if k not in ("name", "configurations", "rule", "parameters")
                },
                "spectral": float(error[0]),
                "relative_spectral": float(error[0] / max(whole[0], _TINY)),
                "relative_frobenius": schatten[EXPONENTS.index(2)],
                "schatten": schatten,
            }
        elif name in choices:
            row["reason"] = choices[name].reason
        rows.append(row)
    return rows


def _all_layers(model) -> dict[str, Any]:
    return {**nn.tables(model), **nn.linear_layers(model)}


def _norm(values: np.ndarray, p: float) -> float:
    """Return the Schatten p-norm of singular values, without overflow."""
    top = max(float(values[0]), _TINY)
    return top * float(np.sum((values / top) ** p)) ** (1 / p)
