"""What torchrun starts in the tests: steps on shares, and a rank that fails."""

import json
import sys
import threading

import torch.distributed as dist

from labkit.scale import data_parallel, joined


def main() -> None:
    with joined():
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if sys.argv[1] == "fail" and rank == 1:
            raise FloatingPointError("the loss is NaN")
        if sys.argv[1] == "hang":
            dist.barrier()
            threading.Event().wait()  # for ever
        from tests.scale import (
            parts,
        )  # transformers takes long to import, and a rank that fails has no use for it

        model = parts.tiny_qlora()
        optimizer = parts.optimizer_of(model)
        losses = [
            data_parallel.take_step(model, batch, optimizer).loss for batch in parts.batches(rank, ranks)
        ]
        if rank == 0:
            print(json.dumps(losses))


if __name__ == "__main__":
    main()
