"""Snapshots of a training on disk, each of which is complete or absent.

A snapshot holds every array of the model and the optimiser, written by Orbax, and facts
as JSON: the step, the marks of the run and the state of its hook. The position in the
data and all random draws follow from the seed and the step. Orbax writes into a
temporary folder, which it renames, and reads into any layout, so that a run can be
resumed with another number of devices.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

Facts = dict[str, Any]
"""JSON values by name."""


class Snapshots:
    """Snapshots of one run in a folder.

    Attributes:
        folder: Folder of the snapshots, created if it is missing.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        """Open the folder.

        Args:
            folder: Folder of the snapshots.
            keep: Number of the newest snapshots to keep, beside the one with the lowest
                loss given to `save`.
        """
        self.folder = folder.resolve()
        policy = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    n=1,
                    get_metric_fn=lambda metrics: metrics["loss"],
                    reverse=True,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def newest(self) -> int | None:
        """The step of the newest snapshot, or None."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: Any, facts: Mapping[str, Any], loss: float | None = None
    ) -> None:
        """Write a snapshot, unless there is one of this step.

        Args:
            step: Number of steps done.
            state: A tree of arrays.
            facts: JSON values by name.
            loss: Held-out loss, by which the best snapshot is kept, or None.

        Raises:
            OSError: If it cannot be written; older snapshots stay intact.
        """
        if step in self._manager.all_steps():
            return
        with self._explained(step):
            # Orbax would notice later, and print pages.
            needed = sum(x.nbytes for x in jax.tree.leaves(state))
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                raise OSError(
                    f"it takes {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} are "
                    "free"
                )
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    facts=ocp.args.JsonSave(dict(facts)),
                ),
                metrics=None if loss is None else {"loss": loss},
                force=True,
            )
            self._manager.wait_until_finished()

    def facts(self, step: int) -> Facts:
        """Return the facts of a snapshot."""
        with self._readable(step):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(facts=ocp.args.JsonRestore())
            )
            return restored["facts"]

    def state(self, step: int, like: Any) -> Any:
        """Return the arrays of a snapshot.

        Args:
            step: Step of the snapshot.
            like: A tree of arrays with the shapes, dtypes and layouts to restore.
        """
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        with self._readable(step):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )
            return restored["state"]

    def close(self) -> None:
        """Close the manager of the folder."""
        self._manager.close()

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        newest, log = self.newest, logging.getLogger("absl")
        level = log.level
        try:
            log.setLevel(logging.CRITICAL)  # Orbax would print pages
            yield
        except (OSError, ValueError, RuntimeError) as error:
            kept = "there is none before it"
            if newest is not None:
                kept = (
                    f"that of step {newest} is intact: run the same command to resume"
                )
            # The end of the message of Orbax is that of the system.
            reason = ": ".join(str(error).strip().splitlines()[0].split(": ")[-2:])
            raise OSError(
                f"the checkpoint of step {step} in {self.folder} cannot be written "
                f"({reason}); {kept}"
            ) from error
        finally:
            log.setLevel(level)

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise ValueError(
                f"the checkpoint {self.folder / str(step)} is damaged ({reason}); "
                "remove it to resume from the one before, if there is one"
            ) from error
