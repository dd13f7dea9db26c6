"""The valve: texts of rising length on a card that has too little room for them and all of the optimizer's state.

The same training, three times from the same start: without a cap; with a cap and all state in memory, until that run dies;
and with the same cap and `Pager.make_room_for`. The cap lies below what the longest text needs, by half of the state. Attention
and scatters are PyTorch's deterministic ones, so that equal losses are expected to the last bit.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.capped import CardMemory, SimulatedMemory, capped_memory
from gpu.measurement import Numbers, Skipped, Stage
from gpu.paging_subjects import adamw, backward, folder, state_bytes, trained_model
from labkit.memory import make_batch
from labkit.optim.paging import attach_paging
from labkit.optim.valve import is_out_of_memory

LENGTHS = (256, 512, 768, 896, 960, 1024)  # of smollm2-135m: on the way activations outgrow half of the state
REHEARSED = (32, 64, 128, 160, 176, 192)
STEPS_EACH = 2  # at every length
CAP_BELOW = 0.5  # of the state
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Training:
    """A training run on longer and longer texts.

    Args:
        model: is put back to `start` first.
        start: the values of its parameters.
        stage: where.
        make_optimizer: from the parameters.
        budget: of the state, with the valve; None for all of it in memory.

    Attributes:
        losses: of every step.
        reached: the longest length of which all steps were taken; 0 for none.
        died_at, error: the length of the step that ran out of memory, and what it said; None as long as none has.
        failed: passes that ran out of memory and were taken again.
    """

    def __init__(
        self,
        model: nn.Module,
        start: list[Tensor],
        stage: Stage,
        make_optimizer: MakeOptimizer = adamw,
        budget: int | None = None,
    ):
        self.model, self.stage = model, stage
        with torch.no_grad():
            for p, value in zip(model.parameters(), start, strict=True):
                p.copy_(value)
                p.grad = None
        self.optimizer = make_optimizer(list(model.parameters()))
        self.pager = None if budget is None else attach_paging(self.optimizer, budget, store=folder(stage))
        self.losses: list[float] = []
        self.reached, self.died_at, self.failed = 0, None, 0
        self.error: str | None = None

    def train(self, lengths: tuple[int, ...]) -> "Training":
        """Steps at each length, until all are taken or memory runs out."""
        for length in lengths:
            for number in range(STEPS_EACH):
                try:
                    self.losses.append(self.step(length, seed=1000 * number + length))
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    self.died_at, self.error = (
                        length,
                        f"{type(error).__name__}: {error}".splitlines()[0][:200],
                    )
                if self.died_at is not None:  # only here nothing refers to the tensors of that step
                    self.optimizer.zero_grad()
                    return self
            self.reached = length
        return self

    def step(self, length: int, seed: int) -> float:
        """One step on random tokens; the loss."""
        batch = make_batch(self.model.config.vocab_size, 1, length, seed=seed).to(self.stage.device)
        tries = 0

        def passes() -> float:
            nonlocal tries
            tries += 1
            return backward(self.model, batch, self.stage).item()

        loss = passes() if self.pager is None else self.pager.make_room_for(passes)
        self.failed += tries - 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def close(self) -> None:
        """Drop the optimizer's state."""
        if self.pager is not None:
            self.pager.close(keep_state=False)
        self.optimizer.state.clear()


def the_valve(stage: Stage) -> Numbers:
    """Which lengths the plain and the paged run reach under the cap, and whether the losses are those without one."""
    name, model = trained_model(stage, ("smollm2-135m",))
    lengths = LENGTHS if stage.cuda else REHEARSED
    start = [p.detach().to("cpu", copy=True) for p in model.parameters()]
    state = state_bytes(start)
    with repeatable(), capped_memory(stage, model.parameters()) as memory:
        free, needed = without_a_cap(model, start, stage, lengths, memory)
        cap = needed[-1] - int(CAP_BELOW * state)
        if cap <= needed[0]:
            raise Skipped(
                "the activations of these lengths do not outgrow the state, so no cap tells the two apart"
            )
        memory.cap(cap)
        plain = Training(model, start, stage).train(lengths)
        plain.close()
        stage.tidy()
        paged = Training(model, start, stage, budget=state).train(lengths)
        budget_at_end = paged.pager.table.budget
        paged.close()
    return {
        "model": name,
        "lengths": list(lengths),
        "steps_each": STEPS_EACH,
        "state_bytes": state,
        "needed_bytes": needed,
        "cap": memory.kind,
        "cap_bytes": cap,
        "plain_died_at_length": plain.died_at,
        "plain_error": plain.error,
        "paged_reached_length": paged.reached,
        "paged_error": paged.error,
        "budget_bytes": state,
        "budget_at_end_bytes": budget_at_end,
        "failed_passes": paged.failed,
        "losses_equal": paged.losses == free.losses and all(map(math.isfinite, free.losses)),
        "plain_losses_equal": plain.losses == free.losses[: len(plain.losses)],
        "losses": paged.losses,
    }


def without_a_cap(
    model: nn.Module,
    start: list[Tensor],
    stage: Stage,
    lengths: tuple[int, ...],
    memory: CardMemory | SimulatedMemory,
    make_optimizer: MakeOptimizer = adamw,
) -> tuple[Training, list[int]]:
    """(the run with room enough, the most memory in use up to the end of each length in bytes)."""
    run, needed = Training(model, start, stage, make_optimizer), []
    memory.peak()
    for length in lengths:
        run.train((length,))
        needed.append(max([memory.peak(), *needed]))
    run.close()
    stage.tidy()
    return run, needed


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Within the block, the same operations on the same numbers give the same bits, where PyTorch can."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.filterwarnings("ignore", message=".*[Dd]eterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
