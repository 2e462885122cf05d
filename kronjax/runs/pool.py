"""Many continuations side by side, each matrix at its own stage, in slices of work.

Every device has slots, each with the path of one matrix, and lanes that compute. One
call gives every device slots that are at the same stage, so that all lanes spend the
same products on a trial point, and a number of trial points: a *slice*. Slots whose
stage has ended turn to the next one together; slots whose last stage has ended are
emptied together, and new matrices fill them. Slow matrices do not delay the others,
except at the end of a run, where they do not fill the lanes.

Lanes are independent. The result for a matrix depends neither on its slot, its device,
the other matrices in the call, nor on how the work is cut: only on the number of
lanes, which decides how products are computed, and perhaps on whether there is a single
slot. Devices do not communicate.

>>> from kronjax.kronecker import Configuration
>>> from kronjax.solver.problem import Problem
>>> problem = Problem.of((4, 6), Configuration((2, 3), 1), num_starts=1)
>>> pool = Pool(Kind(problem, np.dtype(np.float32)), lanes=2, slots=4)
>>> matrices = [Matrix(f"no. {i}", np.eye(4, 6, i, np.float32)) for i in range(3)]
>>> sorted(found.key for found in pool.solve(iter(matrices)))
['no. 0', 'no. 1', 'no. 2']
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from kronjax import cpu_threads
from kronjax.kronecker import KroneckerTerms
from kronjax.linalg import schatten
from kronjax.runs import pool_programs as programs
from kronjax.runs.pool_programs import Kind
from kronjax.solver.descent import Status
from kronjax.solver.solution import Trace, gather

SLICE = 24
"""Products of the size of `EᵀE` that a lane spends in one call, about."""

OPERATIONS = 10**9
"""Multiplications and additions of a slice, at least, in pools that prove nothing: few
matrices are solved there, and a call should take longer than its overhead."""

Tick = Callable[[int, int], None]
"""Called with the products spent since the last call, and the stages that ended."""


class Matrix(NamedTuple):
    """A matrix to be solved.

    Attributes:
        key: Any name.
        matrix: `[m, n]`.
        seed: Seed of the perturbed starts.
        left: Weight of the rows, `[m, m]`, or None.
        right: Weight of the columns, `[n, n]`, or None.
    """

    key: Hashable
    matrix: np.ndarray
    seed: int = 0
    left: np.ndarray | None = None
    right: np.ndarray | None = None

    @property
    def arrays(self) -> tuple[np.ndarray | None, ...]:
        """The matrix and its weights."""
        return self.matrix, self.left, self.right


@dataclasses.dataclass(frozen=True)
class Finished:
    """The solution for one matrix.

    Attributes:
        key: The key of the matrix.
        terms: One `KroneckerTerms` for each configuration, NumPy.
        spectral_error: `‖L^{1/2} (T − K) R^{1/2}‖_2`, rounding included: the error is
            not above this. None where nothing is proven.
        local_bound: No change of all `A_k`, or of all `B_k`, reaches less: see
            `bounds.certify_stage`. None where nothing is proven.
        status: `Status` of the last stage.
        trace: `Trace` of the winning start, `[stages]`, NumPy; it begins at p = 2.
        frobenius: The terms at p = 2, or None if the pool does not return them.
    """

    key: Hashable
    terms: tuple[KroneckerTerms, ...] = dataclasses.field(repr=False)
    spectral_error: float | None
    local_bound: float | None
    status: Status
    trace: Trace = dataclasses.field(repr=False)
    frobenius: tuple[KroneckerTerms, ...] | None = dataclasses.field(repr=False)

    @property
    def steps(self) -> int:
        """Accepted steps."""
        return int(self.trace.steps.sum())

    @property
    def products(self) -> int:
        """Products of the size of `EᵀE`, those of all starts included."""
        return int(self.trace.products.sum())

    @property
    def local_gap(self) -> float:
        """The largest part of the error by which such a change can lower it."""
        assert self.spectral_error is not None and self.local_bound is not None
        if not self.spectral_error > 0:
            return self.spectral_error  # zero, or NaN
        return 1 - self.local_bound / self.spectral_error


@dataclasses.dataclass
class _Slot:
    """A matrix that is being solved, its stage, and the lines of its trace."""

    given: Matrix
    stage: int = 0
    ends: bool = False
    lines: list[Trace] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Host:
    """The slots of one device: free, at work, or done."""

    free: list[int]
    held: dict[int, _Slot] = dataclasses.field(default_factory=dict)
    done: dict[int, _Slot] = dataclasses.field(default_factory=dict)

    def chosen(self, lanes: int, ends: bool) -> list[int]:
        """Return the slots for the next call: at one stage, and ending it or not."""
        stages: dict[int, list[int]] = {}
        for slot, one in self.held.items():
            if one.ends == ends:
                stages.setdefault(one.stage, []).append(slot)
        if not stages:
            return []
        # Full lanes first, and of those the latest stage. Where no lanes are full the
        # earliest stage goes first, so that its slots join others from then on.
        full = [i for i, slots in stages.items() if len(slots) >= lanes]
        return stages[max(full) if full else min(stages)][:lanes]


class Pool:
    """Slots for matrices of one problem, on some devices.

    Attributes:
        kind: The problem and precision that all matrices share.
        lanes: Matrices of a device in one call.
        slots: Matrices of a device in all, at least as many.
        mesh: The devices.
        memory: Bytes that a call takes on every device, as compiled.
    """

    def __init__(
        self,
        kind: Kind,
        *,
        lanes: int,
        slots: int,
        devices: list[Any] | None = None,
        tolerance: float = 2e-4,
    ) -> None:
        """Compile the programs, and allocate the slots.

        Args:
            kind: The problem and precision (float64 only if jax computes in that).
            lanes: Matrices of a device in one call.
            slots: Matrices of a device in all.
            devices: To use; by default all of this process.
            tolerance: As for `continuation.solve`.

        Raises:
            ValueError: If simulated devices have too few threads.
        """
        self.kind, self.lanes, self.slots = kind, lanes, max(slots, lanes)
        problem, dtype = kind.problem, kind.dtype
        devices = jax.local_devices() if devices is None else devices
        _check_threads(devices)
        self.mesh = programs.mesh_of(devices)
        self._count = len(devices)
        self._tolerance = np.asarray(tolerance, dtype)
        self._stages = programs.stages(problem)
        products = SLICE
        if not kind.proves:
            m, n = problem.shape
            products = max(SLICE, OPERATIONS // (2 * m * n * min(m, n) * lanes))
        self._trials = [
            max(products // int(schatten.num_products(stage.squarings)), 2)
            for stage in self._stages
        ]
        self._programs = programs.compiled(
            kind.compiled, self.mesh, self.lanes, self.slots
        )
        self.memory = max(map(programs.peak, self._programs.values()))
        self._held = self._programs["empty"]()

    def solve(
        self,
        matrices: Iterator[Matrix],
        tick: Tick = lambda products, turned: None,
    ) -> Iterator[Finished]:
        """Solve matrices as they come, and yield them as they are done.

        Args:
            matrices: Taken whenever there is room, and read only then.
            tick: Called after every slice with the products spent in it, and the
                number of matrices that have ended a stage.
        """
        hosts = [_Host(list(range(self.slots))) for _ in range(self._count)]
        more = True
        while more or any(host.held or host.done for host in hosts):
            if more and max(len(host.free) for host in hosts) >= self.lanes:
                more = self._fill(matrices, hosts)
            turning, working = (
                [host.chosen(self.lanes, ends) for host in hosts]
                for ends in (True, False)
            )
            if self._comes_first(hosts, turning, working):
                self._turn(hosts, turning)
                tick(0, sum(map(len, turning)))
            elif any(working):
                tick(self._work(hosts, working), 0)
            done = max(len(host.done) for host in hosts)
            if done >= self.lanes or (done and not any(x.held for x in hosts)):
                yield from self._take(hosts)

    def _comes_first(self, hosts, turning, working):
        """Return whether slots whose stages have ended turn before more work is done.

        Full lanes come first, then the earlier stage: slots that have ended a stage
        wait there for the others.
        """
        full = [max(map(len, one)) >= self.lanes for one in (turning, working)]
        if full[0] or not any(working):
            return any(turning)
        if full[1] or not any(turning):
            return False
        ended, behind = (
            min(
                host.held[slots[0]].stage
                for host, slots in zip(hosts, chosen, strict=True)
                if slots
            )
            for chosen in (turning, working)
        )
        return ended < behind

    def _fill(self, matrices, hosts):
        """Start new matrices in all lanes; return whether more may come."""
        chosen, new, given = [[] for _ in hosts], {}, None
        for lane, device in itertools.product(range(self.lanes), range(self._count)):
            host = hosts[device]
            if not host.free:
                continue
            given = next(matrices, None)
            if given is None:
                break
            slot, one = host.free.pop(), _Slot(Matrix(*given))
            (host.held if self._stages else host.done)[slot] = one
            chosen[device].append(slot)
            new[device, lane] = one
        if new:
            first = None
            if self._stages:
                first = self._stacked([0] * self._count)
            lines = self._run("start", self._places(chosen), self._matrices(new), first)
            for at, one in new.items():
                one.lines.append(jax.tree.map(lambda x, at=at: x[at], lines))
        return given is not None

    def _work(self, hosts, working):
        """Spend one slice on some slots of every device; return its products."""
        stages = self._stages_of(hosts, working)
        trials = np.array([self._trials[i] for i in stages], np.int32)
        ended, spent = self._run(
            "work", self._places(working), self._stacked(stages), trials
        )
        total = 0
        for at, _, one in self._concerned(hosts, working):
            one.ends = bool(ended[at])
            total += int(spent[at])
        return total

    def _turn(self, hosts, turning):
        """Turn some slots of every device, whose stages have ended, to the next."""
        stages = self._stages_of(hosts, turning)
        last = len(self._stages) - 1
        following = [min(i + 1, last) for i in stages]
        concerned = self._concerned(hosts, turning)
        done, lines = self._run(
            "turn",
            self._places(turning),
            self._seeds({at: one for at, _, one in concerned}),
            self._stacked(stages),
            self._stacked(following),
            np.array([i == last for i in stages]),
        )
        for at, slot, one in concerned:
            one.lines.append(jax.tree.map(lambda x, at=at: x[at], lines))
            one.stage, one.ends = one.stage + 1, False
            if done[at]:
                host = hosts[at[0]]
                host.done[slot] = host.held.pop(slot)

    def _take(self, hosts):
        """Yield finished matrices, and free their slots."""
        chosen = [list(host.done)[: self.lanes] for host in hosts]
        taken = {
            (device, lane): host.done.pop(slot)
            for device, (host, slots) in enumerate(zip(hosts, chosen, strict=True))
            for lane, slot in enumerate(slots)
        }
        last = np.full((self._count, self.lanes), -1, np.int32)
        for at, one in taken.items():
            if one.stage:
                last[at] = self._stages[one.stage - 1].squarings
        results = self._run("finish", self._places(chosen), self._matrices(taken), last)
        for at, one in taken.items():
            hosts[at[0]].free.append(chosen[at[0]][at[1]])
            terms, bounds, status, winner, frobenius = jax.tree.map(
                lambda x, at=at: np.array(x[at]), results
            )
            yield Finished(
                key=one.given.key,
                terms=terms,
                spectral_error=bounds and float(bounds.error),
                local_bound=bounds and float(bounds.local_bound),
                status=Status(int(status)),
                trace=self._trace(one.lines, int(winner)),
                frobenius=frobenius,
            )

    def _trace(self, lines, winner) -> Trace:
        """Return the trace of the winning start."""
        first, *rest = lines
        stacked = jax.tree.map(lambda *x: np.stack(x), *(rest or [first]))
        return gather(self.kind.problem, winner, first, stacked)

    def _places(self, chosen):
        """Return the slots `[devices, lanes]`; idle lanes get the last slot."""
        places = np.full((self._count, self.lanes), self.slots, np.int32)
        for device, slots in enumerate(chosen):
            places[device, : len(slots)] = slots
        return places

    def _matrices(self, some):
        """Return matrices and weights by device and lane; zeros in idle lanes."""
        arrays = jax.tree.map(
            lambda x: np.zeros((self._count, self.lanes, *x.shape), x.dtype),
            self.kind.arrays,
        )
        for at, one in some.items():
            for array, given in zip(arrays, one.given.arrays, strict=True):
                if array is not None:
                    array[at] = given
        return arrays

    def _seeds(self, some):
        """Return the seeds by device and lane; zeros in idle lanes."""
        seeds = np.zeros((self._count, self.lanes), np.int32)
        for at, one in some.items():
            seeds[at] = one.given.seed % 2**31
        return seeds

    def _concerned(self, hosts, chosen):
        """Return device and lane, slot, and matrix for every lane of a call."""
        return [
            ((device, lane), slot, host.held[slot])
            for device, (host, slots) in enumerate(zip(hosts, chosen, strict=True))
            for lane, slot in enumerate(slots)
        ]

    def _stages_of(self, hosts, chosen):
        """Return the stage of the chosen slots of every device."""
        return [
            host.held[slots[0]].stage if slots else 0
            for host, slots in zip(hosts, chosen, strict=True)
        ]

    def _stacked(self, stages):
        """Return stages by their numbers, stacked."""
        return jax.tree.map(lambda *x: np.array(x), *(self._stages[i] for i in stages))

    def _run(self, name, *arguments):
        """Call a program, keep the paths, and return its results as NumPy arrays."""

        def get(x):
            x = np.asarray(x)
            return x.reshape(self._count, self.lanes, *x.shape[1:])

        # As NumPy: transferred one by one they would take as long as a trial point.
        given = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]) if x.ndim > 1 else x, arguments
        )
        self._held, told = self._programs[name](self._held, self._tolerance, *given)
        return jax.tree.map(get, jax.device_get(told))


def _check_threads(devices) -> None:
    """Refuse simulated devices that would wait for each other's threads for ever.

    It happened with eight devices and two threads: see `cpu_threads`.
    """
    wanted = cpu_threads.EACH * len(devices)
    if (
        devices[0].platform == "cpu"
        and len(devices) > 1
        and cpu_threads.count() < wanted
    ):
        raise ValueError(
            f"{len(devices)} simulated devices share {cpu_threads.count()} threads, "
            "and could wait for each other for ever: set "
            f"{cpu_threads.VARIABLE}={wanted} before Python starts"
        )
