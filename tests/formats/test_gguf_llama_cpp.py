"""What a real llama.cpp computes from our GGUF files, against the model they were written from."""

import copy

import pytest
from transformers import LlamaForCausalLM

from labkit import models
from labkit.formats.gguf_adapter import save_gguf_adapter
from labkit.formats.gguf_model import save_gguf
from labkit.lora.inject import lora_layers
from labkit.models.surgery import untie_embeddings
from tests.formats.llama_cpp import answer, differences, engine
from tests.formats.test_merged import adapted

TOLERANCE = 1e-5  # of a log-probability, both sides in fp32
PROMPT = "Mr. Darcy looked at Elizabeth, and she said"
ADAPTERS = {
    "LoRA": {},
    "rsLoRA": {"variant": "rslora", "alpha": 4},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"down_proj": 2}},
    "PiSSA": {"init": "pissa"},
}


def small(**settings):
    """tiny-llama with an adapter about as large as a trained one."""
    model, tokenizer = adapted(**settings)
    for layer in lora_layers(model).values():
        layer.lora_B.data.mul_(0.3)
    return model, tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model, tokenizer = models.load("tiny-llama", dtype="float32")
    return save_gguf(model, tokenizer, tmp_path_factory.mktemp("base") / "base.gguf", "F32")


def compare(model, tokenizer, file, adapter=None, exact=True):
    ids = tokenizer(PROMPT)["input_ids"]
    said = answer(engine(file, adapter, exact), ids)
    greedy, largest = differences(model, ids, said)
    return greedy == said.ids, largest


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_llama_cpp_puts_the_adapter_on_its_base_and_says_the_same(settings, base, tmp_path):
    model, tokenizer = small(**settings)
    same, largest = compare(model, tokenizer, base, save_gguf_adapter(model, tmp_path / "a.gguf"))
    assert same and largest < TOLERANCE


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_llama_cpp_computes_the_merged_model(variant, tmp_path):
    model, tokenizer = small(variant=variant)
    same, largest = compare(model, tokenizer, save_gguf(model, tokenizer, tmp_path / "m.gguf", "F32"))
    assert same and largest < TOLERANCE


@pytest.mark.parametrize("numbers, at_most", [("F16", 1e-2), ("BF16", 5e-2), ("Q8_0", 0.3), ("Q4_0", 1.5)])
def test_fewer_bits_lose_more(numbers, at_most, tmp_path):
    model, tokenizer = small()
    _, largest = compare(model, tokenizer, save_gguf(model, tokenizer, tmp_path / "m.gguf", numbers))
    assert TOLERANCE < largest < at_most


def test_llama_cpps_defaults_are_coarser_than_the_file(base):
    model, tokenizer = models.load("tiny-llama", dtype="float32")
    _, exact = compare(model, tokenizer, base)
    _, usual = compare(model, tokenizer, base, exact=False)
    assert exact < TOLERANCE < 1e-4 < usual < 1e-2


def test_llama_cpp_adapts_an_embedding_and_an_output_layer_of_their_own(tmp_path):
    model, tokenizer = models.load("tiny-llama", dtype="float32")
    base = save_gguf(untie_embeddings(model), tokenizer, tmp_path / "base.gguf", "F32")
    model, _ = small(untied=True, targets=["embed_tokens", "lm_head", "q_proj"])
    same, largest = compare(model, tokenizer, base, save_gguf_adapter(model, tmp_path / "a.gguf"))
    assert same and largest < TOLERANCE


def test_llama_cpp_scales_positions_as_llama_3_does(tmp_path):
    plain, tokenizer = models.load("tiny-llama", dtype="float32")
    config = copy.deepcopy(plain.config)
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(plain.state_dict())
    ids = tokenizer(PROMPT * 15)["input_ids"][:200]
    said = answer(engine(save_gguf(model, tokenizer, tmp_path / "m.gguf", "F32")), ids)
    assert differences(model, ids, said)[1] < 2 * TOLERANCE  # further apart after a long text
    assert differences(plain, ids, said)[1] > 0.1  # without the scaling it is another model
