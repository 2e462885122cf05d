"""Public names that are loaded on first use.

The command line can therefore answer before jax is imported, and `import kronjax` loads
no flax.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package with lazy names.

    Args:
        package: Name of the package.
        homes: The public names that each module defines. A module is imported when one
            of its names is first used.
    """
    module_of = {name: module for module, names in homes.items() for name in names}

    def load(name):
        """Load a public name from the module that defines it."""
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(module_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def names():
        """List the public names, loaded or not."""
        return sorted({*vars(sys.modules[package]), *module_of})

    return load, names
