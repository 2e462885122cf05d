"""The training loop: steps, metrics, evaluations, checkpoints and resuming.

The loop never waits for a running step: its numbers are fetched after the next step has
been started. Checkpoints are written between steps, after the hook and the evaluation
that are due, so that a resumed run repeats neither.

>>> str(Stopped(15, 200))
'stopped by SIGTERM after step 200'
"""

import collections
import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kronjax.io.cache import digest
from kronjax.io.progress import bar
from kronjax.lm.models.base import LanguageModel
from kronjax.lm.text.blocks import Blocks
from kronjax.lm.training import nonfinite
from kronjax.lm.training import parameters as named
from kronjax.lm.training.history import HELD_OUT, History
from kronjax.lm.training.hooks import Hook
from kronjax.lm.training.parameters import Arrays
from kronjax.lm.training.settings import Settings
from kronjax.lm.training.snapshots import Snapshots
from kronjax.lm.training.step import (
    Carry,
    Task,
    advice,
    compile_evaluation,
    compile_step,
)
from kronjax.runs.processes import Hosts

STATE = ".training"
"""Name of the subfolder with checkpoints."""


class Stopped(Exception):
    """The run was stopped by a signal, and its state was saved.

    Attributes:
        signal: Number of the signal.
    """

    def __init__(self, number: int, step: int) -> None:
        """Store the signal and name the last step."""
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.signal = number


@dataclasses.dataclass
class Loop:
    """The loop of one run and its state.

    Attributes:
        task: The task, which determines the compiled programs.
        settings: Complete settings.
        training: The blocks to train on.
        tests: `[k, t + 1]`, the windows to evaluate on, or None.
        carry: The arrays that a step changes, placed on the devices.
        fixed: Arrays that are not trained.
        theirs: Arrays of the teacher.
        hook: A hook called between steps, or None.
        folder: Folder for metrics and checkpoints, or None.
        marks: Identity of the run; checkpoints with other marks are refused.
        limit: Peak number of tokens per second of the devices, or None if unknown.
        history: Metrics of the run.
        ended: Reason for the end of the run.
        compile_seconds: Seconds spent on tracing and compiling.
    """

    task: Task
    settings: Settings
    training: Blocks
    tests: np.ndarray | None
    carry: Carry
    fixed: Arrays
    theirs: Arrays
    hook: Hook | None = None
    folder: Path | None = None
    marks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    limit: float | None = None
    history: History = dataclasses.field(default_factory=History)
    ended: str = "all steps done"
    compile_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Initialise the private state."""
        self._snapshots: Snapshots | None = None
        self._best: tuple[Arrays, Arrays] | None = None
        self._pending: collections.deque = collections.deque()
        self._clock = 0.0
        self._evaluate: Any = None
        self._asked: jax.Array | None = None
        rows, length = self.settings.rows, self.settings.length or 1
        self._shape = (self.settings.accumulate, rows, length + 1)

    def go(self, progress: bool | None) -> None:
        """Run all remaining steps."""
        total = self.settings.steps
        assert total is not None
        first = self._resume() if self.folder is not None else 0
        if first == 0:
            self._change(0)
            self._test(0)
        if first >= total or self._is_patience_over():
            self._finish(first)
            return
        begun = time.perf_counter()
        step = compile_step(self.task, self.carry, self.fixed, self.theirs, self._shape)
        self.compile_seconds += time.perf_counter() - begun
        unit = self.settings.batch * self._shape[2] - self.settings.batch
        wanted = progress if jax.process_index() == 0 else False
        with (
            bar(total * unit, "training", wanted=wanted) as advance,
            _signals(self.folder is not None) as received,
        ):
            advance(first * unit)
            self._clock = time.perf_counter()
            done = first
            for done in range(first + 1, total + 1):
                with advice(self._shape):
                    windows = self.task.placement.deal(self._windows(done), 1)
                    self.carry, numbers = step(
                        self.carry, self.fixed, self.theirs, windows
                    )
                    self._pending.append((done, numbers))
                    self._fetch(leave=1)
                advance(unit)
                self._change(done)
                if done % self._every == 0 or done == total:
                    self._test(done)
                number = self._leaves(received)
                if number or done % self.settings.checkpoint_every == 0:
                    self._keep(done)
                if number:
                    raise Stopped(number, done)
                if self._is_patience_over():
                    break
        self._finish(done)

    def model(self) -> LanguageModel:
        """Return the model with the current parameters."""
        arrays = {**self.fixed, **self.carry.parameters}
        return named.put(self.task.form, self.task.placement.gather(arrays))

    def close(self) -> None:
        """Close all files."""
        self.history.close()
        if self._snapshots is not None:
            self._snapshots.close()

    def _leaves(self, received: list[int]) -> int:
        """Return the signal to stop for, or 0; the same in all processes.

        With several processes it is known one step after one of them received it.
        """
        if not self.task.placement.is_shared:
            return received[0] if received else 0
        asked, self._asked = self._asked, self.task.placement.any(bool(received))
        return signal.SIGTERM if asked is not None and asked.item() else 0

    @property
    def _every(self) -> int:
        return self.settings.evaluate_every or 1

    def _windows(self, step: int) -> np.ndarray:
        """Return the windows of a step, `[parts, b, t + 1]`."""
        count = self.settings.batch
        return self.training.take((step - 1) * count, count).reshape(self._shape)

    def _fetch(self, *, leave: int = 0) -> None:
        """Record the numbers of all pending steps but the last `leave`."""
        while len(self._pending) > leave:
            step, numbers = self._pending.popleft()
            values = {k: x.item() for k, x in jax.device_get(numbers).items()}
            if values.pop("failed"):
                raise ValueError(self._failure(step, values["loss"]))
            now = time.perf_counter()
            speed = self.settings.batch * (self._shape[2] - 1) / (now - self._clock)
            self._clock = now
            line = {"step": step, **values, "tokens_per_second": round(speed, 1)}
            if self.limit is not None:
                line["utilisation"] = round(speed / self.limit, 4)
            self.history.add(line)

    def _failure(self, step: int, loss: float) -> str:
        """Return where a step failed; the carry is that of the step before."""
        place = None
        for part in self._windows(step):
            parameters = self.carry.parameters
            windows = self.task.placement.deal(part, 0)
            where = (self.task, parameters, self.fixed, self.theirs, windows)
            place = place or nonfinite.locate(*where)
        kept = ""
        if self._snapshots is not None and self._snapshots.newest is not None:
            kept = f"; the checkpoint of step {self._snapshots.newest} is kept"
        return (
            f"the loss is {loss:.4g} at step {step}; the first number that is not "
            f"finite is {place}{kept}. Try a lower --rate"
        )

    def _change(self, step: int) -> None:
        """Apply the hook if it is due."""
        if self.hook is None or not self.hook.due(step):
            return
        self._fetch()
        model = self.model()
        self.hook(step, model)
        form, arrays = named.take(model)
        old = {**self.fixed, **self.carry.parameters}
        kinds = [
            {name: (x.shape, x.dtype) for name, x in held.items()}
            for held in (old, arrays)
        ]
        if kinds[0] != kinds[1] or form.parameters != self.task.form.parameters:
            raise ValueError(
                f"the hook {self.hook!r} changed more than numbers at step {step}: "
                "shapes and kinds of layers must stay; train in two stages instead"
            )
        put = self.task.placement.put
        self.fixed = put({name: arrays[name] for name in self.fixed})
        parameters = put({name: arrays[name] for name in self.carry.parameters})
        self.carry = dataclasses.replace(self.carry, parameters=parameters)
        self._clock = time.perf_counter()

    def _test(self, step: int) -> None:
        """Evaluate on the held-out windows."""
        if self.tests is None:
            return
        self._fetch()
        devices = self.task.placement.devices
        rows = min(self.settings.rows, -(-len(self.tests) // devices) * devices)
        if self._evaluate is None:
            begun = time.perf_counter()
            shape = rows, self._shape[2]
            parameters = self.carry.parameters
            self._evaluate = compile_evaluation(
                self.task, parameters, self.fixed, shape
            )
            self.compile_seconds += time.perf_counter() - begun
        total = 0.0
        for first in range(0, len(self.tests), rows):
            part = self.tests[first : first + rows]
            filled = np.resize(part, (rows, part.shape[1]))
            windows = self.task.placement.deal(filled, 0)
            sums = self._evaluate(self.carry.parameters, self.fixed, windows)
            total += float(np.sum(np.asarray(sums, np.float64)[: len(part)]))
        loss = total / (self.tests.size - len(self.tests))
        before = self.history.best()
        self.history.add({"step": step, HELD_OUT: loss})
        if self.settings.patience and (before is None or loss < before[HELD_OUT]):
            self._best = jax.tree.map(jnp.copy, (self.carry.parameters, self.fixed))
            self._keep(step, loss)
        self._clock = time.perf_counter()

    def _is_patience_over(self) -> bool:
        best, patience = self.history.best(), self.settings.patience
        if patience is None or best is None:
            return False
        since = sum(x["step"] > best["step"] for x in self.history.evaluations)
        return since >= patience

    def _finish(self, step: int) -> None:
        """Save the last state, and restore the best parameters with patience."""
        self._fetch()
        self._keep(step)
        best = self.history.best()
        if self._is_patience_over() and best is not None:
            self.ended = f"no lower loss since step {best['step']}"
        if self._best is not None:
            parameters, self.fixed = self._best
            self.carry = dataclasses.replace(self.carry, parameters=parameters)

    def _state(self) -> dict[str, Any]:
        """Return the arrays of a checkpoint."""
        moments = jax.tree.leaves(self.carry.moments)
        return {
            "arrays": {**self.fixed, **self.carry.parameters},
            "moments": {str(i): x for i, x in enumerate(moments)},
            "step": self.carry.step,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Restore the arrays of a checkpoint."""
        arrays = state["arrays"]
        self.fixed = {name: arrays[name] for name in self.fixed}
        leaves, tree = jax.tree.flatten(self.carry.moments)
        moments = [state["moments"][str(i)] for i in range(len(leaves))]
        self.carry = Carry(
            {name: arrays[name] for name in self.carry.parameters},
            tree.unflatten(moments),
            state["step"],
            self.carry.failed,
        )

    def _keep(self, step: int, loss: float | None = None) -> None:
        """Write a checkpoint."""
        if self._snapshots is None:
            return
        self._fetch()
        self.history.flush()
        facts = {
            "marks": self.marks,
            "hook": None if self.hook is None else self.hook.state(),
        }
        self._snapshots.save(step, self._state(), facts, loss)
        self._clock = time.perf_counter()

    def _resume(self) -> int:
        """Restore the newest checkpoint; return its step, or 0."""
        assert self.folder is not None
        self._snapshots = Snapshots(self.folder / STATE, keep=self.settings.keep)
        newest = self._snapshots.newest
        if self.task.placement.is_shared:
            what = "finds another checkpoint"
            Hosts.here().agree(digest(newest), what=what)
        writes = jax.process_index() == 0
        if newest is None:
            self.history = History(self.folder, writes=writes)
            return 0
        facts = self._snapshots.facts(newest)
        _compare(facts["marks"], self.marks, self.folder)
        self.history = History(self.folder, until=newest, writes=writes)
        best = self.history.best()
        if self.settings.patience and best is not None:
            self._restore(self._snapshots.state(best["step"], self._state()))
            self._best = self.carry.parameters, self.fixed
        self._restore(self._snapshots.state(newest, self._state()))
        if self._best is not None:
            self._best = jax.tree.map(jnp.copy, self._best)
        if self.hook is not None:
            self.hook.restore(facts["hook"])
        return newest


def _compare(theirs: Mapping[str, Any], ours: Mapping[str, Any], folder: Path) -> None:
    """Refuse the checkpoint of another run, and name the differences."""
    differences = []
    for name, (old, new) in {
        key: (theirs.get(key), value) for key, value in ours.items()
    }.items():
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences += [
                f"{key} was {old.get(key)!r} and is {value!r}"
                for key, value in new.items()
                if old.get(key) != value
            ]
        else:
            differences.append(f"the {name} differs")
    if differences:
        raise ValueError(
            f"{folder} holds the checkpoint of another run: {'; '.join(differences)}. "
            "Give another --out, or --force to start again"
        )


@contextlib.contextmanager
def _signals(wanted: bool) -> Iterator[list[int]]:
    """Yield a list that receives the first signal to stop; a second one interrupts."""
    received: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    numbers = signal.SIGTERM, signal.SIGINT
    old = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
