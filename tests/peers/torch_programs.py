"""The programs of `programs_of_files` in PyTorch, with the same weights, adapted by PEFT."""

import warnings
from typing import Any

import numpy as np
import programs_of_files
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    REASON = "install jaxlora[peft] to compare with PEFT"
    torch: Any = pytest.importorskip("torch", reason=REASON)
    peft: Any = pytest.importorskip("peft", reason=REASON)


def parameter(array):
    return torch.nn.Parameter(torch.tensor(np.ascontiguousarray(array)))


def linear(kernel, bias=None):
    """Return a layer from a kernel whose last axis is out."""
    layer = torch.nn.Linear(1, 1, bias=bias is not None)
    layer.weight = parameter(kernel.T)
    layer.out_features, layer.in_features = layer.weight.shape
    if bias is not None:
        layer.bias = parameter(bias)
    return layer


def convolution(kernel, bias=None):
    """Return a layer from a kernel as PyTorch has it."""
    kind = {3: torch.nn.Conv1d, 4: torch.nn.Conv2d, 5: torch.nn.Conv3d}[kernel.ndim]
    out, in_ = kernel.shape[:2]
    layer = kind(in_, out, kernel.shape[2:], padding="same", bias=bias is not None)
    layer.weight = parameter(kernel)
    if bias is not None:
        layer.bias = parameter(bias)
    return layer


class Layers(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.embed = torch.nn.Embedding(*params["embed"].shape)
        self.embed.weight = parameter(params["embed"])
        self.layers = torch.nn.ModuleList()
        for up, bias, down in zip(params["up"], params["up_bias"], params["down"], strict=True):
            layer = torch.nn.Module()
            layer.up, layer.down = linear(up, bias), linear(down)
            self.layers.append(layer)
        self.head = linear(params["head"]["kernel"], params["head"]["bias"])

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer.down(torch.tanh(layer.up(x)))
        return self.head(x)


class Convolutions(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        image, sequence = params["image"], params["sequence"]
        self.image = convolution(image["kernel"].transpose(3, 2, 0, 1), image["bias"])
        self.sequence = convolution(sequence["kernel"].transpose(2, 1, 0))

    def forward(self, x):
        x = torch.tanh(self.image(x.permute(0, 3, 1, 2))).mean(2)
        return self.sequence(x).permute(0, 2, 1)


class WindowLast(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.image = convolution(params["image"])

    def forward(self, x):
        return self.image(x)


class Volume(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.volume = convolution(params["volume"].transpose(4, 3, 0, 1, 2))

    def forward(self, x):
        return self.volume(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


class Attention(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.mha = torch.nn.MultiheadAttention(8, 2, bias=False)
        self.mha.in_proj_weight = parameter(params["qkv"].reshape(8, -1).T)
        self.mha.out_proj.weight = parameter(params["out"].reshape(-1, 8).T)

    def forward(self, x):
        return self.mha(x, x, x)[0]


class SplitHeads(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.q, self.v = (linear(params["qv"][:, i].reshape(8, 12)) for i in range(2))
        self.out = linear(params["out"].reshape(12, 8))

    def forward(self, x):
        return self.out(torch.tanh(self.q(x)) * self.v(x))


class Weights(torch.nn.Module):
    """Experts, ``(expert, out, in)``."""

    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = parameter(up.transpose(0, 2, 1)), parameter(down.transpose(0, 2, 1))

    def forward(self, x):
        h = torch.tanh(torch.einsum("ehi,ni->enh", self.up, x))
        return torch.einsum("eoh,enh->no", self.down, h)


class Experts(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for up, down in zip(params["up"], params["down"], strict=True):
            layer = torch.nn.Module()
            layer.experts = Weights(up, down)
            self.layers.append(layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer.experts(x)
        return x


TWINS = {
    programs_of_files.layers: Layers,
    programs_of_files.convolutions: Convolutions,
    programs_of_files.window_last: WindowLast,
    programs_of_files.split_heads: SplitHeads,
    programs_of_files.attention: Attention,
    programs_of_files.volume: Volume,
    programs_of_files.experts: Experts,
}


def twin(case) -> Any:
    """Return the program of a case in PyTorch."""
    return TWINS[case.program](case.program().params)


_START = {
    "LoraConfig": {"r": 2, "lora_alpha": 5, "init_lora_weights": False},
    "LoHaConfig": {"r": 2, "alpha": 5, "init_weights": False},
    "AdaLoraConfig": {"lora_alpha": 5, "init_lora_weights": False},
    "VeraConfig": {"r": 4},
}


def adapted(case) -> Any:
    """Return it as PEFT adapts it, everything that is trained moved."""
    torch.manual_seed(0)
    config = getattr(peft, case.kind)(**_START[case.kind], **case.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(twin(case), config)
    if case.kind == "AdaLoraConfig":
        allocate(model, case)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    return model


def allocate(model, case) -> None:
    """Let AdaLoRA take away ranks, as it does while it is trained."""
    for step in range(1, case.config["total_step"]):
        model(torch.tensor(case.program().x)).square().sum().backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()


def loaded(case, folder) -> Any:
    """Return it with the adapter of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*(Could not find a config|base_model).*")
        # PEFT's own, for its patterns of AdaLoRA, which it does use
        warnings.filterwarnings("ignore", message=".*rank_pattern keys did not match")
        return peft.PeftModel.from_pretrained(twin(case), folder)


def output(model, case) -> np.ndarray:
    """Return what it computes."""
    with torch.no_grad():
        return model(torch.tensor(case.program().x)).numpy()
