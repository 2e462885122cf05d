"""Training of models with factored, masked, low-rank or dense layers.

AdamW moves all parameters that are not frozen along the gradient of the next-token
loss, of the distance to a teacher, or of both. With a folder the run writes its losses
and regular checkpoints. The same call resumes an interrupted run, and its results are
bitwise equal to those of a run without the interruption.

>>> settings, blocks, tests = _prepare(8, np.arange(100), None, Settings(batch=4))
>>> settings.steps, blocks.count, len(tests)
(2, 11, 1)
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kronjax.io.cache import digest
from kronjax.lm.models import sizes
from kronjax.lm.models.base import LanguageModel, check_vocabulary, fingerprint
from kronjax.lm.text import blocks
from kronjax.lm.text.blocks import Blocks
from kronjax.lm.training import history, objectives, optimizer
from kronjax.lm.training import parameters as named
from kronjax.lm.training.history import History
from kronjax.lm.training.hooks import Hook
from kronjax.lm.training.loop import STATE, Loop, Stopped
from kronjax.lm.training.settings import LENGTH, Settings
from kronjax.lm.training.sharding import Placement
from kronjax.lm.training.step import Task
from kronjax.runs.processes import Hosts

__all__ = ["STATE", "Result", "Stopped", "steps_of", "train"]


_LONG = ("teacher", "norms and ranks")
"""Rows of a record that are left out of its text."""


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """The result of a training.

    Attributes:
        model: The trained model, with float32 parameters.
        history: The metrics of every step and every evaluation.
        record: Summary of the run; see `kronjax.lm.training.history.rows`.
    """

    model: LanguageModel
    history: History
    record: dict[str, Any]

    def __repr__(self) -> str:
        """Return a table of the record, of at most ten lines."""
        table = [x for x in history.rows(self.record) if x[0] not in _LONG]
        return "\n".join(f"{name:<26}{value}" for name, value in table)

    def _repr_html_(self) -> str:
        return history.html_table(self.record)


def train(
    model: LanguageModel,
    tokens: np.ndarray,
    settings: Settings,
    *,
    teacher: LanguageModel | None = None,
    held_out: np.ndarray | None = None,
    folder: Path | None = None,
    hook: Hook | None = None,
    progress: bool | None = None,
) -> Result:
    """Train a model.

    Args:
        model: The model, with any kinds of layers; not modified.
        tokens: `[n]`, integers, for example a memory-mapped file.
        settings: Settings of the run.
        teacher: A model of the same vocabulary, or None.
        held_out: `[k]`, tokens to evaluate on; by default the last of `tokens`.
        folder: Folder for metrics, a figure, a table and checkpoints, which the caller
            removes; None writes nothing.
        hook: A hook called between steps, or None.
        progress: Whether to draw a bar; by default on a terminal, after two seconds.

    Returns:
        `Result`. Finished steps of an earlier, interrupted call are not repeated.

    Raises:
        ValueError: If the arguments do not fit the model, the batch does not fit into
            memory, the folder belongs to another run, or the loss is not finite; the
            message says where.
        OSError: If a checkpoint cannot be written.
        Stopped: If the process received SIGTERM or SIGINT; with a folder the state is
            saved.
    """
    _check(model, teacher, tokens, held_out, settings)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    settings, training, tests = _prepare(
        model.config.context, tokens, held_out, settings
    )
    task, carry, fixed, theirs = _begin(model, teacher, settings)
    marks = {
        "settings": settings.decisive(),
        "model": fingerprint(model),
        "teacher": teacher and fingerprint(teacher),
        "data": digest(np.asarray(tokens)),
        "held-out text": None if held_out is None else digest(np.asarray(held_out)),
        "hook": None if hook is None else repr(hook),
    }
    parts = task, settings, training, tests, carry, fixed, theirs
    if task.placement.is_shared:
        Hosts.here().agree(digest(marks, settings))
    limit = _limit(model, teacher, task)
    loop = Loop(*parts, hook=hook, folder=folder, marks=marks, limit=limit)
    try:
        loop.go(progress)
    finally:
        loop.close()
    facts = {
        "asked_steps": settings.steps,
        "tokens_per_step": settings.batch * (settings.length or 0),
        "parameters": sizes.count(model).parameters,
        "trained": sum(x.size for x in loop.carry.parameters.values()),
        "teacher": teacher and f"{sizes.count(teacher).parameters:,} parameters",
        "ended": loop.ended,
        "devices": task.placement.devices,
        "device": jax.devices()[0].device_kind,
        "compile_seconds": loop.compile_seconds,
        "settings": dataclasses.asdict(settings),
    }
    record = history.record(loop.history, facts)
    if folder is not None and jax.process_index() == 0:
        history.write(loop.history, record, folder)
    return Result(loop.model(), loop.history, record)


def _limit(model, teacher, task: Task) -> float | None:
    """Return the peak number of tokens per second of the devices, or None.

    The gradient takes twice the products of a forward pass, and the teacher has no
    gradient. Attention scores and rematerialised blocks are not counted.
    """
    peak = history.peak(jax.devices()[0].device_kind, task.precision)
    if peak is None:
        return None
    extra = 0 if teacher is None else sizes.count(teacher).flops
    return peak * task.placement.devices / (3 * sizes.count(model).flops + extra)


def steps_of(
    model: LanguageModel,
    tokens: np.ndarray,
    settings: Settings,
    held_out: np.ndarray | None = None,
) -> int:
    """Return the number of steps of `train` with these arguments."""
    steps = _prepare(model.config.context, tokens, held_out, settings)[0].steps
    assert steps is not None
    return steps


def _check(model, teacher, tokens, held_out, settings) -> None:
    """Refuse arguments that do not fit together, before anything takes time."""
    length = settings.length
    asked = length or min(model.config.context, LENGTH)
    for reader, name in ((model, "model"), (teacher, "teacher")):
        if reader is not None and asked > reader.config.context:
            raise ValueError(
                f"windows have {asked} tokens, and the {name} has a context of "
                f"{reader.config.context}: give --length {reader.config.context} or "
                "less"
            )
    if teacher is not None:
        objectives.check(model, teacher, settings.weights)
    for text in (tokens, held_out):
        if text is not None and len(text):
            check_vocabulary(model, text)


def _prepare(context, tokens, held_out, settings):
    """Return complete settings, the training blocks and the held-out windows."""
    length = settings.length or min(context, LENGTH)
    if held_out is None:
        tokens, held_out = blocks.split(tokens, length, fraction=settings.held_out)
    training = Blocks(tokens, length, settings.seed)
    steps = settings.steps or max(training.count // settings.batch, 1)
    every = settings.evaluate_every or max(steps // 10, 1)
    filled = {"length": length, "steps": steps, "evaluate_every": every}
    settings = dataclasses.replace(settings, **filled)
    tests = None
    if len(held_out) > length:
        tests = blocks.in_order(held_out, length, settings.evaluate_blocks)
    elif settings.patience is not None:
        raise ValueError(
            f"patience needs held-out text of more than {length} tokens; there are "
            f"{len(held_out)}"
        )
    return settings, training, tests


def _begin(model, teacher, settings: Settings):
    """Return the task, the first carry, the fixed arrays and those of the teacher."""
    form, arrays = named.take(model)
    frozen = named.matching(form.parameters, settings.freeze)
    trained = form.parameters - frozen
    if not trained:
        raise ValueError("everything is frozen; there is nothing to train")
    placement = Placement.of(settings.shard)
    if settings.rows % placement.devices:
        raise ValueError(
            f"{settings.rows} windows, a part of a batch, cannot be distributed over "
            f"{placement.devices} devices: give a --batch that they divide"
        )
    theirs, other = {}, None
    if teacher is not None:
        other, theirs = named.take(teacher)
    steps = settings.steps or 1
    task = Task(
        form=form,
        teacher=other,
        weights=settings.weights,
        precision=settings.precision,
        remat=settings.remat,
        placement=placement,
        transformation=optimizer.transformation(settings.optimizer, steps),
        schedule=optimizer.schedule(settings.optimizer, steps),
    )
    theirs = placement.put(named.cast(theirs, task.dtype))
    # Copies, because a step donates its arguments.
    arrays = {k: jnp.array(x) for k, x in named.cast(arrays, jnp.float32).items()}
    parts = (
        {k: arrays[k] for k in arrays if k in trained},
        {k: arrays[k] for k in arrays if k not in trained},
    )
    parameters, fixed = map(placement.put, parts)
    return task, task.begin(parameters), fixed, theirs
