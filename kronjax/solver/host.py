"""Solves of batches on the host: compiled in parts, run stage by stage.

The parts (start, one stage, the assembly of the trace, the end) are compiled once for
each problem and shape, and kept. Between stages the host looks: progress is shown, and
where all matrices of a batch are done nothing more is run.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from kronjax.solver import continuation
from kronjax.solver.problem import Problem, Stage
from kronjax.solver.whitened import Setting


@functools.lru_cache(maxsize=64)
def compiled(problem: Problem, shapes):
    """Compile the parts of a solve for arrays of `shapes`; return them in order."""
    # A search tries with one start what it then solves with all: compiled once, and
    # with room for a champion.
    alike = dataclasses.replace(problem, starts=2, budget=1)
    programs, (_, paths, first, line), _ = _stages(alike, shapes)
    count = len(problem.schedule())
    lines = jax.eval_shape(lambda x: _stack([x] * count), line) if count else line

    def gather(*lanes):
        return jax.vmap(lambda *lane: continuation.gather(problem, *lane))(*lanes)

    given = paths, first, lines
    length = jax.eval_shape(gather, *given).p.shape[1]
    last = _last(alike, shapes, length)
    return [*programs, jax.jit(gather).lower(*given).compile(), last]


@functools.lru_cache(maxsize=64)
def _stages(problem, shapes):
    """Return start and advance, compiled, what they return, and the settings' axes."""
    arrays = tuple(shape and jax.ShapeDtypeStruct(*shape) for shape in shapes)
    scalar = jax.ShapeDtypeStruct((), jnp.result_type(float))
    seed = jax.ShapeDtypeStruct((), jnp.result_type(int))
    # Weights that all matrices share are decomposed, and kept, once.
    axes = tuple(None if x is None or len(x.shape) == 2 else 0 for x in arrays)
    axes_of: Any = Setting
    setting_axes = axes_of(
        target=0,
        plain=0,
        roots=axes[1:],
        frames=None if axes[1:] == (None, None) else 0,
        scale=0,
        unit=0,
        finite=0,
    )

    def start(*arrays):
        return jax.vmap(
            lambda *x: continuation.start(problem, *x),
            in_axes=axes,
            out_axes=(setting_axes, 0, 0),
        )(*arrays)

    def advance(settings, paths, stage, tolerance, seed):
        tolerance = tolerance.astype(settings.target.dtype)
        return jax.vmap(
            lambda setting, path: continuation.advance(
                problem, setting, path, stage, tolerance, seed
            ),
            in_axes=(setting_axes, 0),
        )(settings, paths)

    settings, paths, first = jax.eval_shape(start, *arrays)
    line, schedule = first, problem.schedule()
    programs = [jax.jit(start).lower(*arrays).compile()]
    if schedule:
        stage = jax.eval_shape(_as_arrays, schedule[0])
        given = settings, paths, stage, scalar, seed
        _, line = jax.eval_shape(advance, *given)
        programs.append(jax.jit(advance, donate_argnums=1).lower(*given).compile())
    return programs, (settings, paths, first, line), setting_axes


@functools.lru_cache(maxsize=64)
def _last(problem, shapes, length):
    """Compile `finish` for a trace of so many lines."""
    _, (settings, paths, _, line), axes = _stages(problem, shapes)

    def finish(settings, paths, trace):
        return jax.vmap(
            lambda *lane: continuation.finish(problem, *lane), in_axes=(axes, 0, 0)
        )(settings, paths, trace)

    trace = jax.eval_shape(lambda x: _stack([x] * length), line)
    return jax.jit(finish).lower(settings, paths, trace).compile()


def prepare(problem: Problem, arrays: tuple):
    """Return what `compiled` does for these arrays, and the seconds that it took."""
    begun, made = time.perf_counter(), compiled.cache_info().misses
    programs = compiled(
        problem, tuple(x if x is None else (x.shape, x.dtype) for x in arrays)
    )
    is_new = compiled.cache_info().misses > made
    return programs, time.perf_counter() - begun if is_new else 0.0


def run(problem, programs, arrays, tolerance, seed, tick):
    """Walk through the schedule; return the solution as NumPy arrays."""
    schedule = problem.schedule()
    first_program, *advance, gather, finish = programs
    tolerance, seed = jnp.asarray(float(tolerance)), jnp.asarray(int(seed) % 2**31)
    settings, paths, first = jax.block_until_ready(first_program(*arrays))
    lines = []
    for stage in schedule:
        stage = _as_arrays(stage)
        paths, line = advance[0](settings, paths, stage, tolerance, seed)
        lines.append(jax.block_until_ready(line))
        tick(f"p = {line.p.max():.0f}")
        if paths.done.all():  # what is left out has lines, too
            idle = {name: 0 * getattr(line, name) for name in ("steps", "gemms")}
            line = dataclasses.replace(line, **idle)
            lines += [line] * (len(schedule) - len(lines))
            break
    trace = gather(paths, first, _stack(lines) if lines else first)
    return jax.device_get(finish(settings, paths, trace))


def _as_arrays(stage: Stage) -> Stage:
    return jax.tree.map(jnp.asarray, stage)


def _stack(lines):
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *lines)
