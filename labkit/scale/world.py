"""What a rank knows: which one it is, how it talks to the others, and whether they run the same thing.

A collective is a promise that every rank calls the same one, in the same order, on tensors of the same shape. No
library checks that: ranks with another version of the code, another data file or another seed compute something, and
average it. So they compare hashes of all that must be equal first (`check_same`), and say in one sentence which
rank differs, in what.

Every wait is bounded by `Place.patience`. NCCL is used where there is a GPU for each rank, gloo elsewhere.

Sources: `torch.distributed`; PyTorch's notes on TORCH_DISTRIBUTED_DEBUG=DETAIL, which compares shapes at each call.
"""

import hashlib
import json
import os
import pickle
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from labkit.scale.counting import COUNTED, register

PATIENCE = 60.0  # seconds that a collective may take
WHERE = b"where"  # the question to a rank
LOST = ("Connection closed", "Timed out", "timed out", "timeout", "Connection reset", "Broken pipe")


@dataclass(frozen=True)
class Place:
    """Which rank a process is, and where it finds the others; see `ranks.start`."""

    rank: int
    ranks: int
    host: str
    port: int
    patience: float = PATIENCE
    counted: bool = False


class DifferentRanks(RuntimeError):
    """The ranks do not run the same thing; the message says which one differs in what."""


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


def device_of(rank: int, ranks: int) -> torch.device:
    """A GPU of its own for each rank where there are enough, else the CPU."""
    return torch.device("cuda", rank) if torch.cuda.device_count() >= ranks else torch.device("cpu")


@contextmanager
def joined(place: Place | None = None) -> Iterator[torch.device]:
    """Within the block this process is a rank; gives its device.

    Args:
        place: None under `torchrun`, whose environment says it.
    """
    if place is None:
        env = os.environ
        device = device_of(int(env["LOCAL_RANK"]), int(env["LOCAL_WORLD_SIZE"]))
        counted, patience, rest = False, PATIENCE, {}
    else:
        device, counted, patience = device_of(place.rank, place.ranks), place.counted, place.patience
        store = dist.TCPStore(place.host, place.port, is_master=False, timeout=seconds(patience))
        rest = {"rank": place.rank, "world_size": place.ranks, "store": store}
    if counted:
        register()
        device = torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = COUNTED if counted else "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=seconds(patience), **rest)
    try:
        yield device
    finally:
        dist.destroy_process_group()


_reporting: Connection | None = None
_sending = threading.Lock()  # two threads report


def at(step: int) -> None:
    """Tell whoever started the ranks that this one begins `step`; without anybody to tell, nothing."""
    if _reporting is not None:
        with suppress(OSError):
            tell(_reporting, "at", int(step))


def tell(connection: Connection, kind: str, value: Any) -> None:
    """Report to whoever started the ranks; by value, since this process may be gone before it is read."""
    with _sending:
        connection.send_bytes(pickle.dumps((kind, value)))


def take_part(place: Place, connection: Connection, function: Callable, arguments: Sequence) -> None:
    """What the process of a rank does: join, call the function, and report."""
    global _reporting
    _reporting = connection
    torch.set_num_threads(1)
    threading.Thread(target=answer, args=(connection,), daemon=True).start()
    tell(connection, "up", None)
    try:
        with joined(place):
            outcome = pickle.dumps(("done", function(*arguments)))
            dist.barrier()  # nobody leaves while another still talks to it
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)
        outcome = pickle.dumps(("waited" if lost else "failed", text))
    with _sending:
        connection.send_bytes(outcome)
    os._exit(0)  # a lost neighbour would keep the clean-up of the process group waiting


def answer(connection: Connection) -> None:
    """Say where this process is whenever that is asked, and end it when the one that started it ends."""
    with suppress(OSError, EOFError):
        while connection.recv_bytes() == WHERE:
            tell(connection, "where", doing())
    os._exit(1)


def doing() -> tuple[bool, str]:
    """Does this process wait for other ranks, and where is it: "in all_reduce, train.py, line 12 (step)"."""
    for thread, top in sys._current_frames().items():
        stack, frame = [], top
        while frame is not None:
            stack.append(frame)
            frame = frame.f_back
        inside = [f for f in stack if is_of_collectives(f.f_code.co_filename)]
        main = thread == threading.main_thread().ident
        if inside or main:
            own = next((f for f in stack if "torch" not in Path(f.f_code.co_filename).parts), top)
            line = f"{Path(own.f_code.co_filename).name}, line {own.f_lineno} ({own.f_code.co_name})"
            if inside:
                names = [f.f_code.co_name for f in inside if f.f_code.co_name != "wrapper"]
                return True, f"in {names[-1] if names else 'a collective'}, {line}"
            place = False, f"at {line}"
    return place


def is_of_collectives(file: str) -> bool:
    """Is it one of the files in which a rank waits for others?"""
    path = Path(file)
    return path.parent.name == "distributed" and path.name == "distributed_c10d.py"


def hash_of(value: Any) -> str:
    """A hash of a tensor, of a file or a folder's Python files (a `Path`), or of anything JSON can hold."""
    digest = hashlib.sha256()
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().view(-1)
        digest.update(
            f"{value.dtype} {tuple(value.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()
        )
    elif isinstance(value, Path):
        for file in sorted(value.rglob("*.py")) if value.is_dir() else [value]:
            digest.update(file.name.encode() + file.read_bytes())
    else:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def check_same(**values: Any) -> None:
    """Check that every rank gives the same values: `check_same(code=Path(labkit.__path__[0]), data=records, seed=0)`.

    Args:
        values: by name; see `hash_of` for what can be compared.

    Raises:
        DifferentRanks: on every rank, with one sentence about who differs from most in what.
    """
    mine = {name: hash_of(value) for name, value in values.items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    for name in dict.fromkeys(name for one in gathered for name in one):
        raise_if_different(name, [one.get(name, "missing") for one in gathered])


def raise_if_different(name: str, hashes: Sequence[str]) -> None:
    """Raise `DifferentRanks` unless all hashes are one."""
    usual, many = Counter(hashes).most_common(1)[0]
    if many == len(hashes):
        return
    odd = [rank for rank, one in enumerate(hashes) if one != usual]
    who = f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))}"
    have = "have" if len(odd) > 1 else "has"
    raise DifferentRanks(
        f"{who} {have} another {name} than the other{'s' if many > 1 else ''} ({hashes[odd[0]]} instead of {usual}); "
        "the average of their gradients would be that of no run. Start all from one checkout and one file"
    )


def same_parameters(named: Mapping[str, torch.Tensor]) -> None:
    """Check that all ranks hold the same bits: for adapters that were each started from a seed.

    Raises:
        DifferentRanks: see `check_same`.
    """
    check_same(**{name.replace(".", "_"): tensor for name, tensor in named.items()})
