"""Checkpoints without pickle: safetensors and JSON, in a folder that appears whole or not at all."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def save_checkpoint(folder: Path, model, optimizer, state: dict) -> None:
    """Write `folder`/step-NNNNNN by way of a temporary folder, then delete the older ones."""
    scratch = folder / "part"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tensors = {}
    for name, parameter in model.named_parameters():  # the tied lm_head comes once
        tensors[f"model/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch / "state.safetensors")
    (scratch / "state.json").write_text(json.dumps(state))
    made = folder / f"step-{state['step']:06d}"
    shutil.rmtree(made, ignore_errors=True)
    os.replace(scratch, made)
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
