"""The state of a run on disk: enough that a killed run goes on to the very numbers it would have reached.

That takes the trained parameters, the optimizer's moments and step counts, the state of the random generators
(for dropout), and the number of steps done, from which the order of the data follows. One safetensors file
holds all of it, with the small things as JSON in its header, so one rename makes the whole checkpoint visible
at once.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from labkit.data.encoding import Encoded, fingerprint
from labkit.lora.fingerprint import update
from labkit.lora.inject import lora_layers
from labkit.training.config import TrainConfig
from labkit.training.history import BestWeights, History

FILE = "run.safetensors"
# none changes a result
MAY_DIFFER = ("checkpoint_folder", "checkpoint_every", "progress", "state_budget_bytes")
SINCE_0_2 = ("model", "adapter")  # parts of an identity that older checkpoints do not have


def identity_of(model: nn.Module, config: TrainConfig, examples: list[Encoded], total: int) -> dict:
    """What must be the same for a run to go on where another stopped: settings, data, number of steps, and of
    the model all that the checkpoint does not hold."""
    same = {name: value for name, value in asdict(config).items() if name not in MAY_DIFFER}
    same |= {"betas": list(config.betas), "data": fingerprint(examples), "total": total}
    return same | {"model": hash_frozen(model), "adapter": hash_adapter(model)}


def hash_frozen(model: nn.Module) -> str:
    """A short hash of the values that do not train, with their names, dtypes and shapes: the same base in four
    bits, or in another dtype, is another one."""
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name not in trained:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            update(digest, value)
    return digest.hexdigest()[:16]


def hash_adapter(model: nn.Module) -> str:
    """A short hash of what an adapter computes with beside its weights: variant, scaling, dropout by layer."""
    layers = {
        name: [type(layer).__name__, layer.scaling, layer.dropout.p]
        for name, layer in lora_layers(model).items()
    }
    return hashlib.sha256(json.dumps(layers, sort_keys=True).encode()).hexdigest()[:16]


def exists(folder: Path) -> bool:
    """Is there a checkpoint in `folder`?"""
    return (folder / FILE).exists()


def save(
    folder: Path,
    identity: dict,
    steps_done: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    history: History,
    best: BestWeights | None,
) -> None:
    """Write the state of a run under a temporary name, then rename it: a failure leaves the last checkpoint
    intact.

    Raises:
        OSError: the file could not be written.
    """
    tensors = {f"parameter/{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        tensors |= {f"optimizer/{key}/{name}": value for key, value in optimizer.state[p].items()}
    if best:
        tensors |= {f"best/{name}": value for name, value in best.weights.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"rng/cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    state = {"identity": identity, "steps_done": steps_done, "best": best and best.loss}
    state |= {
        "steps": history.steps,
        "evals": history.evals,
        "stopped": history.stopped,
        "left_out": history.left_out,
    }
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{FILE}.part"
    try:
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, part, metadata={"state": json.dumps(state)}
        )
        os.replace(part, folder / FILE)
    except Exception as error:
        part.unlink(missing_ok=True)
        raise OSError(
            f"could not write the checkpoint to {folder} ({error}); the one before, if any, is intact"
        ) from error


def load(
    folder: Path, identity: dict, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, History, BestWeights | None]:
    """Put the state of a run back into `parameters`, `optimizer` and the random generators.

    Returns:
        (steps done, history, best).

    Raises:
        ValueError: a damaged file, or the checkpoint of another run: other settings, data or parameters.
    """
    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable checkpoint ({error}); delete it to start the run from the beginning"
        ) from None
    recorded = state["identity"]
    known = [key for key in identity if key in recorded or key not in SINCE_0_2]
    differs = [key for key in known if json.loads(json.dumps(identity[key])) != recorded.get(key)]
    shapes = {k.removeprefix("parameter/"): v.shape for k, v in tensors.items() if k.startswith("parameter/")}
    if shapes != {name: p.shape for name, p in parameters.items()}:
        differs.append("trained parameters")
    if differs:
        raise ValueError(
            f"{path} belongs to another run (different: {', '.join(differs)}); choose another "
            "checkpoint_folder, or delete this one to start anew"
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"parameter/{name}"])
            keys = [key for key in tensors if key.startswith("optimizer/") and key.split("/", 2)[2] == name]
            # AdamW keeps its step count on the CPU, and its moments beside the parameter
            optimizer.state[p] = {
                key.split("/")[1]: tensors[key] if tensors[key].dim() == 0 else tensors[key].to(p.device)
                for key in keys
            }
    torch.set_rng_state(tensors["rng/cpu"])
    if torch.cuda.is_available() and "rng/cuda/0" in tensors:
        torch.cuda.set_rng_state_all([v for k, v in sorted(tensors.items()) if k.startswith("rng/cuda/")])
    best = None
    if state["best"] is not None:
        weights = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
        best = BestWeights(state["best"], weights)
    history = History(state["steps"], state["evals"], state["left_out"], state["stopped"])
    return state["steps_done"], history, best
