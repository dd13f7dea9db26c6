"""PiSSA and OLoRA as plain LoRA of twice the rank on the base as it was."""

import pytest
import torch

from labkit.lora.adapters import base_only
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge
from labkit.lora.mounting import mounted_adapter
from labkit.lora.plain import plain_factors, to_plain_lora
from labkit.lora.qlora import add_qlora
from tests.lora.cases import IDS, make_model, randomize


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_a_trained_start_becomes_plain_lora_of_twice_the_rank_on_the_original_base(init, variant):
    base = make_model()
    model = add_lora(
        make_model(), LoRAConfig(r=4, alpha=12, init=init, variant=variant, rank_pattern={"down_proj": 2})
    )
    randomize(model)
    with torch.no_grad():
        before = model(IDS).logits
        to_plain_lora(model)
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)
        with base_only(model):
            assert torch.equal(model(IDS).logits, base(IDS).logits)
    ranks = {name.rpartition(".")[2]: layer.r for name, layer in lora_layers(model).items()}
    assert (
        ranks["q_proj"] == 8 and ranks["down_proj"] == 4 and mounted_adapter(model).config.init == "default"
    )


def test_plain_factors_of_a_plain_adapter_are_its_own():
    layer = next(iter(lora_layers(add_lora(make_model(), LoRAConfig(r=4))).values()))
    A, B = plain_factors(layer)
    assert A.shape[0] == 4 and torch.equal(A, layer.lora_A) and torch.equal(B, layer.lora_B)


def test_to_plain_lora_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="PiSSA or OLoRA"):
        to_plain_lora(add_lora(make_model(), LoRAConfig(r=4)))
    with pytest.raises(ValueError, match="not at hand"):
        to_plain_lora(add_qlora(make_model(), LoRAConfig(r=4, init="pissa")))
    merged = merge(add_lora(make_model(), LoRAConfig(r=4, init="pissa")))
    with pytest.raises(ValueError, match="not at hand"):
        to_plain_lora(merged)
