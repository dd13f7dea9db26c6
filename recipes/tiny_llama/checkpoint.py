"""Checkpoints without pickle: safetensors and JSON, in a folder that appears whole or not at all."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from labkit.files.writing import new_folder


def save_checkpoint(folder: Path, model, optimizer, state: dict) -> None:
    """Write `folder`/step-NNNNNN, whole or not at all, then delete the older ones."""
    tensors = {}
    for name, parameter in model.named_parameters():  # the tied lm_head comes once
        tensors[f"model/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    made = folder / f"step-{state['step']:06d}"
    with new_folder(made) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / "state.safetensors")
        (part / "state.json").write_text(json.dumps(state))
    for old in folder.glob("step-*"):
        if old != made:
            shutil.rmtree(old)


def load_checkpoint(folder: Path, model, optimizer) -> dict | None:
    """Put the newest checkpoint into model and optimizer; its state, or None if there is no checkpoint."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return None
    tensors = load_file(found[-1] / "state.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
            optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return json.loads((found[-1] / "state.json").read_text())
