"""One loop that trains whatever the compressor makes.

Factored layers, masked ones, low rank or dense ones: all parameters that are not frozen
are moved by AdamW along the gradient of the next-token loss, of the distance to a
teacher, or of both. In a folder the run leaves its losses and, every so many steps, its
state; the same call goes on from there, and what it computes is to the bit what it
would have been without the interruption.

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


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a training.

    Attributes:
        model: With parameters in float32.
        history: A line for every step and every evaluation.
        record: Numbers and words for a table; see `kronjax.lm.training.history.rows`.
    """

    model: LanguageModel
    history: History
    record: dict[str, Any]


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
        model: With any layers; left as it is.
        tokens: `[n]`, integers, a memory-mapped file perhaps.
        settings: How.
        teacher: Of the same vocabulary, or None.
        held_out: `[k]`, tokens to evaluate on; by default the last of `tokens`.
        folder: For metrics, a figure and a table, and for checkpoints, which stay for
            the caller to remove; None keeps nothing.
        hook: Called between steps.
        progress: Whether to draw a bar; by default on a terminal, after two seconds.

    Returns:
        `Result`. What was finished before is read and not computed again.

    Raises:
        ValueError: If something does not fit the model, the batch not into memory, the
            folder belongs to another run, or the loss is no number; says where.
        OSError: If a checkpoint cannot be written.
        Stopped: If the process was asked to end; with a folder the state is kept.
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
    found = history.record(loop.history, facts)
    if folder is not None and jax.process_index() == 0:
        history.write(loop.history, found, folder)
    return Result(loop.model(), loop.history, found)


def _limit(model, teacher, task: Task) -> float | None:
    """Return the tokens per second that the devices could do, or None.

    The gradient takes twice the products of a forward pass, and the teacher has no
    gradient. Attention scores and what is computed twice are left out.
    """
    peak = history.peak(jax.devices()[0].device_kind, task.precision)
    if peak is None:
        return None
    theirs = 0 if teacher is None else sizes.count(teacher).flops
    return peak * task.placement.devices / (3 * sizes.count(model).flops + theirs)


def steps_of(
    model: LanguageModel,
    tokens: np.ndarray,
    settings: Settings,
    held_out: np.ndarray | None = None,
) -> int:
    """Return the steps that a run with these settings makes; arguments as of `run`."""
    steps = _prepare(model.config.context, tokens, held_out, settings)[0].steps
    assert steps is not None
    return steps


def _check(model, teacher, tokens, held_out, settings) -> None:
    """Refuse what does not belong together, before anything takes time."""
    length = settings.length
    for one, what in ((model, "model"), (teacher, "teacher")):
        if one is None:
            continue
        asked = length or min(model.config.context, LENGTH)
        if asked > one.config.context:
            raise ValueError(
                f"windows have {asked} tokens, and the {what} has a context of "
                f"{one.config.context}: give --length {one.config.context} or less"
            )
    if teacher is not None:
        objectives.check(model, teacher, settings.weights)
    for one in (tokens, held_out):
        if one is not None and len(one):
            check_vocabulary(model, one)


def _prepare(context, tokens, held_out, settings):
    """Return settings without gaps, the blocks to train on, and windows to test."""
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
    """Return the task, the first carry, and what is not trained: laid out."""
    form, arrays = named.take(model)
    frozen = named.matching(form.parameters, settings.freeze)
    trained = form.parameters - frozen
    if not trained:
        raise ValueError("everything is frozen; there is nothing to train")
    placement = Placement.of(settings.shard)
    if settings.rows % placement.devices:
        raise ValueError(
            f"{settings.rows} windows, a part of a batch, cannot be dealt out to "
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
    # Copies, for a step takes the memory of what it is given.
    arrays = {k: jnp.array(x) for k, x in named.cast(arrays, jnp.float32).items()}
    parts = (
        {k: arrays[k] for k in arrays if k in trained},
        {k: arrays[k] for k in arrays if k not in trained},
    )
    parameters, fixed = map(placement.put, parts)
    return task, task.begin(parameters), fixed, theirs
