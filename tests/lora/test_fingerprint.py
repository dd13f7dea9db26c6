"""A fingerprint is of the base, whatever is mounted on it."""

import pytest

from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import fingerprint
from labkit.lora.inject import lora_layers
from labkit.lora.merging import merge
from labkit.lora.qlora import add_qlora
from labkit.quant.model import quantize_model
from tests.conftest import make_small_llama
from tests.formats.cases import adapted
from tests.lora.cases import make_model, randomize


def test_fingerprint_does_not_see_adapters_merged_or_not():
    model = adapted()
    assert fingerprint(make_small_llama()) == fingerprint(model)
    assert fingerprint(merge(model)) == fingerprint(make_small_llama())


@pytest.mark.parametrize("init", ["default", "pissa", "loftq"])
def test_the_fingerprint_of_a_4_bit_base_is_the_same_before_and_after_a_merge(init):
    model = randomize(add_qlora(make_model(), LoRAConfig(r=4, init=init)))
    before = fingerprint(model)
    merged = merge(model, requantize=True)
    weights = {name: layer.base.weight for name, layer in lora_layers(merged).items()}
    assert fingerprint(merged) == before
    assert all(
        layer.is_merged and layer.base.weight is weights[n] for n, layer in lora_layers(merged).items()
    )
    if init == "default":
        alone = make_model()
        quantize_model(alone, progress=False)
        assert before == fingerprint(alone)
