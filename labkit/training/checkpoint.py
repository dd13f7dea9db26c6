"""The state of a run on disk: enough that a killed run goes on to the very numbers it would have reached.

That takes the trained parameters, the optimizer's moments and step counts, the state of the random generators
(for dropout), and the number of steps done, from which the order of the data follows. One safetensors file
holds all of it, the small things as JSON in the tensor `state`, so one rename makes the whole checkpoint
visible at once. Its header has a hash of all that it holds, and which run it belongs to is in it too
(`labkit.training.identity`).

Nothing of a file is taken before all of it was checked, and one run at a time uses a folder.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from labkit.files import reading, writing
from labkit.training.history import BestWeights, History
from labkit.training.identity import differences, in_words
from labkit.training.saved_state import (
    check_best,
    check_finite,
    check_generators,
    check_moments,
    check_progress,
    different_tensors,
)

FILE, LOCK = "run.safetensors", ".run.lock"
STATE, HASH = "state", "sha256"


def exists(folder: Path) -> bool:
    """Is there a checkpoint in `folder`?"""
    return (folder / FILE).exists()


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Within the block the folder is this run's, and it is known that files can be made there.

    What killed runs left behind is cleared.

    Raises:
        labkit.files.InUse: another run uses the folder.
        labkit.files.CannotWrite: it cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise writing.CannotWrite(
            f"checkpoint_folder={str(folder)!r} is a file; give a folder, or a new name"
        )
    taken = (
        f"another run keeps its checkpoints in {folder}, and each would overwrite the other's; wait for it, stop it, or "
        "give this run a checkpoint_folder of its own"
    )
    with writing.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with writing.only_one(folder / LOCK, taken):
        with writing.explained(folder), writing.scratch_beside(folder / FILE):
            pass
        yield


def save(
    folder: Path,
    identity: dict,
    steps_done: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    history: History,
    best: BestWeights | None,
    rng: dict[str, Tensor] | None = None,
) -> None:
    """Write the state of a run in place of the one before, in one step.

    Args:
        folder: where.
        identity: of the run.
        steps_done: how many.
        parameters: what trains, by name.
        optimizer, history, best: of the run.
        rng: `random_state()` after these steps; default: as it is now.

    Raises:
        labkit.files.CannotWrite: the disk is full, or the like; the checkpoint before is intact.
    """
    tensors = {f"parameter/{name}": p.detach() for name, p in parameters.items()}
    kept = dict(optimizer.state.items())  # of a paged optimizer, copies
    for name, p in parameters.items():
        tensors |= {f"optimizer/{key}/{name}": value for key, value in kept.get(p, {}).items()}
    if best:
        tensors |= {f"best/{name}": value for name, value in best.weights.items()}
    tensors |= {f"rng/{name}": value for name, value in (rng or random_state()).items()}
    state = {"identity": identity, "steps_done": steps_done, "best": best and best.loss, **vars(history)}
    tensors[STATE] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        with writing.new_file(folder / FILE) as part:
            save_file(tensors, part, metadata={HASH: hash_of(tensors)})
    except (OSError, SafetensorError) as error:
        if isinstance(error, writing.CannotWrite):
            raise
        raise writing.CannotWrite(
            f"cannot write a checkpoint to {folder} ({error}); the one before, if any, is intact"
        ) from error


def random_state() -> dict[str, Tensor]:
    """The state of PyTorch's random generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def hash_of(tensors: dict[str, Tensor]) -> str:
    """The sha256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load(
    folder: Path, identity: dict, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, History, BestWeights | None]:
    """Put the state of a run back into `parameters`, `optimizer` and the random generators.

    Returns:
        (steps done, history, best).

    Raises:
        ValueError: a damaged file, or the checkpoint of another run; says what differs. Nothing is changed
        then.
    """
    path = folder / FILE
    try:
        tensors, state = read(path)
        recorded = state["identity"]
        if not isinstance(recorded, dict):
            raise ValueError("its identity is no object")
    except (ValueError, KeyError, OSError) as error:
        raise unreadable(path, error) from None
    saved = {k.removeprefix("parameter/"): v for k, v in tensors.items() if k.startswith("parameter/")}
    different = differences(recorded, identity) + different_tensors(saved, parameters)
    if different:
        raise ValueError(
            f"{path} belongs to another run (different: {in_words(different)}); choose another "
            "checkpoint_folder, or delete this one to start anew"
        )
    try:
        done, history = check_progress(state, identity["total"])
        moments = check_moments(tensors, parameters, optimizer, done, history)
        best = check_best(tensors, parameters, state["best"])
        check_finite(tensors)
        generators = check_generators(tensors)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise unreadable(path, error) from None
    ids = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(
        {"state": {ids[parameters[name]]: one for name, one in moments.items()}, "param_groups": groups}
    )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(saved[name])
    for generator, value in generators:
        generator.set_state(value)
    return done, history, best


def unreadable(path: Path, error: Exception) -> ValueError:
    """The error about a damaged file."""
    reason = f"{error} is missing" if isinstance(error, KeyError) else error
    return ValueError(
        f"{path} is not a readable checkpoint ({reason}); delete it to start the run from the beginning"
    )


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a checkpoint, and its state.

    Raises:
        ValueError: it is damaged. Files of version 0.1.0 have no hash, and their state is in the header.
    """
    metadata = reading.read_header(path).get("__metadata__")
    tensors = reading.read_tensors(path)
    metadata = metadata if isinstance(metadata, dict) else {}
    if STATE in tensors:
        if metadata.get(HASH) != hash_of(tensors):
            raise ValueError("its contents are not what was written: the hash in its header is another one")
        raw = tensors.pop(STATE).numpy().tobytes()
    elif STATE in metadata:
        raw = metadata[STATE].encode()
    else:
        raise ValueError("it has no state of a run in it")
    state = reading.parse_json(path, raw)
    if not isinstance(state, dict):
        raise ValueError("its state is no object")
    return tensors, state
