"""Compilation of programs for CPUs in a short time, and of several at once.

XLA's fusion emitters and the optimisations of LLVM take most of the time of compiling.
With jaxlib 0.10 the programs that solve one 36×36 matrix took, tracing included, 0.83
of the CPU time with level 1 of LLVM's optimisations, 0.57 without fusion emitters, 0.37
with both, and 0.21 with level 0. Fifty matrices were then solved in 0.9 of the time
with level 1, and in 3.4 times the time with level 0. So level 0 is for small arrays,
whose programs run for less time than they take to compile. Later versions of jaxlib
have no other emitters; there the level alone is set.

Without fusion emitters the last digits depend on the number of devices, seen with eight
simulated ones: programs whose results must not depend on it keep them.

>>> set(options(100)) <= {EMITTERS, LEVEL}
True
"""

import functools
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

SMALL = 2**15
"""Number of entries of all matrices of a program up to which it is not optimised: one
144×144 (20,736) gained by it, fifty 36×36 (64,800) lost; none between was measured."""

EMITTERS = "xla_cpu_use_fusion_emitters"
LEVEL = "xla_backend_optimization_level"


def options(
    entries: int, platform: str | None = None, *, keeps_emitters: bool = False
) -> dict[str, Any]:
    """Return compiler options, to be passed to `jax.jit` or `Lowered.compile`.

    Options that the environment variable `XLA_FLAGS` names are left to it.

    Args:
        entries: Number of entries of all matrices that the program computes at once.
        platform: Platform of the devices; by default that of `jax.default_backend`.
        keeps_emitters: Whether the result must not depend on the number of devices.
    """
    if (platform or jax.default_backend()) != "cpu":
        return {}
    chosen = {EMITTERS: False, LEVEL: 0 if entries <= SMALL else 1}
    if keeps_emitters:
        del chosen[EMITTERS]
    given = os.environ.get("XLA_FLAGS", "")
    return {
        name: value
        for name, value in chosen.items()
        if name not in given and _is_known(name, value)
    }


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    """Return whether this version of XLA has an option."""
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def start(
    lowered: Mapping[str, Any],
    entries: int,
    platform: str | None = None,
    *,
    keeps_emitters: bool = False,
) -> dict[str, Future]:
    """Start to compile several programs, as many at once as there are processors.

    Args:
        lowered: Results of `jax.stages.Traced.lower`, by name.
        entries: As for `options`.
        platform: As for `options`.
        keeps_emitters: As for `options`.

    Returns:
        The compiled programs to come, by name.
    """
    chosen = options(entries, platform, keeps_emitters=keeps_emitters)
    return {
        name: _threads().submit(program.compile, chosen)
        for name, program in lowered.items()
    }


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "compiling")
