"""Traced programs on disk: a later process neither traces nor lowers them again.

JAX finds a compiled program by its lowered text, so that a process whose programs are
all in JAX's cache still traces and lowers them. For the programs of one 36×36 matrix
that took ten times as long as to load what `jax.export` had written. Exported programs
lie in a folder below that of JAX's cache; where there is none, nothing is stored.

An entry depends on the source of the package, on the settings and the version of jax,
and on the facts that its caller states: together they have to determine the programs.
"""

import functools
import hashlib
from collections.abc import Callable, Hashable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from kronjax.io.cache import Cache

_registered: set[type] = set()

FOLDER = "kronjax-traced"
"""Name of the folder below that of JAX's cache."""

LIMIT = 2**27
"""Bytes of the folder; the oldest entries are deleted."""

Programs = Mapping[str, tuple[jax.stages.Wrapped, tuple]]
"""Jitted functions and their arguments, or the shapes of these, by name."""


def programs(
    build: Callable[[], Programs], platform: str, *facts: Hashable
) -> dict[str, Any] | None:
    """Return programs as `jax.export.Exported`, traced only if they are not stored.

    Args:
        build: Function that returns what is to be traced.
        platform: Platform of the devices.
        *facts: Everything that the programs depend on besides the package and jax; with
            an unambiguous `repr`.

    Returns:
        Exported programs by name. None where JAX has no folder for its cache, the
        folder cannot be used, or a program cannot be exported.
    """
    folder = _folder()
    if folder is None:
        return None
    traced: dict[str, Any] = {}
    # "gpu" is not a platform of `jax.export`, which asks for the one of the default.
    platforms = [platform] if platform == "cpu" else None

    def trace():
        for name, (function, arguments) in build().items():
            traced[name] = export.export(function, platforms=platforms)(*arguments)
        blobs = {name: program.serialize() for name, program in traced.items()}
        return {k: np.frombuffer(x, np.uint8) for k, x in blobs.items()}, {}

    try:
        cache = Cache(folder)
        key = "programs", trace, _sources(), _settings(), platform, facts
        arrays, _ = cache.get_or_compute(*key)
        if traced:
            cache.shrink(LIMIT)
            return traced
        return {
            name: export.deserialize(bytearray(blob)) for name, blob in arrays.items()
        }
    except Exception:  # a cache may fail in any way, and must not stop a solve
        return None


def register(*types: type) -> None:
    """Let arguments and results of exported programs contain dataclasses.

    Args:
        *types: Dataclasses that are pytrees, all of whose fields are data.
    """
    for kind in set(types) - _registered:
        export.register_pytree_node_serialization(
            kind,
            serialized_name=f"{kind.__module__}.{kind.__qualname__}",
            serialize_auxdata=lambda _: b"",
            deserialize_auxdata=lambda _: (),
        )
        _registered.add(kind)


@functools.lru_cache(maxsize=64)
def compiled(
    function: Callable, platform: str, options: tuple, arguments: Any
) -> Callable:
    """Return a function of a module, compiled, without tracing it if it is stored.

    Args:
        function: The function; it depends on nothing but its arguments.
        platform: Platform of the device.
        options: Items of the compiler options.
        arguments: `shapes` of the arguments.
    """
    given = jax.tree.unflatten(arguments[0], arguments[1])
    name = f"{function.__module__}.{function.__qualname__}"

    def build():
        return {name: (jax.jit(function), given)}

    stored = programs(build, platform, name, arguments)
    call = stored[name].call if stored else function
    return jax.jit(call).lower(*given).compile(dict(options))


def shapes(*arguments: Any) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """Return the structure, and the shapes and dtypes, of arguments; hashable."""
    leaves, tree = jax.tree.flatten(arguments)
    return tree, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)


def _folder() -> Path | None:
    """Return the folder of exported programs, or None if JAX has no local one."""
    config: Any = jax.config
    folder = config.jax_compilation_cache_dir
    if not folder or "://" in folder or not config.jax_enable_compilation_cache:
        return None
    return Path(folder) / FOLDER


@functools.cache
def _sources() -> str:
    """Return a digest of the source of the package."""
    sha = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _settings() -> tuple[Any, ...]:
    """Return the versions and the settings of jax, but for those of caches and logs."""
    config: Any = jax.config
    names = (x for x in sorted(config.values) if "cache" not in x and "log" not in x)
    versions = jax.__version__, metadata.version("jaxlib"), jax.default_backend()
    return *versions, *((name, getattr(config, name, None)) for name in names)
