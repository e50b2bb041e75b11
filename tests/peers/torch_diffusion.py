"""The model of `diffusion_programs` in PyTorch, its components as those of diffusers."""

from typing import Any

import diffusion_programs as programs
import numpy as np
import pytest
from torch_programs import convolution, linear, peft, torch

diffusers: Any = pytest.importorskip("diffusers", reason="install jaxlora[peft]")
loaders: Any = pytest.importorskip("diffusers.loaders")
lycoris: Any = pytest.importorskip("lycoris", reason="install jaxlora[peft]")
utilities: Any = pytest.importorskip("diffusers.configuration_utils")


class UNet(diffusers.ModelMixin, utilities.ConfigMixin, loaders.PeftAdapterMixin):
    @utilities.register_to_config
    def __init__(self):
        super().__init__()
        params = programs.PARAMS["unet"]
        kernel, bias = params["conv_in"]["kernel"], params["conv_in"]["bias"]
        self.conv_in = convolution(kernel.transpose(3, 2, 0, 1), bias)
        self.blocks = torch.nn.ModuleList()
        for i in range(programs.LAYERS):
            own = {name: params["blocks"][name][i] for name in ("q", "k", "v", "out")}
            attn = torch.nn.Module()
            for name in "qkv":
                setattr(attn, f"to_{name}", linear(own[name].reshape(programs.WIDTH, -1)))
            attn.to_out = torch.nn.ModuleList([linear(own["out"].reshape(-1, programs.WIDTH))])
            block = torch.nn.Module()
            block.attn = attn
            self.blocks.append(block)
        self.proj_out = convolution(params["proj_out"].transpose(3, 2, 0, 1))

    def forward(self, image, text):
        x = self.conv_in(image.permute(0, 3, 1, 2))
        size = x.shape
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            attn = block.attn
            split = lambda y: y.unflatten(-1, (programs.HEADS, -1)).transpose(1, 2)  # noqa: E731
            q, k, v = (
                split(to(y)) for to, y in ((attn.to_q, x), (attn.to_k, text), (attn.to_v, text))
            )
            h = torch.softmax(q @ k.transpose(2, 3) / 2, -1) @ v
            x = x + attn.to_out[0](torch.tanh(h.transpose(1, 2).flatten(2)))
        return self.proj_out(x.transpose(1, 2).reshape(size)).permute(0, 2, 3, 1)


class TextEncoder(diffusers.ModelMixin, utilities.ConfigMixin, loaders.PeftAdapterMixin):
    @utilities.register_to_config
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        text = programs.PARAMS["text"]
        for fc1, fc2 in zip(text["fc1"], text["fc2"], strict=True):
            layer = torch.nn.Module()
            layer.fc1, layer.fc2 = linear(fc1), linear(fc2)
            self.layers.append(layer)

    def forward(self, text):
        for layer in self.layers:
            text = text + layer.fc2(torch.tanh(layer.fc1(text)))
        return text


def output(unet, text_encoder) -> np.ndarray:
    """Return what the two compute."""
    with torch.no_grad():
        image, text = torch.tensor(programs.IMAGE), torch.tensor(programs.TEXT)
        return unet(image, text_encoder(text)).numpy()


LORA = {"r": 2, "lora_alpha": 5, "init_lora_weights": False}
OF_DIFFUSERS = {
    "lora": {"target_modules": ["to_q", "to_out.0", "fc1"]},
    "convolutions": {"target_modules": ["conv_in", "proj_out", "fc2"]},
    "magnitudes": {"target_modules": ["to_q", "to_k", "fc1"], "use_dora": True},
    "stabilized": {"target_modules": ["to_v", "fc2"], "use_rslora": True},
    "patterns": {
        "target_modules": ["to_q", "to_v", "fc1"],
        **{"rank_pattern": {"to_v": 3}, "alpha_pattern": {"blocks.1.attn.to_q": 7}},
    },
}
OF_LYCORIS = {
    "lora": {"algo": "lora"},
    "loha": {"algo": "loha"},
    "lora_windows": {"algo": "lora", "use_tucker": True},
    "loha_windows": {"algo": "loha", "use_tucker": True},
    "lora_magnitudes": {"algo": "lora", "dora_wd": True},
    "loha_magnitudes": {"algo": "loha", "dora_wd": True},
    "lora_stabilized": {"algo": "lora", "rs_lora": True},
}


def write_with_diffusers(name, folder) -> np.ndarray:
    """Write a file with adapters of both components, and return what they compute."""
    torch.manual_seed(0)
    components: dict[str, Any] = {"unet": UNet(), "text_encoder": TextEncoder()}
    tensors, metadata = {}, {}
    for component, model in components.items():
        model.add_adapter(peft.LoraConfig(**LORA, **OF_DIFFUSERS[name]))
        move(model)
        own = peft.get_peft_model_state_dict(model, adapter_name="default")
        tensors |= {f"{component}.{key}": x.contiguous() for key, x in own.items()}
        config = model.peft_config["default"].to_dict()
        metadata |= {f"{component}.{key}": value for key, value in config.items()}
    loaders.lora_base.LoraBaseMixin.write_lora_layers(
        tensors,
        folder,
        is_main_process=True,
        weight_name="pytorch_lora_weights.safetensors",
        save_function=None,
        safe_serialization=True,
        lora_adapter_metadata=metadata,
    )
    return output(**components)


def write_with_lycoris(name, path) -> np.ndarray:
    """Write a file with adapters of the first component, and return what they compute."""
    torch.manual_seed(0)
    unet, text = UNet(), TextEncoder()
    sizes = {"linear_dim": 2, "linear_alpha": 3.0, "conv_dim": 4, "conv_alpha": 1.0}
    lycoris.LycorisNetwork.apply_preset({"target_module": ["UNet"], "target_name": [".*"]})
    network = lycoris.create_lycoris(unet, 1.0, **sizes, **OF_LYCORIS[name])
    network.apply_to()
    move(network)
    computed = output(unet, text)
    network.save_weights(path, None, {})
    return computed


def move(model) -> None:
    """Move everything that is trained of adapters."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if any(kind in name for kind in ("lora", "hada", "dora")):
                value.add_(0.1 * torch.randn_like(value))
