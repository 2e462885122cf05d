"""Whole models by rules without weights: as a user types it, and back into a model."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from helpers import free_port

from kronjax import lm, nn
from kronjax.cli import matrices
from kronjax.cli.main import main
from kronjax.io import heartbeat, storage
from kronjax.lm.compression import whole_model as wholes
from kronjax.lm.models import llama, opt
from kronjax.runs import processes, store

RULES = """
rules:
- {match: "*.c_fc", method: interpolative, fraction: 0.5, weighting: none}
- match: "wte"
  method: kronecker
  terms: [{a_shape: [300, 1], rank: 6}]
  weighting: none
- match: "h.1.attn.c_proj"
  method: kronecker
  terms: [{a_shape: [32, 1], rank: 3}]
  scalars: true
  weighting: none
- {match: "*", method: low-rank, rank: 4, weighting: none}
"""


def run(capsys, *args):
    code = main([str(x) for x in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def folder(tiny, tmp_path):
    """A saved model and rules for it; a bag of matrices, and rules for that."""
    lm.save(tiny, tmp_path / "dense")
    (tmp_path / "rules.yaml").write_text(RULES)
    rng = np.random.default_rng(0)
    names = ["../x", "/etc/passwd", "CON", "a\x1b[31m", "e.1.w"]
    bag = {name: rng.standard_normal((6, 8)).astype(np.float32) for name in names}
    bag["CON"][0, 0] = np.nan
    bag["bias"] = np.ones(8, np.float32)
    safetensors.numpy.save_file(bag, tmp_path / "bag.safetensors")
    rule = "{match: '*', method: low-rank, rank: 2, weighting: none}"
    (tmp_path / "bag.yaml").write_text(f"rules: [{rule}]")
    return tmp_path


def compress(folder, *more, model="dense", rules="rules.yaml"):
    given = ("compress", folder / model, "--recipe", folder / rules)
    return (*given, "--out", folder / "out", *more)


def test_a_model_comes_out_as_its_best_sums(folder, tiny, capsys):
    code, out, err = run(capsys, *compress(folder))
    assert code == 0, err
    assert "9 of 9 matrices are finished" in out and "The model is in" in out
    assert "both match h.0.mlp.c_fc and 1 more: the first decides" in err
    small = lm.load(folder / "out")
    dense = {**nn.linear_layers(tiny), **nn.tables(tiny)}
    kinds = {}
    for name, layer in {**nn.linear_layers(small), **nn.tables(small)}.items():
        kinds[name] = nn.describe(layer)["kind"]
        if name in ("wpe", "lm_head"):
            continue
        held = dense[name]
        kernel = held.embedding if name == "wte" else held.kernel
        left = np.float64(kernel[...]) - np.float64(layer.materialize())
        s = np.linalg.svd(np.float64(kernel[...]), compute_uv=False)
        rank = {"wte": 6, "h.1.attn.c_proj": 3}.get(name, 4)
        if kinds[name] == "interpolative":
            rank = layer.rest.shape[0]
        assert np.linalg.norm(left, 2) == pytest.approx(s[rank], rel=1e-4)
    assert kinds["h.0.mlp.c_fc"] == "interpolative" and kinds["wpe"] == "dense"
    assert kinds["wte"] == "kronecker-embedding"
    assert small.h[1].attn.c_proj.scales is not None
    assert "low-rank" in small.recipe and small.tokenizer is not None
    # The same line again finds everything finished, and gives the same model.
    before = (folder / "out" / "model.safetensors").read_bytes()
    assert run(capsys, *compress(folder))[0] == 0
    assert (folder / "out" / "model.safetensors").read_bytes() == before
    code, out, _ = run(capsys, "report", folder / "out", "--json")
    told = json.loads(out)
    assert code == 0 and told["planned"] == len(told["matrices"]) == 9
    state = nnx.state(small, nnx.Param)
    count = sum(int(x.size) for x in jax.tree.leaves(state))
    assert told["after"]["parameters"] == count


def test_what_is_there_is_respected(folder, capsys):
    assert run(capsys, *compress(folder))[0] == 0
    code, _, err = run(capsys, *compress(folder, "--seed", "1"))
    assert code == 2 and "another plan (seed was 0, now 1)" in err and "--force" in err
    code, out, err = run(capsys, *compress(folder, "--seed", "1", "--force", "--json"))
    assert code == 0, err
    assert json.loads(out)["settings"]["seed"] == 1
    # A folder with a model that did not come from a plan.
    given = ("compress", folder / "dense", "--recipe", folder / "rules.yaml", "--out")
    code, _, err = run(capsys, *given, folder / "dense")
    assert code == 2 and "holds the model" in err
    lm.save(lm.load(folder / "dense"), folder / "other")
    code, _, err = run(capsys, *given, folder / "other")
    assert code == 2 and "already holds a model" in err
    assert not (folder / "other" / "matrices").exists()
    code, _, err = run(capsys, *compress(folder, model="out"))
    assert code == 2 and "compressed already" in err


def test_a_bag_of_matrices_ends_as_factors_and_a_report(folder, capsys):
    given = compress(folder, model="bag.safetensors", rules="bag.yaml")
    code, out, err = run(capsys, *given)
    assert code == 3, err
    assert "CON" in out and "it holds NaN" in out and "stay dense" in out
    assert "The factors are in" in out
    there = {str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file()}
    ours = {x for x in there if x.startswith("out/")}
    kept = [f"out/matrices/0000{i}" for i in range(5)]
    expected = {f"{x}.json" for x in kept} | {f"{x}.safetensors" for x in kept}
    plan = store.read_plan(storage.find(str(folder / "out")))
    failed = [x.index for x in plan.tasks if x.name == "CON"][0]
    expected -= {f"out/matrices/0000{failed}.safetensors"}
    assert ours == expected | {"out/plan.json", "out/report.png", "out/.lock-0"}
    code, out, _ = run(capsys, "report", folder / "out")
    assert code == 3 and "5 of 5 matrices are finished" in out
    assert (folder / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_bag_replaces_a_model_at_its_end(folder, capsys, monkeypatch):
    run(capsys, *compress(folder))
    given = compress(folder, "--force", model="bag.safetensors", rules="bag.yaml")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(matrices.engine, "run", lambda *_, **__: sys.exit(1))
        run(capsys, *given)
    lm.load(folder / "out")
    code, _, err = run(capsys, *given)
    assert code == 3, err
    with pytest.raises(OSError):
        lm.load(folder / "out")


def test_a_figure_that_cannot_be_written_is_no_failure(folder, capsys):
    (folder / "out" / "report.png").mkdir(parents=True)
    code, out, err = run(capsys, *compress(folder))
    assert code == 0 and "The model is in" in out
    assert "There is no figure" in err
    lm.load(folder / "out")
    code, out, err = run(capsys, "report", folder / "out")
    assert code == 0 and "9 of 9" in out and "There is no figure" in err


def test_a_table_keeps_its_digits(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    run(capsys, *compress(folder, model="bag.safetensors", rules="bag.yaml"))
    _, out, _ = run(capsys, "report", folder / "out")
    lines = [line for line in out.splitlines() if "6x8" in line]
    assert lines and all("4/5" in line and line.endswith("│") for line in lines)


def test_what_is_missing_or_damaged_is_told(folder, capsys):
    code, _, err = run(capsys, *compress(folder, model="no.safetensors"))
    assert code == 2 and "there is no file" in err and "no.safetensors" in err
    code, _, err = run(capsys, *compress(folder, "--tolerance", "nan"))
    assert code == 2 and "must be positive" in err
    assert not (folder / "out").exists()
    run(capsys, *compress(folder))
    kept = folder / "out" / "matrices" / "00000.json"
    before = kept.stat().st_mtime_ns
    plan = folder / "out" / "plan.json"
    plan.write_bytes(plan.read_bytes()[:100])
    code, _, err = run(capsys, *compress(folder))
    assert code == 2 and "remove it to keep what is finished" in err
    plan.unlink()
    assert run(capsys, *compress(folder))[0] == 0
    assert kept.stat().st_mtime_ns == before


def test_names_cannot_command_a_terminal(folder, capsys):
    path = folder / "bag.safetensors"
    bag = {k: np.array(x) for k, x in safetensors.numpy.load_file(path).items()}
    bag["a\x1b[31m"][...] = np.nan
    safetensors.numpy.save_file(bag, path)
    rule = "method: low-rank, rank: 2, weighting: none}"
    text = f"rules: [{{match: 'a*', {rule}, {{match: '*', {rule}]"
    (folder / "bag.yaml").write_text(text)
    given = compress(folder, model="bag.safetensors", rules="bag.yaml")
    code, out, err = run(capsys, *given)
    assert code == 3
    assert "both match a\\x1b[31m: the first decides" in err
    assert "a\\x1b[31m" in out and "\x1b[31m" not in out + err


def test_a_report_of_a_run_that_goes_on(folder, capsys):
    given = compress(folder, model="bag.safetensors", rules="bag.yaml")
    run(capsys, *given)
    (folder / "out" / "matrices" / "00004.json").unlink()
    code, out, _ = run(capsys, "report", folder / "out")
    assert "4 of 5 matrices are finished" in out
    with storage.find(str(folder / "out")).hold(0):
        code, out, _ = run(capsys, "report", folder / "out")
        assert "4 of 5" in out
        code, _, err = run(capsys, *given)
        assert code == 2 and "another run works in" in err


def test_a_dry_run_plans_and_writes_nothing(folder, capsys):
    code, out, err = run(capsys, *compress(folder, "--dry-run"))
    assert code == 0, err
    assert "Nothing was written" in out and not (folder / "out").exists()
    code, out, _ = run(capsys, *compress(folder, "--dry-run", "--json"))
    told = json.loads(out)
    assert sum(one["matrices"] for one in told["groups"]) == 9
    assert told["after"] < told["before"] and told["seconds"] > 0
    run(capsys, *compress(folder))
    code, out, _ = run(capsys, "report", folder / "out", "--json")
    assert json.loads(out)["after"]["parameters"] == told["after"]
    assert json.loads(out)["plan"] == told["plan"]


def test_results_go_to_a_url(folder, capsys, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.05)
    url = "memory://whole/out"
    given = ("compress", folder / "dense", "--recipe", folder / "rules.yaml")
    code, out, err = run(capsys, *given, "--out", url)
    assert code == 0, err
    place, fetched = storage.find(url), folder / "fetched"
    fetched.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (fetched / name).write_bytes(place.read(name))
    assert nn.tables(lm.load(fetched))
    code, out, _ = run(capsys, "report", url)
    assert code == 0 and "9 of 9" in out


@pytest.mark.parametrize("more", [("--dry-run",), ("--distributed",)])
def test_what_needs_a_text_has_no_plan(folder, capsys, more):
    text = RULES.replace("weighting: none", "weighting: input", 1)
    (folder / "rules.yaml").write_text(text)
    code, _, err = run(capsys, *compress(folder, *more))
    assert code == 2 and "recipes without weights" in err


def test_an_encoder_is_no_language_model(folder, capsys):
    config = {"model_type": "bert", "hidden_size": 8}
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text(json.dumps(config))
    (folder / "bag.safetensors").rename(folder / "bert" / "model.safetensors")
    code, _, err = run(capsys, *compress(folder, model="bert", rules="bag.yaml"))
    assert code == 3, err
    text = (folder / "bag.yaml").read_text().replace(", weighting: none", "")
    (folder / "bag.yaml").write_text(text)
    code, _, err = run(capsys, *compress(folder, model="bert", rules="bag.yaml"))
    assert code == 2 and "weighting: none" in err


@pytest.mark.parametrize("port", [opt, llama])
def test_kernels_are_turned_as_the_model_has_them(port, tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2, "model_type": port.__name__.rpartition(".")[2]}
    extra = {
        opt: {"ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": 16},
        llama: {"intermediate_size": 24, "max_position_embeddings": 32},
    }[port]
    config = port.Config.from_hugging_face({**sizes, **extra})
    model = port.Model(config, rngs=nnx.Rngs(0))
    lm.save(model, tmp_path / "dense")
    opened = wholes.open_whole(tmp_path / "dense")
    layers = nn.linear_layers(model)
    assert opened.tensors.keys() == layers.keys() - {"lm_head"}
    for name, kernel in opened.tensors.items():
        np.testing.assert_array_equal(kernel, layers[name].kernel[...])


@pytest.mark.parametrize("fault", ["model", "out"])
def test_who_cannot_begin_lets_the_others_know(folder, fault, monkeypatch, capsys):
    """Of two processes this one has no model, or cannot write."""
    told = []

    def exchange(self, words):
        told.append(list(words))
        return [[1, *words[1:]], list(words)]  # the other one is well, and agrees

    def join(*_):
        return processes.Hosts(1, 2)

    monkeypatch.setattr(processes, "join", join)
    monkeypatch.setattr(processes.Hosts, "exchange", exchange)
    if fault == "model":
        (folder / "dense" / "model.safetensors").unlink()
    else:
        (folder / "out").write_text("a file")
    code, _, err = run(capsys, *compress(folder, "--distributed"))
    assert code == 2 and ("holds no weights" in err or "cannot write" in err)
    # What is there could be read, in the second case.
    well = [(9, 1)] * (fault == "out")
    assert [(len(words), words[0]) for words in told] == [*well, (9, 0)]


def start(folder, count, process, port):
    command = [sys.executable, "-m", "kronjax", *map(str, compress(folder, "--json"))]
    command += ["--distributed", "--coordinator", f"127.0.0.1:{port}"]
    command += ["--processes", str(count), "--process", str(process)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_share_a_model(folder, capsys, count):
    port = free_port()
    runs = [start(folder, count, i, port) for i in range(count)]
    ended = [run.communicate(timeout=300) for run in runs]
    for one, (_, err) in zip(runs, ended, strict=True):
        assert one.returncode == 0, err
    told = json.loads(ended[0][0])
    assert told["planned"] == len(told["matrices"]) == 9
    assert all(out == "" for out, _ in ended[1:])
    names = os.listdir(folder / "out")
    assert {f".lock-{i}" for i in range(count)} <= set(names)
    shared = (folder / "out" / "model.safetensors").read_bytes()
    (folder / "out").rename(folder / "shared")
    assert run(capsys, *compress(folder))[0] == 0
    assert (folder / "out" / "model.safetensors").read_bytes() == shared


def test_processes_that_see_different_rules_part(folder):
    port = free_port()
    first = start(folder, 2, 0, port)
    text = RULES.replace("rank: 4", "rank: 5")
    (folder / "others.yaml").write_text(text)
    command = [sys.executable, "-m", "kronjax"]
    command += map(str, compress(folder, rules="others.yaml"))
    command += ["--distributed", "--coordinator", f"127.0.0.1:{port}"]
    command += ["--processes", "2", "--process", "1"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=300)
    _, err = first.communicate(timeout=300)
    assert second.returncode == first.returncode == 2
    for text in (err, second.stderr):
        assert "sees another model or other rules" in text
