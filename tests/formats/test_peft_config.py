"""PEFT's configuration: it names the base so that PEFT finds it, and what is not known in it is refused by name."""

import json

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    get_peft_model,
)
from peft import LoraConfig as PeftConfig
from transformers import BertConfig, BertModel, LlamaForSequenceClassification

from labkit.formats import peft_folder
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.lora.qlora import add_qlora
from labkit.models.loading import load
from tests.formats.cases import outputs
from tests.lora.cases import make_model, randomize


def test_a_random_start_cannot_be_saved_as_it_is_nor_read_from_peft(tmp_path):
    model = add_lora(make_model(), LoRAConfig(r=4, init="pissa_niter_2"))
    with pytest.raises(ValueError, match="plain=True"):
        save_adapter(model, tmp_path / "a", plain=False)
    folder = save_adapter(model, tmp_path / "a")
    config = json.loads((folder / peft_folder.CONFIG).read_text())
    for init in ("pissa_niter_4", "corda", "loftq"):
        (folder / peft_folder.CONFIG).write_text(json.dumps(config | {"init_lora_weights": init}))
        with pytest.raises(ValueError, match=f"init_lora_weights='{init}'"):
            load_adapter(make_model(), folder)


def change_config(folder, **values):
    path = folder / peft_folder.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_advice_on_starts_is_given_where_the_start_is_the_cause(tmp_path):
    folder = save_adapter(add_lora(make_model(), LoRAConfig(r=4)), tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"init_lora_weights='corda'.*path_initial_model_for_weight_conversion"
    ):
        load_adapter(make_model(), change_config(folder, init_lora_weights="corda"))
    with pytest.raises(ValueError, match=r"has bias='all', which") as refused:
        load_adapter(make_model(), change_config(folder, init_lora_weights=True, bias="all"))
    assert "path_initial" not in str(refused.value)


@pytest.mark.parametrize("value", [True, 3, "x", [1], {"a": 1}, float("nan")])
def test_a_key_that_nobody_here_knows_is_named_if_it_is_set(tmp_path, value):
    folder = save_adapter(add_lora(make_model(), LoRAConfig(r=4)), tmp_path / "a")
    with pytest.raises(ValueError, match="has use_what_comes=.*, which this loader does not know"):
        load_adapter(make_model(), change_config(folder, use_what_comes=value))
    for unset in (None, False, [], {}, "", 0):
        load_adapter(make_model(), change_config(folder, use_what_comes=unset))


def test_every_key_that_this_version_of_peft_writes_is_known(tmp_path):
    save_adapter(add_lora(make_model(), LoRAConfig(r=4, targets=["q_proj"])), tmp_path / "a")
    (tmp_path / "a" / "labkit.json").unlink()
    PeftConfig.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "a")
    assert len(json.loads((tmp_path / "a" / peft_folder.CONFIG).read_text())) > 30
    load_adapter(make_model(), tmp_path / "a")


def test_peft_finds_the_base_that_a_folder_names(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for place in ("base", str(tmp_path / "base")):
        model = make_model()
        model.config.name_or_path = place
        folder = save_adapter(randomize(add_lora(model, LoRAConfig(r=4))), tmp_path / "a")
        monkeypatch.chdir("/")
        theirs = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(outputs(theirs), outputs(model), rtol=1e-5, atol=1e-5)
        monkeypatch.chdir(tmp_path)


def test_peft_finds_the_base_that_comes_with_the_course(tmp_path):
    model = randomize(
        add_lora(load("tiny-llama", dtype=torch.float32)[0], LoRAConfig(r=4, targets=["q_proj"]))
    )
    folder = save_adapter(model, tmp_path / "a")
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(outputs(theirs), outputs(model), rtol=1e-5, atol=1e-5)


def test_peft_finds_the_class_of_a_base_for_another_task(tmp_path):
    classifier = make_model(LlamaForSequenceClassification, num_labels=5, pad_token_id=0)
    encoder = make_model(BertModel, BertConfig)
    for model, auto in ((classifier, AutoPeftModelForSequenceClassification), (encoder, AutoPeftModel)):
        place = tmp_path / type(model).__name__
        model.save_pretrained(place)
        model.config.name_or_path = str(place)
        targets = ["q_proj"] if model is classifier else ["query"]
        randomize(add_lora(model, LoRAConfig(r=4, targets=targets)))
        theirs = auto.from_pretrained(save_adapter(model, tmp_path / "a"), dtype=torch.float32)
        torch.testing.assert_close(outputs(theirs), outputs(model), rtol=1e-5, atol=1e-5)


def test_loftq_without_the_record_of_its_base_is_refused_here_and_in_peft(tmp_path):
    model = randomize(add_qlora(make_model(), LoRAConfig(r=4, init="loftq_iter_1", targets=["q_proj"])))
    folder = save_adapter(model, tmp_path / "a", plain=False)
    assert torch.equal(outputs(load_adapter(make_model(), folder)), outputs(model))
    (folder / "labkit.json").unlink()
    with pytest.raises(ValueError, match="init_lora_weights='loftq'"):
        load_adapter(make_model(), folder)
    with pytest.raises(ValueError, match="loftq_config"):
        PeftConfig.from_pretrained(folder)


@pytest.mark.parametrize("first", ["layers", ["h", "layers"], None])
def test_layers_by_number_are_those_that_peft_takes(tmp_path, first):
    config = PeftConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=first)
    theirs = get_peft_model(make_model(), config)
    theirs.save_pretrained(tmp_path / "a")
    ours = load_adapter(make_model(), tmp_path / "a")
    assert torch.equal(outputs(ours), outputs(theirs))
