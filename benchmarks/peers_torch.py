"""Measure PEFT on PyTorch against its own floor and full fine-tuning, on the benchmark's model.

Run it in an environment with ``torch`` and ``peft`` alone. The models, the batch, the loss, the
optimizer and the way of measuring are those of `train_step.py`; the floor trains one vector that
is added to the input, through the frozen model. It runs on a GPU where there is one.
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
from torch.utils.checkpoint import checkpoint

TARGETS = ("q", "k", "v", "o", "up", "down")


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


class GatedBlock(nn.Module):
    """Grouped attention and a gated feed-forward network, normalized before."""

    def __init__(self, width: int, heads: int, hidden: int, groups: int):
        super().__init__()
        self.per_head = width // heads
        grouped = groups * self.per_head

        def dense(in_: int, out: int) -> nn.Linear:
            return nn.Linear(in_, out, bias=False)

        self.attention_norm, self.norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = dense(width, width), dense(width, width)
        self.k, self.v = dense(width, grouped), dense(width, grouped)
        self.gate, self.up, self.down = (
            dense(width, hidden),
            dense(width, hidden),
            dense(hidden, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(batch, time, width)`` for the same."""
        h = self.attention_norm(x)
        q, k, v = (
            layer(h).unflatten(-1, (-1, self.per_head)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(h.transpose(1, 2).flatten(-2))
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Transformer(nn.Module):
    """A stack of blocks, with a norm behind those that are not gated."""

    def __init__(self, options: argparse.Namespace):
        super().__init__()
        sizes = (options.width, options.heads, options.hidden)
        is_gated = options.model == "llama"
        blocks = (
            GatedBlock(*sizes, options.groups) if is_gated else Block(*sizes)
            for _ in range(options.layers)
        )
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity() if is_gated else nn.LayerNorm(options.width)
        self.remat = options.remat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(batch, time, width)`` for the same."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.remat else block(x)
        return self.norm(x)


class Step:
    """One training step of a model, of the parameters that are trainable."""

    def __init__(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, offset: bool):
        self.model, self.x, self.y = model, x, y
        self.offset = nn.Parameter(torch.zeros_like(x[0, 0])) if offset else None
        trained = [p for p in model.parameters() if p.requires_grad]
        trained += [self.offset] if self.offset is not None else []
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def run(self) -> float:
        """Run once and return the seconds it took."""
        start = time.perf_counter()
        x = self.x if self.offset is None else self.x + self.offset
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            loss = nn.functional.mse_loss(self.model(x).float(), self.y.float())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def steps(options: argparse.Namespace) -> dict[str, Step]:
    """Return the steps that are compared."""
    torch.manual_seed(0)
    like = {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": getattr(torch, options.dtype),
    }
    shape = (options.batch, options.time, options.width)
    x, y = torch.randn(shape, **like), torch.randn(shape, **like)

    def transformer() -> Transformer:
        return Transformer(options).to(**like)

    targets = [*TARGETS, *["gate"] * (options.model == "llama")]
    config = peft.LoraConfig(r=options.rank, lora_alpha=16, target_modules=targets)
    adapted = peft.get_peft_model(transformer(), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.01)
    return {
        "floor": Step(transformer().requires_grad_(False), x, y, offset=True),
        "full": Step(transformer(), x, y, offset=False),
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
    sizes = {"layers": 6, "width": 384, "hidden": 1536, "heads": 6, "groups": 2, "rank": 8}
    batch = {"batch": 8, "time": 128, "rounds": 11, "warmup": 2, "threads": 1}
    for name, default in {**sizes, **batch}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--remat", action="store_true", help="compute each block again")
    models = ("transformer", "llama")
    parser.add_argument("--model", choices=models, default=models[0], help="default transformer")
    parser.add_argument("--dtype", default="float32", help="default float32")
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
