"""Does a merged adapter cost nothing, and what does it cost to go from one task to another?

Hu et al. 2021 (arXiv:2106.09685), section 4.2: no additional latency, and adapters that are changed
instead of models.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

import jaxlora

from .definitions import model_and_params
from .lab import Lab, Wanted
from .report import Report, figure

CONTEXT = 256  # positions of the cache
SITES = ("query", "key", "value", "attention_out", "gate", "up", "down")


def needs(lab: Lab) -> dict[str, Wanted]:
    """Return no runs: nothing is trained."""
    return {}


def run(lab: Lab) -> Report:
    """Time SmolLM2 and MiniLM without adapters, merged and unmerged, in turn."""
    programs = _language_model(lab.quick) | _encoder(lab)
    seconds = {name: _timed(*found, 3 if lab.quick else 60) for name, found in programs.items()}
    ratios = {
        name: {which: np.divide(found[which], found["base"]) for which in ("merged", "unmerged")}
        for name, found in seconds.items()
    }
    rows = [
        [name, f"{1e3 * np.median(seconds[name]['base']):.1f} ms", *map(_ratio, found.values())]
        for name, found in ratios.items()
    ]
    switching = _switching(lab.quick)
    rows += [
        [name, f"{1e3 * s:.0f} ms, {size / 1e6:.1f} MB", "", ""]
        for name, (size, s) in switching.items()
    ]
    picture, axes = figure(2)
    for ax, which in zip(axes, ("merged", "unmerged"), strict=True):
        drawn = [found[which] for found in ratios.values()]
        ax.boxplot(drawn, tick_labels=list(ratios), showfliers=False)
        ax.axhline(1, color="0.4", linestyle="--")
        ax.tick_params("x", rotation=20)
        ax.set(title=which, ylabel="seconds over the base's")
    figures = {"seconds": seconds, "bytes and seconds to load": switching}
    return Report(("program", "base", "merged", "unmerged"), rows, figures, picture)


Programs = dict[str, tuple[Any, dict[str, Any], tuple[Any, ...]]]


def _language_model(quick: bool) -> Programs:
    """Return what SmolLM2 computes for a prompt, and for the token after a context."""
    model, params = model_and_params(quick)
    prompt = jnp.ones((1, CONTEXT // 4), jnp.int32)
    cache = model.empty_cache(1, CONTEXT)
    variants = _variants(model.apply, params, (prompt,), SITES)
    apply = jaxlora.lora(model.apply, strict=True)
    return {
        "SmolLM2, 64 tokens": (jax.jit(apply), variants, (prompt,)),
        "SmolLM2, a token": (jax.jit(apply), variants, (prompt[:, :1], cache, jnp.int32(128))),
    }


def _encoder(lab: Lab) -> Programs:
    """Return what MiniLM computes for one sentence, and for 32."""
    task = lab.task("sentiment")
    variants = _variants(task.fn, task.params, task.example, task.weights["all"])
    apply = jax.jit(jaxlora.lora(task.fn, strict=True))
    return {
        f"MiniLM, {n} x 24 tokens": (
            apply,
            variants,
            (jnp.ones((n, 24), int), jnp.ones((n, 24), bool)),
        )
        for n in (1, 32)
    }


def _variants(fn: Any, params: Any, args: tuple[Any, ...], targets: Any) -> dict[str, Any]:
    """Return parameters of the base, with adapters merged, and with adapters."""
    config = jaxlora.LoRAConfig(rank=8, alpha=16.0, targets=targets)
    adapted = jaxlora.init(jax.random.key(0), fn, params, *args, config=config)
    base, adapters = jaxlora.split(adapted)
    keys = iter(jax.random.split(jax.random.key(1), 2 * len(adapters)))
    adapters = jax.tree.map(  # as if trained: b is zero before
        lambda x: 0.01 * jax.random.normal(next(keys), x.shape, x.dtype), adapters
    )
    adapted = jaxlora.bind(base, adapters)
    return {"base": params, "merged": jaxlora.merge(adapted), "unmerged": adapted}


def _timed(fn: Any, variants: Mapping[str, Any], args: Any, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each variant, round by round, in turn."""
    seconds: dict[str, list[float]] = {which: [] for which in variants}
    for params in variants.values():
        jax.block_until_ready(fn(params, *args))
    for _ in tqdm(range(rounds), desc="timing", leave=False):
        for which, params in variants.items():
            begun = time.perf_counter()
            jax.block_until_ready(fn(params, *args))
            seconds[which].append(time.perf_counter() - begun)
    return seconds


def _ratio(ratios: np.ndarray) -> str:
    """Return the median of ratios, with the quarter below and the quarter above."""
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _switching(quick: bool) -> dict[str, tuple[int, float]]:
    """Return bytes on disk and seconds to load: of a whole model, and of adapters for one."""
    model, params = model_and_params(quick)
    example = (jnp.ones((1, 8), jnp.int32),)
    adapted = _variants(model.apply, params, example, SITES)["unmerged"]
    base, adapters = jaxlora.split(adapted)
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder, "model"), Path(folder, "adapters")
        jaxlora.save_merged(whole, adapted)
        jaxlora.save_adapters(small, adapters)

        def load_model():
            with ocp.StandardCheckpointer() as checkpointer:
                return checkpointer.restore(whole, params)

        def load_adapters():
            return jaxlora.bind(base, jaxlora.load_adapters(small, base=base))

        return {
            "loading a model": (_size(whole), _seconds(load_model)),
            "loading adapters": (_size(small), _seconds(load_adapters)),
        }


def _seconds(load: Callable[[], Any]) -> float:
    """Return the median of some times, the first left out."""
    found = []
    for _ in range(6):
        begun = time.perf_counter()
        jax.block_until_ready(load())
        found.append(time.perf_counter() - begun)
    return float(np.median(found[1:]))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
