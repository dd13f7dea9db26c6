"""More than one process: what is shared among them, what crosses the wire, and whether they do the same thing.

    ranks.py           start processes, watch them, say which one failed; world.py is what each of them knows
    torchrun.py        the same processes started from a script, as on a cluster
    ring.py            the collectives, written out; counting.py runs DDP and FSDP on them, and counts
    traffic.py         the same bytes in closed form
    sockets.py         the same bytes as the system sees them
    data_parallel.py   N shares of a batch as one step
    sharding.py        a model divided among ranks by FSDP2, its 4-bit weights too; checkpoints.py keeps it
    tensor_parallel.py a layer divided among ranks, with its adapter

Start with data_parallel, ring and traffic.
"""

from labkit.scale.checkpoints import load_checkpoint, save_checkpoint
from labkit.scale.counting import Transfer, count_transfers, sent
from labkit.scale.data_parallel import replicate, share, take_step
from labkit.scale.ranks import RankFailed, start
from labkit.scale.sharding import NotSharded, bytes_here, check_sharded, shard
from labkit.scale.tensor_parallel import ColumnLoRA, RowLoRA
from labkit.scale.world import DifferentRanks, at, check_same, joined

__all__ = [
    "ColumnLoRA",
    "DifferentRanks",
    "NotSharded",
    "RankFailed",
    "RowLoRA",
    "Transfer",
    "at",
    "bytes_here",
    "check_same",
    "check_sharded",
    "count_transfers",
    "joined",
    "load_checkpoint",
    "replicate",
    "save_checkpoint",
    "sent",
    "shard",
    "share",
    "start",
    "take_step",
]
