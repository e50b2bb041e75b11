"""What training steps cost, side by side: `Step` is one column of a `Plan`."""

import dataclasses
from collections.abc import Callable, Mapping

from jaxlora.messages import table
from jaxlora.planning.numbers import prefixed
from jaxlora.reports.counts import Row


@dataclasses.dataclass(frozen=True)
class Step:
    """What a training step costs; bytes and operations are those of each device.

    Attributes:
        trained: parameters that are trained, on all devices.
        total: parameters in all, those of factors included, on all devices.
        base_bytes: of the weights that are frozen.
        trained_bytes: of what is trained.
        state_bytes: of the state of the optimizer.
        data_bytes: of the other arguments.
        argument_bytes: of all that the compiled step takes, as its compiler says; without what it
            does not read.
        output_bytes: of what it returns, likewise.
        alias_bytes: of what it returns in the place of arguments.
        temp_bytes: of what it needs between: activations, gradients, and all other temporaries.
        flops: operations of its products and convolutions, a multiplication and an addition
            counting as two; see `jaxlora.planning.plan`.
    """

    trained: int
    total: int
    base_bytes: int
    trained_bytes: int
    state_bytes: int
    data_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    flops: int

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients, each as what it is of; they are among the temporaries."""
        return self.trained_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of arguments, temporaries and those outputs that take no argument's place."""
        return self.argument_bytes + self.temp_bytes + self.output_bytes - self.alias_bytes


def _bytes(value: int) -> str:
    return f"{prefixed(value, '.2f', 'GMk') or f'{value} '}B"


def _operations(value: int) -> str:
    return prefixed(value, ".2f", "TGM") or f"{value:,}"


_TERMS: tuple[tuple[str, Callable[[Step], int], Callable[[int], str]], ...] = (
    ("parameters in all", lambda step: step.total, "{:,}".format),
    ("parameters trained", lambda step: step.trained, "{:,}".format),
    ("frozen weights", lambda step: step.base_bytes, _bytes),
    ("trained weights", lambda step: step.trained_bytes, _bytes),
    ("optimizer state", lambda step: step.state_bytes, _bytes),
    ("data", lambda step: step.data_bytes, _bytes),
    ("= arguments, compiled", lambda step: step.argument_bytes, _bytes),
    ("gradients", lambda step: step.gradient_bytes, _bytes),
    ("+ temporaries, compiled", lambda step: step.temp_bytes, _bytes),
    ("outputs, compiled", lambda step: step.output_bytes, _bytes),
    ("+ outputs of their own", lambda step: step.output_bytes - step.alias_bytes, _bytes),
    ("= memory", lambda step: step.total_bytes, _bytes),
    ("FLOPs a step", lambda step: step.flops, _operations),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What training with adapters will cost, beside full fine-tuning and QLoRA; ``str`` is a table.

    The numbers of the step with adapters can be read from the plan itself.

    Attributes:
        lora: the step that trains adapters.
        full: the step that trains every floating weight, or None.
        qlora: the step that trains the adapters over weights in nf4, or None.
        missing: for ``"full"`` and ``"qlora"``, why there is none.
        targets: a row for each adapted weight, with its path, rank and trained parameters.
        devices: number of devices.
        platform: what the steps are compiled for.
    """

    lora: Step
    full: Step | None
    qlora: Step | None
    missing: Mapping[str, str]
    targets: tuple[Row, ...]
    devices: int
    platform: str

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return self.lora.trained

    @property
    def total(self) -> int:
        """Parameters in all, those of factors included."""
        return self.lora.total

    @property
    def argument_bytes(self) -> int:
        """Bytes of the arguments of the step, of each device."""
        return self.lora.argument_bytes

    @property
    def temp_bytes(self) -> int:
        """Bytes of the temporaries of the step, of each device."""
        return self.lora.temp_bytes

    @property
    def output_bytes(self) -> int:
        """Bytes of the outputs of the step, of each device."""
        return self.lora.output_bytes

    @property
    def flops(self) -> int:
        """Operations of the products of a step, of each device."""
        return self.lora.flops

    def __str__(self) -> str:
        steps = {"LoRA": self.lora, "full fine-tuning": self.full, "QLoRA (nf4)": self.qlora}
        found = {name: step for name, step in steps.items() if step is not None}
        rows = [
            (term, *(show(value(step)) for step in found.values())) for term, value, show in _TERMS
        ]
        names = {"full": "full fine-tuning", "qlora": "QLoRA (nf4)"}
        without = [f"no {names[key]}: {why}" for key, why in self.missing.items()]
        each = f", each of {self.devices} devices" if self.devices > 1 else ""
        targets = [
            (row.path, str(row.shape), str(row.rank or "itself"), f"{row.trainable:,}")
            for row in self.targets
        ]
        return "\n".join(
            [
                table.render((f"{self.platform}{each}", *found), rows),
                *without,
                "",
                table.render_folded(("target", "shape", "rank", "trained"), targets),
            ]
        )

    __repr__ = __str__
