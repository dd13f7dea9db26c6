"""What must come out the same twice: with a cache and without, now and later, policy and reference."""

from functools import partial

import torch
from torch import Tensor

from labkit.doctor.case import Case, base_alone, last_logits, with_logits
from labkit.doctor.findings import Finding, Missing, healthy, sick
from labkit.training.readiness import own_modes

SAME = 0.1  # of the logits' spread; rounding is far less
STEPS = 3  # tokens that are read one at a time
LENGTH = 32  # tokens that are read
START = 1e-3  # nats; rounding in 16 bits is less


@torch.no_grad()
def look_at_cache(case: Case) -> Finding:
    """The largest difference that a KV cache makes, in spreads of the logits; of the base and of the adapted model."""
    prompts = [(one.prompt + one.completion)[:LENGTH] for one in case.chosen(case.examples)[:2]]
    prompts = [ids for ids in prompts if len(ids) > STEPS + 1]
    if not prompts:
        raise Missing(f"no record has more than {STEPS + 1} tokens")
    case.model.eval()
    plain = [without_cache(case, ids) for ids in prompts]
    worst = max(map(partial(difference, case), prompts, plain))
    try:
        with base_alone(case.model):
            worst = max(worst, *(difference(case, ids, without_cache(case, ids)) for ids in prompts))
        both = "with the adapter and without"
    except Missing:
        both = "as the model is"
    worst = max(worst, *map(partial(difference, case), reversed(prompts), reversed(plain)))
    if not worst <= SAME:  # NaN is no agreement
        return sick(
            f"with a cache the logits differ from those without by {worst:.2g} of their spread",
            worst,
            "a cache belongs to one base and one adapter: drop it when either changes, and key a prefix cache by both",
        )
    return healthy(f"a cache changes no logit by more than {worst:.1e} of their spread, {both}", worst)


def without_cache(case: Case, ids: list[int]) -> Tensor:
    """The logits of the last places in one pass, (STEPS + 1, vocabulary)."""
    return last_logits(case.model, torch.tensor([ids], device=case.device), STEPS + 1).float()


def difference(case: Case, ids: list[int], plain: Tensor) -> float:
    """How far the last logits are from those computed without a cache, `plain`, in their standard deviation."""
    row = torch.tensor([ids], device=case.device)
    out = with_logits(case.model, row[:, :-STEPS], 1, use_cache=True)
    cache, said = getattr(out, "past_key_values", None), [out.logits[0, -1]]
    if cache is None:
        raise Missing("the model returns no KV cache")
    for i in range(len(ids) - STEPS, len(ids)):
        out = case.model(input_ids=row[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        said.append(out.logits[0, -1])
    together = torch.stack(said).float()
    return ((together - plain).abs().max() / plain.std().clamp(min=1e-12)).item()


@torch.no_grad()
def look_at_reference(case: Case) -> Finding:
    """KL(policy, reference) before the first step of DPO, which starts from its reference."""
    if case.reference is None:
        raise Missing("no reference model was given; only preference training (DPO, GRPO) has one")
    if case.history is not None and case.history.steps:
        raise Missing("steps were taken, and policy and reference differ since; look at step 0")
    mine = case.heard
    if case.reference == "base":
        theirs = case.heard_base
    else:
        with own_modes(case.reference):
            theirs = case.hear(case.reference, case.examples)
    kl = sum(kl_of(a.first, b.first) for a, b in zip(mine, theirs)) / len(mine)
    if not kl <= START:
        return sick(
            f"KL(policy, reference) is {kl:.3g} nats before the first step",
            kl,
            "the reference is the policy as it starts: a frozen copy of its adapter. Switching the adapter off gives the "
            "base, which is that only for a fresh one",
        )
    return healthy(f"KL(policy, reference) is {kl:.1e} nats", kl)


def kl_of(policy: Tensor, reference: Tensor) -> float:
    """KL divergence of two rows of logits, in nats."""
    p, q = policy.double().log_softmax(dim=0), reference.double().log_softmax(dim=0)
    return (p.exp() * (p - q)).sum().item()
