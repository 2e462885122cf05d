"""Training without compression, with gradual pruning, or with falling ranks.

`run` calls `trainer.train` for all three, and adds facts about the layers to the
record: the number of entries kept, spectral norms and stable ranks before and after.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from kronjax.lm.compression.moments import Moments
from kronjax.lm.evaluation import spectra
from kronjax.lm.models import sizes
from kronjax.lm.models.base import LanguageModel
from kronjax.lm.training import history, pruning, staged, trainer
from kronjax.lm.training.history import History
from kronjax.lm.training.pruning import Gradual
from kronjax.lm.training.settings import Course, Settings


def run(
    model: LanguageModel,
    tokens: np.ndarray,
    settings: Settings,
    course: Course,
    *,
    moments: Moments | None = None,
    teacher: LanguageModel | None = None,
    held_out: np.ndarray | None = None,
    folder: Path | None = None,
    progress: bool | None = None,
) -> trainer.Result:
    """Train a model, and compress it during training.

    Args:
        model: The model; not modified.
        tokens: `[n]`, as for `trainer.train`.
        settings: Settings of the whole course.
        course: Changes of the layers.
        moments: Moments that weight entries or errors, or None.
        teacher: A model to match, or None.
        held_out: Tokens to evaluate on, or None.
        folder: Folder for metrics and checkpoints, or None.
        progress: Whether to draw bars.

    Raises:
        ValueError: As for `trainer.train`, and if a schedule is longer than the run or
            a layer does not allow the change.
    """
    options: dict[str, Any] = {
        "teacher": teacher,
        "held_out": held_out,
        "progress": progress,
    }
    if course.low_rank_to is not None:
        stages = staged.progressive(
            course.low_rank_to,
            course.stages,
            match=course.match,
            moments=moments,
            method=course.method,
        )
        # Inside the folder that is removed after the whole course.
        inside = folder and folder / trainer.STATE / "stages"
        options["folder"] = inside
        result = _joined(staged.run(model, stages, tokens, settings, **options), folder)
    else:
        begun, hook = model, None
        if course.pruning is not None:
            steps = trainer.steps_of(model, tokens, settings, held_out)
            hook = Gradual(course.pruning, steps, moments)
            begun = nnx.clone(model)
            pruning.begin(begun, course.pruning)
        options |= {"folder": folder, "hook": hook}
        result = trainer.train(begun, tokens, settings, **options)
    if not course.changes:
        return result
    counted = sizes.count(result.model)
    result.record["parameters"], result.record["held"] = (
        counted.parameters,
        counted.held,
    )
    result.record["analysis"] = spectra.compare(model, result.model).plain()
    if folder is not None and jax.process_index() == 0:
        history.write(result.history, result.record, folder)
    return result


def _joined(results: list[trainer.Result], folder: Path | None) -> trainer.Result:
    """Return several stages as one training, with its metrics in a folder."""
    whole = History(folder if jax.process_index() == 0 else None)
    first = 0
    for i, result in enumerate(results, 1):
        for line in result.history.lines:
            whole.add({**line, "step": first + line["step"], "stage": i})
        first += result.record["steps"]
    whole.flush()
    whole.close()
    facts = {
        **results[-1].record,
        "asked_steps": sum(x.record["asked_steps"] for x in results),
        "compile_seconds": sum(x.record["compile_seconds"] for x in results),
        "stages": len(results),
    }
    return trainer.Result(results[-1].model, whole, history.record(whole, facts))
