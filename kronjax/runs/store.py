"""The stored results of a plan: factors and a record for each matrix.

    plan.json                     the plan; written first
    matrices/00007.safetensors    the factors
    matrices/00007.json           the record: errors, bounds, effort; written last

A task is finished if it has a record of this plan, sealed by a digest of its own and
with the digest of the factors as they are stored. Anything else counts as absent:
truncated files, damaged ones, those of another plan. Only a record of a later version
is refused.

>>> file_names(7)
('matrices/00007.safetensors', 'matrices/00007.json')
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from kronjax.io import matrices
from kronjax.io.json_values import jsonable, parse_json
from kronjax.io.storage import Storage
from kronjax.runs.plan import MatrixTask, RunPlan, differences

FORMAT = 2
"""Version of records; a reader refuses later ones."""

PLAN = "plan.json"
MATRICES = "matrices"

SOLVED, FAILED = "solved", "failed"
"""Values of `status` in a record: the matrix has factors, or stays dense."""


class Store:
    """The results of one plan at a place.

    Attributes:
        place: Storage location.
        plan: The plan whose results are stored.
    """

    def __init__(self, place: Storage, plan: RunPlan) -> None:
        """Keep both; nothing is read yet."""
        self.place, self.plan = place, plan

    def agree(self, lanes: Mapping[str, int] | None = None) -> None:
        """Write the plan, or find that it is stored already, and take over its lanes.

        Args:
            lanes: Lanes of groups, added where the stored plan has none.

        Raises:
            ValueError: If the place belongs to another plan; names the differences.
        """
        content = self.place.read(PLAN)
        held = None
        if content is not None:
            held = RunPlan.of_json(content, f"{self.place}/{PLAN}")
            if held.hash != self.plan.hash:
                lines = "; ".join(differences(held, self.plan)) or "their order"
                raise ValueError(
                    f"{self.place} holds results of another plan ({lines}): give --out "
                    "another folder, or --force to start anew"
                )
        known = {**(lanes or {}), **(held.lanes if held else {})}
        if held is None or known != dict(held.lanes):
            plan = dataclasses.replace(self.plan, lanes=known)
            self.place.write(PLAN, plan.to_json())
        self.plan = dataclasses.replace(self.plan, lanes=known)

    def remember(self, key: str, lanes: int) -> None:
        """Store a new number of lanes for a group."""
        known = {**self.plan.lanes, key: lanes}
        self.plan = dataclasses.replace(self.plan, lanes=known)
        self.place.write(PLAN, self.plan.to_json())

    def clear(self) -> None:
        """Remove the plan, and then all of its results."""
        self.place.remove(PLAN)
        for name in self.place.names(MATRICES):
            if re.fullmatch(r"\.?\d{5,}\.(json|safetensors)(\..*\.tmp)?", name):
                self.place.remove(f"{MATRICES}/{name}")

    def sweep(self, owned: Sequence[MatrixTask]) -> None:
        """Remove temporary files that interrupted writes of these tasks left behind."""
        mine = {task.index for task in owned}
        for name in self.place.names(MATRICES):
            match = re.fullmatch(r"\.(\d{5,})\.\w+\..*\.tmp", name)
            if match and int(match[1]) in mine:
                self.place.remove(f"{MATRICES}/{name}")

    def put(
        self,
        task: MatrixTask,
        factors: Mapping[str, np.ndarray],
        facts: Mapping[str, Any],
    ) -> None:
        """Store the result for one matrix: factors first, then the record.

        Args:
            task: The task, from the plan.
            factors: Arrays by name; none where the method failed.
            facts: For the record, with a `status`; numbers that are not finite become
                null.

        Raises:
            OSError: If it cannot be written.
        """
        name, record = file_names(task.index)
        entry: dict[str, Any] = {
            "format": FORMAT,
            "plan": self.plan.hash,
            "index": task.index,
            "name": task.name,
            **facts,
        }
        if factors:
            arrays = {key: np.array(x, order="C") for key, x in factors.items()}
            # A single entry: several would come in any order.
            format_ = {"format": matrices.FORMAT} if task.configurations else None
            content = safetensors.numpy.save(arrays, format_)
            self.place.write(name, content)
            entry["digest"] = hashlib.sha256(content).hexdigest()
        entry = jsonable(entry)
        text = json.dumps({**entry, "seal": _seal(entry)}, indent=1, allow_nan=False)
        self.place.write(record, text.encode() + b"\n")

    def records(self, tasks: Sequence[MatrixTask]) -> dict[int, dict[str, Any]]:
        """Return the records of those tasks that are finished, by index.

        Raises:
            ValueError: If a record is of a later version.
            OSError: If something cannot be read.
        """
        there = set(self.place.names(MATRICES))
        records = {}
        for task in tasks:
            factors, record = file_names(task.index)
            if record.rpartition("/")[2] not in there:
                continue
            facts = self._read(record)
            if facts is None or facts.get("name") != task.name:
                continue
            if facts["status"] == SOLVED:
                content = self.place.read(factors) or b""
                if hashlib.sha256(content).hexdigest() != facts.get("digest"):
                    continue
            records[task.index] = facts
        return records

    def factors(self, task: MatrixTask) -> dict[str, np.ndarray]:
        """Return the arrays of a finished matrix by name.

        Raises:
            ValueError: If the file is damaged.
        """
        name, _ = file_names(task.index)
        try:
            return matrices.load(self.place.read(name) or b"")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self.place}/{name} is damaged: {error}") from error

    def _read(self, name: str) -> dict[str, Any] | None:
        """Return a record of this plan, or None if the file is no such record."""
        try:
            facts = parse_json(self.place.read(name) or b"")
            version = facts["format"]
            later = version > FORMAT
        except (ValueError, KeyError, TypeError):
            return None
        if later:
            raise ValueError(
                f"{self.place}/{name} is of format {version}, and this kronjax reads "
                f"format {FORMAT}: update kronjax"
            )
        if facts.pop("seal", None) != _seal(facts) or facts["plan"] != self.plan.hash:
            return None
        return facts


def file_names(index: int) -> tuple[str, str]:
    """Return the names of factors and record of one matrix."""
    stem = f"{MATRICES}/{index:05d}"
    return f"{stem}.safetensors", f"{stem}.json"


def read_plan(place: Storage) -> RunPlan | None:
    """Return the plan that a place belongs to, or None.

    Raises:
        ValueError: If it is damaged, or of a later version.
    """
    content = place.read(PLAN)
    return None if content is None else RunPlan.of_json(content, f"{place}/{PLAN}")


def _seal(facts: Mapping[str, Any]) -> str:
    """Return the digest of a record, which reveals damage."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
