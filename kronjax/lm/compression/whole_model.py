"""Whole models as matrices by name, and back into a model.

What kronjax can load is opened by the names of its layers, kernels `[n_in, n_out]`, as
recipes for language models know them; anything else by the names of its tensors, as
they are. Nothing is read before it is needed.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kronjax import nn
from kronjax.io.tensors import map_all, read_json
from kronjax.lm.checkpoints import hugging_face
from kronjax.lm.compression import pipeline, plan
from kronjax.lm.models import registry, sizes
from kronjax.lm.models.base import LanguageModel
from kronjax.runs.store import SOLVED, Store


@dataclasses.dataclass(frozen=True)
class Whole:
    """A model, or any bag of matrices.

    Attributes:
        path: File or folder.
        tensors: By name, mapped into memory.
        tables: Embeddings of a model.
        model_type: Of what `lm.load` opens, or None.
        parameters: Of all.
    """

    path: Path
    tensors: Mapping[str, np.ndarray]
    tables: Mapping[str, np.ndarray]
    model_type: str | None
    parameters: int


def is_supported(path: Path) -> bool:
    """Say whether a folder holds a model that `lm.load` opens.

    Raises:
        ValueError: If its `config.json` is damaged.
    """
    config = path / "config.json"
    if not config.is_file():
        return False
    kind = read_json(config).get("model_type")
    return isinstance(kind, str) and kind in (
        *registry.PORTS,
        hugging_face.MODEL_TYPE,
    )


def open_whole(path: Path) -> Whole:
    """Open a safetensors file or a folder.

    Raises:
        ValueError: If a model is compressed already, or files are damaged.
        OSError: If there is nothing to read.
    """
    if not is_supported(path):
        tensors = map_all(path)
        count = sum(int(one.size) for one in tensors.values())
        return Whole(path, tensors, {}, None, count)
    outline, arrays = hugging_face.opened(path)
    return Whole(
        path=path,
        tensors={name: arrays[f"{name}.kernel"] for name in plan.compressible(outline)},
        tables={name: arrays[f"{name}.embedding"] for name in nn.tables(outline)},
        model_type=outline.config.model_type,
        parameters=sizes.count(outline).parameters,
    )


def merge(path: Path, store: Store, recipe: str, dtype: str | None) -> LanguageModel:
    """Return the model with the sums of a store in the places of its layers.

    Args:
        path: Of the dense model.
        store: What failed there stays dense.
        recipe: That travels with the model.
        dtype: Of parameters; by default as they are stored.
    """
    model = hugging_face.load(path, dtype=dtype)
    records = store.records(store.plan.tasks)
    for task in store.plan.tasks:
        if records[task.index]["status"] == SOLVED:
            terms = store.terms(task)
            pipeline.put(model, task.name, task.method, terms, task.scalars)
    model.recipe = recipe
    return model
