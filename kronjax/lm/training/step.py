"""One step of training as one compiled program.

    (parameters, moments), windows  →  (parameters, moments), loss and its terms

Parameters are float32; products use copies in the precision of the computation. A batch
may be processed in several parts whose gradients are averaged. A step whose loss or
gradient is not finite changes nothing, and neither does any later step: the state
before the first such step stays and can be examined.

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
"""Compiler options on a CPU: compiles a quarter faster to equally fast programs."""

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
"""The word that identifies this error of jax."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """The arrays that a step changes.

    Attributes:
        parameters: The trained parameters, float32.
        moments: State of the optimiser.
        step: int32, number of steps done.
        failed: bool, whether a loss or a gradient was not finite.
    """

    parameters: Arrays
    moments: Any
    step: jax.Array
    failed: jax.Array


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything that determines the programs of a training.

    Attributes:
        form: The model without its arrays.
        teacher: The teacher without its arrays, or None.
        weights: Weights of the terms of the loss.
        precision: Precision of products.
        remat: Whether blocks and logits are computed twice, to save memory.
        placement: Layout of arrays on the devices.
        transformation: The optimiser.
        schedule: The learning rate as a function of the step.
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
        """The dtype of products."""
        return jnp.bfloat16 if self.precision == "bfloat16" else jnp.float32

    def begin(self, parameters: Arrays) -> Carry:
        """Return the carry of the first step."""
        carry = Carry(
            parameters,
            self.transformation.init(parameters),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), bool),
        )
        return self.placement.put(carry)

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
    """Return the compiled program of a step.

    Args:
        task: The task.
        carry: The arrays that a step changes, on the devices; the program donates them.
        fixed: Arrays that are not trained, masks for example.
        teacher: Arrays of the teacher, in the precision of products.
        shape: `(parts, b, t + 1)` of the windows.

    Returns:
        A function of carry, fixed, teacher and windows that returns the carry and
        numbers: `loss` and its terms, `grad_norm`, `rate`, and `failed`.

    Raises:
        ValueError: If the batch does not fit into memory; the message says what would.
    """

    def step(carry: Carry, fixed: Arrays, teacher: Arrays, windows: jax.Array):
        losses, gradient = _gradient(task, carry.parameters, fixed, teacher, windows)
        squares = (jnp.sum(x**2) for x in jax.tree.leaves(gradient))
        norm = jnp.sqrt(sum(squares))
        updates, moments = task.transformation.update(
            gradient, carry.moments, carry.parameters
        )
        parameters = optax.apply_updates(carry.parameters, updates)
        moved = parameters, moments, carry.step + 1
        failed = carry.failed | ~(jnp.isfinite(losses["loss"]) & jnp.isfinite(norm))
        old = carry.parameters, carry.moments, carry.step
        parameters, moments, count = jax.tree.map(
            lambda new, x: jnp.where(failed, x, new), moved, old
        )
        numbers = {
            **losses,
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
        task: The task.
        parameters: The trained parameters, on the devices.
        fixed: Arrays that are not trained.
        shape: Shape of the windows.

    Returns:
        A function of parameters, fixed and windows that returns the sum over each
        window, float32 `[b]`.
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
    """Compile a function for one call, and return its value."""
    return _compile(jax.jit(function).lower(*arrays))(*arrays)


def _compile(lowered: Any) -> Any:
    on_cpu = jax.default_backend() == "cpu"
    return lowered.compile(compiler_options=COMPILER if on_cpu else None)


def _gradient(task, parameters, fixed, teacher, windows):
    """Return the loss with its terms and the gradient, averaged over parts."""
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
    """Turn an error about memory into advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and OUT_OF_MEMORY not in str(error):
            raise
        raise ValueError(too_large(shape)) from error


def too_large(shape: tuple[int, int, int]) -> str:
    """Return the message that a batch does not fit into memory, with advice."""
    parts, rows, length = shape
    advice = "--remat, or a smaller --length"
    if rows > 1:
        advice = f"--accumulate {2 * parts} makes the same step in smaller parts"
    return (
        f"a batch of {parts * rows} windows of {length - 1} tokens in {parts} "
        f"part{'s' * (parts > 1)} does not fit into memory: {advice}"
    )


def _check_memory(compiled: Any, shape: tuple[int, int, int]) -> None:
    """Refuse a program on a CPU that would exceed its physical memory."""
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
