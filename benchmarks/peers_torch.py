"""Measure PEFT on PyTorch against its own floor and full fine-tuning, on the benchmark's model.

Run it in an environment with ``torch`` and ``peft`` alone. The model, the batch, the loss, the
optimizer and the way of measuring are those of `train_step.py`; the floor trains one vector that
is added to the input, through the frozen model.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import interleaved
import peft
import torch
from torch import nn


class Block(nn.Module):
    """Attention and a feed-forward network, normalized before."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(batch, time, width)`` for the same."""
        h = self.attention_norm(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = x + self.o(h)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x)), approximate="tanh"))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, options: argparse.Namespace):
        super().__init__()
        sizes = (options.width, options.heads, options.hidden)
        self.blocks = nn.Sequential(*(Block(*sizes) for _ in range(options.layers)))
        self.norm = nn.LayerNorm(options.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(batch, time, width)`` for the same."""
        return self.norm(self.blocks(x))


class Step:
    """One training step of a model, of the parameters that are trainable."""

    def __init__(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, offset: bool):
        self.model, self.x, self.y = model, x, y
        self.offset = nn.Parameter(torch.zeros(x.shape[-1])) if offset else None
        trained = [p for p in model.parameters() if p.requires_grad]
        trained += [self.offset] if self.offset is not None else []
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def run(self) -> float:
        """Run once and return the seconds it took."""
        start = time.perf_counter()
        x = self.x if self.offset is None else self.x + self.offset
        loss = nn.functional.mse_loss(self.model(x), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start


def steps(options: argparse.Namespace) -> dict[str, Step]:
    """Return the steps that are compared."""
    torch.manual_seed(0)
    shape = (options.batch, options.time, options.width)
    x, y = torch.randn(shape), torch.randn(shape)
    frozen = Transformer(options).requires_grad_(False)
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=16, target_modules=["q", "k", "v", "o", "up", "down"]
    )
    adapted = peft.get_peft_model(Transformer(options), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.01)
    return {
        "floor": Step(frozen, x, y, offset=True),
        "full": Step(Transformer(options), x, y, offset=False),
        "peft": Step(adapted, x, y, offset=False),
    }


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run all interleaved, and return the figures of each."""
    return interleaved.measure(steps(options), options.rounds, options.warmup)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {"layers": 6, "width": 384, "hidden": 1536, "heads": 6, "batch": 8, "time": 128}
    for name, default in {**defaults, "rank": 8, "rounds": 11, "warmup": 2, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = measure(options)
    for name, row in results.items():
        print(f"{name:6}", *(f"{key} {value:.2f}" for key, value in row.items()), sep="  ")
    if options.out:
        about = {
            "torch": torch.__version__,
            "peft": peft.__version__,
            "python": platform.python_version(),
            "options": {k: v for k, v in vars(options).items() if k != "out"},
        }
        options.out.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
