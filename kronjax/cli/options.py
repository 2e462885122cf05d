"""The look of options on the command line; without jax.

>>> Flag.__metadata__[0].metavar is None
True
"""

import dataclasses
import types
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from kronjax.runs.settings import SolveSettings

METAVARS = {int: "N", float: "X", str: "NAME"}
"""Placeholders for the values of options, by type."""


def option(metavar: str | None = None, name: str | None = None) -> object:
    """Return the look of an option; defaults None and False are not shown."""

    def hint(default: str) -> str:
        return "" if default in ("None", "False", "") else f"(default: {default})"

    return tyro.conf.arg(metavar=metavar, name=name, help_behavior_hint=hint)


def fields_of(
    settings: type,
    *,
    without: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    metavars: Mapping[str, str] | None = None,
    kinds: Mapping[str, Any] | None = None,
) -> object:
    """Return a tyro argument that makes an option of every field of a dataclass.

    The options have the defaults of the dataclass and the texts of its docstring. They
    are parsed into a namespace that checks nothing, so that invalid values raise where
    the dataclass itself is created.

    Args:
        settings: The dataclass.
        without: Names of fields that get no option.
        names: Names of options that differ from those of the fields.
        metavars: Placeholders other than `METAVARS`, by field.
        kinds: Types to parse, where a field has another.
    """
    hints = get_type_hints(settings) | dict(kinds or {})
    fields = []
    for field in dataclasses.fields(settings):
        if field.name not in without:
            hint = hints[field.name]
            metavar = (metavars or {}).get(field.name, _metavar(hint))
            look = option(metavar, (names or {}).get(field.name))
            fields.append((field.name, Annotated[hint, look], field.default))
    namespace = dataclasses.make_dataclass(settings.__name__, fields)
    namespace.__doc__ = settings.__doc__
    return tyro.conf.arg(name="", constructor=namespace)


def _metavar(hint: Any) -> str | None:
    """Return the placeholder for the values of a type; None for flags.

    >>> _metavar(int | None), _metavar(Literal["a", "b"]), _metavar(tuple[str, ...])
    ('N', 'a|b', 'NAME ...')
    """
    kinds = [x for x in get_args(hint) if x not in (types.NoneType, ...)]
    if get_origin(hint) is Literal:
        return "|".join(kinds)
    if get_origin(hint) is tuple:
        return f"{_metavar(kinds[0])} ..."
    return METAVARS.get(kinds[0] if kinds else hint)


@dataclasses.dataclass(frozen=True)
class HostOptions:
    """The processes that run a command together.

    Attributes:
        distributed: Share the work with the same command on other hosts, which see the
            same FOLDER: on Cloud TPU, under Slurm and Open MPI 4 they find each other.
        coordinator: Address of process 0, on other systems.
        processes: Number of processes.
        process: Number of this process, from 0.
    """

    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


Slice = Annotated[str | None, option("A:B")]
Flag = Annotated[bool, option()]
Json = Annotated[bool, option(name="json")]
Seed = Annotated[int, option("N")]
Solving = Annotated[Any, fields_of(SolveSettings, without=("schedule",))]
Sharing = Annotated[
    Any,
    fields_of(HostOptions, metavars={"coordinator": "HOST:PORT", "process": "I"}),
]
