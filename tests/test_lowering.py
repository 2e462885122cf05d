"""Tests of the programs for TPUs and GPUs, exported as StableHLO on any machine.

Decompositions are those of jax, which implements them differently on every platform, on
a TPU as loops. The loops that are counted here are those of kronjax.
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
from kronjax.runs.pool_programs import Kind
from kronjax.solver import continuation
from kronjax.solver.problem import Problem

SHAPE = (96, 144)
ONE = Configuration((8, 12), 2)
TWO = (ONE, Configuration((96, 1), 1))
# With nearly half the parameters the unknowns are factors.
HIGH = Configuration((8, 12), 28)
# Number of matrices in a call of a pool.
LANES = 3

HIGHEST = "[{0}, {0}]".format("#stablehlo<precision HIGHEST>")
DECOMPOSITIONS = {"svd", "eigh", "eigvalsh", "qr", "cholesky", "inv"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """A product, a decomposition or an external call, and its number of loops."""

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
    """The operations of an exported program, and its types of float64."""

    operations: tuple[Operation, ...]
    doubles: frozenset[str]

    @property
    def products(self):
        return [x for x in self.operations if x.name == "dot_general"]

    @property
    def decompositions(self):
        return [x for x in self.operations if x.name in DECOMPOSITIONS]

    def full(self, loops):
        """The decompositions of matrices as large as the problem, by name and shape."""
        return [
            (x.name, x.shapes[0])
            for x in self.decompositions
            if x.size >= min(SHAPE) and bool(x.loops) == loops
        ]

    @property
    def calls(self):
        return {x.name for x in self.operations if x.name.startswith("@")}


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


def pooled(function, *given, configuration=ONE, **facts):
    """Return the function and the arguments of a pool's program on one device."""
    problem = Problem.of(SHAPE, configuration, num_starts=2)
    assert problem.is_factored == (configuration == HIGH)
    kind = Kind(problem, np.dtype(np.float32), **facts)
    stage = jax.tree.map(
        lambda x: array((1,), bool if isinstance(x, bool) else int),
        problem.schedule()[0],
    )
    known = {
        "seeds": array((LANES,), int),
        "stage": stage,
        "trials": array((1,), int),
        "matrices": jax.tree.map(lambda x: array((LANES, *x.shape)), kind.arrays),
        "last": array((LANES,), int),
        "ends": array((1,), bool),
    }
    held = jax.tree.map(lambda x: array((2 * LANES, *x.shape), x.dtype), kind.shapes)
    order, tolerance = array((LANES,), int), array(())
    given = (held, tolerance, order, *(known[name] for name in given))
    return functools.partial(function, kind), given


def array(shape, dtype=float):
    """Return the shape of an argument, whose numbers have 32 bits."""
    short = {"i": jnp.int32, "f": jnp.float32}.get(np.dtype(dtype).kind, dtype)
    return jax.ShapeDtypeStruct(shape, short)


M, N = SHAPE
BOTH = (M, M), (N, N)
TERMS = (2, 8, 12), (2, 12, 12)
# Functions to export, and the shapes of their arguments.
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
    "certificate of a stage": (certify_stage, (SHAPE, *TERMS)),
}
PROGRAMS = {
    "work": (pool_programs._work, "stage", "trials"),
    "turn": (pool_programs._turn, "seeds", "stage", "stage", "ends"),
    "start": (pool_programs._start, "matrices", "stage"),
    "finish": (pool_programs._finish, "matrices", "last"),
}
# The pools of runs with proofs, at low and at high rank, and those of `approximate`.
POOLS = {
    f"{name}{ending}": pooled(*given, **facts)
    for name, given in PROGRAMS.items()
    for ending, facts in {
        "": {},
        " at high rank": {"configuration": HIGH},
        " without proofs": {"proves": False, "traces": True},
        " with weights": {"proves": False, "weighted": (True, True)},
    }.items()
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
        functions = {x.attributes["sym_name"].value: x for x in module.body.operations}
        operations = tuple(walk(functions["main"], functions))
    return Program(operations, frozenset(re.findall(r"tensor<[^>]*f64>", text)))


def walk(operation, functions, loops=0):
    """Yield products, decompositions and external calls, also in called functions."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield from visit(inner.operation, functions, loops)


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
    program = exported(case, platform)
    inside = [x for x in program.decompositions if x.loops]
    # The basis of a Krylov space: twice the rank and two more vectors, in four blocks.
    assert max(x.size for x in inside) == spectral.BLOCKS * 6
    # Inside the loop over stages there are the descent and the norm's Krylov spaces.
    further = [x for x in inside if x.loops > 1]
    assert max(x.size for x in further) == spectral.BLOCKS * 4
    assert {x.size for x in further if x.name in ("svd", "cholesky")} <= {1, 2, 4}


@platforms
@pytest.mark.parametrize("case", SOLVES)
def test_solve_fully_decomposes_only_weights(case, platform):
    program = exported(case, platform)
    assert program.full(loops=True) == []
    weights = [("eigh", (M, M)), ("eigh", (N, N))] if "weighted" in case else []
    assert sorted(program.full(loops=False)) == weights


@platforms
@pytest.mark.parametrize("case", POOLS)
def test_pool_programs_decompose_only_small_matrices_in_loops(case, platform):
    program = exported(case, platform)
    # At high rank there are only the norm's Krylov spaces, and none in the descent.
    width = 4 if "high" in case else 6
    sizes = [x.size for x in program.decompositions if x.loops]
    assert max(sizes, default=0) <= spectral.BLOCKS * width
    assert bool(sizes) == (case != "work at high rank")


@platforms
def test_the_descent_at_high_rank_decomposes_nothing(platform):
    assert exported("work at high rank", platform).decompositions == []


@platforms
@pytest.mark.parametrize("case", POOLS)
def test_pool_programs_fully_decompose_in_proofs_starts_and_weights(case, platform):
    program = exported(case, platform)
    gram = "eigh", (LANES, M, M)
    wanted = {
        # The error and the candidate for the dual: see `certify_stage`.
        "finish": [gram, gram],
        "finish at high rank": [gram, gram],
        # The rearranged matrix at the start, which is as large; singular values where
        # the Gram matrix is not precise enough. At low rank a Krylov space replaces
        # both.
        "start at high rank": [gram, ("svd", (LANES, N, M))],
        # The roots of both weights.
        "start with weights": [gram, ("eigh", (LANES, N, N))],
    }
    assert program.full(loops=True) == []
    assert sorted(program.full(loops=False)) == wanted.get(case, [])
    # The others are of two bases at once, or of a Krylov space with four more vectors.
    rank = HIGH.rank if "high" in case else ONE.rank
    rest = [x.size for x in program.decompositions if not x.loops and x.size < M]
    assert max(rest, default=0) <= max(2 * rank, rank + 4)


@platforms
def test_small_matrices_are_decomposed_once_a_stage_and_not_in_the_descent(platform):
    program = exported("small", platform)
    large = [x for x in program.decompositions if x.size > 4]
    # The rearranged matrix at the start, and estimates of the norm before, in and after
    # the stages.
    assert sorted({(x.name, x.loops, x.shapes[0]) for x in large}) == [
        ("eigh", 0, (9, 9)),
        ("eigvalsh", 0, (12, 12)),
        ("eigvalsh", 1, (12, 12)),
        # Runs only where the Gram matrix is not precise enough.
        ("svd", 0, (24, 9)),
    ]
    assert max(x.loops for x in program.decompositions) == 2


@platforms
@pytest.mark.parametrize("case", BOUNDS)
def test_bounds_of_norms_decompose_only_small_matrices(case, platform):
    program = exported(case, platform)
    sizes = {x.size for x in program.decompositions}
    # Three blocks of vectors, or once at the end the tridiagonal matrix of 64 steps.
    assert sizes <= ({3, 16, 48} if "certain" in case else {64})
    inside = {x.size for x in program.decompositions if x.loops}
    assert inside == ({48} if "certain" in case else set())


@platforms
@pytest.mark.parametrize("case", CERTIFICATES)
def test_certificates_decompose_what_their_docstring_says(case, platform):
    program = exported(case, platform)
    # The loop over the few candidates for the dual, before and after the multipliers,
    # and in the iteration for these the cluster, here all singular values. The
    # certificate of a stage has one candidate, by Gram matrices, and no multipliers.
    is_short = "stage" in case
    candidates = [] if is_short else [("eigh", (M, M)), *[("svd", SHAPE)] * 2]
    assert sorted(program.full(loops=True)) == candidates
    singular = [x for x in program.decompositions if x.name == "svd"]
    assert not (is_short and singular)
    assert not any(x.loops > 1 for x in singular)


@platforms
@pytest.mark.parametrize("case", CASES)
def test_all_products_ask_for_the_highest_precision(case, platform):
    products = exported(case, platform).products
    assert products
    assert {x.precision for x in products} == {HIGHEST}


@platforms
@pytest.mark.parametrize("case", SOLVES)
def test_powers_are_taken_by_squarings_in_the_innermost_loop(case, platform):
    square = (M, M)
    squarings = {
        x.loops
        for x in exported(case, platform).products
        if [shape[-2:] for shape in x.shapes] == [square, square]
    }
    # In every trial; the first trial of a stage is its beginning.
    assert squarings == {3}


@platforms
@pytest.mark.parametrize("case", CASES)
def test_programs_make_no_external_calls(case, platform):
    assert exported(case, platform).calls == set()


@platforms
@pytest.mark.parametrize("case", CASES)
def test_float32_programs_contain_no_float64(case, platform):
    assert exported(case, platform).doubles == frozenset()


@platforms
@pytest.mark.parametrize("case", ["weighted batch of two", "certificate", *BOUNDS])
def test_with_x64_on_float32_has_constants_of_float64_only(case, platform):
    # At most one number for each matrix of a batch; jax's SVD on TPUs has a table.
    constants = {"tensor<f64>", "tensor<3xf64>", "tensor<2x3xf64>"}
    doubles = exported(case, platform, x64=True).doubles
    assert doubles <= (set() if case in BOUNDS else constants)
