"""The architecture as tests: who may import whom, and what stays unloaded."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kronjax

PACKAGE = Path(kronjax.__file__).parent

# A module imports only from modules above it in this list. `kronjax` itself is the
# list of the names that a user starts with, and comes after everything it names.
ORDER = [
    "dense",
    "lanes",
    "kronecker",
    "spectral",
    "norms",
    "lanczos",
    "manifold",
    "factored",
    "weighted",
    "schatten",
    "pairs",
    "descent",
    "problem",
    "setting",
    "leastsquares",
    "path",
    "objective",
    "continuation",
    "programs",
    "errors",
    "sheet",
    "cluster",
    "barrier",
    "newton",
    "tangent",
    "global_bound",
    "multipliers",
    "certificate",
    "slots",
    "threads",
    "pool",
    "crew",
    "proof",
    "inputs",
    "approximation",
    "greedy",
    "budget",
    "permute",
    "output",
    "files",
    "options",
    "recipes",
    "recipe",
    "shards",
    "tasks",
    "places",
    "store",
    "batch",
    "factors",
    "forecast",
    "hosts",
    "outcome",
    "layers",
    "nn",
    "lm.tokenizer",
    "lm.attention",
    "lm.architecture",
    "lm.gpt2",
    "lm.opt",
    "lm.llama",
    "lm.gguf_header",
    "lm.gguf_tokenizer",
    "lm.gguf",
    "lm.storage",
    "lm.sources",
    "lm.checkpoint",
    "lm.generation",
    "lm.progress",
    "lm.text",
    "lm.losses",
    "lm.protocol",
    "lm.evaluate",
    "lm.sizes",
    "lm.fold",
    "lm.turns",
    "lm.latency",
    "lm.arrays",
    "lm.data",
    "lm.calibrate",
    "lm.budget",
    "lm.work",
    "lm.mixture",
    "lm.fit",
    "lm.offers",
    "lm.plan",
    "lm.refine",
    "lm.sequential",
    "lm.starts",
    "lm.groups",
    "lm.compression",
    "lm.masks",
    "lm.scores",
    "lm.prune",
    "lm.truncate",
    "lm.analysis",
    "lm.distillation",
    "lm.optimizer",
    "lm.placement",
    "lm.step",
    "lm.regimen",
    "lm.snapshots",
    "lm.history",
    "lm.diagnosis",
    "lm.loop",
    "lm.train",
    "lm.fresh",
    "lm.stages",
    "lm.course",
    "lm.whole",
    "lm.record",
    "lm.page",
    "lm.report",
    "lm.harness",
    "lm.commands",
    "lm.whole_commands",
    "lm.compress_commands",
    "lm.fresh_commands",
    "lm.train_commands",
    "lm",
    "report",
    "demo.corpus",
    "demo.build",
    "demo",
    "cli",
    "__main__",
]
CORE = ORDER[: ORDER.index("permute") + 1]

HEAVY = {"flax", "matplotlib", "optax", "orbax", "torch", "transformers"}
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def module_name(path):
    """`kronjax/lm/gpt2.py` -> `lm.gpt2`, `kronjax/__init__.py` -> ``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = sorted(set(PATHS) - {""})
EXISTING_CORE = [name for name in CORE if name in PATHS]


def tree_of(name):
    return ast.parse(PATHS[name].read_text(encoding="utf-8"))


def imports_of(name, nodes):
    """Absolute dotted names imported by `nodes`, e.g. `kronjax.manifold.Point`."""
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


def place(dotted):
    """The entry of ORDER that `kronjax.x.y.z` comes from, or None for a bare name."""
    parts = dotted.split(".")[1:]
    while parts and ".".join(parts) not in PATHS:
        parts = parts[:-1]
    if parts and ".".join(parts) not in ORDER:
        parts = parts[:1]  # inside a package that has one place, such as demo
    return ".".join(parts) or None


def run_python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_above(name):
    own = place(f"kronjax.{name}")
    assert own in ORDER, f"give {name} a place in ORDER"
    for dotted in imports_of(name, ast.walk(tree_of(name))):
        if dotted.split(".")[0] != "kronjax" or dotted == "kronjax.__version__":
            continue
        source = place(dotted)
        if own in ("cli", "__main__", "demo") and source is None:
            continue  # these use the library as a user does
        assert source is not None, f"{name}: import {dotted} from its own module"
        allowed = ORDER.index(source) < ORDER.index(own)
        # A package that is one place, such as demo, may be made of several files.
        assert allowed or source == own, f"{name} imports {dotted} from below"


@pytest.mark.parametrize("name", EXISTING_CORE)
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


def test_help_does_not_load_jax():
    output = run_python(
        "import json, sys\n"
        "from kronjax.cli import main\n"
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


def test_no_module_hides_a_public_name():
    """Importing the submodule `kronjax.x` sets `x` on the package, whatever it was."""
    import kronjax

    assert not set(kronjax.__all__) & {name.split(".")[0] for name in MODULES}


@pytest.mark.parametrize("name", EXISTING_CORE)
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
