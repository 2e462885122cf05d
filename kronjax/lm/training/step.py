"""One step of training as one compiled program.

    (parameters, moments), windows  →  (parameters, moments), loss and its terms

Parameters are float32; products are made of copies in the precision of the computation.
A batch may be taken in several parts whose gradients are averaged. A step whose loss or
gradient is no number changes nothing, nor does any after it: what was there before the
first of them stays, and can be looked into.

>>> COMPILER
{'xla_backend_optimization_level': 1}
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kronjax.io import matrices
from kronjax.lm.models import likelihood
from kronjax.lm.training import objectives
from kronjax.lm.training import parameters as named
from kronjax.lm.training.parameters import Arrays, Form
from kronjax.lm.training.settings import Precision, Weights
from kronjax.lm.training.sharding import Placement

COMPILER = {"xla_backend_optimization_level": 1}
"""Options on a CPU: compiles a quarter faster, and what is compiled is as fast."""

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
"""What tells this error of jax from others."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What a step changes.

    Attributes:
        parameters: Those that are trained, float32.
        moments: Of the optimiser.
        step: int32, the steps that were made.
        failed: bool, whether a loss or a gradient was no number.
    """

    parameters: Arrays
    moments: Any
    step: jax.Array
    failed: jax.Array


@dataclasses.dataclass(frozen=True)
class Task:
    """What decides the programs of a training.

    Attributes:
        form: Of the model.
        teacher: Of the teacher, or None.
        weights: Of the terms of the loss.
        precision: Of products.
        remat: Whether blocks and logits are computed twice, to save memory.
        placement: Where arrays lie.
        transformation: The optimiser.
        schedule: Its learning rate.
    """

    form: Form
    teacher: Form | None
    weights: Weights
    precision: Precision
    remat: bool
    placement: Placement
    transformation: optax.GradientTransformation
    schedule: optax.Schedule

    @property
    def dtype(self) -> Any:
        """Of products."""
        return jnp.bfloat16 if self.precision == "bfloat16" else jnp.float32

    def begin(self, parameters: Arrays) -> Carry:
        """Return what the first step changes."""
        made = Carry(
            parameters,
            self.transformation.init(parameters),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), bool),
        )
        return self.placement.put(made)

    def loss(
        self, parameters: Arrays, fixed: Arrays, teacher: Arrays, windows: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss of windows `[b, t + 1]`, and its terms."""
        student = named.put(self.form, named.cast({**fixed, **parameters}, self.dtype))
        other = self.teacher and named.put(self.teacher, teacher)
        return objectives.objective(
            student, other, windows, self.weights, remat=self.remat
        )


def compile_step(
    task: Task,
    carry: Carry,
    fixed: Arrays,
    teacher: Arrays,
    shape: tuple[int, int, int],
) -> Callable[..., tuple[Carry, dict[str, jax.Array]]]:
    """Return the program of a step, compiled.

    Args:
        task: What decides it.
        carry: Laid out; given to the program and lost.
        fixed: What is not trained, masks for example.
        teacher: Its arrays, in the precision of products.
        shape: `(parts, b, t + 1)` of the windows.

    Returns:
        A function of carry, fixed, teacher and windows, to the carry and numbers:
        `loss` and its terms, `grad_norm`, `rate`, and `failed`.

    Raises:
        ValueError: If the batch does not fit into memory; says what would.
    """

    def step(carry: Carry, fixed: Arrays, teacher: Arrays, windows: jax.Array):
        found, gradient = _gradient(task, carry.parameters, fixed, teacher, windows)
        squares = (jnp.sum(x**2) for x in jax.tree.leaves(gradient))
        norm = jnp.sqrt(sum(squares))
        updates, moments = task.transformation.update(
            gradient, carry.moments, carry.parameters
        )
        made = optax.apply_updates(carry.parameters, updates), moments, carry.step + 1
        failed = carry.failed | ~(jnp.isfinite(found["loss"]) & jnp.isfinite(norm))
        old = carry.parameters, carry.moments, carry.step
        parameters, moments, count = jax.tree.map(
            lambda new, x: jnp.where(failed, x, new), made, old
        )
        numbers = {
            **found,
            "grad_norm": norm,
            "rate": jnp.asarray(task.schedule(carry.step), jnp.float32),
            "failed": failed,
        }
        return Carry(parameters, moments, count, failed), numbers

    layouts, copied = task.placement.layouts(carry), task.placement.copied
    program = jax.jit(step, donate_argnums=0, out_shardings=(layouts, copied))
    windows = jax.ShapeDtypeStruct(
        shape, jnp.int32, sharding=task.placement.windows(axis=1)
    )
    with advice(shape), _precision(task):
        compiled = _compile(program.lower(carry, fixed, teacher, windows))
    _check_memory(compiled, shape)
    return compiled


def compile_evaluation(
    task: Task, parameters: Arrays, fixed: Arrays, shape: tuple[int, int]
) -> Callable[..., jax.Array]:
    """Return the program of the next-token losses of windows `[b, t + 1]`.

    Args:
        task: What decides it.
        parameters: Laid out.
        fixed: What is not trained.
        shape: Of the windows.

    Returns:
        A function of parameters, fixed and windows, to the sum of each, float32 `[b]`.
    """

    def total(parameters: Arrays, fixed: Arrays, windows: jax.Array) -> jax.Array:
        model = named.put(task.form, named.cast({**fixed, **parameters}, task.dtype))
        return jnp.sum(likelihood.token_losses(model, windows), axis=1)

    windows = jax.ShapeDtypeStruct(
        shape, jnp.int32, sharding=task.placement.windows(axis=0)
    )
    with _precision(task):
        program = jax.jit(total, out_shardings=task.placement.copied)
        return _compile(program.lower(parameters, fixed, windows))


def run(function: Callable[..., Any], *arrays: Any) -> Any:
    """Return what a function returns, by a program for this one call."""
    return _compile(jax.jit(function).lower(*arrays))(*arrays)


def _compile(lowered: Any) -> Any:
    on_cpu = jax.default_backend() == "cpu"
    return lowered.compile(compiler_options=COMPILER if on_cpu else None)


def _gradient(task, parameters, fixed, teacher, windows):
    """Return the loss with its terms, and the gradient: means over parts."""
    graded = jax.value_and_grad(task.loss, has_aux=True)

    def part(windows):
        (loss, terms), gradient = graded(parameters, fixed, teacher, windows)
        return {"loss": loss, **terms}, gradient

    count = windows.shape[0]
    if count == 1:
        return part(windows[0])

    def add(total, windows):
        return jax.tree.map(jnp.add, total, part(windows)), None

    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, windows[0])
    )
    total, _ = jax.lax.scan(add, zeros, windows)
    return jax.tree.map(lambda x: x / count, total)


def _precision(task: Task) -> Any:
    return jax.default_matmul_precision(
        "highest" if task.precision == "float32" else "default"
    )


@contextlib.contextmanager
def advice(shape: tuple[int, int, int]) -> Iterator[None]:
    """Say what helps where memory is short."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and OUT_OF_MEMORY not in str(error):
            raise
        raise ValueError(too_large(shape)) from error


def too_large(shape: tuple[int, int, int]) -> str:
    """Say that a batch does not fit into memory, and what would."""
    parts, rows, length = shape
    advice = "--remat, or a smaller --length"
    if rows > 1:
        advice = f"--accumulate {2 * parts} makes the same step in smaller parts"
    return (
        f"a batch of {parts * rows} windows of {length - 1} tokens in {parts} "
        f"part{'s' * (parts > 1)} does not fit into memory: {advice}"
    )


def _check_memory(compiled: Any, shape: tuple[int, int, int]) -> None:
    """Refuse on a CPU what would have the system end the process."""
    if jax.default_backend() != "cpu":
        return
    facts = compiled.memory_analysis()
    if facts is None:
        return
    needed = facts.temp_size_in_bytes + facts.argument_size_in_bytes
    if needed > matrices.physical_memory():
        raise ValueError(
            f"{too_large(shape)} (it takes {needed / 2**30:.1f} GiB of "
            f"{matrices.physical_memory() / 2**30:.1f})"
        )
