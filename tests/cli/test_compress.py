"""`kronjax plan`, `compress` and `report` of language models, as a user types them."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressions import RULES, SPECTRAL, compress, run
from flax import nnx
from helpers import KRONY_PT, free_port

from kronjax import lm, nn, recipe
from kronjax.io import heartbeat, storage
from kronjax.lm.compression import record
from kronjax.runs.store import Store

WEIGHTED = """
rules:
- match: "h.*.attn.c_proj"
  method: kronecker
  terms: [{a_shape: [8, 8]}]
  norm: spectral
  weighting: input
- {match: "h.*.mlp.c_fc", method: low-rank, rank: 4, weighting: input+gradient}
- {match: "*", method: keep}
"""


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def interrupt_after(monkeypatch, count):
    """Let the store raise KeyboardInterrupt after some results; return their names."""
    put, names = Store.put, []

    def interrupted(self, task, *rest):
        if len(names) == count:
            raise KeyboardInterrupt
        names.append(task.name)
        put(self, task, *rest)

    monkeypatch.setattr(Store, "put", interrupted)
    return names


def test_a_budget_and_a_text_make_a_smaller_model_with_a_report(folder, capsys):
    given = ("compress", folder / "dense", "--budget", "0.6")
    given += ("--calibrate", folder / "text.txt", "--tokens", "600")
    code, out, err = run(capsys, *given, "--out", folder / "small")
    assert code == 0, err
    assert "Moments of inputs and gradients take up to" in err
    assert "report.html shows every layer" in out
    found = json.loads((folder / "small" / "report.json").read_text())
    assert found["after"]["linear_parameters"] < found["before"]["linear_parameters"]
    assert found["perplexity"]["compressed"]["tokens_scored"] > 0
    assert len(found["analysis"]["layers"]) == 8
    page = (folder / "small" / "report.html").read_text()
    assert "Norms and ranks" in page and "mean stable rank" in page
    names = {path.name for path in (folder / "small").iterdir()}
    assert {"config.json", "model.safetensors", "recipe.yaml", "report.html"} <= names
    assert not [name for name in names if name.startswith(".kronjax")]
    small = lm.load(folder / "small")
    kinds = {nn.describe(x)["kind"] for x in nn.linear_layers(small).values()}
    assert "interpolative" in kinds
    assert recipe.loads(small.recipe).rules
    # The same command again is finished; another one would replace the model.
    before = weights(folder / "small")
    code, out, _ = run(capsys, *given, "--out", folder / "small")
    assert code == 0 and "finished already" in out and "report.html" in out
    more = ("--evaluate", folder / "text.txt")
    code, _, err = run(capsys, *given, *more, "--out", folder / "small")
    assert code == 2 and "another command made; --force" in err
    assert weights(folder / "small") == before
    code, out, err = run(capsys, "report", folder / "small", "--json")
    assert code == 0 and json.loads(out) == found
    lm.export(small, folder / "export")
    again = lm.load(folder / "export")
    tokens = np.arange(12)[None]
    np.testing.assert_allclose(again(tokens), small(tokens), atol=1e-4)


def test_plans_are_printed_written_and_carried_out(folder, capsys):
    plan = folder / "plan.yaml"
    given = ("plan", folder / "dense", "--budget", "0.5", "--out", plan, "--json")
    code, out, err = run(capsys, *given)
    assert code == 0, err
    values = json.loads(out)
    assert values["weighting"] == "none"
    assert all("reason" in one for one in values["layers"])
    given = ("compress", folder / "dense", "--recipe", plan, "--out", folder / "small")
    code, out, err = run(capsys, *given, "--json")
    assert code == 0, err
    after = json.loads(out)["after"]
    assert after["parameters"] == values["after"]["parameters"]
    # For rules the config.json is enough.
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_bytes(
        (folder / "dense" / "config.json").read_bytes()
    )
    code, out, err = run(capsys, "plan", folder / "bare", "--recipe", plan)
    assert code == 0, err
    assert f"{values['after']['parameters']:,} of" in out


def test_plans_of_gpt2_count_what_the_literature_counts(tmp_path, capsys):
    config = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
    config |= {"n_embd": 768, "n_layer": 12, "n_head": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    # All of them: see test_nn.
    for a_shape, total in list(KRONY_PT.items())[::7]:
        rules = [
            {"match": f"h.*.mlp.{name}", "method": "kronecker", "terms": [term]}
            for name, term in (
                ("c_proj", {"a_shape": a_shape}),
                ("c_fc", {"a_shape": a_shape[::-1]}),
            )
        ]
        path = tmp_path / "rules.yaml"
        path.write_text(json.dumps({"rules": rules}))  # which is YAML, too
        code, out, err = run(capsys, "plan", tmp_path, "--recipe", path, "--json")
        assert code == 0, err
        assert json.loads(out)["after"]["parameters"] == total


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "either --budget or --recipe"),
        (("--budget", "80%"), "write a fraction"),
        (("--budget", "100"), "leaves nothing for the linear layers"),
        (("--recipe", "kronypt-81"), "did you mean kronypt-81m"),
        (("--recipe", "svd-half", "--weighting", "none"), "says itself"),
    ],
)
def test_mistakes_leave_nothing_behind(folder, capsys, given, message):
    out = folder / "small"
    code, _, err = run(capsys, "compress", folder / "dense", *given, "--out", out)
    assert code == 2
    assert message in err
    assert not (out / "config.json").exists()


def test_a_folder_that_cannot_be_made_is_told_before_the_work(folder, capsys):
    given = ("compress", folder / "dense", "--budget", "0.5")
    code, _, err = run(capsys, *given, "--out", folder / "text.txt" / "small")
    assert code == 2
    assert "text.txt" in err


@pytest.mark.parametrize("rules", [SPECTRAL, WEIGHTED])
def test_measuring_changes_no_weight_and_both_doors_agree(
    folder, capsys, untimed, rules
):
    text = ("--calibrate", folder / "text.txt", "--tokens", "600")
    plain = text if rules is WEIGHTED else ()
    code, _, err = run(capsys, *compress(folder, *plain, rules=rules, out="alone"))
    assert code == 0, err
    layers = {x["name"]: x for x in record.read(folder / "alone")["layers"]}
    for name in ("h.0.attn.c_proj", "h.1.attn.c_proj"):
        assert 0 <= layers[name]["gap"] < 0.5
        assert layers[name]["relative"] > 0
    assert "gap" not in layers["h.0.mlp.c_proj"]
    given = compress(
        folder, *text, "--evaluate", folder / "text.txt", rules=rules, out="measured"
    )
    code, _, err = run(capsys, *given)
    assert code == 0, err
    assert record.read(folder / "measured")["perplexity"]["compressed"]
    assert weights(folder / "measured") == weights(folder / "alone")
    options = {"calibration": folder / "text.txt", "tokens": 600} if plain else {}
    dense = lm.load(folder / "dense")
    small = lm.compress(dense, folder / "rules.yaml", **options, progress=False)
    lm.save(small, folder / "function")
    assert weights(folder / "function") == weights(folder / "alone")


def test_a_model_comes_out_as_its_best_sums(folder, tiny, capsys, untimed):
    code, out, err = run(capsys, *compress(folder))
    assert code == 0, err
    assert "report.html shows every layer" in out
    assert "both match h.0.mlp.c_fc and 1 more: the first decides" in err
    small = lm.load(folder / "out")
    dense = {**nn.linear_layers(tiny), **nn.tables(tiny)}
    kinds = {}
    for name, layer in {**nn.linear_layers(small), **nn.tables(small)}.items():
        kinds[name] = nn.describe(layer)["kind"]
        if name in ("wpe", "lm_head"):
            continue
        kernel = np.float64(nn.materialize(dense[name]))
        left = kernel - np.float64(layer.materialize())
        s = np.linalg.svd(kernel, compute_uv=False)
        rank = {"wte": 6, "h.1.attn.c_proj": 3}.get(name, 4)
        if kinds[name] == "interpolative":
            rank = layer.rest.shape[0]
        assert np.linalg.norm(left, 2) == pytest.approx(s[rank], rel=1e-4)
    assert kinds["h.0.mlp.c_fc"] == "interpolative" and kinds["wpe"] == "dense"
    assert kinds["wte"] == "kronecker-embedding"
    assert small.h[1].attn.c_proj.scales is not None
    assert "low-rank" in small.recipe and small.tokenizer is not None
    code, out, _ = run(capsys, "report", folder / "out", "--json")
    found = json.loads(out)
    assert code == 0 and sum("relative" in x for x in found["layers"]) == 9
    state = nnx.state(small, nnx.Param)
    count = sum(int(x.size) for x in jax.tree.leaves(state))
    assert found["after"]["parameters"] == count
    # With --force the same model is made again; a compressed one cannot be compressed.
    before = weights(folder / "out")
    assert run(capsys, *compress(folder))[0] == 0
    assert run(capsys, *compress(folder, "--seed", "1"))[0] == 2
    (folder / "out/report.json").rename(folder / "report.json")
    assert run(capsys, *compress(folder))[0] == 2
    assert run(capsys, *compress(folder, "--force"))[0] == 0
    assert weights(folder / "out") == before
    (folder / "out").rename(folder / "dense2")
    given = ("compress", folder / "dense2", "--recipe", folder / "rules.yaml", "--out")
    code, _, err = run(capsys, *given, folder / "out")
    assert code == 2 and "compressed already" in err
    code, _, err = run(capsys, *given, folder / "dense2", "--force")
    assert code == 2 and "holds the model" in err


def test_an_interrupted_compression_resumes(folder, capsys, monkeypatch, untimed):
    spectral = SPECTRAL.rpartition("- {")[0].strip()
    spectral = spectral.replace("h.*.attn.c_proj", "h.*.mlp.c_proj")
    rules = RULES.replace("rules:", spectral)
    assert run(capsys, *compress(folder, rules=rules, out="whole"))[0] == 0
    with monkeypatch.context() as patch:
        done = interrupt_after(patch, 4)
        code, _, err = run(capsys, *compress(folder, rules=rules))
    assert code == 130 and "interrupted" in err and len(done) == 4
    assert "mlp.c_proj" in done[-1]  # the other one of its pool is missing
    assert not (folder / "out" / "config.json").exists()
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    code, out, _ = run(capsys, "report", folder / "out", "--open")
    assert code == 0 and "4 of 9 matrices are finished" in out
    work = folder / "out" / ".kronjax-work"
    assert opened == [(work / "fits" / "report.html").as_uri()]
    # Another seed would be another plan.
    given = compress(folder, "--seed", "1", rules=rules)
    code, _, err = run(capsys, *given)
    assert code == 2 and "another plan (seed was 0, now 1)" in err and "--force" in err
    with monkeypatch.context() as patch:
        rest = interrupt_after(patch, None)
        code, _, err = run(capsys, *compress(folder, rules=rules))
    assert code == 0, err
    assert len(rest) == 5 and not set(rest) & set(done)
    assert weights(folder / "out") == weights(folder / "whole")
    assert not work.exists()


def test_the_work_of_the_former_engine_is_refused(folder, capsys, untimed):
    work = folder / "out" / ".kronjax-work"
    work.mkdir(parents=True)
    former = work / "layer-00.safetensors"
    former.write_bytes(b"of an earlier version")
    code, _, err = run(capsys, *compress(folder))
    assert code == 2 and "earlier version" in err and "start anew" in err
    assert former.read_bytes() == b"of an earlier version"
    code, _, err = run(capsys, *compress(folder, "--force"))
    assert code == 0, err
    assert not work.exists() and weights(folder / "out")


def test_a_dry_run_plans_and_writes_nothing(folder, capsys, untimed):
    code, out, err = run(capsys, *compress(folder, "--dry-run"))
    assert code == 0, err
    assert "Nothing was written" in out and not (folder / "out").exists()
    code, out, _ = run(capsys, *compress(folder, "--dry-run", "--json"))
    told = json.loads(out)
    assert sum(group["matrices"] for group in told["groups"]) == 9
    assert told["after"] < told["before"] and told["seconds"] > 0
    run(capsys, *compress(folder))
    assert record.read(folder / "out")["after"]["parameters"] == told["after"]


def test_a_layer_that_fails_stays_dense(folder, tiny, capsys, untimed):
    kernel = tiny.h[0].attn.c_proj.kernel
    kernel[...] = kernel[...].at[0, 0].set(jnp.nan)
    lm.save(tiny, folder / "dense")
    code, out, err = run(capsys, *compress(folder))
    assert code == 3, err
    assert "h.0.attn.c_proj stays dense: it holds NaN or infinite entries." in out
    small = nn.linear_layers(lm.load(folder / "out"))
    assert isinstance(small["h.0.attn.c_proj"], nnx.Linear)
    assert isinstance(small["h.0.attn.c_attn"], nn.KroneckerLinear)
    code, out, _ = run(capsys, "report", folder / "out")
    assert code == 3 and "it holds NaN" in out


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_model_goes_to_a_url(folder, capsys, monkeypatch, untimed, scheme):
    monkeypatch.setattr(heartbeat, "BEAT", 0.05)
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    rules = WEIGHTED.partition("- {")[2]  # a weighted low-rank rule, in sequence
    rules = "rules:\n- {" + rules
    text = ("--calibrate", folder / "text.txt", "--tokens", "600", "--sequential")
    url = f"{scheme}://{folder}/url"
    given = compress(folder, *text, "--out", url, rules=rules)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert run(capsys, *given)[0] == 130
    code, out, err = run(capsys, "report", url)
    assert code == 0, err
    assert "0 of 1 matrices are finished" in out  # of the second block
    code, out, err = run(capsys, *given)
    assert code == 0, err
    place, fetched = storage.find(url), folder / "fetched"
    fetched.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (fetched / name).write_bytes(place.read(name))
    kinds = {
        nn.describe(x)["kind"] for x in nn.linear_layers(lm.load(fetched)).values()
    }
    assert kinds == {"dense", "kronecker"}
    assert not place.names(".kronjax-work/fits-2/matrices")
    code, out, err = run(capsys, "report", url, "--open")
    assert code == 0 and "report.html shows every layer" in out
    assert opened == [f"{url}/report.html"] * (scheme == "file")
    assert ("No browser" in err) == (scheme == "memory")
    code, out, _ = run(capsys, "report", url, "--json", "--open")
    assert json.loads(out)["source"] == str(folder / "dense")


def test_an_encoder_is_no_language_model(folder, capsys):
    config = {"model_type": "bert", "hidden_size": 8}
    (folder / "dense" / "config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, *compress(folder))
    assert code == 2 and "bert" in err
    assert not (folder / "out").exists()


def test_processes_share_a_model(folder, capsys, untimed):
    port = free_port()
    command = [sys.executable, "-m", "kronjax", *map(str, compress(folder))]
    command += ["--distributed", "--coordinator", f"127.0.0.1:{port}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [
        subprocess.Popen([*command, "--processes", "2", "--process", str(i)], **pipes)
        for i in range(2)
    ]
    ended = [process.communicate(timeout=300) for process in runs]
    for process, (_, err) in zip(runs, ended, strict=True):
        assert process.returncode == 0, err
    assert "report.html shows every layer" in ended[0][0]
    assert ended[1][0] == ""
    shared = weights(folder / "out")
    assert run(capsys, *compress(folder, out="alone"))[0] == 0
    assert weights(folder / "alone") == shared
