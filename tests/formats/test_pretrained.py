"""An adapter that PEFT made of a pretrained model, on its real weights."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import bert
import fetch
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora.formats import peft

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests/golden/peft_minilm"
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(
        not fetch.has("model.safetensors", "tokenizer.json", fetch.RATINGS),
        reason="the weights and sentences are not in the cache: run examples/sentiment.py once",
    ),
]


def load(folder):
    _, sites = bert.shapes_and_sites()
    return peft.load(folder, sites=sites, names=bert.NAMES)


def test_it_computes_what_it_does_in_peft():
    base = {"params": bert.encoder_params(fetch.minilm()[0])}
    wanted = np.load(FOLDER / "vectors.npz")
    encode: Any = jaxlora.lora(bert.SentenceEncoder().apply, strict=True)
    tokens = wanted["tokens"].astype(np.int32)
    got = encode(jaxlora.bind(base, load(FOLDER)), tokens, tokens != 0)
    np.testing.assert_allclose(got, wanted["vectors"], rtol=1e-4, atol=1e-5)
    assert jnp.abs(got - encode(base, tokens, tokens != 0)).max() > 0.01


def test_training_goes_on_from_it(tmp_path):
    script = ROOT / "examples/from_peft.py"
    options = ["--steps=3", "--batch=4", "--out", tmp_path / "out"]
    command = [sys.executable, script, FOLDER, *options]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert out.startswith("12 adapters from")
    before, after = load(FOLDER), load(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all((before[path].b != after[path].b).any() for path in before)
