# pyright: strict, reportMissingTypeStubs=false
"""A user's script that calls every public function, as a type checker sees it in strict mode.

Its values are looked at in test_public_names.py.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import optax

import jaxlora
from jaxlora import algebra, analysis, calibration, initializers, optim, planning
from jaxlora.analysis import plot
from jaxlora.formats import Names, Place, diffusion, models, peft, safetensors
from jaxlora.formats import names as formats_names

X = jax.random.normal(jax.random.key(9), (5, 8))
Params = dict[str, jax.Array]
grad: Callable[..., Callable[..., Any]] = jax.grad  # pyright: ignore  of unknown types itself


def model(params: Params, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]) @ params["down"]


def loss(params: Params, x: jax.Array) -> jax.Array:
    return jnp.mean(model(params, x) ** 2)


def weights(seed: int) -> Params:
    up, down = jax.random.split(jax.random.key(seed))
    return {"up": jax.random.normal(up, (8, 6)), "down": jax.random.normal(down, (6, 8))}


def trained(seed: int) -> tuple[Any, Any]:
    """Adapt and train: sites, targets, a step in each of two ways."""
    params = weights(0)
    sites = jaxlora.find_sites(model, params, X)
    ranks: dict[str, int] = {site.path: min(2, site.max_rank) for site in sites}
    config = jaxlora.LoRAConfig(rank=2, alpha=4.0, rank_pattern=ranks, initializer="kaiming")
    adapted = jaxlora.init(jax.random.key(seed), model, params, X, config=config)
    base, adapters = jaxlora.split(adapted)

    def of_adapters(adapters: Any) -> jax.Array:
        tree = jaxlora.dropout(jaxlora.bind(base, adapters), jax.random.key(1), 0.1)
        return jaxlora.lora(loss)(tree, X)

    steps = (optim.scale_rates(b=4.0), optim.decay_factors(a=0.1), optim.precondition(damping=1.0))
    tx = optax.chain(*steps, optax.sgd(0.1))
    updates, _ = tx.update(grad(of_adapters)(adapters), tx.init(adapters), adapters)
    adapters: Any = optax.apply_updates(adapters, updates)

    frozen = optim.freeze(optax.sgd(0.1)) if seed else jaxlora.freeze(optax.sgd(0.1), train="b")
    tree = jaxlora.bind(base, adapters)
    grads = grad(jaxlora.lora(loss), allow_int=True)(tree, X)
    updates, _ = frozen.update(grads, frozen.init(tree), tree)
    return base, jaxlora.split(optax.apply_updates(tree, updates))[1]


def summed() -> dict[str, float]:
    """Call the algebra of adapters."""
    base, one = trained(0)
    key, two = jax.random.key(2), trained(1)[1]
    methods: list[algebra.Method] = [
        algebra.Concatenation(),
        algebra.Linear(),
        algebra.MagnitudePruning(0.5),
        algebra.Ties(density=0.5, majority="frequency"),
        algebra.DareLinear(0.5, key),
        algebra.DareTies(0.5, key, "total"),
        algebra.Svd(algebra.Ties(0.5), rank=2),
    ]
    sums = [algebra.combine([one, two], [0.5, 0.5], method) for method in methods]
    sums.append(peft.combine([one, two], [0.5, 0.5], "ties_svd", svd_rank=2, density=0.5))
    wide = algebra.pad(algebra.scale(algebra.add(one, two), 0.5), 8)
    tree = jaxlora.bind(base, algebra.truncate(wide, 4))
    change = algebra.delta(tree, "up")
    found: algebra.Extracted = algebra.extract(base, jaxlora.merge(tree), 4)
    return {
        "difference": float(jnp.abs(change - algebra.delta(jaxlora.bind(base, wide), "up")).max()),
        "energy": min(found.energy.values()),
        "sets": float(len(sums)),
    }


def no_place(name: str) -> str | None:
    """Return the place of a name: this pair has none."""


def no_names(path: str) -> list[str]:
    """Return the names of a path."""
    return []


def travelled(folder: pathlib.Path) -> dict[str, float]:
    """Write a folder for PEFT, and read it."""
    base, adapters = trained(0)
    names = Names(("model.{name}_proj", "{name}"), (no_place, no_names))
    places: dict[str, Place] = names.table({"up": (8, 6)})
    peft.save(folder / "peft", adapters, names=names, base_model_name_or_path="name")
    sites: jaxlora.targets.Sites = jaxlora.find_sites(model, base, X)
    loaded = peft.load(folder / "peft", sites=sites, names=names)
    shapes = {"one.weight": (6, 8), "two.weight": (3, 6)}
    found: Names = formats_names.find(shapes, sites, known=[("two", "down", "linear")])
    bert: Names = models.BERT_FLAX.within(file="bert.", tree="params/")
    places |= found.table({"up": (8, 6)}) | bert.table({"params/pooler/dense/bias": (4,)})
    style: diffusion.Style = "kohya"
    file = folder / "it.safetensors"
    diffusion.save(file, adapters, names=names, style=style, sites=sites, metadata={"a": "b"})
    loaded |= diffusion.load(file, sites=sites, names=names, ignore=("unet.*",))
    both = Names(("{name}", "{name}"))
    tree = jaxlora.bind(base, adapters)
    safetensors.save(folder / "weights", tree, both, sites=sites, max_shard_bytes=10**6)
    merged = safetensors.load(folder / "weights", both, base, sites=sites, ignore=("head",))
    return {
        "merged": float(jnp.abs(merged["up"] - jaxlora.merge(tree)["up"]).max()),
        "places": float(len(places)),
        "loaded": float(jnp.abs(loaded["up"].a - adapters["up"].a).max()),
    }


def started() -> dict[str, float]:
    """Start from weights, data and quantized weights."""
    params, key, config = weights(3), jax.random.key(4), jaxlora.LoRAConfig(rank=2)
    moments = calibration.moments(model, params, [(X,)], config=config)
    gradients = calibration.gradients(loss, params, [(X,)], config=config)
    ranks = initializers.eva_ranks(moments, 2)
    starts: list[initializers.FromWeight] = [
        initializers.pissa(4),
        initializers.eva(moments),
        initializers.corda(moments, keep=True),
        initializers.lora_ga(gradients),
    ]
    for start in starts:
        made = jaxlora.LoRAConfig(rank=2, initializer=start)
        jaxlora.init(key, model, params, X, config=made)
    for draw in (
        initializers.uniform,
        initializers.normal,
        initializers.kaiming,
        initializers.orthogonal,
    ):
        assert draw(key, (8, 2), jnp.float32).shape == (8, 2)
    pissa = jaxlora.LoRAConfig(rank=2, initializer="pissa")
    adapted = jaxlora.init(key, model, params, X, config=pissa)
    _, adapters = jaxlora.split(adapted)
    plain = algebra.rebase(adapters, adapters, base=params)

    how = jaxlora.QuantizationConfig("int8", block_size=4)
    quantized = jaxlora.quantize(model, params, X, config=how)
    loftq = jaxlora.LoRAConfig(rank=2, initializer=initializers.loftq(params))
    nearer = jaxlora.merge(jaxlora.init(key, model, quantized, X, config=loftq))
    error = jaxlora.dequantize(quantized)["up"] - params["up"]
    return {
        "ranks": float(sum(ranks.values())),
        "rebased": float(plain["up"].rank),
        "quantized": float(jnp.abs(error).mean()),
        "loftq": float(jnp.abs(nearer["up"] - params["up"]).mean()),
    }


def stored(folder: pathlib.Path) -> dict[str, float]:
    """Report, save, load, merge and take out again."""
    base, adapters = trained(0)
    tree = jaxlora.bind(base, adapters)
    summary: jaxlora.reports.Summary = jaxlora.summary(tree)
    report: jaxlora.reports.Report = jaxlora.explain(model, tree, X, platform="tpu")
    kinds = {use.kind for uses in report.uses.values() for use in uses}
    jaxlora.save_adapters(folder / "adapters", adapters)
    jaxlora.save_merged(folder / "merged", tree)
    loaded = jaxlora.load_adapters(folder / "adapters", base=base)
    merged = jaxlora.merge(jaxlora.bind(base, loaded))
    back = jaxlora.unmerge(merged, loaded)
    errors: dict[str, jax.Array] = jaxlora.merge_error(tree)
    marked: list[bool] = jax.tree.leaves(jaxlora.mask(tree))
    named: list[str] = jax.tree.leaves(jaxlora.labels(tree))
    return {
        "trainable": float(summary.trainable),
        "extra": float(report.cost.flops),
        "kinds": float(len(kinds)),
        "back": float(jnp.abs(back["up"] - base["up"]).max()),
        "error": max(float(error) for error in errors.values()),
        "marked": float(sum(marked)),
        "named": float(named.count("trained")),
    }


def module() -> dict[str, float]:
    """Adapt an NNX module, and merge it."""
    linear = flax.nnx.Linear(8, 6, rngs=flax.nnx.Rngs(0))
    config = jaxlora.LoRAConfig(rank=2)
    adapted = jaxlora.nnx.adapt(jax.random.key(5), linear, X, config=config)
    same = jaxlora.nnx.Adapted(linear, adapted.adapters())
    merged: flax.nnx.Linear = jaxlora.nnx.merge(same)
    return {"module": float(jnp.abs(merged(X) - linear(X)).max())}


def looked_at() -> dict[str, float]:
    """Call what looks at adapters, and draw it."""
    base, one = trained(0)
    two, tree = trained(1)[1], jaxlora.bind(base, one)
    found: analysis.Spectra = analysis.spectrum(tree)
    alike: analysis.Similarity = analysis.similarity(one, two, side="out", of="factor")
    stronger: analysis.Amplification = analysis.amplification(base, one)
    strange: analysis.Intruders = analysis.intruders(base, one, k=3, epsilon=0.9)
    left = analysis.without_intruders(base, one, k=3, epsilon=0.9)
    tuned: Params = jaxlora.merge(tree)
    change = analysis.explained(tuned, (1, 2), base=base)
    axes = [plot.spectra(found), plot.energy(found), plot.similarity(alike["up"])]
    axes.append(plot.training({"lora": [2.0, 1.0]}))
    return {
        "values": float(found["up"].values.size),
        "phi": float(alike["up"][-1, -1]),
        "stronger": float(stronger["up"]),
        "taken off": float(left["up"].rank - one["up"].rank - strange["up"].count),
        "kept": float(change["up"].energy[-1]),
        "pictures": float(len(axes)),
    }


def planned() -> dict[str, float]:
    """Plan a run, count what it trains, and ask where to start."""
    params = weights(0)
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    rules = planning.Rules(alpha=4.0)
    start: planning.Recommendation = planning.recommend(
        parameters=7e9, tokens=1e6, examples=500, task="simple", rules=rules
    )
    config = jaxlora.LoRAConfig(rank=2, alpha=start.config().alpha)
    found: planning.Plan = planning.plan(
        loss, params, shape, config=config, optimizer=optax.adam(start.learning_rate.value)
    )
    full: planning.Step | None = found.full
    sites = jaxlora.find_sites(loss, params, shape)
    rank: planning.Choice = start.rank
    return {
        "trained": float(found.trained),
        "full": float(full.trained) if full else 0.0,
        "sites": float(planning.count(sites, config)),
        "shapes": float(planning.count({"up": (8, 6), "down": (6, 8)}, 2)),
        "rank": float(rank.value),
    }
