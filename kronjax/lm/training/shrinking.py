"""A course of training: as a model is, pruned on the way, or with ranks that fall.

`run` is `trainer.train` for all three, and adds to the record what became of the
layers: how many numbers are kept, spectral norms and stable ranks before and after.
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
    """Train a model, and make it smaller on the way.

    Args:
        model: Left as it is.
        tokens: `[n]`, as for `trainer.train`, and so are the others.
        settings: Of the whole course.
        course: What happens on the way.
        moments: To weigh entries or errors by.
        teacher: To follow.
        held_out: To evaluate on.
        folder: For metrics and checkpoints.
        progress: Whether to draw bars.

    Raises:
        ValueError: As `trainer.train`, and if a schedule is longer than the run or a
            layer cannot be changed so.
    """
    given: dict[str, Any] = {
        "teacher": teacher,
        "held_out": held_out,
        "progress": progress,
    }
    if course.low_rank_to is not None:
        made = staged.progressive(
            course.low_rank_to,
            course.stages,
            match=course.match,
            moments=moments,
            method=course.method,
        )
        # Inside of what is thrown away once the whole course is over.
        inside = folder and folder / trainer.STATE / "stages"
        given["folder"] = inside
        result = _joined(staged.run(model, made, tokens, settings, **given), folder)
    else:
        begun, hook = model, None
        if course.pruning is not None:
            steps = trainer.steps_of(model, tokens, settings, held_out)
            hook = Gradual(course.pruning, steps, moments)
            begun = nnx.clone(model)
            pruning.begin(begun, course.pruning)
        given |= {"folder": folder, "hook": hook}
        result = trainer.train(begun, tokens, settings, **given)
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
    """Return several stages as one training, whose metrics are written to a folder."""
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
        "asked_steps": sum(one.record["asked_steps"] for one in results),
        "compile_seconds": sum(one.record["compile_seconds"] for one in results),
        "stages": len(results),
    }
    return trainer.Result(results[-1].model, whole, history.record(whole, facts))
