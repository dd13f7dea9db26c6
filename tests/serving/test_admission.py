"""Which folders become versions, and what is said of those that do not."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import labkit
from labkit.formats.peft_folder import CONFIG, WEIGHTS
from labkit.lora.inject import lora_layers
from labkit.quant.model import quantize_model
from labkit.serving import Base, Registry
from labkit.serving.admission import examine
from tests.lora.cases import IDS, make_model
from tests.serving.cases import BASE, form, write_adapter

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def with_nan(tensors, raw):
    tensors[f"{Q0}.lora_A.weight"][0, 0] = float("nan")


def rewrite(folder, change):
    """Change the tensors of a folder behind the back of its `labkit.json`."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def drop(key):
    return lambda tensors, raw: tensors.pop(key)


def add(key):
    return lambda tensors, raw: tensors.update({key: torch.ones(8)})


def rename(old, new):
    def change(tensors, raw):
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"base": form("c")}, "was trained on another base than small.*linears cccccccc… against aaaaaaaa…"),
        ({"base": form(shapes="t")}, "another base than small.*shapes tttttttt…"),
        (
            {"base": form("a", "torch.bfloat16")},
            "another base than small.*linears aaaaaaaa… against bbbbbbbb…",
        ),
        ({"width": 16}, r"q_proj.lora_A.weight has shape \(2, 16\), not \(2, 8\) as in small.*and 5 more"),
        ({"change": drop(f"{Q0}.lora_B.weight")}, "layers.0.self_attn.q_proj.lora_B.weight is missing"),
        ({"change": rename("layers.1", "layers.7")}, "layers.7.self_attn.q_proj: no such layer in small"),
        (
            {"change": rename("layers.1.self_attn.q", "layers.1.self_attn.k")},
            "k_proj has tensors, and is not adapted",
        ),
        ({"change": add(f"{Q0}.lora_C.weight")}, "q_proj.lora_C.weight is neither a LoRA weight"),
        ({"change": add(f"{Q0}.bias")}, "q_proj.bias is neither a LoRA weight"),
        (
            {"change": add(f"{Q0}.lora_magnitude_vector")},
            "lora_magnitude_vector is left over: its settings say another",
        ),
        (
            {"change": drop(f"{Q0}.lora_magnitude_vector"), "use_dora": True},
            "lora_magnitude_vector is missing",
        ),
        ({"change": lambda tensors, raw: raw.update(r=3)}, r"has shape \(2, 8\), not \(3, 8\)"),
        ({"change": lambda tensors, raw: tensors.clear()}, "it holds no tensors"),
        ({"peft_type": "IA3"}, "peft_type='IA3'; this loader reads LoRA"),
        ({"bias": "all"}, "bias='all', which this loader does not know"),
        ({"use_qalora": True}, "use_qalora=True, which this loader does not know"),
        ({"lora_alpha": -1}, "lora_alpha=-1 must be a positive number"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_folder_that_does_not_fit_is_refused_by_name(registry, tmp_path, given, said):
    folder = write_adapter(tmp_path / "a", **given)
    with pytest.raises(ValueError, match=said):
        registry.publish("support", folder, "ann")
    assert registry.versions() == [] and os.listdir(registry.root) == ["registry.sqlite"]


def test_nan_is_refused(registry, tmp_path):
    folder = write_adapter(tmp_path / "a")
    rewrite(folder, lambda tensors: with_nan(tensors, {}))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.lora_A.weight holds NaN"):
        registry.publish("support", folder, "ann")


def test_an_edited_folder_is_refused(registry, tmp_path):
    folder = write_adapter(tmp_path / "a")
    rewrite(folder, lambda tensors: tensors[f"{Q0}.lora_A.weight"].mul_(2))
    with pytest.raises(ValueError, match="the tensors in .* are not those that were saved"):
        registry.publish("support", folder, "ann")


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_damaged_file_is_refused(registry, tmp_path, cut):
    folder = write_adapter(tmp_path / "a")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:cut])
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        registry.publish("support", folder, "ann")


def test_a_pickle_file_is_refused(registry, tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle file, which can run any code"):
        registry.publish("support", folder, "ann")


def test_a_pipe_among_the_files_is_refused_and_not_waited_for(registry, tmp_path):
    folder = write_adapter(tmp_path / "a")
    os.mkfifo(folder / "notes.txt")
    with pytest.raises(ValueError, match=r"notes.txt is not a regular file"):
        registry.publish("support", folder, "ann")


@pytest.mark.parametrize("place", ["nothing", "file", "empty"])
def test_where_there_is_no_adapter_that_is_said(registry, tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no adapter|there is no adapter_model.safetensors"):
        registry.publish("support", tmp_path / place, "ann")


def test_a_folder_that_cannot_show_its_base_needs_the_word_of_its_publisher(registry, tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / "labkit.json").unlink()
    with pytest.raises(
        labkit.AdapterMismatch, match="has no labkit.json.*whether it is for small cannot be seen"
    ):
        registry.publish("support", folder, "ann")
    made = registry.publish("support", folder, "ann", trust_base=True)
    assert made.facts["base_checked"] == "stated by the publisher" and made.base is None


def test_a_base_in_a_form_that_is_not_known_needs_the_word_of_its_publisher(registry, tmp_path):
    folder = write_adapter(tmp_path / "a", base=form("e", "nf4/64/double"))
    with pytest.raises(
        labkit.AdapterMismatch, match="in a form .dtype or quantization. that this registry does not"
    ):
        registry.publish("support", folder, "ann")
    assert registry.publish("support", folder, "ann", trust_base=True).base == form("e", "nf4/64/double")


def test_trust_does_not_help_against_a_fingerprint_that_says_no(registry, tmp_path):
    with pytest.raises(labkit.AdapterMismatch, match="another base than small"):
        registry.publish("support", write_adapter(tmp_path / "a", base=form("c")), "ann", trust_base=True)


def test_each_form_of_the_base_is_compared_with_its_own_kind(registry, tmp_path):
    made = registry.publish("support", write_adapter(tmp_path / "a", base=form("b", "torch.bfloat16")), "ann")
    assert made.facts["base_checked"] == "by the fingerprint of its linears and rest"


def test_dora_is_kept_with_the_reason_why_it_is_served_alone(registry, tmp_path):
    made = registry.publish("support", write_adapter(tmp_path / "a", use_dora=True), "ann")
    [reason] = made.facts["alone"]
    assert made.facts["variant"] == "dora" and reason.startswith("DoRA scales each row")
    assert (
        "It cannot be served in one batch with other adapters: DoRA"
        in made.place.with_suffix(".md").read_text()
    )


def test_rank_patterns_are_followed(registry, tmp_path):
    def wider(tensors, raw):
        for part, shape in (("A", (5, 8)), ("B", (8, 5))):
            tensors[f"{Q0}.lora_{part}.weight"] = torch.ones(shape)

    pattern = {"layers.0.self_attn.q_proj": 5}
    made = registry.publish(
        "support", write_adapter(tmp_path / "a", change=wider, rank_pattern=pattern), "ann"
    )
    assert made.facts["r"] == 2 and made.facts["rank"] == 5


def test_whole_modules_are_kept_and_named(registry, tmp_path):
    def with_head(tensors, raw):
        tensors["base_model.model.lm_head.weight"] = torch.ones(32, 8)

    folder = write_adapter(tmp_path / "a", change=with_head, modules_to_save=["lm_head"])
    made = registry.publish("support", folder, "ann")
    assert made.facts["alone"] == ["it brings whole modules (lm_head) in place of the base's"]


def test_the_forms_of_a_base_are_of_one_model():
    with pytest.raises(ValueError, match="the forms of 'x' have other layers"):
        Base.of("x", make_model(), make_model(num_hidden_layers=1))
    with pytest.raises(ValueError, match="no model of the base 'x' was given"):
        Base.of("x")


def adapted(seed=0, quantized=False, **config):
    """A small Llama with an adapter that was not trained."""
    model = base_model(seed, quantized)
    labkit.add_lora(model, labkit.LoRAConfig(**{"r": 4, "alpha": 8} | config))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.eval()


def base_model(seed=0, quantized=False):
    model = make_model(seed=seed)
    if quantized:
        quantize_model(model, progress=False)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


class TestRealAdapters:
    """A model with adapters made by labkit and by PEFT."""

    @pytest.fixture(scope="class")
    def registry(self, tmp_path_factory) -> Registry:
        base = Base.of("small-llama", base_model(), base_model(quantized=True))
        return Registry.create(tmp_path_factory.mktemp("real") / "r", base)

    @pytest.mark.parametrize(
        ("quantized", "config"),
        [
            (False, {}),
            (True, {}),
            (False, {"variant": "rsdora", "targets": ("q_proj", "down_proj")}),
            (False, {"targets": ("q_proj", "embed_tokens")}),
            (False, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}}),
            (False, {"init": "pissa"}),
        ],
        ids=["lora", "qlora", "rsdora", "embeddings", "patterns", "pissa"],
    )
    def test_what_labkit_saves_is_published_and_loads_from_both_places(
        self, registry, tmp_path, quantized, config
    ):
        model = adapted(quantized=quantized, **config)
        made = registry.publish("support", labkit.save_adapter(model, tmp_path / "a"), "ann")
        assert made.facts["base_checked"].startswith("by the fingerprint")
        for place in (made.path, made.place):
            loaded = labkit.load_adapter(base_model(quantized=quantized), place)
            torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)

    def test_peft_reads_the_layout_and_what_peft_saves_is_published(self, registry, tmp_path):
        peft = pytest.importorskip("peft")
        made = registry.publish("sales", labkit.save_adapter(adapted(), tmp_path / "a"), "ann")
        theirs = peft.PeftModel.from_pretrained(base_model(), made.place).eval()
        ours = labkit.load_adapter(base_model(), made.place)
        torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-5)
        theirs.save_pretrained(tmp_path / "b")
        again = registry.publish("sales", tmp_path / "b", "ann", trust_base=True)
        assert torch.equal(logits(labkit.load_adapter(base_model(), again.place)), logits(ours))

    def test_an_adapter_of_another_base_of_the_same_shape_is_refused(self, registry, tmp_path):
        folder = labkit.save_adapter(adapted(seed=1), tmp_path / "a")
        with pytest.raises(labkit.AdapterMismatch, match="another base than small-llama"):
            registry.publish("support", folder, "ann")

    def test_what_loading_refuses_for_its_layers_is_not_admitted(self, registry, tmp_path):
        folder = labkit.save_adapter(adapted(targets=("q_proj", "v_proj")), tmp_path / "a")
        (folder / "labkit.json").unlink()
        raw = json.loads((folder / CONFIG).read_text()) | {"target_modules": ["q_proj"]}
        (folder / CONFIG).write_text(json.dumps(raw))
        for refuse in (
            lambda: examine(folder, registry.base, trust_base=True),
            lambda: labkit.load_adapter(base_model(), folder),
        ):
            with pytest.raises(labkit.AdapterMismatch, match="v_proj"):
                refuse()


def test_the_base_of_the_cases_is_one_that_fingerprints_describe():
    from labkit.lora.fingerprint import check_recorded

    for one in BASE.forms:
        check_recorded(one)
