"""Where an adapter comes from is recorded, and it is never loaded onto another base."""

import json

import pytest
import torch
from safetensors.torch import load_file

from labkit.formats.adapters import load_adapter, save_adapter
from labkit.formats.peft_folder import CONFIG, WEIGHTS
from labkit.formats.provenance import PROVENANCE, seal
from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import AdapterMismatch, fingerprint
from labkit.lora.inject import add_lora
from labkit.lora.qlora import add_qlora
from labkit.quant.model import quantize_model
from tests.conftest import make_small_llama
from tests.formats.cases import adapted
from tests.lora.cases import logits, make_model, randomize


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


def test_a_flipped_bit_of_the_data_is_seen(tmp_path):
    folder = save_adapter(adapted(), tmp_path / "a")
    path = folder / WEIGHTS
    raw = bytearray(path.read_bytes())
    raw[-1000] ^= 1  # the last bit of a number: it changes by a ten-millionth
    path.write_bytes(raw)
    model = make_small_llama()
    with pytest.raises(
        ValueError, match="the tensors in .* are not those that were saved.*delete labkit.json to insist"
    ):
        load_adapter(model, folder)
    (folder / PROVENANCE).unlink()
    load_adapter(model, folder)


def test_a_setting_that_was_edited_is_seen_and_the_name_of_the_base_may_be(tmp_path):
    folder = save_adapter(adapted(), tmp_path / "a")
    path = folder / CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere", "revision": "main"}))
    load_adapter(make_small_llama(), folder)
    path.write_text(json.dumps(config | {"lora_alpha": 9}))
    with pytest.raises(ValueError, match="the settings in .* are not those that were saved"):
        load_adapter(make_small_llama(), folder)


def resealed(folder, change):
    """A folder whose record was changed by somebody who knows how its hash is made."""
    record = json.loads((folder / PROVENANCE).read_text())
    change(record)
    sealed = seal(record, load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text()))
    (folder / PROVENANCE).write_text(json.dumps(sealed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r["start"]["quantization"].update(blocksize=128),
            "is not bit for bit that of the adapter",
        ),
        (
            lambda r: r["start"]["quantization"].update(codebook="fp4"),
            "is not bit for bit that of the adapter",
        ),
        (lambda r: r["base"].update(linears_kind="nf4/128/double"), "is not bit for bit that of the adapter"),
        (lambda r: r["start"].update(init="loftq_iter_2"), "is not bit for bit that of the adapter"),
        (
            lambda r: r["start"]["origin"].update(linears_kind="torch.bfloat16"),
            "original model in full precision",
        ),
        (
            lambda r: r["start"].update(init="pissa_niter_1000000000"),
            r"cannot be made again: init=.* is not known",
        ),
        (lambda r: r["start"].update(init="pissa_niter_4"), "cannot be made again: init=.* is random"),
        (
            lambda r: r["start"]["quantization"].update(compute_dtype="load"),
            "cannot be made again: compute_dtype",
        ),
        (lambda r: r["start"]["quantization"].update(colour="red"), "cannot be made again"),
    ],
)
def test_a_base_that_is_made_again_is_compared_whatever_the_record_says_and_the_model_is_put_back(
    tmp_path, change, message
):
    model = randomize(add_qlora(make_model(), LoRAConfig(r=4, init="loftq_iter_1", targets=["q_proj"])))
    folder = save_adapter(model, tmp_path / "a", plain=False)
    resealed(folder, change)
    fresh = make_model()
    before = [(name, id(m)) for name, m in fresh.named_modules()]
    with pytest.raises(ValueError, match=message):
        load_adapter(fresh, folder)
    assert [(name, id(m)) for name, m in fresh.named_modules()] == before
    assert all(p.requires_grad for p in fresh.parameters()) and torch.equal(
        logits(fresh), logits(make_model())
    )
