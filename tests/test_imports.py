"""The architecture as tests: who may import whom, and what stays unloaded."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kronjax

PACKAGE = Path(kronjax.__file__).parent

# A room imports only from the rooms before it and from itself. A room is a folder,
# or a single file where no folder is needed. `kronjax` is the list of public names.
ROOMS = [
    "lazy",
    "cpu_threads",
    "linalg",
    "validation",
    "kronecker",
    "norm",
    "io",
    "nn",
    "methods",
    "patterns",
    "recipe",
    "solver",
    "display",
    "pages",
    "proof",
    "operators",
    "greedy",
    "runs",
    "approximation",
    "permute",
    "selection",
    "",
    "report",
    "lm.text",
    "lm.models",
    "lm.checkpoints",
    "lm.evaluation",
    "lm.compression",
    "lm.training",
    "lm",
    "demo",
    "cli",
]
# These import jax and NumPy only.
CORE = {
    "approximation",
    "display",
    "greedy",
    "kronecker",
    "linalg",
    "norm",
    "permute",
    "proof",
    "selection",
    "solver",
    "validation",
}
MOST_FILES = 24

HEAVY = {"flax", "matplotlib", "optax", "orbax", "torch", "transformers"}
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def module_name(path):
    """`kronjax/lm/gpt2.py` -> `lm.gpt2`, `kronjax/__init__.py` -> ``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = sorted(set(PATHS) - {""})


def room_of(name):
    """The room of a module: its folder, or the module itself at the top."""
    name = {"__main__": "cli", "recipes": "recipe"}.get(name, name)
    while name and name not in ROOMS:
        name = name.rpartition(".")[0]
    return name


CORE_MODULES = [name for name in MODULES if room_of(name) in CORE]


def tree_of(name):
    return ast.parse(PATHS[name].read_text(encoding="utf-8"))


def imports_of(name, nodes):
    """Absolute dotted names imported by `nodes`, e.g. `kronjax.recipe.Rule`."""
    is_package = PATHS[name].name == "__init__.py"
    here = ["kronjax", *filter(None, name.split("."))]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package that holds the module, or the package itself.
            keep = len(here) - node.level + is_package
            base = here[:keep] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_modules(name):
    """The modules of kronjax that a module imports, wherever it does."""
    for dotted in imports_of(name, ast.walk(tree_of(name))):
        parts = dotted.split(".")
        if parts[0] != "kronjax" or dotted == "kronjax.__version__":
            continue
        while ".".join(parts[1:]) not in PATHS:
            parts = parts[:-1]
        yield ".".join(parts[1:])


def run_python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_rooms_before_its_own(name):
    own = room_of(name)
    assert own, f"give {name} a room"
    for source in imported_modules(name):
        room = room_of(source)
        assert ROOMS.index(room) <= ROOMS.index(own), f"{name} imports {source}"


@pytest.mark.parametrize("room", ROOMS)
def test_the_imports_inside_a_room_have_no_cycle(room):
    edges = {
        name: {x for x in imported_modules(name) if room_of(x) == room and x != name}
        for name in MODULES
        if room_of(name) == room and name != room
    }
    while edges:
        free = [name for name, sources in edges.items() if not sources & set(edges)]
        assert free, f"a cycle among {sorted(edges)}"
        for name in free:
            del edges[name]


def test_no_folder_holds_more_files_than_one_can_survey():
    folders = {path.parent for path in PATHS.values()}
    assert max(len(list(folder.glob("*.py"))) for folder in folders) <= MOST_FILES


@pytest.mark.parametrize("name", CORE_MODULES)
def test_the_core_imports_only_jax_and_numpy(name):
    tree = tree_of(name)
    # The front door may draw a progress bar, permutations take scipy's assignments:
    # but only once they need them.
    nodes = tree.body if name in ("approximation", "permute") else ast.walk(tree)
    roots = {dotted.split(".")[0] for dotted in imports_of(name, nodes)}
    assert roots <= {"jax", "numpy", "kronjax"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", sorted(PATHS))
def test_nothing_is_unpickled(name):
    tree = tree_of(name)
    roots = {dotted.split(".")[0] for dotted in imports_of(name, ast.walk(tree))}
    assert not roots & PICKLES
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False


def test_the_names_a_user_starts_with_load_nothing_heavy():
    loaded = run_python(
        "import json, sys, kronjax\n"
        "assert kronjax.__all__\n"
        "for name in kronjax.__all__: getattr(kronjax, name)\n"
        "print(json.dumps([name.split('.')[0] for name in sys.modules]))"
    )
    assert not (HEAVY | {"scipy.optimize"}) & set(json.loads(loaded))


@pytest.mark.parametrize("name", ["methods", "recipe"])
def test_recipes_and_methods_do_not_load_jax(name):
    run_python(f"import sys, kronjax.{name}\nassert 'jax' not in sys.modules")


def test_help_does_not_load_jax():
    output = run_python(
        "import json, sys\n"
        "from kronjax.cli.main import main\n"
        "sys.argv = ['kronjax', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print()\n"
        "print(json.dumps([name.split('.')[0] for name in sys.modules]))"
    )
    help_text, loaded = output.rstrip().rsplit("\n", 1)
    assert "kronjax" in help_text
    assert not (HEAVY | {"jax", "jaxlib"}) & set(json.loads(loaded))


@pytest.mark.parametrize("package", ["kronjax", "kronjax.lm", "kronjax.nn"])
def test_no_module_hides_a_public_name(package):
    """Importing the submodule `kronjax.x` sets `x` on the package, whatever it was."""
    loaded = importlib.import_module(package)
    folder = Path(loaded.__file__).parent
    modules = {path.stem for path in folder.iterdir()}
    assert loaded.__all__ and not set(loaded.__all__) & modules


@pytest.mark.parametrize("name", CORE_MODULES)
def test_of_a_qr_decomposition_only_q_is_taken(name):
    """What needs R alone runs beside what makes Q, and the two can block each other."""
    calls, taken = 0, 0
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            "jnp.linalg.qr"
        ):
            calls += 1
        elif isinstance(node, ast.Subscript) and "jnp.linalg.qr(" in ast.unparse(
            node.value
        ):
            taken += ast.unparse(node.slice) == "0"
    assert calls == taken
