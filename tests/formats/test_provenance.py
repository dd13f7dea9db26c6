"""Where an adapter comes from is recorded, and it is never loaded onto another base."""

import json

import pytest
import torch

from labkit.formats.adapters import load_adapter, save_adapter
from labkit.formats.provenance import PROVENANCE
from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import AdapterMismatch, fingerprint
from labkit.lora.inject import add_lora
from labkit.quant.model import quantize_model
from tests.conftest import make_small_llama
from tests.formats.cases import adapted
from tests.lora.cases import make_model


@pytest.mark.parametrize("quantized", [False, True])
def test_adapter_of_another_base_is_refused(tmp_path, quantized):
    save_adapter(adapted(quantized=quantized), tmp_path / "a")
    other = make_small_llama(seed=1)
    if quantized:
        quantize_model(other, progress=False)
    with pytest.raises(AdapterMismatch, match="same shape but with other weights"):
        load_adapter(other, tmp_path / "a")


def test_adapter_of_another_size_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path / "a")
    with pytest.raises(AdapterMismatch, match="other layers or sizes"):
        load_adapter(make_small_llama(intermediate_size=160), tmp_path / "a")


def test_the_same_base_in_other_precision_is_the_same_base(tmp_path):
    save_adapter(adapted(quantized=True), tmp_path / "a")
    load_adapter(make_small_llama(), tmp_path / "a")
    load_adapter(make_small_llama().bfloat16(), tmp_path / "a")


def test_provenance_is_recorded_and_of_the_base_before_pissa(tmp_path):
    model = add_lora(make_model(), LoRAConfig(r=4, init="pissa", targets=["q_proj"]))
    save_adapter(model, tmp_path / "a", data="3fb2", metrics={"loss": 1.25})
    record = json.loads((tmp_path / "a" / PROVENANCE).read_text())
    assert record["base"] == fingerprint(make_model())
    assert record["data"] == "3fb2" and record["metrics"] == {"loss": 1.25}
    assert record["config"]["init"] == "pissa" and record["config"]["targets"] == ["q_proj"]
    assert record["versions"]["torch"] == torch.__version__
