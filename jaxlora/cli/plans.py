"""``jaxlora plan``: what a training run will cost."""

import dataclasses
from typing import Annotated, Any

import typer

from jaxlora.cli import named_objects, output
from jaxlora.messages import checks
from jaxlora.planning.planner import plan as make_plan
from jaxlora.targets.config import ALL_LINEAR, LoRAConfig


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="A function without arguments that returns (fn, params, *args), shapes in the "
            "place of arrays; of an importable module or a file.",
        ),
    ],
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A name to adapt, again for each; all linear weights if not given."),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="A function of optax that takes a learning rate.")
    ] = "adamw",
    as_json: output.AsJson = False,
) -> None:
    """Show the bytes and operations of a training step with adapters, before there are weights.

    Beside it stand full fine-tuning and QLoRA. The step is compiled for the devices at hand.

    Example: jaxlora plan my_model.py:small --rank 16 --target query --target value
    """
    fn, params, *args = named_objects.model(model)
    config = LoRAConfig(rank=rank, targets=target or ALL_LINEAR)
    with output.working("compiling"):
        found = make_plan(fn, params, *args, config=config, optimizer=_optimizer(optimizer))
    if not as_json:
        print(found)
        return
    steps = {"lora": found.lora, "full": found.full, "qlora": found.qlora}
    output.print_json(
        {name: None if step is None else dataclasses.asdict(step) for name, step in steps.items()}
        | {"missing": dict(found.missing), "devices": found.devices, "platform": found.platform}
        | {"targets": {row.path: row.trainable for row in found.targets}}
    )


def _optimizer(name: str) -> object:
    """Return a transform of optax from its name; its learning rate does not change the cost."""
    import optax

    make: Any = getattr(optax, name, None)
    needed = "--optimizer must be a function of optax that takes a learning rate, as adamw"
    if not checks.is_function(make):
        raise ValueError(f"{needed}: got {name!r}")
    try:
        made = make(1e-4)
    except Exception as error:
        raise ValueError(f"{needed}: got {name!r}: {error}") from error
    if not isinstance(made, optax.GradientTransformation):
        raise ValueError(f"{needed}: got {name!r}, which makes none")
    return made
