"""(IA)^3, prompts and prefixes on disk: exact, at home in PEFT, and never loaded where they do not belong."""

import json
import os

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck
from labkit.alternatives.cost import cost
from labkit.alternatives.ia3 import IA3Config, add_ia3, ia3_layers, merge_ia3
from labkit.alternatives.prefixes import PrefixConfig, add_prefix, fold_prefix
from labkit.files import writing
from labkit.formats import peft_folder, provenance
from labkit.formats.adapters import save_adapter
from labkit.formats.alternatives import load_alternative, save_alternative
from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import AdapterMismatch
from labkit.lora.inject import add_lora
from labkit.quant.model import quantize_model
from tests.alternatives.cases import ALL, MAKERS, METHODS, N, gpt2, llama, randomize, text, with_method

pytestmark = pytest.mark.filterwarnings("ignore")


@torch.no_grad()
def logits(model):
    return model(input_ids=text()).logits


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_is_saved_here_loads_here_and_in_peft(tmp_path, make, name):
    model = with_method(make, name)
    expected = logits(model)
    folder = save_alternative(model, tmp_path / "a", data="hash", metrics={"loss": 1.5})
    loaded = load_alternative(make(), folder).eval()
    assert torch.equal(logits(loaded), expected)
    theirs = peft.PeftModel.from_pretrained(make(), str(folder)).eval()
    theirs_logits = logits(theirs)[:, N:] if name == "prompt" else logits(theirs)
    torch.testing.assert_close(theirs_logits, expected, rtol=1e-5, atol=1e-5)
    recorded = json.loads((folder / provenance.PROVENANCE).read_text())
    assert recorded["data"] == "hash" and recorded["metrics"] == {"loss": 1.5}
    again = save_alternative(loaded, tmp_path / "b")
    first, second = (load_file(f / peft_folder.WEIGHTS) for f in (folder, again))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_peft_saves_loads_here(tmp_path, make, name):
    torch.manual_seed(5)
    theirs = peft.get_peft_model(make(), METHODS[name][2]()).eval()
    if name == "ia3":
        randomize(theirs)  # the others start at random
    theirs.save_pretrained(tmp_path / "a")
    ours = load_alternative(make(), tmp_path / "a").eval()
    expected = logits(theirs)[:, N:] if name == "prompt" else logits(theirs)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(ours), logits(make()), atol=1e-3)


def test_pefts_targets_given_as_expressions_load_here(tmp_path):
    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=r".*\.1\.(self_attn\.v_proj|mlp\.down_proj)",
        feedforward_modules=r".*down_proj",
    )
    theirs = randomize(peft.get_peft_model(llama(), config).eval())
    theirs.save_pretrained(tmp_path / "a")
    ours = load_alternative(llama(), tmp_path / "a")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert {n: layer.on_input for n, layer in ia3_layers(ours).items()} == {
        "model.layers.1.self_attn.v_proj": False,
        "model.layers.1.mlp.down_proj": True,
    }


def test_an_mlp_is_left_behind_and_the_prefix_stays(tmp_path):
    model = with_method(llama, "prefix, MLP")
    loaded = load_alternative(llama(), save_alternative(model, tmp_path / "a"))
    assert cost(loaded).trained == cost(model).kept < cost(model).trained
    assert torch.equal(loaded.virtual_tokens.prefix, fold_prefix(model).virtual_tokens.prefix)


def test_merged_vectors_are_saved_with_the_fingerprint_of_the_base_as_it_was(tmp_path):
    model = with_method(llama, "ia3")
    folder = save_alternative(merge_ia3(model), tmp_path / "a")
    assert torch.equal(logits(load_alternative(llama(), folder)), logits(with_method(llama, "ia3")))


@pytest.mark.parametrize("name", ["ia3", "prefix"])
def test_a_quantized_bases_adapter_loads_on_it_bit_for_bit(tmp_path, name):
    model, fresh = llama(), llama()
    for one in (model, fresh):
        quantize_model(one, progress=False)
    add, config = ALL[name]
    folder = save_alternative(randomize(add(model, config)), tmp_path / "a")
    assert torch.equal(logits(load_alternative(fresh, folder)), logits(model))
    load_alternative(llama(), folder)  # the same base in other precision is the same base


def change(folder, alter):
    tensors = load_file(folder / peft_folder.WEIGHTS)
    alter(tensors)
    save_file(tensors, folder / peft_folder.WEIGHTS)


IA3_KEY = "base_model.model.model.layers.1.mlp.down_proj.ia3_l"


@pytest.mark.parametrize(
    ("name", "alter", "message"),
    [
        ("ia3", lambda t: t.pop(IA3_KEY), r"layers.1.mlp.down_proj.ia3_l is missing"),
        (
            "ia3",
            lambda t: t.update({"base_model.model.extra.ia3_l": torch.ones(4, 1)}),
            "extra.ia3_l is not one that",
        ),
        ("ia3", lambda t: t.update({IA3_KEY: torch.ones(128, 1)}), r"shape \(128, 1\), not \(1, 128\)"),
        ("prompt", lambda t: t.update(extra=torch.ones(1)), "extra is not one that"),
        ("prompt", lambda t: t.update(prompt_embeddings=torch.ones(N, 65)), r"\(5, 65\), not \(5, 64\)"),
        ("prefix", lambda t: t.update(prompt_embeddings=torch.ones(4, 128)), r"\(4, 128\), not \(5, 128\)"),
        ("prefix", lambda t: (t.clear(), t.update(other=torch.ones(1))), "prompt_embeddings is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_change_nothing(tmp_path, name, alter, message):
    folder = save_alternative(with_method(llama, name), tmp_path / "a")
    change(folder, alter)
    fresh = llama()
    before = [n for n, _ in fresh.named_parameters()]
    with pytest.raises(AdapterMismatch, match=message):
        load_alternative(fresh, folder)
    assert [n for n, _ in fresh.named_parameters()] == before
    assert all(p.requires_grad for p in fresh.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_another_base_is_refused(tmp_path, name):
    folder = save_alternative(with_method(llama, name), tmp_path / "a")
    other = llama()
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(AdapterMismatch, match="same shape but with other weights"):
        load_alternative(other, folder)
    with pytest.raises(AdapterMismatch, match="other layers or sizes"):
        load_alternative(gpt2(), folder)
    os.remove(folder / provenance.PROVENANCE)
    load_alternative(other, folder)


def test_foreign_and_damaged_folders_are_refused(tmp_path):
    model = llama()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        load_alternative(model, tmp_path)
    lora = save_adapter(add_lora(llama(), LoRAConfig(r=2)), tmp_path / "lora")
    with pytest.raises(ValueError, match=r"peft_type='LORA'.*labkit\.load_adapter"):
        load_alternative(model, lora)
    folder = save_alternative(with_method(llama, "ia3"), tmp_path / "a")
    path = folder / peft_folder.CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    with pytest.raises(ValueError, match=r"modules_to_save=\['lm_head'\]"):
        load_alternative(model, folder)
    path.write_text(json.dumps(config | {"target_modules": ["w9"], "feedforward_modules": []}))
    with pytest.raises(AdapterMismatch, match="match no layer of this model"):
        load_alternative(model, folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_alternative(model, folder)
    assert not ia3_layers(model)
    good = save_alternative(with_method(llama, "prompt"), tmp_path / "b")
    with pytest.raises(ValueError, match="IA3Config already, so prompt tuning cannot be added"):
        load_alternative(add_ia3(llama()), good)


def test_saving_replaces_a_folder_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = save_alternative(with_method(llama, "ia3"), tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft_folder, "save_file", full)
    with pytest.raises(
        writing.CannotWrite, match=r"cannot write .*a: the disk is full; what was .* is intact"
    ):
        save_alternative(with_method(llama, "prompt"), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["a"], "temporary files are gone"
    monkeypatch.undo()
    save_alternative(with_method(llama, "prompt"), folder)
    assert json.loads((folder / peft_folder.CONFIG).read_text())["peft_type"] == "PROMPT_TUNING"


def test_what_cannot_be_saved_says_why(tmp_path):
    with pytest.raises(ValueError, match="none of the methods"):
        save_alternative(llama(), tmp_path / "a")
    with pytest.raises(ValueError, match="PEFT knows no bottleneck adapters"):
        save_alternative(add_bottleneck(llama(), BottleneckConfig(4)), tmp_path / "a")
    model = add_prefix(llama(), PrefixConfig(2))
    model.virtual_tokens.prefix.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        save_alternative(model, tmp_path / "a")
    model = add_ia3(llama(), IA3Config(outputs=["0.self_attn.v_proj"], inputs=[]))
    folder = save_alternative(model, tmp_path / "b")
    assert list(ia3_layers(load_alternative(llama(), folder))) == ["model.layers.0.self_attn.v_proj"]
