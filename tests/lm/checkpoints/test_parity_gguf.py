"""Comparison of the reader of GGUF files with that of transformers, on torch."""

import numpy as np
import pytest

from bench import gguf_files
from kronjax import lm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_transformers(tmp_path, quantization, tied):
    model = gguf_files.random_model(tie_word_embeddings=tied)
    gguf_files.write(tmp_path / "a.gguf", model, quantization)
    ours = lm.load(tmp_path / "a.gguf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", dtype=torch.float32
    ).eval()
    tokens = np.random.default_rng(0).integers(0, 262, (2, 40)).astype(np.int32)
    with torch.inference_mode():
        expected = theirs(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    got = np.asarray(ours(tokens))
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()
