"""Are the numbers fine enough for what they have to hold?"""

import math
import statistics

import torch

from labkit.doctor.case import Case
from labkit.doctor.findings import Finding, Missing, healthy, sick
from labkit.lora.survival import merged_survival

STALLED = 0.3  # of the entries: a step of the learning rate leaves them as they are
SURVIVES = 0.8  # of an update, through a merge
COARSE = 0.5  # error of a merge, in lengths of the update
HALVES = (torch.float16, torch.bfloat16)


def look_at_precision(case: Case) -> Finding:
    """The largest share that rounding takes: of the values that are finite, of the steps, or of a merged update."""
    broken = [
        name for name, p in case.model.named_parameters() if p.is_floating_point() and not p.isfinite().all()
    ]
    halves = any(p.dtype in HALVES for p in case.model.parameters())
    ended = case.history is not None and any(not math.isfinite(loss) for loss in case.history.losses)
    if broken or (ended and halves):
        where = f"NaN or infinity in {len(broken)} tensors, such as {broken[0]}" if broken else ""
        return sick(
            where or "the loss became NaN",
            1.0,
            "train the adapter in fp32 (Adam's eps of 1e-8 is zero in fp16), or in bf16, with clipping"
            if halves
            else "go back to a checkpoint from before, and lower the learning rate",
        )
    if case.is_merged:
        return merged(case)
    trained = [p for p in case.model.parameters() if p.requires_grad]
    if not trained:
        raise Missing("nothing trains and nothing is merged, so no rounding shows; all weights are finite")
    coarse = [p.detach() for p in trained if p.dtype in HALVES]
    if not coarse:
        return healthy("all weights are finite, and those that train are in fp32", 0.0)
    lr = step_of(case)
    still = sum((((p + lr) == p) & ((p - lr) == p)).sum().item() for p in coarse) / sum(
        p.numel() for p in trained
    )
    kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in coarse}))
    if still > STALLED:
        return sick(
            f"a step of {lr:.2g} rounds to nothing in {still:.0%} of the entries that train, in {kinds}",
            still,
            "keep the weights that train in fp32; only the base may be in 16 bits",
        )
    return healthy(f"a step of {lr:.2g} moves {1 - still:.0%} of the entries that train, in {kinds}", still)


def step_of(case: Case) -> float:
    """What Adam moves an entry by in a step: about the learning rate."""
    if case.history is not None and case.history.steps:
        return statistics.fmean(record["lr"] for record in case.history.steps)
    if case.optimizer is not None:
        return statistics.fmean(group["lr"] for group in case.optimizer.param_groups)
    raise Missing("what trains is in 16 bits, and neither history nor optimizer says the learning rate")


def merged(case: Case) -> Finding:
    """The answer for a merged adapter: is it still in the weight?"""
    found = merged_survival(case.model)[""]
    lost = max(0.0, 1 - found.share)
    numbers = {"share": found.share, "rho": found.rho, "error": found.error}
    if found.share < SURVIVES or found.error > COARSE:
        return sick(
            f"{found.share:.0%} of the update is in the merged weight, with an error of {found.error:.2f} updates",
            lost,
            "merge into the weights in 16 or 32 bits, or serve the adapter beside its base",
            **numbers,
        )
    return healthy(f"{found.share:.0%} of the update is in the merged weight", lost, **numbers)
