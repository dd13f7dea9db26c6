"""A run of several ranks on disk, to go on with on any number of them.

Each rank writes what it has, into a safetensors file of its own that says where in the whole its piece belongs
(`torch.distributed.checkpoint`, in Hugging Face's format). Whoever reads, on one rank or on three, takes from each
file the part that it needs. Only what trains is kept, and the optimizer's moments: the frozen base is where it came
from, and a hash says whether it is the same.

All or nothing: the files go to a folder of another name; when every rank has written, the first one adds
`run.json`, which lists them with their sizes, and renames the folder. A rank that dies on the way leaves what was
there before.

Why not the usual format of `torch.distributed.checkpoint`: its metadata is a pickle, which runs what it is told to.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from labkit.files import writing

RUN = "run.json"


class DamagedCheckpoint(ValueError):
    """A checkpoint cannot be read; the message says why. Nothing is loaded then."""


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    notes: Mapping[str, object] | None = None,
) -> None:
    """Write what trains, and the optimizer's moments, from all ranks; each calls this.

    Args:
        folder: the same for all ranks, on a disk that all of them see.
        model: sharded, replicated or plain.
        optimizer: of its parameters.
        step: how many were taken.
        notes: of the run, which JSON can hold: hashes of base and data, the seed.

    Raises:
        labkit.files.writing.CannotWrite: the first rank cannot put the folder in place; the old one is intact.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.part")
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    tensors = tensors_of(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(part), save_distributed=True))
    dist.barrier()
    if dist.get_rank() == 0:
        files = {file.name: file.stat().st_size for file in sorted(part.glob("*.safetensors"))}
        about = {"step": step, "ranks": dist.get_world_size(), "files": files, "tensors": shapes_of(tensors)}
        with writing.new_folder(folder) as made:
            for name in files:
                (part / name).rename(made / name)
            (made / RUN).write_text(
                json.dumps(about | {"notes": dict(notes or {})}, indent=2), encoding="utf-8"
            )
        shutil.rmtree(part, ignore_errors=True)
    dist.barrier()


def load_checkpoint(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Fill `model` and `optimizer`, on however many ranks there are now; each calls this.

    Returns:
        What `run.json` says: `step`, `ranks` that wrote it, `notes`.

    Raises:
        DamagedCheckpoint: it is not one, a file is missing or cut short, or it is of another model.
    """
    folder = Path(folder)
    about = read_run(folder)
    make_state(optimizer, about["step"])
    tensors = tensors_of(model, optimizer)
    mine, there = shapes_of(tensors), about["tensors"]
    if other := [name for name in sorted(mine | there) if mine.get(name) != there.get(name)]:
        raise DamagedCheckpoint(
            f"{folder} is of another model or optimizer: {len(other)} tensors differ, such as {other[0]}, which is "
            f"{there.get(other[0], 'not there')} in the checkpoint and {mine.get(other[0], 'not there')} here"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    return about


def read_run(folder: Path) -> dict:
    """What `run.json` says, after a look whether the files that it lists are all there.

    Raises:
        DamagedCheckpoint: they are not, or there is no such file.
    """
    try:
        about = json.loads((folder / RUN).read_text(encoding="utf-8"))
        files = {str(name): int(size) for name, size in about["files"].items()}
        about["step"], about["tensors"] = int(about["step"]), dict(about["tensors"])
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{folder} has no {RUN}: it is no checkpoint of several ranks") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(f"{folder / RUN} is damaged; take an older checkpoint") from None
    for name, size in files.items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else None
        if Path(name).name != name or there != size:
            how = "missing" if there is None else f"{there} bytes long instead of {size}"
            raise DamagedCheckpoint(f"{folder / name} is {how}; copy the checkpoint again, from all ranks")
    return about


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds, by name: "model.…" and "optimizer.….exp_avg"; a step count is no part of it."""
    found: dict[str, Tensor] = {}
    for path, p in model.named_parameters():
        if not p.requires_grad:
            continue
        name = path.removeprefix("module.")  # DDP's
        found[f"model.{name}"] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.dim():
                found[f"optimizer.{name}.{key}"] = value
    return found


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The shape of each as a whole."""
    return {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}


def make_state(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give an optimizer that has taken no step the state that a checkpoint of `step` steps fills.

    A step with a gradient and a learning rate of zero makes it, whatever its kind.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if step and not all(optimizer.state.get(p) for p in parameters):
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = (
                torch.full_like(state["step"], step) if isinstance(state["step"], Tensor) else step
            )
