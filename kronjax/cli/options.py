"""Types of options of the command line; imports no jax.

>>> Flag.__metadata__[0].metavar is None
True
"""

from typing import Annotated

import tyro


def option(metavar: str | None = None, name: str | None = None) -> object:
    """Return the settings of an option; defaults None and False are not shown."""

    def hint(default: str) -> str:
        return "" if default in ("None", "False") else f"(default: {default})"

    return tyro.conf.arg(metavar=metavar, name=name, help_behavior_hint=hint)


Slice = Annotated[str | None, option("A:B")]
Flag = Annotated[bool, option()]
Json = Annotated[bool, option(name="json")]
Seed = Annotated[int, option("N")]
Tolerance = Annotated[float, option("X")]
NumStarts = Annotated[int, option("N")]
MaxProducts = Annotated[int | None, option("N")]
