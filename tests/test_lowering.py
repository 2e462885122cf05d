"""What TPUs and GPUs are given: exported on any machine, and read as StableHLO.

Decompositions are those of jax: what it makes of them on a platform, which on a TPU are
loops of their own, is its business. A law about loops is one about ours.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.mlir import ir
from jax.interpreters import mlir

from kronjax import Configuration
from kronjax.kronecker import KroneckerTerms
from kronjax.linalg import lanczos, norms, spectral
from kronjax.proof import bounds
from kronjax.runs import pool_programs
from kronjax.solver import continuation
from kronjax.solver.problem import Problem

SHAPE = (96, 144)
ONE = Configuration((8, 12), 2)
TWO = (ONE, Configuration((96, 1), 1))
# With nearly half the parameters: the unknowns are factors.
HIGH = Configuration((8, 12), 28)
# Matrices in a call to a pool.
LANES = 3

HIGHEST = "[{0}, {0}]".format("#stablehlo<precision HIGHEST>")
DECOMPOSITIONS = {"svd", "eigh", "eigvalsh", "qr", "cholesky", "inv"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """A product, a decomposition or a call out of the program, in so many loops."""

    name: str
    loops: int
    shapes: tuple[tuple[int, ...], ...]
    precision: str = ""

    @property
    def size(self):
        """The smaller side of the matrix that is decomposed."""
        return min(self.shapes[0][-2:])


@dataclasses.dataclass(frozen=True)
class Program:
    """All that the tests ask about an exported program."""

    operations: tuple[Operation, ...]
    doubles: frozenset[str]

    @property
    def products(self):
        return [one for one in self.operations if one.name == "dot_general"]

    @property
    def decompositions(self):
        return [one for one in self.operations if one.name in DECOMPOSITIONS]

    def full(self, loops):
        """The decompositions of matrices as large as the problem, by name and shape."""
        return [
            (one.name, one.shapes[0])
            for one in self.decompositions
            if one.size >= min(SHAPE) and bool(one.loops) == loops
        ]

    @property
    def calls(self):
        return {one.name for one in self.operations if one.name.startswith("@")}


def solve(configuration=ONE, schedule="adaptive"):
    def of(matrix, *weights):
        left, right = weights or (None, None)
        return continuation.solve(
            matrix,
            configuration,
            schedule=schedule,
            left_weight=left,
            right_weight=right,
        )

    return of


def lanczos_bounds(matrix, start):
    return lanczos.map_norm_bounds(
        lambda x: jnp.matmul(matrix, x, precision="highest"),
        lambda y: jnp.matmul(y, matrix, precision="highest"),
        start,
    )


def certify(matrix, a, b, *weights):
    return bounds.certify(matrix, (KroneckerTerms(a, b),), *weights)


def certify_stage(matrix, a, b):
    return bounds.certify_stage(matrix, (KroneckerTerms(a, b),), 258.0)


def pooled(function, *given, configuration=ONE):
    """A program of a pool, as one device has it: its function, and its arguments."""
    problem = Problem.of(SHAPE, configuration, num_starts=2)
    assert problem.is_factored == (configuration == HIGH)
    stage = jax.tree.map(
        lambda x: array((1,), bool if isinstance(x, bool) else int),
        problem.schedule()[0],
    )
    known = {
        "seeds": array((LANES,), int),
        "stage": stage,
        "trials": array((1,), int),
        "matrices": array((LANES, *SHAPE)),
        "last": array((LANES,), int),
        "ends": array((1,), bool),
    }
    held = jax.tree.map(
        lambda x: array((2 * LANES, *x.shape), x.dtype),
        pool_programs.shapes(problem, np.dtype(np.float32)),
    )
    order, tolerance = array((LANES,), int), array(())
    given = (held, tolerance, order, *(known[name] for name in given))
    return functools.partial(function, problem), given


def array(shape, dtype=float):
    """An argument: numbers have 32 bits."""
    short = {"i": jnp.int32, "f": jnp.float32}.get(np.dtype(dtype).kind, dtype)
    return jax.ShapeDtypeStruct(shape, short)


M, N = SHAPE
BOTH = (M, M), (N, N)
TERMS = (2, 8, 12), (2, 12, 12)
# What is exported: a function, and its arguments or their shapes.
SOLVES = {
    "plain": (solve(), (SHAPE,)),
    "fixed": (solve(schedule="fixed"), (SHAPE,)),
    "weighted": (solve(), (SHAPE, *BOTH)),
    "two": (solve(TWO), (SHAPE,)),
    "batch": (jax.vmap(solve()), ((3, *SHAPE),)),
    "fixed batch": (jax.vmap(solve(schedule="fixed")), ((3, *SHAPE),)),
    "weighted batch of two": (
        jax.vmap(solve(TWO), in_axes=(0, None, None)),
        ((3, *SHAPE), *BOTH),
    ),
}
BOUNDS = {
    "certain": (norms.norm_bounds, (SHAPE,)),
    "certain batch": (jax.vmap(norms.norm_bounds), ((3, *SHAPE),)),
    "probable": (lanczos_bounds, (SHAPE, (N,))),
    "probable batch": (jax.vmap(lanczos_bounds), ((3, *SHAPE), (3, N))),
}
CERTIFICATES = {
    "certificate": (certify, (SHAPE, *TERMS)),
    "weighted certificate": (certify, (SHAPE, *TERMS, *BOTH)),
    "certificate in haste": (certify_stage, (SHAPE, *TERMS)),
}
PROGRAMS = {
    "work": (pool_programs._work, "stage", "trials"),
    "turn": (pool_programs._turn, "seeds", "stage", "stage", "ends"),
    "start": (pool_programs._start, "matrices", "seeds"),
    "finish": (pool_programs._finish, "matrices", "last"),
}
POOLS = {name: pooled(*one) for name, one in PROGRAMS.items()} | {
    f"{name} at high rank": pooled(*one, configuration=HIGH)
    for name, one in PROGRAMS.items()
}
SMALL = {"small": (solve(Configuration((3, 3), 2)), ((12, 18),))}
CASES = SOLVES | BOUNDS | CERTIFICATES | POOLS | SMALL


@functools.cache
def exported(case, platform, x64=False):
    function, given = CASES[case]
    with jax.enable_x64(x64):
        arguments = given if case in POOLS else map(array, given)
        text = jax.export.export(jax.jit(function), platforms=[platform])(
            *arguments
        ).mlir_module()
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        functions = {
            one.attributes["sym_name"].value: one for one in module.body.operations
        }
        operations = tuple(walk(functions["main"], functions))
    return Program(operations, frozenset(re.findall(r"tensor<[^>]*f64>", text)))


def walk(operation, functions, loops=0):
    """All products, decompositions and calls out, also in functions that are called."""
    for region in operation.regions:
        for block in region.blocks:
            for one in block.operations:
                yield from visit(one.operation, functions, loops)


def visit(operation, functions, loops):
    name = operation.name.removeprefix("stablehlo.")
    shapes = tuple(tuple(ir.RankedTensorType(x.type).shape) for x in operation.operands)
    if name == "func.call":
        callee = operation.attributes["callee"].value
        name = re.sub(r"_\d+$", "", callee)
        if name not in DECOMPOSITIONS:
            yield from walk(functions[callee], functions, loops)
            return
    if name == "custom_call":
        name = "@" + operation.attributes["call_target_name"].value
    precision = ""
    if name == "dot_general" and "precision_config" in operation.attributes:
        precision = str(operation.attributes["precision_config"])
    if name in ("dot_general", *DECOMPOSITIONS) or name.startswith("@"):
        yield Operation(name, loops, shapes, precision)
    yield from walk(operation, functions, loops + (name == "while"))


platforms = pytest.mark.parametrize("platform", ["tpu", "cuda"])


@platforms
@pytest.mark.parametrize("case", SOLVES)
def test_solve_decomposes_only_small_matrices_in_loops(case, platform):
    found = exported(case, platform)
    inside = [one for one in found.decompositions if one.loops]
    # The basis of a Krylov space: twice the rank and two more vectors, in four blocks.
    assert max(one.size for one in inside) == spectral.BLOCKS * 6
    # Within that over the stages there are the descent, and the norm's Krylov spaces.
    further = [one for one in inside if one.loops > 1]
    assert max(one.size for one in further) == spectral.BLOCKS * 4
    assert {one.size for one in further if one.name in ("svd", "cholesky")} <= {1, 2, 4}


@platforms
@pytest.mark.parametrize("case", SOLVES)
def test_solve_fully_decomposes_only_weights(case, platform):
    found = exported(case, platform)
    assert found.full(loops=True) == []
    weights = [("eigh", (M, M)), ("eigh", (N, N))] if "weighted" in case else []
    assert sorted(found.full(loops=False)) == weights


@platforms
@pytest.mark.parametrize("case", POOLS)
def test_pool_programs_decompose_only_small_matrices_in_loops(case, platform):
    found = exported(case, platform)
    inside = [one for one in found.decompositions if one.loops]
    # At high rank there are the norm's Krylov spaces alone, and none in the descent.
    width = 4 if "high" in case else 6
    sizes = [one.size for one in inside]
    assert max(sizes, default=0) <= spectral.BLOCKS * width
    assert bool(sizes) == (case != "work at high rank")


@platforms
def test_the_descent_at_high_rank_decomposes_nothing(platform):
    assert exported("work at high rank", platform).decompositions == []


@platforms
@pytest.mark.parametrize("case", POOLS)
def test_pool_programs_fully_decompose_only_for_proofs_and_starts(case, platform):
    found = exported(case, platform)
    gram = "eigh", (LANES, M, M)
    wanted = {
        # The error, and the candidate for the dual: see `certify_stage`.
        "finish": [gram, gram],
        "finish at high rank": [gram, gram],
        # The start, rearranged, which is as large; singular values where its Gram
        # matrix leaves doubt. At low rank there is a Krylov space for it.
        "start at high rank": [gram, ("svd", (LANES, N, M))],
    }
    assert found.full(loops=True) == []
    assert sorted(found.full(loops=False)) == wanted.get(case, [])
    # Else there are two bases at once, or that of a Krylov space with its four more.
    rank = HIGH.rank if "high" in case else ONE.rank
    rest = [one.size for one in found.decompositions if not one.loops and one.size < M]
    assert max(rest, default=0) <= max(2 * rank, rank + 4)


@platforms
def test_small_matrices_are_decomposed_once_a_stage_and_not_in_the_descent(platform):
    found = exported("small", platform)
    large = [one for one in found.decompositions if one.size > 4]
    # The start, rearranged, and what estimates the norm: before, in each stage, after.
    assert sorted({(one.name, one.loops, one.shapes[0]) for one in large}) == [
        ("eigh", 0, (9, 9)),
        ("eigvalsh", 0, (12, 12)),
        ("eigvalsh", 1, (12, 12)),
        # Where its Gram matrix leaves doubt, which is asked when it runs.
        ("svd", 0, (24, 9)),
    ]
    assert max(one.loops for one in found.decompositions) == 2


@platforms
@pytest.mark.parametrize("case", BOUNDS)
def test_bounds_of_norms_decompose_nothing_in_full(case, platform):
    found = exported(case, platform)
    sizes = {one.size for one in found.decompositions}
    # Three blocks of vectors; or the tridiagonal matrix of 64 steps, once at the end.
    assert sizes <= ({3, 16, 48} if "certain" in case else {64})
    inside = {one.size for one in found.decompositions if one.loops}
    assert inside == ({48} if "certain" in case else set())


@platforms
@pytest.mark.parametrize("case", CERTIFICATES)
def test_certificates_decompose_what_their_docstring_says(case, platform):
    found = exported(case, platform)
    # Of all candidates for the dual, a handful, before the multipliers and after; and
    # in the iteration for these the cluster, here all singular values. In haste there
    # is one candidate, by Gram matrices, and no multipliers.
    is_hasty = "haste" in case
    candidates = [] if is_hasty else [("eigh", (M, M)), *[("svd", SHAPE)] * 2]
    assert sorted(found.full(loops=True)) == candidates
    singular = [one for one in found.decompositions if one.name == "svd"]
    assert not (is_hasty and singular)
    assert not any(one.loops > 1 for one in found.decompositions if one.name == "svd")


@platforms
@pytest.mark.parametrize("case", CASES)
def test_all_products_ask_for_the_highest_precision(case, platform):
    products = exported(case, platform).products
    assert products
    assert {one.precision for one in products} == {HIGHEST}


@platforms
@pytest.mark.parametrize("case", SOLVES)
def test_powers_are_taken_by_squarings_in_the_innermost_loop(case, platform):
    square = (M, M)
    squarings = {
        one.loops
        for one in exported(case, platform).products
        if [shape[-2:] for shape in one.shapes] == [square, square]
    }
    # Once a stage begins, and once in every iteration.
    assert {2, 3} <= squarings


@platforms
@pytest.mark.parametrize("case", CASES)
def test_nothing_leaves_the_device(case, platform):
    assert exported(case, platform).calls == set()


@platforms
@pytest.mark.parametrize("case", CASES)
def test_float32_programs_contain_no_float64(case, platform):
    assert exported(case, platform).doubles == frozenset()


@platforms
@pytest.mark.parametrize("case", ["weighted batch of two", "certificate", *BOUNDS])
def test_with_x64_on_float32_has_constants_of_float64_only(case, platform):
    # Numbers, one for each matrix of a batch at most; jax's SVD on TPUs has a table.
    constants = {"tensor<f64>", "tensor<3xf64>", "tensor<2x3xf64>"}
    doubles = exported(case, platform, x64=True).doubles
    assert doubles <= (set() if case in BOUNDS else constants)
