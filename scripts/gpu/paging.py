"""Optimizer state in a second tier: what a step costs at each budget, and the valve (`gpu.paging_valve`).

On a GPU the second tier is pinned host memory, and copies run on a stream of their own; in a rehearsal it is a file.

One model and one backward pass, and three optimizers that take turns on it: the plain one, a paged one, and a paged one that
does not read ahead. The learning rate is 0, so that all of them see the same gradients; AdamW does its work nonetheless.
What they move in a second is set against plain copies, out and in, in the same run. That the bits are equal is tried apart
from that: on copies of the parameters, with drawn gradients and a learning rate.
"""

from functools import partial

import torch
from torch import Tensor, nn

from gpu.capped import capped_memory
from gpu.machine import free_bytes
from gpu.measurement import Measurement, Numbers, Section, Skipped, Stage, laps, spread
from gpu.paging_subjects import adamw, backward, folder, state_bytes, trained_model
from gpu.paging_valve import CAP_BELOW, LENGTHS, Training, repeatable, the_valve, without_a_cap
from labkit.data.batches import Batch
from labkit.memory import make_batch
from labkit.optim.page_store import Placed
from labkit.optim.paging import attach_paging, store_for

SHARES = (0.25, 1.0, 0.5, 0.1)
MODELS = ("smollm2-360m", "smollm2-135m")  # the first that fits: 2.9 GB of state, or 1.1
COPIED = 256 * 2**20  # bytes of the plain copies, at most
ROUNDS = 5


def measurements(stage: Stage) -> list[Measurement]:
    """The valve, the cost at each budget, and bitsandbytes last: it never gives back the memory that it manages."""
    rows = [Measurement("the valve", the_valve, seconds=12)]
    rows += [
        Measurement(f"budget {100 * share:.0f} %", partial(cost_at, share=share), seconds=9)
        for share in SHARES
    ]
    peer = Measurement("bitsandbytes' paged AdamW", bitsandbytes_paged, packages=("bitsandbytes",), seconds=9)
    return [*rows, peer]


def cost_at(stage: Stage, share: float) -> Numbers:
    """A step at a budget of `share` of the state, beside the unpaged step."""
    name, model = trained_model(stage, MODELS)
    batch_size, length = (8, 512) if stage.cuda else (2, 32)
    batch = make_batch(model.config.vocab_size, batch_size, length).to(stage.device)
    parameters = list(model.parameters())
    state = state_bytes(parameters)
    budget = max(int(share * state), *(state_bytes([p]) for p in parameters))
    alone, whole, moved = take_turns(model, batch, budget, stage)
    copied = rate_of_copies(stage, min(COPIED, state))
    rate = moved / alone["paged"] / 1e9 if moved else None
    return {
        "model": name,
        "tokens": batch_size * length,
        "budget_share": share,
        "state_bytes": state,
        "budget_bytes": budget,
        "plain_s": whole["plain"],
        "step_s": whole["paged"],
        "without_prefetch_s": whole["without prefetch"],
        "ratio": whole["paged"] / whole["plain"],
        "optimizer_plain_s": alone["plain"],
        "optimizer_s": alone["paged"],
        "optimizer_without_prefetch_s": alone["without prefetch"],
        "laps": ROUNDS,
        "bytes_moved": moved,
        "gb_per_s": rate,
        "copy_gb_per_s": copied,
        "share_of_copy": rate and rate / copied,
        "tier": "pinned host memory" if stage.cuda else "a file",
        "bits_equal": bits_are_equal([p.detach() for p in parameters], budget, stage),
    }


def take_turns(model: nn.Module, batch: Batch, budget: int, stage: Stage) -> tuple[Numbers, Numbers, int]:
    """(median seconds of the optimizer by way, those of the whole step, bytes that paging moves in a step)."""
    parameters = list(model.parameters())
    optimizers = {way: adamw(parameters, lr=0.0) for way in ("plain", "paged", "without prefetch")}
    pagers = {
        way: attach_paging(optimizers[way], budget, prefetch=way == "paged", store=folder(stage))
        for way in ("paged", "without prefetch")
    }

    def step(way: str) -> None:
        optimizers["plain"].zero_grad()  # the parameters are those of all
        backward(model, batch, stage)
        optimizers[way].step()

    try:
        backward(model, batch, stage)
        alone = laps({way: optimizer.step for way, optimizer in optimizers.items()}, stage, ROUNDS)
        table = pagers["paged"].table
        before, first = table.bytes_in + table.bytes_out, table.step
        whole = laps({way: partial(step, way) for way in optimizers}, stage, ROUNDS)
        moved = (table.bytes_in + table.bytes_out - before) // (table.step - first)
    finally:
        for pager in pagers.values():
            pager.close(keep_state=False)
        optimizers["plain"].zero_grad()
    medians = ({way: spread(s)["median_s"] for way, s in times.items()} for times in (alone, whole))
    return *medians, moved


def rate_of_copies(stage: Stage, nbytes: int) -> float:
    """GB/s of plain copies to the second tier and back, one after the other."""
    store = store_for(stage.device, folder(stage))
    slot, data = (
        store.reserve(nbytes),
        [Placed(0, torch.zeros(nbytes, dtype=torch.uint8, device=stage.device))],
    )

    def out_and_in() -> None:
        store.write(slot, data)
        store.read(slot, data)

    try:
        return 2 * nbytes / spread(laps({"copies": out_and_in}, stage, ROUNDS)["copies"])["median_s"] / 1e9
    finally:
        store.close()


def bits_are_equal(values: list[Tensor], budget: int, stage: Stage) -> bool:
    """Four steps with drawn gradients: are parameters and state those of the optimizer without paging?"""
    expected = after_steps(values, stage)
    return all(
        same(expected, after_steps(values, stage, budget_bytes=budget, prefetch=prefetch))
        for prefetch in (True, False)
    )


def after_steps(values: list[Tensor], stage: Stage, steps: int = 4, **paging) -> list[Tensor]:
    """Parameters and moments after a few steps from `values`; one parameter in seven has no gradient."""
    parameters = [nn.Parameter(value.clone()) for value in values]
    optimizer = adamw(parameters, lr=1e-3)
    pager = attach_paging(optimizer, store=folder(stage), **paging) if paging else None
    generator = torch.Generator(stage.device).manual_seed(stage.seed)
    for step in range(steps):
        for n, p in enumerate(parameters):
            gradient = torch.randn(p.shape, device=stage.device, generator=generator)
            p.grad = gradient if (step + n) % 7 else None
        optimizer.step()
    optimizer.zero_grad()
    if pager is not None:
        pager.close()
    return [p.detach() for p in parameters] + [
        value for p in parameters for value in optimizer.state[p].values()
    ]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Are two lists of tensors equal, bit for bit?"""
    return len(some) == len(others) and all(map(torch.equal, some, others))


# --- bitsandbytes


def bitsandbytes_paged(stage: Stage) -> Numbers:
    """Its paged AdamW beside its plain one: the time of a step, and what the cap says about it."""
    if not stage.cuda:
        raise Skipped("CUDA's managed memory, in which its paged state lies, needs a GPU")
    from bitsandbytes.optim import AdamW32bit, PagedAdamW32bit

    name, model = trained_model(stage, MODELS[-1:])
    start = [p.detach().to("cpu", copy=True) for p in model.parameters()]
    state = state_bytes(start)
    if 3 * state > free_bytes(stage.device):  # two runs, and it gives nothing back
        raise Skipped(
            f"its managed memory, {2 * state / 1e9:.1f} GB, would not fit beside the rest of the GPU"
        )
    batch = make_batch(model.config.vocab_size, 8, 512).to(stage.device)
    optimizers = {
        "plain": AdamW32bit(model.parameters(), lr=0.0),
        "paged": PagedAdamW32bit(model.parameters(), lr=0.0),
    }

    def step(way: str) -> None:
        optimizers["plain"].zero_grad()
        backward(model, batch, stage)
        optimizers[way].step()

    step_s = {
        way: spread(times)["median_s"]
        for way, times in laps({way: partial(step, way) for way in optimizers}, stage, ROUNDS).items()
    }
    optimizers.clear()
    stage.tidy()
    with repeatable(), capped_memory(stage) as memory:
        free, needed = without_a_cap(model, start, stage, LENGTHS, memory, partial(AdamW32bit, lr=1e-4))
        cap = needed[-1] - int(CAP_BELOW * state)
        memory.cap(cap)
        plain = Training(model, start, stage, partial(AdamW32bit, lr=1e-4)).train(LENGTHS)
        plain.close()
        stage.tidy()
        paged = Training(model, start, stage, partial(PagedAdamW32bit, lr=1e-4)).train(LENGTHS)
    return {
        "model": name,
        "tokens": 8 * 512,
        "plain_s": step_s["plain"],
        "step_s": step_s["paged"],
        "ratio": step_s["paged"] / step_s["plain"],
        "state_bytes": state,
        "lengths": list(LENGTHS),
        "cap_bytes": cap,
        "plain_died_at_length": plain.died_at,
        "paged_reached_length": paged.reached,
        "losses_equal": paged.losses == free.losses,
        "state_is_counted": False,
        "note": "its state lies in CUDA's managed memory, which the cap does not count: that it reaches a length under the "
        "cap does not show that anything was paged out",
    }


# --- what follows


def conclude(rows: dict[str, Numbers]) -> list[str]:
    """What the valve did, what each budget costs, and whether the bits are equal."""
    found = []
    if valve := rows.get("the valve"):
        died, reached = valve["plain_died_at_length"], valve["paged_reached_length"]
        plain = f"the plain run died at {died:,} tokens" if died else "the plain run did not die"
        end = "to the end, " if reached == valve["lengths"][-1] else ""
        losses = (
            "the losses of a run without it"
            if valve["losses_equal"]
            else "OTHER losses than a run without it"
        )
        found.append(
            f"under a cap ({valve['cap']}) {plain}, and the paged one came {end}to {reached:,} tokens, with {losses} (C10)"
        )
    costs = sorted(
        (row for key, row in rows.items() if key.startswith("budget")), key=lambda row: -row["budget_share"]
    )
    if costs:
        ratios = ", ".join(f"{row['ratio']:.2f} at {100 * row['budget_share']:.0f} %" for row in costs)
        found.append(
            f"{costs[0]['model']}, {costs[0]['tokens']:,} tokens: the paged step takes the plain one's times {ratios} of the state"
        )
        equal = all(row["bits_equal"] for row in costs)
        found.append(
            "parameters and state are " + ("equal bit for bit at every budget" if equal else "NOT equal")
        )
    if (peer := rows.get("bitsandbytes' paged AdamW")) and peer["ratio"]:
        found.append(
            f"bitsandbytes: its paged step takes its plain one's times {peer['ratio']:.2f}; {peer['note']}"
        )
    return found


SECTION = Section(
    "paging",
    "Optimizer state in a second tier: what a step costs, and the valve",
    measurements,
    {
        "budget_share": "budget",
        "plain_s": "plain s",
        "step_s": "paged s",
        "without_prefetch_s": "no prefetch s",
        "ratio": "paged/plain",
        "gb_per_s": "GB/s",
        "share_of_copy": "of a copy",
        "bits_equal": "same bits",
        "plain_died_at_length": "plain died at",
        "paged_reached_length": "paged reached",
        "losses_equal": "same losses",
    },
    conclude,
)
