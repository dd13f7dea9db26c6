"""Before and in the first step: every state in which nothing would be learned is refused, and the model
unchanged.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from labkit.alternatives.ia3 import add_ia3, merge_ia3
from labkit.alternatives.methods import base_only
from labkit.alternatives.prefixes import PrefixConfig, add_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.data.encoding import Encoded
from labkit.lora.adapters import base_only as disabled
from labkit.lora.adapters import use_adapter
from labkit.lora.merging import adapter_strength, merge, unmerge
from labkit.quant.model import quantize_model
from labkit.training.config import TrainConfig
from labkit.training.loop import train
from labkit.training.readiness import check_causal, looks_ahead
from tests.training.small_runs import QUIET, SHORT, tiny_adapted, tiny_llama

SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {**SIZES, "num_attention_heads": 2, "intermediate_size": 48}
IDS = torch.tensor([[5, 9, 70, 3, 44, 8]])


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def refuses(model, tiny, message, **settings):
    """`train` raises, and every tensor of the model, its modes and hooks are as they were."""
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(ValueError, match=message):
        train(model, tiny[1], SHORT, TrainConfig(**QUIET | settings))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert [module.training for module in model.modules()] == modes
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert all(p.grad is None for p in model.parameters())


def test_training_while_merged_is_refused_even_where_a_head_would_train(tiny):
    model = merge(tiny_adapted(modules_to_save=["lm_head"], init="b_random"))
    refuses(
        model,
        tiny,
        r"the adapter is merged into the base \(model.layers.0.*\), .*; call unmerge\(model\) first",
    )
    assert train(unmerge(model), tiny[1], SHORT, TrainConfig(**QUIET)).without_gradient == []
    refuses(
        merge_ia3(add_ia3(tiny_llama())), tiny, r"merged into the base .*; call unmerge_ia3\(model\) first"
    )


def test_training_with_an_adapter_switched_off_is_refused_even_where_other_weights_train(tiny):
    model = tiny_adapted()
    model.model.norm.weight.requires_grad_(True)
    said = r"the adapters of the model \(default\) are switched off, .* use_adapter\(model, 'default'\)"
    with disabled(model):
        refuses(model, tiny, said)
    refuses(use_adapter(model, None), tiny, said)
    prompted = add_prompt(tiny_llama(), PromptConfig(3))
    with base_only(prompted):
        refuses(
            prompted, tiny, r"Prompt is switched off, so it would not train; .* outside of base_only\(model\)"
        )
    train(use_adapter(model, "default"), tiny[1], SHORT, TrainConfig(**QUIET | {"steps": 1}))


def test_training_with_frozen_adapters_or_nothing_to_train_says_which(tiny):
    model = tiny_adapted()
    for p in model.parameters():
        p.requires_grad_(False)
    refuses(
        model,
        tiny,
        "no parameter of the model requires a gradient; its adapters are frozen too, which quantize_model",
    )
    model = tiny_llama().requires_grad_(False)
    refuses(model, tiny, "no parameter of the model requires a gradient; call add_lora, or unfreeze some")


def test_gradients_that_are_switched_off_outside_are_told(tiny):
    for off in (torch.no_grad, torch.inference_mode):
        model = tiny_adapted()
        with (
            off(),
            pytest.raises(ValueError, match="gradients are switched off here .*; call train outside of it"),
        ):
            train(model, tiny[1], SHORT, TrainConfig(**QUIET))
    with torch.inference_mode():
        model = tiny_llama()
    with pytest.raises(
        ValueError, match=r"was made within torch.inference_mode, and cannot be differentiated"
    ):
        train(model, tiny[1], SHORT, TrainConfig(**QUIET))
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ValueError, match="is on the meta device: it has a shape, and no values"):
        train(model, tiny[1], SHORT, TrainConfig(**QUIET))


def test_parameters_without_a_part_in_the_loss_are_an_error_in_the_first_step(tiny):
    said = (
        r"none of the 1 parameters that train has a part in the loss \(spare\), so nothing would be learned"
    )
    model = tiny_llama().requires_grad_(False)
    model.spare = torch.nn.Parameter(torch.ones(3))
    refuses(model, tiny, said)
    refuses(model, tiny, said, logits="all")
    peft = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with peft.disable_adapter():
        refuses(
            peft,
            tiny,
            "no parameter of the model requires a gradient|none of the 4 parameters that train has a part",
        )
    detached = tiny_adapted()
    detached.model.norm.register_forward_hook(lambda module, _, output: output.detach())
    refuses(
        detached,
        tiny,
        r"none of the 8 parameters that train has a part in the loss .*on the way to the loss detaches",
    )


def test_a_factor_of_zero_before_everything_that_trains_is_an_error_in_the_first_step(tiny):
    model = tiny_adapted()
    with adapter_strength(model, 0):
        refuses(
            model,
            tiny,
            r"gradient of every parameter that trains is exactly zero at a loss of 8.*adapter_strength",
        )
    assert train(model, tiny[1], SHORT, TrainConfig(**QUIET)).stopped == "finished", (
        "A's zeros alone are fine: B = 0"
    )


CAUSAL = {
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2)),
    "OPT": lambda: OPTForCausalLM(
        OPTConfig(**SIZES, ffn_dim=48, num_attention_heads=2, word_embed_proj_dim=16)
    ),
    "Mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4)),
    "Gemma": lambda: GemmaForCausalLM(GemmaConfig(**HEADS, num_key_value_heads=1, head_dim=16)),
    "Qwen3 MoE": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **HEADS, num_key_value_heads=2, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
        )
    ),
    "BERT as a decoder": lambda: BertLMHeadModel(BertConfig(**HEADS, is_decoder=True)),
    "Llama in 4 bits": lambda: in_four_bits(tiny_llama()),
    "a soft prompt": lambda: add_prompt(tiny_llama(), PromptConfig(3)),
    "a prefix": lambda: add_prefix(tiny_llama(), PrefixConfig(3)),
    "bf16": lambda: tiny_llama().bfloat16(),
}
NOT_CAUSAL = {
    "BERT": lambda: BertForMaskedLM(BertConfig(**HEADS)),
    "BERT with a causal class and no causal mask": lambda: BertLMHeadModel(BertConfig(**HEADS)),
    "BERT in bf16": lambda: BertForMaskedLM(BertConfig(**HEADS)).bfloat16(),
    "a Llama that was made bidirectional": lambda: bidirectional(tiny_llama()),
}


def in_four_bits(model):
    quantize_model(model, progress=False)
    return model


def bidirectional(model):
    """As LLM2Vec does: attention over everything, by the mask."""
    forward = model.model.forward

    def without_mask(*args, **kwargs):
        time = kwargs["input_ids"].shape[1]
        return forward(*args, **kwargs | {"attention_mask": torch.zeros(1, 1, time, time)})

    model.model.forward = without_mask
    return model


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_is_taken(name):
    """The oracle: the logits themselves do not change with the last token."""
    model = CAUSAL[name]().eval()
    other = torch.cat([IDS[:, :-1], IDS[:, -1:] + 1], 1)
    with torch.no_grad():
        first, second = (model(input_ids=ids, use_cache=False).logits[:, :-1] for ids in (IDS, other))
    torch.testing.assert_close(first, second)
    assert not looks_ahead(model, IDS)


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_model_whose_earlier_logits_depend_on_later_tokens_is_refused(name):
    model = NOT_CAUSAL[name]().eval()
    other = torch.cat([IDS[:, :-1], IDS[:, -1:] + 1], 1)
    with torch.no_grad():
        first, second = (model(input_ids=ids, use_cache=False).logits[:, :-1] for ids in (IDS, other))
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match=r"is not causal: what it says at a token depends on later ones"):
        check_causal(model, [Encoded([5, 9, 70], [3, 44, 8])], torch.device("cpu"))


def test_bert_is_refused_before_a_weight_moves(tiny):
    model = BertForMaskedLM(BertConfig(**HEADS | {"vocab_size": 4096}))
    refuses(model, tiny, "BertForMaskedLM is not causal")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=4096, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2)),
            "T5ForConditionalGeneration has an encoder and a decoder",
        ),
        (
            lambda: LlamaForSequenceClassification(LlamaConfig(**HEADS | {"vocab_size": 4096})),
            "LlamaForSequenceClassification has no output layer over a vocabulary",
        ),
        (lambda: LlamaModel(LlamaConfig(**HEADS | {"vocab_size": 4096})), "LlamaModel has no output layer"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)), "Sequential has no output layer"),
    ],
)  # fmt: skip
def test_what_is_no_causal_language_model_is_refused(tiny, make, message):
    refuses(make(), tiny, message)


def test_looking_changes_no_mode_no_gradient_and_no_random_number():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    modes, rng = [module.training for module in model.modules()], torch.get_rng_state()
    looks_ahead(model, IDS)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), rng)
    assert not model.get_input_embeddings()._forward_hooks
