"""Combined adapters, steps and starts, against PEFT on the same factors and weights."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from numpy.testing import assert_allclose

import jaxlora
from jaxlora import Adapter, optim
from jaxlora.formats.peft import combine
from jaxlora.weights import Roles

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    REASON = "install jaxlora[peft] to compare with PEFT"
    torch = pytest.importorskip("torch", reason=REASON)
    peft = pytest.importorskip("peft", reason=REASON)

WEIGHTS = [0.9, -0.4, 0.3]
LAYERS = ("up", "down")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 6)


def adapted(ranks):
    """Return a model with an adapter of each rank, all factors drawn."""
    torch.manual_seed(0)
    configs = [
        peft.LoraConfig(r=rank, lora_alpha=2 * rank + i, target_modules=list(LAYERS))
        for i, rank in enumerate(ranks)
    ]
    model = peft.get_peft_model(Model(), configs[0], adapter_name="0")
    for i, config in enumerate(configs[1:], start=1):
        model.add_adapter(str(i), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def adapters_of(model, name, field="data"):
    """Return an adapter of PEFT as ours; a kernel is ``(in, out)``, the factors are transposed.

    With the field ``"grad"`` its gradient is returned.
    """
    found = {}
    for path in LAYERS:
        layer = getattr(model.base_model.model, path)
        a, b = (
            jnp.asarray(getattr(group[name].weight, field).numpy().T.copy())
            for group in (layer.lora_A, layer.lora_B)
        )
        alpha = float(layer.scaling[name] * a.shape[1])
        found[path] = Adapter(a, b, Roles((), (0,), (1,)), alpha, (a.shape[0], b.shape[1]))
    return found


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cat", {}),
        ("linear", {}),
        ("svd", {}),
        ("svd", {"svd_rank": 2}),
        ("magnitude_prune", {"density": 0.7}),
        ("ties", {"density": 0.7}),
        ("ties", {"density": 0.7, "majority_sign_method": "frequency"}),
        ("magnitude_prune_svd", {"density": 0.7}),
        ("ties_svd", {"density": 0.7, "svd_rank": 2}),
        ("ties_svd", {"density": 0.7, "majority_sign_method": "frequency"}),
        ("dare_linear", {"density": 1.0}),
        ("dare_ties", {"density": 1.0}),
    ],
)
@pytest.mark.filterwarnings("ignore:The density")
def test_combined_product_is_that_of_peft(method, options):
    uses_factors = not method.endswith("svd") and method != "cat"
    model = adapted((3, 3, 3) if uses_factors else (2, 3, 4))
    ours = [adapters_of(model, str(i)) for i in range(3)]
    model.add_weighted_adapter(
        ["0", "1", "2"],
        WEIGHTS,
        "combined",
        combination_type=method,
        **options,
    )
    key = jax.random.key(0) if method.startswith("dare") else None
    combined = combine(ours, WEIGHTS, method, key=key, **options)
    wanted = adapters_of(model, "combined")
    for path, theirs in wanted.items():
        got = combined[path]
        assert (got.rank, got.alpha) == (theirs.rank, theirs.alpha)
        assert_allclose(got.a @ got.b, theirs.a @ theirs.b, rtol=1e-4, atol=1e-4)
        if uses_factors:
            assert_allclose(got.a, theirs.a, rtol=1e-5, atol=1e-6)
            assert_allclose(got.b, theirs.b, rtol=1e-5, atol=1e-6)


def test_loraplus_takes_the_same_steps():
    """PEFT's parameter groups of LoRA+ under AdamW, against ``scale_rates`` behind optax's."""
    model = adapted([2])
    factors, decay, lr, ratio = adapters_of(model, "0"), 0.1, 1e-2, 8.0
    from peft.optimizers import create_loraplus_optimizer

    torch_optimizer = create_loraplus_optimizer(
        model=model,
        optimizer_cls=torch.optim.AdamW,
        lr=lr,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=decay,
        weight_decay=decay,
    )
    tx = optax.chain(optax.adamw(lr, weight_decay=decay), optim.scale_rates(b=ratio))
    state = tx.init(factors)
    for seed in range(3):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.grad = torch.randn_like(parameter)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
            updates, state = tx.update(adapters_of(model, "0", "grad"), state, factors)
        factors: Any = optax.apply_updates(factors, updates)
        torch_optimizer.step()
    for path, adapter in adapters_of(model, "0").items():
        assert_allclose(factors[path].a, adapter.a, rtol=1e-5, atol=1e-7)
        assert_allclose(factors[path].b, adapter.b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("initializer", ["pissa", "olora"])
def test_start_from_the_weight_takes_out_the_same(initializer):
    torch.manual_seed(0)
    model = Model()
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["up"], init_lora_weights=initializer
    )
    node, (a, b), left = started(model, config, initializer)
    assert_allclose(node.base, left, rtol=1e-4, atol=1e-5)
    assert_allclose(node.delta(), 2 * a @ b, rtol=1e-4, atol=1e-5)
    assert_allclose(abs(node.a), abs(a), rtol=1e-3, atol=1e-4)  # signs are free
    assert_allclose(abs(node.b), abs(b), rtol=1e-3, atol=1e-4)


def started(model, config, initializer):
    """Return our node of a layer, and PEFT's factors and base in our layout."""
    kernel = jnp.asarray(model.up.weight.detach().numpy().T.copy())
    layer = peft.get_peft_model(model, config).base_model.model.up
    factors = [group["default"].weight.detach().numpy().T for group in (layer.lora_A, layer.lora_B)]
    ours = jaxlora.LoRAConfig(rank=config.r, alpha=config.lora_alpha, initializer=initializer)
    params = jaxlora.init(
        jax.random.key(0),
        lambda params, x: x @ params["up"],
        {"up": kernel},
        jnp.ones((2, 8)),
        config=ours,
    )
    return params["up"], factors, layer.base_layer.weight.detach().numpy().T


def compared(model, config, initializer):
    """Check that PEFT's start of a layer takes out what ours does."""
    node, (a, b), left = started(model, config, initializer)
    if initializer.name == "lora_ga":  # the signs of each are free, and so that of the product
        assert_allclose(abs(node.a), abs(a), rtol=1e-2, atol=1e-4)
        assert_allclose(abs(node.b), abs(b), rtol=1e-2, atol=1e-4 * abs(b).max())
        return
    assert_allclose(node.delta(), 2 * a @ b, rtol=1e-3, atol=1e-4)
    assert_allclose(node.base, left, rtol=1e-3, atol=1e-4)


def start_config(**options):
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up"], **options)


def inputs():
    torch.manual_seed(0)
    return Model(), torch.randn(64, 8) * torch.arange(1, 9)


CONFIG = jaxlora.LoRAConfig(rank=2, targets=("up",))


@pytest.mark.parametrize("keep", [False, True])
def test_corda_takes_out_the_same(keep):
    model, x = inputs()
    kernel = {"up": jnp.asarray(model.up.weight.detach().numpy().T.copy())}
    from peft.tuners.lora.corda import preprocess_corda

    method = peft.tuners.lora.config.CordaConfig(corda_method="kpm" if keep else "ipm")
    config = start_config(init_lora_weights="corda", corda_config=method)
    preprocess_corda(model, config, run_model=lambda: model.up(x))
    batches = [(jnp.asarray(x.numpy()),)]
    found = jaxlora.calibration.moments(lambda p, x: x @ p["up"], kernel, batches, config=CONFIG)
    compared(model, config, jaxlora.initializers.corda(found, keep=keep))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_lora_ga_takes_out_the_same():
    model, x = inputs()
    bias = jnp.asarray(model.up.bias.detach().numpy())
    kernel = {"up": jnp.asarray(model.up.weight.detach().numpy().T.copy())}
    config = start_config(
        init_lora_weights="lora_ga", lora_ga_config=peft.tuners.lora.config.LoraGAConfig()
    )

    from peft.tuners.lora.loraga import preprocess_loraga

    def step():
        model.zero_grad()
        torch.sin(model.up(x)).sum().backward()

    preprocess_loraga(model, config, step)

    def loss(params, x):
        return jnp.sin(x @ params["up"] + bias[None]).sum()

    batches = [(jnp.asarray(x.numpy()),)]
    found = jaxlora.calibration.gradients(loss, kernel, batches, config=CONFIG)
    compared(model, config, jaxlora.initializers.lora_ga(found))


class Odd(torch.nn.Module):
    """A model of odd functions: inputs without mean have activations without."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (torch.nn.Linear(*n, bias=False) for n in ((8, 12), (12, 6)))

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize(("power", "found_ranks"), [(0.0, [2, 4]), (-3.0, [3, 3])])
def test_eva_gives_the_same_ranks_and_directions(power, found_ranks):
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(64, 8) * torch.arange(1, 9) ** power
    x = torch.cat([x, -x])  # for PEFT takes the mean out
    weights = {n: jnp.asarray(getattr(model, n).weight.detach().numpy().T) for n in LAYERS}
    options: Any = {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=2.0)}
    config = peft.LoraConfig(r=3, target_modules=list(LAYERS), **options)
    theirs: Any = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    pass_on = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    peft.initialize_lora_eva_weights(
        theirs, [x] * 4, forward_fn=lambda model, x: model(x), show_progress_bar=False, **pass_on
    )

    def ours(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    batch, config = jnp.asarray(x.numpy()), jaxlora.LoRAConfig(rank=3)
    found = jaxlora.calibration.moments(ours, weights, [(batch,)], config=config)
    ranks = jaxlora.initializers.eva_ranks(found, 3)
    start = jaxlora.initializers.eva(found)
    config = jaxlora.LoRAConfig(targets=tuple(ranks), rank_pattern=ranks, initializer=start)
    params = jaxlora.init(jax.random.key(0), ours, weights, batch, config=config)
    assert sorted(ranks.values()) == found_ranks
    for name in LAYERS:
        directions = getattr(theirs.base_model.model, name).lora_A["default"].weight.detach().T
        assert directions.shape[1] == ranks[name]
        cosines = jnp.sum(params[name].a * jnp.asarray(directions.numpy()), 0)
        assert_allclose(abs(cosines), 1, atol=1e-3)  # signs are free
