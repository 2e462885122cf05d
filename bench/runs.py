"""Runs of `kronjax factorize` in processes of their own: timed, or killed."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import safetensors.numpy

from bench import script

TOLERANCE = 1e-2
"""Of the runs that are killed."""

RULES = """
rules:
- match: "*"
  method: kronecker
  terms: [{a_shape: [6, 6], rank: 3}]
  weighting: none
"""


def line(name, out, tolerance):
    """The command that factorizes `name.safetensors` by `name.yaml`."""
    given = [f"{name}.safetensors", "--recipe", f"{name}.yaml", "--out", out]
    more = ["--tolerance", str(tolerance)]
    return [sys.executable, "-m", "kronjax", "factorize", *given, *more]


def factorize(folder, name, out, tolerance, environment=None):
    """Run the command in a folder; its report, wall seconds and peak memory in GiB."""
    begun = time.perf_counter()
    run = subprocess.Popen(
        [*line(name, out, tolerance), "--json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )
    assert run.stdout is not None
    told = run.stdout.read()
    _, status, usage = os.wait4(run.pid, 0)
    run.returncode = os.waitstatus_to_exitcode(status)
    if run.returncode:
        raise RuntimeError(f"kronjax factorize ended with {run.returncode}")
    seconds = time.perf_counter() - begun
    return json.loads(told), seconds, usage.ru_maxrss / 2**20


def span(folder, prefix):
    """Seconds from when the first matrix of a name was read until the last was kept."""
    begun, ended = [], []
    for path in (folder / "matrices").glob("*.json"):
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["name"].startswith(prefix):
            ended.append(path.stat().st_mtime)
            begun.append(ended[-1] - told["seconds"])
    return max(ended) - min(begun)


def kill(folder, count, kills):
    """Kill runs of matrices of 36 x 36 again and again; what was found in the end."""
    rng = np.random.default_rng(1)
    some = rng.standard_normal((count, 36, 36)).astype(np.float32)
    tensors = {f"w.{i}": x for i, x in enumerate(some)}
    safetensors.numpy.save_file(tensors, folder / "small.safetensors")
    (folder / "small.yaml").write_text(RULES)
    # Compiled once: what is killed is not the compiler, most of the time.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    factorize(folder, "small", "undisturbed", TOLERANCE, cache)
    _, undisturbed, _ = factorize(folder, "small", "again", TOLERANCE, cache)
    folders, at, finished = [folder / "killed 0"], [], []
    before, lost, seen, twice = 0, 0, {}, set()
    while len(at) < kills:
        run = subprocess.Popen(
            line("small", folders[-1].name, TOLERANCE),
            cwd=folder,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **cache},
        )
        wait = float(rng.uniform(0, undisturbed))
        try:
            run.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            at.append(wait)
            finished.append(look(folders[-1], seen, twice))
            lost += finished[-1] < before
            before = finished[-1]
            script.say(f"killed {len(at)} times, {before} finished")
        else:  # who comes to the end goes on with a new folder
            look(folders[-1], seen, twice)
            folders.append(folder / f"killed {len(folders)}")
            before = 0
    factorize(folder, "small", folders[-1].name, TOLERANCE, cache)
    look(folders[-1], seen, twice)
    wanted = contents(folder / "undisturbed")
    found = [contents(one) for one in folders]
    return {
        "kills": at,
        "finished": finished,
        "runs": len(folders),
        "undisturbed_seconds": undisturbed,
        "complete": all(len(one) == count for one in found),
        "identical": all(one == wanted for one in found),
        "lost": lost,
        "solved_twice": len(twice),
    }


def look(folder, seen, twice):
    """Note when what is finished was written, and what was written again since."""
    found = factors(folder)
    for path in found:
        written = path.stat().st_mtime_ns
        if seen.setdefault(path, written) != written:
            twice.add(path)
    return len(found)


def contents(folder):
    """The bytes of all factors that are finished, by the name of their file."""
    return {path.name: path.read_bytes() for path in factors(folder)}


def factors(folder):
    """All files of factors that are finished."""
    return sorted(
        x.with_suffix(".safetensors")
        for x in (folder / "matrices").glob("*.json")
        if x.with_suffix(".safetensors").exists()
    )
