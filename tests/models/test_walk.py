"""One walk: through every wrapper, under all names, every kind of layer, and the bytes of what was left."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import AdaptionPromptConfig, get_peft_model
from peft import IA3Config as PeftIA3Config
from peft import LoraConfig as PeftConfig
from peft import PromptTuningConfig as PeftPromptConfig
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck
from labkit.alternatives.ia3 import add_ia3
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.lora.adapters import use_adapter
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.models.walk import (
    ATTENTION,
    CONV1D,
    EMBEDDING,
    EXPERTS,
    LINEAR,
    PACKED,
    SUBCLASS,
    adapters_in,
    describe,
    left_out,
    own_name,
    path_of,
    total_bytes,
    unwrap,
    walk,
)
from labkit.quant.model import quantize_model
from tests.lora.cases import make_model


def peft(config):
    return lambda: get_peft_model(make_model(), config)


PEFT_LORA = PeftConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"], task_type="CAUSAL_LM")
WRAPPED = {
    "as it is": make_model,
    "compiled": lambda: torch.compile(make_model(), backend="eager"),
    "data parallel": lambda: nn.DataParallel(make_model()),
    "compiled in parallel": lambda: torch.compile(nn.DataParallel(make_model()), backend="eager"),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(make_model()),
    "PEFT's LoRA": peft(PEFT_LORA),
    "PEFT's IA3": peft(
        PeftIA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        )
    ),
    "PEFT's prompt": peft(PeftPromptConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "PEFT's LLaMA-Adapter": peft(
        AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    ),
    "PEFT, compiled": lambda: torch.compile(peft(PEFT_LORA)(), backend="eager"),
    "LoRA": lambda: add_lora(make_model(), LoRAConfig(r=2)),
    "DoRA, compiled": lambda: torch.compile(add_lora(make_model(), LoRAConfig(r=2, variant="dora"))),
    "IA3": lambda: add_ia3(make_model()),
    "bottlenecks": lambda: add_bottleneck(make_model(), BottleneckConfig(size=4)),
    "a prompt": lambda: add_prompt(make_model(), PromptConfig(3)),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_whatever_stands_around_a_model_its_layers_and_their_names_are_the_same(how):
    bare, model = make_model(), WRAPPED[how]()
    assert [layer.name for layer in walk(model)] == [n for n, m in bare.named_modules() if m._parameters]
    for layer, plain in zip(walk(model), walk(bare)):
        assert layer.kind == plain.kind and type(layer.module) is type(plain.module)
        assert layer.nbytes == plain.nbytes and layer.is_output == plain.is_output
        assert unwrap(model.get_submodule(layer.paths[0])) is layer.module
        assert own_name(model, layer.paths[0]) == layer.name
        assert unwrap(model.get_submodule(path_of(model, layer.name))) is layer.module
    assert [layer.name for layer in walk(model) if layer.is_output] == ["lm_head"]
    assert type(unwrap(model)) is type(bare)


def test_names_of_parameters_lose_the_wrappers_and_nothing_else():
    model = torch.compile(get_peft_model(make_model(), PEFT_LORA), backend="eager")
    own = [
        own_name(model, n) for n, _ in model.named_parameters() if "lora_" not in n and "_to_save" not in n
    ]
    assert own == [n for n, _ in make_model().named_parameters()]
    plain = nn.ModuleDict({"base": nn.ModuleDict({"module": nn.Linear(2, 2)})})
    assert own_name(plain, "base.module.weight") == "base.module.weight", "a name is no wrapper"
    with pytest.raises(KeyError, match="no module model.nothing"):
        path_of(model, "model.nothing")


def test_a_compiled_layer_inside_a_model_is_found_under_its_own_name():
    model = make_model()
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    assert [layer.name for layer in walk(model)] == [layer.name for layer in walk(make_model())]
    assert path_of(model, "model.layers.1.mlp.up_proj") == "model.layers.1._orig_mod.mlp.up_proj"


def test_an_output_layer_is_known_inside_a_model_that_knows_nothing_of_it():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = make_model(), make_model(seed=1)

    assert [layer.name for layer in walk(Inside()) if layer.is_output] == [
        "student.lm_head",
        "teacher.lm_head",
    ]


def test_every_kind_of_layer_is_named_as_what_it_is():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    mixtral = MixtralForCausalLM(
        MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=100, num_local_experts=4)
    )
    kinds = {layer.name: layer.kind for layer in walk(mixtral)}
    assert kinds["model.layers.0.mlp.experts"] == EXPERTS
    assert kinds["model.embed_tokens"] == EMBEDDING and kinds["lm_head"] == LINEAR
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    assert {layer.kind for layer in walk(gpt2) if ".c_" in layer.name} == {CONV1D}
    attention = walk(nn.MultiheadAttention(8, 2))
    assert [layer.kind for layer in attention] == [ATTENTION, SUBCLASS], "its in_proj_weight, and out_proj"
    positions = nn.Module()
    positions.embedding = nn.Parameter(torch.zeros(1, 16, 8))
    assert walk(positions)[0].kind == "other", "one matrix per batch is no expert"
    assert [layer.kind for layer in walk(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Bilinear(2, 2, 2)))] == [
        "other"
    ] * 2
    quantized = make_model()
    quantize_model(quantized, progress=False)
    assert {layer.kind for layer in walk(quantized) if "proj" in layer.name} == {PACKED}
    for storage in (torch.uint8, torch.bfloat16):
        theirs = Linear4bit(64, 64, quant_type="nf4", quant_storage=storage).to("cpu")
        assert walk(theirs)[0].kind == PACKED, "bytes, whatever the dtype that they are stored under"


def test_a_layer_in_two_places_is_one_layer_with_two_names_and_its_bytes_count_once():
    shared = nn.Linear(8, 8, bias=False)
    model = nn.ModuleDict({"encoder": shared, "decoder": shared, "head": nn.Linear(8, 2, bias=False)})
    first, head = walk(model)
    assert first.names == first.paths == ["encoder", "decoder"] and head.names == ["head"]
    assert total_bytes(walk(model)) == sum(p.nbytes for p in model.parameters())
    assert left_out(model, ["decoder"]) == [head]


def test_a_part_that_holds_the_whole_is_walked_once():
    model = nn.Sequential(nn.Linear(4, 4))
    model.part = nn.Module()
    model.part.whole = model
    assert [layer.names for layer in walk(model)] == [["0"]]


def test_what_was_left_is_told_in_bytes_which_with_the_rest_are_all_there_are():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=100, num_local_experts=8)
    )
    reached = [layer.name for layer in walk(model) if layer.kind == LINEAR and not layer.is_output]
    left = left_out(model, reached)
    parts = total_bytes(left), total_bytes(layer for layer in walk(model) if layer not in left)
    assert sum(parts) == sum(p.nbytes for p in model.parameters())
    experts = 2 * 8 * (64 * 256 + 128 * 64) * 4
    assert describe(left).startswith(f"2 x fused experts ({experts:,} bytes: model.layers.0.mlp.experts, …)")


@pytest.mark.parametrize(
    ("make", "carried"),
    [
        (make_model, []),
        (WRAPPED["compiled"], []),
        (WRAPPED["LoRA"], ["LoRA"]),
        (WRAPPED["DoRA, compiled"], ["LoRA"]),
        (lambda: use_adapter(WRAPPED["LoRA"](), None), ["LoRA"]),
        (lambda: nn.DataParallel(use_adapter(WRAPPED["LoRA"](), None)), ["LoRA"]),
        (WRAPPED["IA3"], ["IA3"]),
        (WRAPPED["bottlenecks"], ["Bottleneck"]),
        (WRAPPED["a prompt"], ["Prompt"]),
        (WRAPPED["PEFT's LoRA"], ["PEFT's adapters"]),
        (WRAPPED["PEFT's IA3"], ["PEFT's adapters"]),
        (WRAPPED["PEFT's prompt"], ["PEFT's adapters"]),
        (WRAPPED["PEFT's LLaMA-Adapter"], ["PEFT's adapters"]),
        (lambda: WRAPPED["PEFT's LoRA"]().get_base_model(), ["PEFT's adapters"]),
        (lambda: WRAPPED["PEFT's LoRA"]().merge_and_unload(), []),
    ],
)
def test_one_question_finds_the_adapters_of_every_kind(make, carried):
    assert adapters_in(make()) == carried
