"""Each variant on each family of models computes and learns what PEFT's does, over dense and 4-bit bases."""

import pytest
import torch
from torch.nn import functional as F

from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge, unmerge
from labkit.quant.model import quantize_model
from tests.lora.cases import (
    FAMILIES,
    IDS,
    assert_same_logits_loss_and_gradients,
    give,
    make_model,
    peft_model,
    randomize,
    with_bitsandbytes,
)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "rsdora"])
def test_logits_loss_and_gradients_equal_peft(variant, quantized):
    ours, base = make_model(), make_model()
    if quantized:
        quantize_model(ours, progress=False, scale_rounding="lookup")  # bitsandbytes' own on a CPU
        with_bitsandbytes(base)
    add_lora(ours.train(), LoRAConfig(r=4, alpha=12, variant=variant))
    theirs = peft_model(base, variant)
    give(randomize(ours), theirs)
    assert_same_logits_loss_and_gradients(ours, theirs)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_adapted_where_peft_adapts_it_and_computes_the_same(family, variant):
    ours = add_lora(FAMILIES[family]().train(), LoRAConfig(r=4, alpha=12, variant=variant))
    theirs = peft_model(FAMILIES[family](), variant)
    modules = dict(theirs.get_base_model().named_modules())
    assert set(lora_layers(ours)) == {name for name, module in modules.items() if hasattr(module, "lora_A")}
    give(randomize(ours), theirs)
    ours.eval(), theirs.eval()
    assert_same_logits_loss_and_gradients(ours, theirs)
    with torch.no_grad():
        before = ours(input_ids=IDS)[0]
        torch.testing.assert_close(merge(ours)(input_ids=IDS)[0], before, rtol=1e-4, atol=2e-5)
        assert torch.equal(unmerge(ours)(input_ids=IDS)[0], before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_what_it_learns_with_peft(family):
    """Language models learn what they read by heart; BERT, to distinguish two sentences by its pooled output."""
    ours = add_lora(FAMILIES[family]().train(), LoRAConfig(r=4, alpha=12))
    theirs = peft_model(FAMILIES[family]())
    give(randomize(ours), theirs)
    losses = []
    for model in (ours.eval(), theirs.eval()):  # no dropout: the same numbers for both
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3, eps=1e-4)
        losses.append([])
        for _ in range(20):
            out = model(input_ids=IDS)
            if hasattr(out, "logits"):
                loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
            else:
                loss = F.cross_entropy(4 * out.pooler_output[:, :2], torch.tensor([0, 1]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.95 * losses[0][0]
