"""The ledger against the card: what `plan` and `simulate` say of a step, and what CUDA's allocator had for it.

Each model has a published shape and random weights, made on the card as they are stored (`random_model`), takes two
plain steps, and is freed. Three numbers of the allocator are kept apart: what tensors requested, what their blocks
have, and what is reserved; and the workspaces of cuBLAS, which no formula knows. `simulate` takes a minute for a 70B,
so its answers are in a file beside this one (`gpu.simulated_steps`).
"""

import time

import torch
from torch.optim import AdamW

from gpu.ledger_steps import OF_A_REHEARSAL, STEPS, Step
from gpu.measurement import Measurement, Numbers, Section, Skipped, Stage
from gpu.simulated_steps import known, simulate_blocks
from labkit.memory import card
from labkit.memory.formulas import plan
from labkit.memory.measurement import TrainingStep, measure, static_all, storages
from labkit.memory.random_weights import random_model
from labkit.memory.setup import Setup
from labkit.memory.subjects import make_batch
from labkit.models.shapes import decoder_shape
from labkit.quant.kernels.dispatch import has_kernels
from labkit.quant.scratch import use_scratch
from labkit.training.recompute import checkpoint_blocks

GOAL = 0.02  # of what is allocated
WORKSPACES = 200_000_000  # bytes that libraries may take; the room that a step is given for them
ATTENTION = {-1: "none", 0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}  # torch.nn.attention.SDPBackend


def measurements(stage: Stage) -> list[Measurement]:
    """A measurement for each step, the most important first."""
    if stage.rehearsal:
        return [Measurement(step.key, lambda stage, step=step: take(step, stage)) for step in OF_A_REHEARSAL]
    simulated = known()
    return [
        Measurement(
            step.key,
            lambda stage, step=step: take(step, stage),
            needs_bytes=room_for(step, simulated.get(step.key)),
            packages=("triton",) if step.method == "qlora" else (),
            seconds=step.seconds,
        )
        for step in STEPS
    ]


def room_for(step: Step, simulated: dict[str, int] | None) -> int:
    """Memory of the card without which a step is not begun."""
    own = simulated["reserved_bytes"] if simulated else plan_of(step, step.setup()).peak
    return own + WORKSPACES


def plan_of(step: Step, setup: Setup):
    """The planned ledger of a step."""
    return plan(step.config(), **setup.as_dict())


def take(step: Step, stage: Stage) -> Numbers:
    """Plan a step, take it, and compare."""
    if stage.cuda and step.method == "qlora" and not has_kernels(torch.empty(0, device=stage.device)):
        raise Skipped("Triton has no kernels for this GPU, and what dequantizes without them is in no plan")
    setup = step.setup(stage.dtype, stage.device.type)
    planned, simulated = plan_of(step, setup), known().get(step.key) or simulate_blocks(step, setup)
    numbers = {
        "model": step.name,
        "method": step.method,
        "batch_size": setup.batch_size,
        "max_length": setup.max_length,
        "checkpointing": setup.checkpointing,
        "settings": setup.as_dict(),
        "plan_bytes": planned.peak,
        "plan_static_bytes": planned.static,
        **{f"simulated_{name}": n for name, n in simulated.items()},
        "attention": attention_of(step, setup, stage),
    }
    numbers |= taken(step, setup, stage)
    allocated, beside = numbers["allocated_bytes"], numbers["workspace_bytes"]
    for error, predicted in (("plan_error", planned.peak), ("simulation_error", simulated["bytes"])):
        numbers[error] = predicted / allocated - 1
        numbers[f"{error}_without_workspaces"] = predicted / (allocated - beside) - 1
    numbers["reserved_over_allocated"] = numbers["reserved_bytes"] / allocated - 1
    if step.published:
        numbers |= {"published": step.published, "published_bytes": step.published_bytes}
        numbers["over_published"] = numbers["reserved_bytes"] / step.published_bytes - 1
    return numbers


def taken(step: Step, setup: Setup, stage: Stage) -> Numbers:
    """Make the model, take two steps, and read the allocator; on a CPU, PyTorch's profiler."""
    device = stage.device
    others = usage_before(stage)
    started = time.perf_counter()
    model = random_model(step.config(), setup, device, stage.seed)
    stage.wait()
    numbers: Numbers = {"seconds_to_make": time.perf_counter() - started}
    numbers["model_bytes"] = sum(storages([*model.parameters(), *model.buffers()]))
    if stage.cuda:
        numbers["making_peak_bytes"] = card.usage(device, peak=True).allocated - others.allocated
    if setup.checkpointing:
        checkpoint_blocks(model)
    batch = make_batch(model.config.vocab_size, setup.batch_size, setup.max_length, setup.supervised)
    batch = batch.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=1e-5, fused=True)
    training = TrainingStep(model, batch, optimizer, trained, setup.checkpointing, setup.logits, 1.0)
    with use_scratch():  # what a CPU keeps for a dequantized weight is the step's own
        numbers |= on_card(training, others, stage) if stage.cuda else on_cpu(training)
    return numbers | (by_tensor(training) if step.by_tensor else {})


def by_tensor(training: TrainingStep) -> Numbers:
    """The ledger of the step, tensor by tensor. It copies all that trains, for which a card may have no room."""
    settings = training.optimizer, training.checkpointing, training.logits
    try:
        ledger = measure(training.model, training.batch, *settings)
    except torch.OutOfMemoryError:
        return {"measure": "out of memory"}
    return {"measure_bytes": ledger.peak, "components": ledger.components(at_peak=True)}


def usage_before(stage: Stage) -> card.Usage:
    """What others have of the card."""
    if not stage.cuda:
        return card.Usage(0, 0, 0)
    card.free_workspaces(stage.device)
    card.restart(stage.device)
    return card.usage(stage.device)


def on_card(training: TrainingStep, others: card.Usage, stage: Stage) -> Numbers:
    """Two plain steps; the optimizer makes its state in the first."""
    device = stage.device
    card.restart(device)
    training()
    stage.wait()
    started = time.perf_counter()
    training()
    stage.wait()
    seconds = time.perf_counter() - started
    peak = card.usage(device, peak=True)
    tensors = list(static_all(training.model, training.optimizer, training.batch))
    blocks = card.bytes_of_blocks(tensors, device)
    beside = card.usage(device).allocated - others.allocated - blocks
    return {
        "requested_bytes": peak.requested - others.requested,
        "allocated_bytes": peak.allocated - others.allocated,
        "reserved_bytes": peak.reserved - others.reserved,
        "static_bytes": blocks,
        "workspace_bytes": beside,
        "cublas_bytes": card.free_workspaces(device),
        "step_seconds": seconds,
    }


def on_cpu(training: TrainingStep) -> Numbers:
    """The same of PyTorch's profiler on a CPU, where nothing is reserved and there are no workspaces."""
    training()
    started = time.perf_counter()
    _, peak, _ = training.by_allocator()
    seconds = time.perf_counter() - started
    static = sum(storages(static_all(training.model, training.optimizer, training.batch)))
    names = ("requested_bytes", "allocated_bytes", "reserved_bytes")
    return dict.fromkeys(names, peak) | {
        "static_bytes": static,
        "workspace_bytes": 0,
        "step_seconds": seconds,
    }


def attention_of(step: Step, setup: Setup, stage: Stage) -> str:
    """Which of PyTorch's kernels for attention this step runs with here."""
    if not stage.cuda:
        return "cpu"
    shape = decoder_shape(step.config())
    heads = shape.num_attention_heads, shape.num_key_value_heads
    size = setup.batch_size, setup.max_length, shape.head_dim

    def tensor(n: int) -> torch.Tensor:
        new = torch.empty(size[0], n, *size[1:], dtype=stage.dtype, device=stage.device)
        return new.requires_grad_()

    q, k, v = tensor(heads[0]), tensor(heads[1]), tensor(heads[1])
    chosen = torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=heads[0] != heads[1])
    return ATTENTION.get(int(chosen), str(chosen))


def conclude(rows: dict[str, Numbers]) -> list[str]:
    """Is the goal met, what does reserved add, and which published figure agrees?"""
    sentences = []
    for name, error in (("plan", "plan_error"), ("simulate", "simulation_error")):
        sentences.append(agreement(name, error, rows))
    workspaces = [row["workspace_bytes"] / 1e6 for row in rows.values()]
    sentences.append(
        f"bytes of no tensor (workspaces): {min(workspaces):.0f} to {max(workspaces):.0f} MB; without them, "
        f"{agreement('plan', 'plan_error_without_workspaces', rows)}"
    )
    more = [row["reserved_over_allocated"] for row in rows.values()]
    sentences.append(f"reserved is {min(more):.1%} to {max(more):.1%} above allocated at its peak")
    if unfused := [key for key, row in rows.items() if row["attention"] == "math"]:
        sentences.append(
            f"{len(unfused)} of {len(rows)} steps ran without a fused kernel for attention, such as {unfused[0]}: all "
            "scores are kept there, which is not in the plan"
        )
    for key, row in rows.items():
        if "published" in row:
            sentences.append(
                f"{key}: {row['reserved_bytes'] / 1e9:.2f} GB reserved, {row['allocated_bytes'] / 1e9:.2f} GB "
                f"allocated; published: {row['published']} ({row['over_published']:+.0%})"
            )
    return sentences + ratios(rows)


def agreement(name: str, error: str, rows: dict[str, Numbers]) -> str:
    """How many steps a prediction is right about, and the worst."""
    worst = max(rows, key=lambda key: abs(rows[key][error]))
    good = sum(abs(row[error]) <= GOAL for row in rows.values())
    return (
        f"{name} is within {GOAL:.0%} of allocated in {good} of {len(rows)} steps; "
        f"the worst is {rows[worst][error]:+.1%}, {worst}"
    )


def ratios(rows: dict[str, Numbers]) -> list[str]:
    """QLoRA against the other methods on the same model and batch, as allocated."""
    sentences = []
    of_qlora = {key.removeprefix("QLoRA "): row for key, row in rows.items() if row["method"] == "qlora"}
    for rest, row in of_qlora.items():
        others = {name: rows.get(f"{name} {rest}") for name in ("LoRA", "full")}
        parts = [
            f"{other['allocated_bytes'] / row['allocated_bytes']:.1f} times less than {name}"
            for name, other in others.items()
            if other
        ]
        if parts:
            sentences.append(f"QLoRA {rest} takes {' and '.join(parts)}")
    return sentences


SECTION = Section(
    "ledger",
    "The ledger against the card",
    measurements,
    {
        "plan_bytes": "plan",
        "simulated_bytes": "simulated",
        "allocated_bytes": "allocated",
        "reserved_bytes": "reserved",
        "workspace_bytes": "workspaces",
        "plan_error": "plan off",
        "simulation_error": "simulated off",
        "attention": "attention",
        "seconds_to_make": "s to make",
    },
    conclude,
)
