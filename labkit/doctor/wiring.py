"""Does what should train get a gradient, does an optimizer hold it, and has it moved?"""

import math
import re
from collections import defaultdict

import torch
from torch import nn
from torch.nn import functional as F

from labkit.data.batches import IGNORE, collate
from labkit.data.encoding import Encoded
from labkit.doctor.case import Case
from labkit.doctor.findings import Finding, Missing, healthy, sick
from labkit.lora.mounting import adapters_of, mounted_adapter
from labkit.models.walk import unwrap, walk
from labkit.training.limits import padding_id

HALF = 0.5  # of the tensors: experts of a mixture may rest, but not most of what trains
LENGTH = 128  # tokens of the one backward pass, about


def look_at_training(case: Case) -> Finding:
    """The smallest of three shares of the tensors to train: with a gradient, in the optimizer, moved."""
    model, inner = case.model, unwrap(case.model)
    if adapters_of(inner).by_name and mounted_adapter(inner) is None:
        return sick(
            "the model has adapters, and all are switched off", 0.0, "call labkit.use_adapter(model, name)"
        )
    if case.is_merged:
        raise Missing(
            "the adapter is merged into the base, so nothing of it can train: labkit.unmerge(model)"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained and not case.layers:
        raise Missing("nothing in the model trains, and it has no adapter: a base, or merged for good")
    if not trained:
        return sick(
            f"the adapter's tensors are frozen: none of {2 * len(case.layers)} requires a gradient",
            0.0,
            "unfreeze them after whatever froze the model: another add_lora, a wrapper, quantization, requires_grad_",
        )
    if part := partly_covered(case):
        return part
    shares: dict[str, float] = {}
    if case.optimizer is not None:
        held = {id(p) for group in case.optimizer.param_groups for p in group["params"]}
        shares["in_optimizer"] = sum(id(p) in held for p in trained) / len(trained)
        if shares["in_optimizer"] < 1:
            return sick(
                f"{shares['in_optimizer']:.0%} of the tensors that train are in the optimizer",
                shares["in_optimizer"],
                "make the optimizer after the adapter is on the model",
                **shares,
            )
    if not torch.is_grad_enabled():
        raise Missing("gradients are switched off here (torch.no_grad); call the doctor outside of it")
    gradients = gradients_of(case, trained)
    shares["with_gradient"] = sum(g is not None for g in gradients) / len(trained)
    norm = sum(g.float().square().sum().item() for g in gradients if g is not None) ** 0.5
    if not math.isfinite(norm):
        raise Missing("the gradient is not finite, so its norm says nothing; see precision")
    shares["gradient_norm"] = norm
    if shares["with_gradient"] < HALF or norm == 0:
        return sick(
            f"{shares['with_gradient']:.0%} of the tensors that train get a gradient, of norm {norm:.3g}",
            shares["with_gradient"],
            "something on the way to the loss detaches: with checkpointing, use_reentrant=False or "
            "enable_input_require_grads()",
            **shares,
        )
    if case.is_trained and case.layers:
        shares["moved"] = sum(bool(m.lora_A.any() and m.lora_B.any()) for m in case.layers.values()) / len(
            case.layers
        )
        if shares["moved"] < HALF:
            return sick(
                f"B A is zero in {1 - shares['moved']:.0%} of {len(case.layers)} layers, as before training",
                shares["moved"],
                "the optimizer held other tensors, or the trained weights were not loaded",
                **shares,
            )
    return healthy(
        f"{len(trained)} tensors train, with a gradient of norm {norm:.3g}", shares["with_gradient"], **shares
    )


def partly_covered(case: Case) -> Finding | None:
    """The finding that a kind of layer is adapted in some blocks and not in others; None if all are alike."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for layer in walk(case.model):
        if re.search(r"\.\d+\.", layer.name) and layer.module.weight is not None and not layer.is_output:
            kinds[layer.name.rpartition(".")[2]].append(layer.name)
    adapted = set(case.layers)
    for kind, names in kinds.items():
        share = sum(name in adapted for name in names) / len(names)
        if 0 < share < HALF:
            return sick(
                f"{kind} is adapted in {share:.0%} of its {len(names)} places: the targets match less than they seem to",
                share,
                "name kinds of layers (q_proj, v_proj, …), and print labkit.lora.inject.lora_layers(model); if it is meant, pass on",
            )
    return None


def gradients_of(case: Case, trained: list[nn.Parameter]) -> list[torch.Tensor | None]:
    """The gradients of a loss on a few short records, in training mode, as a trainer computes it."""
    model, tokens = case.model, 0
    chosen: list[Encoded] = []
    for example in sorted(case.chosen(case.examples), key=len):
        tokens += len(example)
        if chosen and tokens > LENGTH:
            break
        chosen.append(example)
    batch = collate(chosen, padding_id(case.tokenizer, model)).to(case.device)
    model.train()
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, -batch.ids.shape[1] :][:, :-1]
    loss = F.cross_entropy(logits.float().transpose(1, 2), batch.targets[:, 1:], ignore_index=IGNORE)
    if not loss.requires_grad:
        return [None] * len(trained)
    for parameter in trained:
        parameter.grad = None
    loss.backward()
    return [p.grad for p in trained]
