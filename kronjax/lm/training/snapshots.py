"""The state of a training on disk: the newest few, each complete or not there at all.

A snapshot holds every array of the model and the optimiser, by Orbax, and facts as
JSON: the step, what the run was asked, the state of its hook. The position in the data
and all random draws follow from the seed and the step. Orbax writes into a temporary
folder and renames it, and reads into whatever layout is asked for, so that a run may go
on with another number of devices.
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
"""What JSON holds."""


class Snapshots:
    """Snapshots of one run in a folder.

    Attributes:
        folder: Made if it is missing.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        """Open the folder.

        Args:
            folder: For the snapshots.
            keep: How many of the newest stay; beside them the best one that `save` was
                told the loss of.
        """
        self.folder = folder.resolve()
        kept = policies.AnyPreservationPolicy(
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
            preservation_policy=kept,
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
        """Write a snapshot; one of this step is left as it is.

        Args:
            step: That was reached.
            state: A tree of arrays.
            facts: What JSON holds.
            loss: On held-out text, where the best snapshot is to stay.

        Raises:
            OSError: If it cannot be written; the older ones are as they were.
        """
        if step in self._manager.all_steps():
            return
        with self._explained(step):
            # Orbax would find out later, and print pages.
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
            found = self._manager.restore(
                step, args=ocp.args.Composite(facts=ocp.args.JsonRestore())
            )
            return found["facts"]

    def state(self, step: int, like: Any) -> Any:
        """Return the arrays of a snapshot.

        Args:
            step: Its step.
            like: A tree of arrays whose shapes, dtypes and layouts they take.
        """
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        with self._readable(step):
            found = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )
            return found["state"]

    def close(self) -> None:
        """Let go of the folder."""
        self._manager.close()

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        newest, log = self.newest, logging.getLogger("absl")
        level = log.level
        try:
            log.setLevel(logging.CRITICAL)  # it would print pages
            yield
        except (OSError, ValueError, RuntimeError) as error:
            kept = "there is none before it"
            if newest is not None:
                kept = f"that of step {newest} is intact, and the same command goes on"
            # The end of what Orbax says is what the system said.
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
                "remove it to go on from the one before, if there is one"
            ) from error
