"""The results of a plan: factors and a record for each matrix, one by one.

    plan.json                     what is to be done; written first
    matrices/00007.safetensors    the factors
    matrices/00007.json           the record, written last: errors, bounds, effort

What has a record of this plan, sealed by a digest of its own and with that of the
factors as they are there, is finished. Whatever else is there counts as absent: cut
off, damaged, of another plan. Only a record of a later version is refused.

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
"""What became of a matrix: it has factors, or it stays dense."""


class Store:
    """What is kept of one plan at a place.

    Attributes:
        place: Where.
        plan: Of which.
    """

    def __init__(self, place: Storage, plan: RunPlan) -> None:
        """Look at nothing yet."""
        self.place, self.plan = place, plan

    def agree(self, lanes: Mapping[str, int] | None = None) -> None:
        """Write the plan, or find that it is there, and take its lanes over.

        Args:
            lanes: Of groups, to be added where the plan knows none.

        Raises:
            ValueError: If the place belongs to another plan; says what differs.
        """
        content = self.place.read(PLAN)
        held = None
        if content is not None:
            held = RunPlan.of_json(content, f"{self.place}/{PLAN}")
            if held.hash != self.plan.hash:
                lines = "; ".join(differences(held, self.plan)) or "their order"
                raise ValueError(
                    f"{self.place} holds results of another plan ({lines}): give --out "
                    "another folder, or --force to begin anew"
                )
        known = {**(lanes or {}), **(held.lanes if held else {})}
        if held is None or known != dict(held.lanes):
            plan = dataclasses.replace(self.plan, lanes=known)
            self.place.write(PLAN, plan.to_json())
        self.plan = dataclasses.replace(self.plan, lanes=known)

    def remember(self, key: str, lanes: int) -> None:
        """Change how many matrices of a group a device computes at once."""
        known = {**self.plan.lanes, key: lanes}
        self.plan = dataclasses.replace(self.plan, lanes=known)
        self.place.write(PLAN, self.plan.to_json())

    def clear(self) -> None:
        """Remove the plan, and then everything that was kept of it."""
        self.place.remove(PLAN)
        for name in self.place.names(MATRICES):
            if re.fullmatch(r"\.?\d{5,}\.(json|safetensors)(\..*\.tmp)?", name):
                self.place.remove(f"{MATRICES}/{name}")

    def sweep(self, owned: Sequence[MatrixTask]) -> None:
        """Remove what writes of these tasks left behind that were cut off."""
        mine = {one.index for one in owned}
        for name in self.place.names(MATRICES):
            found = re.fullmatch(r"\.(\d{5,})\.\w+\..*\.tmp", name)
            if found and int(found[1]) in mine:
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
        told: dict[str, Any] = {
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
            told["digest"] = hashlib.sha256(content).hexdigest()
        told = jsonable(told)
        text = json.dumps({**told, "seal": _seal(told)}, indent=1, allow_nan=False)
        self.place.write(record, text.encode() + b"\n")

    def records(self, some: Sequence[MatrixTask]) -> dict[int, dict[str, Any]]:
        """Return the records of what is finished among some tasks, by index.

        Raises:
            ValueError: If a record is of a later version.
            OSError: If something cannot be read.
        """
        there = set(self.place.names(MATRICES))
        found = {}
        for task in some:
            factors, record = file_names(task.index)
            if record.rpartition("/")[2] not in there:
                continue
            told = self._read(record)
            if told is None or told.get("name") != task.name:
                continue
            if told["status"] == SOLVED:
                content = self.place.read(factors) or b""
                if hashlib.sha256(content).hexdigest() != told.get("digest"):
                    continue
            found[task.index] = told
        return found

    def factors(self, task: MatrixTask) -> dict[str, np.ndarray]:
        """Return the arrays of a finished matrix by name.

        Raises:
            ValueError: If the file is damaged.
        """
        name, _ = file_names(task.index)
        try:
            return safetensors.numpy.load(self.place.read(name) or b"")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self.place}/{name} is damaged: {error}") from error

    def _read(self, name: str) -> dict[str, Any] | None:
        """Return a record of this plan, or None for anything that is none."""
        try:
            told = parse_json(self.place.read(name) or b"")
            version = told["format"]
            later = version > FORMAT
        except (ValueError, KeyError, TypeError):
            return None
        if later:
            raise ValueError(
                f"{self.place}/{name} is of format {version}, and this kronjax reads "
                f"format {FORMAT}: update kronjax"
            )
        if told.pop("seal", None) != _seal(told) or told["plan"] != self.plan.hash:
            return None
        return told


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


def _seal(told: Mapping[str, Any]) -> str:
    """Return the digest of a record, by which a damaged one is told."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
