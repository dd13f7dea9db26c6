"""What an adapter depends on and nobody else has is saved with it, or named."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification

from labkit.alternatives.ia3 import IA3Config, add_ia3
from labkit.formats import peft_folder
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.formats.alternatives import load_alternative, save_alternative
from labkit.formats.provenance import PROVENANCE
from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import AdapterMismatch
from labkit.lora.inject import add_lora
from labkit.lora.qlora import add_qlora
from labkit.quant.model import quantize_model
from tests.lora.cases import IDS, make_model, randomize


def classifier(seed: int) -> nn.Module:
    """The same pretrained backbone with a new head, as `from_pretrained(…, num_labels=5)` makes it."""
    model = make_model(LlamaForSequenceClassification, num_labels=5, pad_token_id=0)
    torch.manual_seed(seed)
    nn.init.normal_(model.score.weight, std=0.02)
    return model


def resized(seed: int, place: str = "", **config) -> nn.Module:
    """A pretrained model with four new tokens, whose rows are random."""
    model = make_model(**config)
    if place:
        model.save_pretrained(place)
        model.config.name_or_path = str(place)
    torch.manual_seed(seed)
    model.resize_token_embeddings(132, mean_resizing=False)
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


def check_at_home(folder, model: nn.Module, fresh, ids: torch.Tensor = IDS) -> None:
    """What was saved gives the same logits on a base with other new weights, here and in PEFT."""
    expected = logits(model, ids)
    assert not torch.equal(logits(fresh(), ids), expected)
    torch.testing.assert_close(logits(load_adapter(fresh(), folder), ids), expected, rtol=0, atol=0)
    theirs = PeftModel.from_pretrained(fresh(), str(folder))
    torch.testing.assert_close(logits(theirs, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modules_to_save", [["score"], []], ids=["trained", "not trained"])
def test_a_new_head_goes_with_the_adapter_whether_it_was_trained_or_not(tmp_path, modules_to_save):
    config = LoRAConfig(r=4, targets=["q_proj", "up_proj"], modules_to_save=modules_to_save)
    model = randomize(add_lora(classifier(1), config))
    if modules_to_save:
        nn.init.normal_(model.score.weight)
    folder = save_adapter(model, tmp_path / "a")
    check_at_home(folder, model, lambda: classifier(2))
    assert json.loads((folder / peft_folder.CONFIG).read_text())["modules_to_save"] == ["score"]
    assert json.loads((folder / PROVENANCE).read_text())["replaces"] == ["score"]
    again = save_adapter(load_adapter(classifier(3), folder), tmp_path / "b")
    assert (again / peft_folder.WEIGHTS).read_bytes() == (folder / peft_folder.WEIGHTS).read_bytes()
    other = classifier(1)
    other.model.norm.weight.data += 1
    with pytest.raises(AdapterMismatch, match="same shape but with other weights"):
        load_adapter(other, folder)


def test_new_tokens_that_were_trained_go_with_the_adapter(tmp_path):
    config = LoRAConfig(r=4, targets=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = randomize(add_lora(resized(1), config))
    check_at_home(save_adapter(model, tmp_path / "a"), model, lambda: resized(2), IDS + 108)


def test_new_tokens_that_were_not_trained_go_along_as_in_peft(tmp_path):
    model = randomize(add_lora(resized(1, tmp_path / "base"), LoRAConfig(r=4, targets=["q_proj"])))
    check_at_home(save_adapter(model, tmp_path / "a"), model, lambda: resized(2), IDS + 108)


def test_new_rows_of_tied_embeddings_are_named_when_saved_and_when_refused(tmp_path):
    def make(seed: int, place: str = "") -> nn.Module:
        return resized(seed, place, tie_word_embeddings=True)

    model = randomize(add_lora(make(1, tmp_path / "base"), LoRAConfig(r=4, targets=["q_proj"])))
    with pytest.warns(UserWarning, match=r"weights of model\.embed_tokens, lm_head are new in this model"):
        folder = save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(load_adapter(make(1), folder), IDS + 108), logits(model, IDS + 108))
    with pytest.raises(AdapterMismatch, match=r"It depends on model\.embed_tokens, lm_head, newly made"):
        load_adapter(make(2), folder)


@pytest.mark.parametrize("how", ["adapted", "in 4 bits", "beside (IA)^3"])
def test_a_new_head_that_a_folder_cannot_hold_is_named_when_saved_and_when_refused(tmp_path, how):
    def base(seed: int) -> nn.Module:
        model = classifier(seed)
        if how == "in 4 bits":
            quantize_model(model, progress=False)
        return model

    if how == "beside (IA)^3":
        model = add_ia3(base(1), IA3Config(outputs=["k_proj"], inputs=["down_proj"]))
        save, load = save_alternative, load_alternative
    else:
        targets = ["q_proj", "score"] if how == "adapted" else ["q_proj"]
        model, save, load = add_lora(base(1), LoRAConfig(r=2, targets=targets)), save_adapter, load_adapter
    with pytest.warns(UserWarning, match="the weights of score are new in this model"):
        folder = save(model, tmp_path / "a")
    assert torch.equal(logits(load(base(1), folder)), logits(model))
    with pytest.raises(AdapterMismatch, match="It depends on score, newly made in the model"):
        load(base(2), folder)


def test_a_head_of_full_precision_beside_a_4_bit_base_made_with_the_adapter(tmp_path):
    config = LoRAConfig(r=4, init="pissa", targets=["q_proj"], modules_to_save=["score"])
    model = randomize(add_qlora(classifier(1), config))
    nn.init.normal_(model.score.weight)
    folder = save_adapter(model, tmp_path / "a", plain=False)
    assert torch.equal(logits(load_adapter(classifier(2), folder)), logits(model))


@pytest.mark.parametrize("make", [make_model, lambda: make_model(tie_word_embeddings=True)])
def test_a_language_model_as_it_was_pretrained_has_nothing_new(tmp_path, make):
    make().save_pretrained(tmp_path / "base")
    model = make()
    model.config.name_or_path = str(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = save_adapter(add_lora(model, LoRAConfig(r=4, targets=["q_proj"])), tmp_path / "a")
    record = json.loads((folder / PROVENANCE).read_text())
    assert record["replaces"] == record["depends_on"] == []


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_that_peft_saves_beside_an_adapter_must_be_those_of_the_base(tmp_path, tied):
    config = PeftConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    theirs = get_peft_model(resized(1, tie_word_embeddings=tied), config)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    ours = load_adapter(resized(1, tie_word_embeddings=tied), tmp_path / "a")
    assert torch.equal(logits(ours, IDS + 108), logits(theirs, IDS + 108))
    with pytest.raises(AdapterMismatch, match="is not the weight of this base: was its vocabulary changed"):
        load_adapter(resized(2, tie_word_embeddings=tied), tmp_path / "a")
