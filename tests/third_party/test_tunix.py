"""tunix's trainer for LoRA, unmodified, on an adapted model of tunix."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxlora
import jaxlora.nnx
from jaxlora.nnx import Factor, Frozen
from third_party.base import drawn, relaxed

peft_trainer: Any = pytest.importorskip(
    "tunix.sft.peft_trainer", reason="google-tunix is not installed"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own imports
BATCH, LENGTH, VOCABULARY, STEPS = 8, 12, 16, 12


@pytest.fixture
def module():
    """Return a small Qwen3 that has not been trained."""
    always_shard = flax.config.flax_always_shard_variable
    qwen3: Any = pytest.importorskip("tunix.models.qwen3.model")  # it sets this for the process
    config = qwen3.ModelConfig(
        num_layers=1,
        vocab_size=VOCABULARY,
        embed_dim=16,
        hidden_dim=24,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    try:
        flax.config.update("flax_always_shard_variable", False)  # also where it was imported before
        with relaxed():
            module = nnx.eval_shape(lambda: qwen3.Qwen3(config, rngs=nnx.Rngs(0)))
    finally:
        flax.config.update("flax_always_shard_variable", always_shard)
    nnx.update(module, drawn(nnx.state(module)))  # its MLPs start at zero and would get no gradient
    return module


def batches():
    """Yield batches of sequences that count in steps of three, as the trainer takes them."""
    starts = np.random.default_rng(0).integers(0, VOCABULARY, (STEPS, BATCH, 1))
    mask = np.tril(np.ones((LENGTH, LENGTH), bool))
    for start in starts:
        yield {
            "input_tokens": jnp.asarray((start + 3 * np.arange(LENGTH)) % VOCABULARY, jnp.int32),
            "input_mask": jnp.ones((BATCH, LENGTH)),
            "positions": jnp.tile(jnp.arange(LENGTH), (BATCH, 1)),
            "attention_mask": jnp.tile(mask, (BATCH, 1, 1)),
        }


def adapt(module, seed):
    batch = next(batches())
    tokens, positions, mask = (batch[k] for k in ("input_tokens", "positions", "attention_mask"))
    config = jaxlora.LoRAConfig(rank=2, alpha=4, exclude=("input_embedding",))
    key = jax.random.key(seed)
    return jaxlora.nnx.adapt(key, module, tokens, positions, None, mask, config=config)


def trainer(adapted, folder):
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=STEPS, max_steps=STEPS, checkpoint_root_directory=str(folder)
    )
    return peft_trainer.PeftTrainer(adapted, optax.adamw(2e-2), config)


def arrays(node, kind):
    return {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(node, kind))}


@nnx.jit
def loss(model):
    batch = next(batches())
    tokens = batch["input_tokens"]
    logits, _ = model(tokens, batch["positions"], None, batch["attention_mask"])
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return entropy.mean()


def test_trainer_of_tunix_trains_the_factors_alone(module, tmp_path):
    with relaxed():
        adapted = adapt(module, 0)
        frozen, factors = arrays(adapted, Frozen), arrays(adapted, Factor)
        first = float(loss(adapted))
        tunix = trainer(adapted, tmp_path)
        tunix.train(batches())
        tunix.close()
        last = float(loss(adapted))
        assert last < 0.8 * first
        merged = jaxlora.nnx.merge(adapted)
        assert abs(float(loss(merged)) - last) < 1e-4

        jax.tree.map(np.testing.assert_array_equal, arrays(adapted, Frozen), frozen)
        trained = arrays(adapted, Factor)
        assert len(frozen) == len(arrays(module, nnx.Param))
        assert len(factors) == 2 * len(adapted.factors)
        assert all((trained[path] != factors[path]).any() for path in factors)

        # it saves what is a LoRAParam, and goes on from there
        again = adapt(module, 1)
        resumed = trainer(again, tmp_path)
        assert resumed.train_steps == STEPS
        resumed.close()
        jax.tree.map(np.testing.assert_array_equal, arrays(again, Factor), trained)
        assert float(loss(again)) == last
