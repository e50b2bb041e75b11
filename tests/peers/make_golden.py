"""Write the folders of adapters in tests/golden, with PEFT on Python 3.11:

PYTHONPATH=tests:examples python tests/peers/make_golden.py

``peft`` has what PEFT saves of each of the cases of `programs_of_files`, and beside it in
``output.npy`` what the adapted program computes. ``peft_minilm`` has an adapter of the pretrained
all-MiniLM-L6-v2, and what that makes of the tokens beside it. ``diffusion`` has files of diffusers
and LyCORIS for the model of `diffusion_programs`, and beside each what it then computes. It needs
``pip install -e '.[examples,peft]'``.
"""

import shutil
import warnings
from pathlib import Path

import fetch
import numpy as np
import programs_of_files
import torch_diffusion
import torch_programs
import transformers
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent.parent / "golden" / "peft"


def minilm() -> None:
    """Write an adapter of the pretrained model, and vectors of a few tokens."""
    torch, peft = torch_programs.torch, torch_programs.peft
    weights, _ = fetch.minilm()
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, intermediate_size=1536, vocab_size=30522
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    tensors = {k: torch.tensor(x) for k, x in load_file(weights).items() if "pooler" not in k}
    tensors.pop("embeddings.position_ids")
    model.load_state_dict(tensors)
    torch.manual_seed(0)
    how = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"])
    model = peft.get_peft_model(model.eval(), how)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn_like(value))
    folder = GOLDEN.with_name("peft_minilm")
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    tokens = np.array([[101, 2023, 2003, 2307, 102], [101, 2919, 3185, 102, 0]])
    mask = tokens != 0
    with torch.no_grad():
        states = model(torch.tensor(tokens), torch.tensor(mask)).last_hidden_state.numpy()
    vectors = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    np.savez(folder / "vectors.npz", tokens=tokens, vectors=vectors)


def diffusion() -> None:
    """Write files of adapters of a diffusion model."""
    folder = GOLDEN.with_name("diffusion")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in torch_diffusion.OF_DIFFUSERS:
        output = torch_diffusion.write_with_diffusers(name, folder)
        (folder / "pytorch_lora_weights.safetensors").rename(folder / f"{name}.safetensors")
        np.save(folder / f"{name}.npy", output)
    for name in torch_diffusion.OF_LYCORIS:
        output = torch_diffusion.write_with_lycoris(name, folder / f"lycoris_{name}.safetensors")
        np.save(folder / f"lycoris_{name}.npy", output)


def main() -> None:
    """Write every folder."""
    minilm()
    diffusion()
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name, case in (programs_of_files.CASES | programs_of_files.OTHER_KINDS).items():
        folder = GOLDEN / name
        model = torch_programs.adapted(case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder)
        (folder / "README.md").unlink()  # a model card without anything in it
        if case.kind == "AdaLoraConfig":
            model = torch_programs.loaded(case, folder)  # without what has lost its rank
        np.save(folder / "output.npy", torch_programs.output(model, case))


if __name__ == "__main__":
    main()
