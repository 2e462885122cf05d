"""The persistent cache of compiled programs, which a later process loads.

JAX keeps compiled programs in a folder if it is told one. `cache` names a folder of the
user, limited in size. A compiled program is machine code: the folder belongs to the
user alone, and every kind of processor and version of jaxlib has its own. Importing
this module does not load jax.

The environment variable `KRONJAX_CACHE` names another folder, or is `off`. Where JAX
has a folder already (`JAX_COMPILATION_CACHE_DIR`), it stays.
"""

import functools
import hashlib
import os
import platform
import stat
import sys
from importlib import metadata
from pathlib import Path

VARIABLE = "KRONJAX_CACHE"
"""Environment variable with a folder, or `off`."""

LIMIT = 2**30
"""Bytes of the cache; the programs that were not used for longest are deleted."""


def cache(folder: str | Path | None = None, *, max_bytes: int = LIMIT) -> Path | None:
    """Keep compiled programs for later processes; return the folder, or None if off.

    The command line calls this by itself. In Python it has to come before the programs
    are compiled.

    Args:
        folder: Folder of the cache; by default that of `KRONJAX_CACHE`, else `kronjax`
            in the user's folder of caches. A folder that is missing is created.
        max_bytes: Limit on the size of all programs of one processor and version.

    Returns:
        The folder in use: that of JAX if it has one, None if `KRONJAX_CACHE` is `off`.
        Settings of JAX's cache in the environment are kept.

    Raises:
        ValueError: If `max_bytes` is not positive, or others may write to the folder.
        OSError: If the folder cannot be created.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1; got {max_bytes}.")
    given = _setting_of_jax()
    if given:
        return Path(given)
    wanted = os.environ.get(VARIABLE, "")
    if wanted.lower() == "off":
        return None
    base = Path(folder or wanted or _user_folder()).expanduser().resolve()
    place = base / _machine()
    for above in base.parents:
        if above.exists():
            _refuse_shared(above, is_above=True)
    for own in (base, place):
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_shared(own)
    _tell_jax(place, max_bytes)
    return place


def cache_if_possible() -> str:
    """Turn the cache on unless something hinders it; return its folder or the cause."""
    try:
        place = cache()
    except (OSError, RuntimeError, ValueError) as error:  # or there is no home folder
        return f"off: {error}"
    return str(place) if place else f"off: {VARIABLE}=off"


def _setting_of_jax() -> str | None:
    """Return the folder that JAX has been told, if any."""
    if "jax" in sys.modules:
        import jax

        return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or None


def _tell_jax(place: Path, max_bytes: int) -> None:
    settings = {
        "jax_compilation_cache_dir": str(place),
        "jax_compilation_cache_max_size": max_bytes,
        # Many programs of a tenth of a second make the seconds that a user waits for.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    for name, value in settings.items():
        if os.environ.get(name.upper()):
            continue  # the user has told JAX
        if "jax" in sys.modules:
            import jax

            jax.config.update(name, value)
        else:
            os.environ[name.upper()] = str(value)


def _user_folder() -> Path:
    """Return the folder of kronjax among the caches of the user."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kronjax"


@functools.cache
def _machine() -> str:
    """Return a name for the instruction set and the version of jaxlib.

    A home folder may be shared by machines that cannot run each other's programs.
    """
    features = platform.processor()
    try:
        with open("/proc/cpuinfo") as lines:
            features = next(x for x in lines if x.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        pass
    digest = hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()
    return f"jaxlib-{metadata.version('jaxlib')}-{digest[:12]}"


def _refuse_shared(folder: Path, *, is_above: bool = False) -> None:
    """Raise a `ValueError` if others can write to a folder, or own it.

    Args:
        folder: A folder, without links in its path.
        is_above: Whether it only leads to the cache. It may then belong to the system,
            or be writable to all if they cannot rename what others own (sticky).
    """
    if os.name != "posix":
        return
    facts = folder.stat()
    owners = (os.getuid(), 0) if is_above else (os.getuid(),)
    is_open = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if is_above and facts.st_mode & stat.S_ISVTX:
        is_open = 0
    if facts.st_uid not in owners or is_open:
        raise ValueError(
            f"others may write to {folder}, and compiled programs are machine code: "
            f"run chmod go-w {folder}, or set {VARIABLE} to a folder of your own"
        )
