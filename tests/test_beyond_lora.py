"""The methods beside LoRA: PEFT computes the same, the papers' equations give the same, and the costs are what torch counts."""

import copy

import peft
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from labkit import models
from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck, bottlenecks
from labkit.alternatives.cost import cost, prefill_flops
from labkit.alternatives.ia3 import IA3Config, add_ia3, ia3_layers, merge_ia3, unmerge_ia3
from labkit.alternatives.methods import bare, remove
from labkit.alternatives.prefixes import PrefixConfig, add_prefix, fold_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.data.batches import IGNORE, Batch
from labkit.lora.config import LoRAConfig
from labkit.lora.count import trainable
from labkit.lora.inject import add_lora
from labkit.quant.linear import QuantLinear
from labkit.quant.model import quantize_model
from labkit.training.config import TrainConfig
from labkit.training.loop import train
from labkit.training.loss import supervised_loss

VOCAB, N = 199, 5


def llama(**changes):
    """Grouped-query attention, and weights large enough that what a method does is seen in the logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes | changes)).eval()


def gpt2(**changes):
    torch.manual_seed(0)
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1} | changes
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes)).eval()


MAKERS = {"llama": llama, "gpt2": gpt2}
METHODS = {
    "ia3": (add_ia3, IA3Config(), lambda: peft.IA3Config(task_type="CAUSAL_LM")),
    "prompt": (
        add_prompt,
        PromptConfig(N, init="random"),
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
    ),
    "prefix": (
        add_prefix,
        PrefixConfig(N),
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
    ),
    "prefix, MLP": (
        add_prefix,
        PrefixConfig(N, projection=24),
        lambda: peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=24
        ),
    ),
}
BOTTLENECKS = {
    form: (add_bottleneck, BottleneckConfig(size=8, form=form, scale=1.5)) for form in ("serial", "parallel")
}
ALL = {name: method[:2] for name, method in METHODS.items()} | BOTTLENECKS


def randomize(model, std=0.3):
    """Move what trains away from where it starts, which for most methods is the base model."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += std * torch.randn(parameter.shape, generator=generator)
    return model


def with_method(make, name):
    add, config = ALL[name]
    return randomize(add(make(), config))


def text(batch=3, time=9):
    return torch.randint(0, VOCAB, (batch, time), generator=torch.Generator().manual_seed(2))


def pairs(ours, theirs):
    """(our parameter, PEFT's) for each that trains."""
    if ia3_layers(ours):
        modules = dict(theirs.get_base_model().named_modules())
        return [(layer.vector, modules[name].ia3_l["default"]) for name, layer in ia3_layers(ours).items()]
    tokens, encoder = ours.virtual_tokens, theirs.prompt_encoder["default"]
    if getattr(tokens, "mlp", None) is not None:
        first = [(tokens.embedding, encoder.embedding.weight)]
        return first + list(zip(tokens.mlp.parameters(), encoder.transform.parameters()))
    own = tokens.prefix if hasattr(tokens, "prefix") else tokens.embedding
    return [(own, encoder.embedding.weight)]


def both(make, name):
    """The same method with the same values, here and in PEFT."""
    ours = with_method(make, name)
    theirs = peft.get_peft_model(make(), METHODS[name][2]()).eval()
    with torch.no_grad():
        for own, other in pairs(ours, theirs):
            other.copy_(own.view_as(other))
    return ours, theirs


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_logits_loss_gradients_and_counts_equal_pefts(make, name, padded):
    ours, theirs = both(make, name)
    ids, mask = text(), None
    targets = ids.clone()
    targets[:, :3] = IGNORE
    if padded:  # on the right, as for training
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        targets[0, 6:] = IGNORE
    out, reference = (
        ours(ids, attention_mask=mask),
        theirs(input_ids=ids, attention_mask=mask, labels=targets),
    )
    logits = reference.logits[:, N:] if name == "prompt" else reference.logits
    torch.testing.assert_close(out.logits[targets != IGNORE], logits[targets != IGNORE], rtol=1e-5, atol=1e-5)
    batch = Batch(ids, targets)
    loss = supervised_loss(ours, batch) / batch.n_supervised  # the trainer's: without a mask, and in chunks
    torch.testing.assert_close(loss, reference.loss, rtol=1e-5, atol=1e-5)
    in_full = supervised_loss(ours, batch, logits="all") / batch.n_supervised
    torch.testing.assert_close(in_full, reference.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    reference.loss.backward()
    for own, other in pairs(ours, theirs):
        assert own.grad.abs().max() > 1e-4, "a gradient of nothing would equal anything"
        torch.testing.assert_close(own.grad, other.grad.view_as(own), rtol=1e-4, atol=1e-5)
    assert trainable(ours).trainable == theirs.get_nb_trainable_parameters()[0] == cost(ours).trained


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_generate_writes_pefts_tokens(make, name):
    ours, theirs = both(make, name)
    ids = text(2, 6)
    mask = torch.ones_like(ids)
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    written = ours.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(written, theirs.generate(input_ids=ids, attention_mask=mask, **options))
    assert torch.equal(written, ours.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options))
    with bare(ours):
        assert not torch.equal(written, ours.generate(input_ids=ids, attention_mask=mask, **options))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_padding_on_the_left_changes_no_written_token(make, name):
    """PEFT's soft prompts fail here: there the distance between prompt and text grows with the padding."""
    model = with_method(make, name)
    ids, gap = text(1, 6), torch.zeros(1, 4, dtype=torch.long)
    options = dict(max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0)
    alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    padded, mask = torch.cat([gap, ids], 1), torch.cat([gap, torch.ones_like(ids)], 1)
    batch = torch.cat([padded, text(1, 10)]), torch.cat([mask, torch.ones(1, 10, dtype=torch.long)])
    assert torch.equal(model.generate(input_ids=batch[0], attention_mask=batch[1], **options)[:1, 4:], alone)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    ("add", "config"),
    [(add_prompt, PromptConfig(7, "text", "a b")), (add_prefix, PrefixConfig(7, None, "text", "a b"))],
)
def test_started_from_a_text_it_is_the_model_with_that_text_before(make, add, config):
    def tokenizer(_):
        return {"input_ids": [11, 42, 5]}

    seven = torch.tensor([[11, 42, 5, 11, 42, 5, 11]]).expand(3, -1)
    with torch.no_grad():
        expected = make()(torch.cat([seven, text()], 1)).logits[:, 7:]
        model = add(make(), config, tokenizer)
        torch.testing.assert_close(model(text()).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        add(make(), config)


def reference_llama(base, ids, adapt):
    """A Llama written out, with `adapt(which, f, x)` in place of each sub-layer f(x)."""
    h = base.model.embed_tokens(ids)
    angles = base.model.rotary_emb(h, torch.arange(ids.shape[1])[None])
    for i, block in enumerate(base.model.layers):
        h = h + adapt(
            (i, "self_attn"),
            lambda x, b=block: b.self_attn(hidden_states=x, position_embeddings=angles)[0],
            block.input_layernorm(h),
        )
        h = h + adapt((i, "mlp"), block.mlp, block.post_attention_layernorm(h))
    return base.lm_head(base.model.norm(h))


def reference_gpt2(base, ids, adapt):
    h = base.transformer.wte(ids) + base.transformer.wpe(torch.arange(ids.shape[1]))
    for i, block in enumerate(base.transformer.h):
        h = h + adapt((i, "attn"), lambda x, b=block: b.attn(x)[0], block.ln_1(h))
        h = h + adapt((i, "mlp"), block.mlp, block.ln_2(h))
    return base.lm_head(base.transformer.ln_f(h))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("form", ["serial", "parallel"])
@pytest.mark.parametrize(
    ("make", "reference"), [(llama, reference_llama), (gpt2, reference_gpt2)], ids=MAKERS
)
def test_bottleneck_adapters_equal_the_papers_equations(make, reference, form, activation):
    config = BottleneckConfig(size=8, form=form, scale=1.5, activation=activation)
    model = randomize(add_bottleneck(make(), config))
    weights = {
        (int(name.split(".")[-2]), name.split(".")[-1]): [
            p.detach().clone().requires_grad_()
            for p in (layer.down.weight, layer.down.bias, layer.up.weight, layer.up.bias)
        ]
        for name, layer in bottlenecks(model).items()
    }

    def adapt(which, f, x):
        down, b_down, up, b_up = weights[which]
        y = f(x)
        h = y if form == "serial" else x
        return y + 1.5 * (getattr(F, activation)(h @ down.T + b_down) @ up.T + b_up)

    expected, logits = reference(make(), text(), adapt), model(text()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.logsumexp(-1).mean().backward()
    expected.logsumexp(-1).mean().backward()
    for name, layer in bottlenecks(model).items():
        own = (layer.down.weight, layer.down.bias, layer.up.weight, layer.up.bias)
        for a, b in zip(own, weights[int(name.split(".")[-2]), name.split(".")[-1]]):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["ia3", "serial", "parallel"])
def test_before_training_it_is_the_base_bit_for_bit(name, quantized):
    model = llama()
    if quantized:
        quantize_model(model, progress=False)
    with torch.no_grad():
        expected = model(text()).logits
        assert torch.equal(ALL[name][0](model, ALL[name][1])(text()).logits, expected)


def test_houlsbys_start_is_nearly_the_base_and_within_two_deviations():
    with torch.no_grad():
        expected = llama()(text()).logits
        model = add_bottleneck(llama(), BottleneckConfig(size=8, init="near-identity"))
        torch.testing.assert_close(model(text()).logits, expected, rtol=0, atol=0.02)
    for layer in bottlenecks(model).values():
        for part in (layer.down, layer.up):
            assert 0.005 < part.weight.std() < 0.01 and part.weight.abs().max() <= 0.02
            assert torch.all(part.bias == 0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@torch.no_grad()
def test_bare_and_remove_give_the_base_back(make, name):
    base, model = make(), with_method(make, name)
    expected, adapted = base(text()).logits, model(text()).logits
    assert not torch.allclose(adapted, expected, atol=1e-3)
    with bare(model):
        assert torch.equal(model(text()).logits, expected)
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in base.named_parameters()]
    assert torch.equal(model(text()).logits, adapted)
    twin = copy.deepcopy(model)
    assert torch.equal(remove(model)(text()).logits, expected)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in base.named_modules()]
    assert torch.equal(twin(text()).logits, adapted), "a copy keeps its own"
    randomize(twin)
    assert not torch.allclose(twin(text()).logits, adapted, atol=1e-3), "and it is its own that counts"
    assert torch.equal(remove(twin)(text()).logits, expected)
    add_ia3(model)  # is bare again
    with pytest.raises(ValueError, match="none of the methods"):
        cost(base)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@torch.no_grad()
def test_a_folded_prefix_needs_no_mlp(make):
    model = with_method(make, "prefix, MLP")
    logits, before = model(text()).logits, cost(model)
    assert torch.equal(fold_prefix(model)(text()).logits, logits)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["virtual_tokens.prefix"]
    assert cost(model).kept == cost(model).trained == before.kept
    with pytest.raises(ValueError, match="no prefix with a projection"):
        fold_prefix(model)


# --- costs ---------------------------------------------------------------------------------------------------------------


def flops(model, ids, **inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(ids, **inputs)
    return counter.get_total_flops(), out


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_costs_are_what_torch_counts_and_the_cache_holds(make, name):
    base, model = (
        make(attn_implementation="eager"),
        randomize(ALL[name][0](make(attn_implementation="eager"), ALL[name][1])),
    )
    if name == "prefix, MLP":
        fold_prefix(model)  # the MLP belongs to training
    counted, ids = cost(model), text(1, 11)
    (read, start), (base_read, base_start) = flops(model, ids), flops(base, ids)
    assert read - base_read == prefill_flops(model, 11)
    extra = start.past_key_values.layers[1], base_start.past_key_values.layers[1]
    held, base_held = (layer.keys.nbytes + layer.values.nbytes for layer in extra)
    assert held - base_held == counted.cache_bytes_per_layer
    written, _ = flops(model, ids[:, :1], past_key_values=start.past_key_values)
    base_written, _ = flops(base, ids[:, :1], past_key_values=base_start.past_key_values)
    assert written - base_written == counted.flops_per_token
    assert counted.kept == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_counts_of_the_papers():
    s = llama().config
    kv, inner, d = s.num_key_value_heads * 16, s.intermediate_size, s.hidden_size
    assert cost(add_ia3(llama())).trained == 2 * (kv + kv + inner)
    assert cost(add_prompt(llama(), PromptConfig(N))).trained == N * d
    prefix = cost(add_prefix(llama(), PrefixConfig(N)))
    assert prefix.trained == N * 2 * 2 * kv and prefix.lost_positions == N
    m = 8  # Houlsby et al.: 2 m d + d + m for each adapter, two in a block
    assert cost(add_bottleneck(llama(), BottleneckConfig(m))).trained == 2 * 2 * (2 * m * d + d + m)
    only = add_bottleneck(llama(), BottleneckConfig(m, where=("mlp",)))
    assert cost(only).trained == 2 * (2 * m * d + d + m)
    model = add_ia3(llama())
    assert cost(model).elementwise_per_token == cost(model).trained
    merged = cost(merge_ia3(model))
    assert merged.elementwise_per_token == merged.kept == 0 and merged.merges


def test_counts_for_llama_2_7b_from_its_shapes_alone():
    """By the closed forms of the papers, for 32 blocks of width 4096 with an MLP of 11008."""

    def trained(add, *config):
        with torch.device("meta"):
            return cost(add(LlamaForCausalLM(LlamaConfig()), *config)).trained

    assert trained(add_ia3) == 32 * (4096 + 4096 + 11008) == 614_400
    assert trained(add_bottleneck, BottleneckConfig(64)) == 64 * (2 * 64 * 4096 + 4096 + 64) == 33_820_672
    assert trained(add_prompt, PromptConfig(20)) == 20 * 4096
    assert trained(add_prefix, PrefixConfig(20)) == 20 * 32 * 2 * 4096 == 5_242_880


# --- (IA)^3 merged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@torch.no_grad()
def test_merged_ia3_computes_the_same_and_unmerging_is_exact(make):
    base = make()
    for parameter in base.parameters():  # biases too
        parameter.data += 0.05
    model = randomize(add_ia3(copy.deepcopy(base)))
    next(iter(ia3_layers(model).values())).vector[0] = 0  # dividing could not undo this
    expected = model(text()).logits
    torch.testing.assert_close(merge_ia3(model)(text()).logits, expected, rtol=1e-4, atol=1e-5)
    assert (
        sum(p.numel() for p in model.parameters())
        == sum(p.numel() for p in base.parameters()) + cost(model).trained
    )
    with pytest.raises(ValueError, match="merged already"):
        merge_ia3(model)
    assert torch.equal(unmerge_ia3(model)(text()).logits, expected)
    with pytest.raises(ValueError, match="no merged"):
        unmerge_ia3(model)
    merge_ia3(model)
    assert torch.equal(remove(model)(text()).logits, base(text()).logits)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rows", [1, 60])  # one row takes the kernel that never makes the weight
@torch.no_grad()
def test_ia3_on_outputs_merges_into_four_bits_exactly(double_quant, rows):
    model = llama()
    quantize_model(model, double_quant=double_quant, progress=False)
    config = IA3Config(outputs=("k_proj", "v_proj", "up_proj"), inputs=())
    model = randomize(add_ia3(model, config))
    ids = text(1, rows)
    packed = {name: layer.base.packed for name, layer in ia3_layers(model).items()}
    expected = model(ids).logits
    torch.testing.assert_close(merge_ia3(model)(ids).logits, expected, rtol=1e-5, atol=1e-5)
    for name, layer in ia3_layers(model).items():
        assert isinstance(layer.base, QuantLinear) and torch.equal(layer.base.packed, packed[name])
    assert torch.equal(unmerge_ia3(model)(ids).logits, expected)


@torch.no_grad()
def test_in_a_gated_mlp_the_output_of_up_is_the_input_of_down():
    inputs = randomize(add_ia3(llama()))
    outputs = add_ia3(llama(), IA3Config(outputs=("k_proj", "v_proj", "up_proj"), inputs=()))
    own = ia3_layers(inputs)
    for name, layer in ia3_layers(outputs).items():
        layer.vector.copy_(own[name.replace("up_proj", "down_proj")].vector)
    torch.testing.assert_close(outputs(text()).logits, inputs(text()).logits, rtol=1e-5, atol=1e-5)
    assert trainable(outputs).trainable == trainable(inputs).trainable


@torch.no_grad()
def test_what_four_bits_cannot_take_is_refused_and_changes_nothing():
    model = llama()
    quantize_model(model, progress=False)
    randomize(add_ia3(model))
    expected = model(text()).logits
    with pytest.raises(ValueError, match=r"down_proj is a 4-bit layer.*up_proj"):
        merge_ia3(model)
    assert torch.equal(model(text()).logits, expected) and not any(
        layer.unmerged for layer in ia3_layers(model).values()
    )
    odd = llama(hidden_size=96, num_attention_heads=4, num_key_value_heads=2)
    quantize_model(odd, progress=False)
    with pytest.raises(ValueError, match="96 weights, no whole number of blocks of 64"):
        merge_ia3(add_ia3(odd, IA3Config(outputs=["k_proj"], inputs=[])))


# --- training --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny-llama")


@pytest.mark.parametrize(
    ("name", "quantized"),
    [(name, False) for name in ALL] + [(name, True) for name in ("ia3", "prefix", "serial")],
)
def test_training_reduces_the_loss_and_moves_nothing_else(tiny, name, quantized):
    base, tokenizer = tiny
    model = copy.deepcopy(base)
    if quantized:
        quantize_model(model, progress=False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    torch.manual_seed(3)
    add, config = ALL[name]
    if name == "prompt":
        config = PromptConfig(N)
    add(model, config)
    records = [{"prompt": f"Question {i}:", "completion": " the answer is no."} for i in range(4)]
    options = dict(lr=0.03, steps=8, batch_size=4, schedule="constant", warmup=0.0, progress=False)
    losses = train(model, tokenizer, records, TrainConfig(**options)).losses
    assert losses[-1] < 0.9 * losses[0]
    after = remove(model).state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.parametrize("name", ["ia3", "prompt", "serial", "parallel"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        model = with_method(llama, name).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        supervised_loss(model, Batch(text(), text())).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_a_prefix_under_gradient_checkpointing_is_an_error_and_not_silently_nothing():
    model = with_method(llama, "prefix").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(ValueError, match="does not train with gradient checkpointing"):
        supervised_loss(model, Batch(text(), text()))


@pytest.mark.parametrize("name", ALL)
def test_a_base_in_bf16_trains_in_fp32(name):
    model = ALL[name][0](llama().bfloat16(), ALL[name][1])
    out = model(text()).logits
    assert out.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    out.float().square().mean().backward()
    assert any(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


# --- mistakes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ALL)
@pytest.mark.parametrize("first", ["ia3", "prompt", "serial", "lora"])
def test_a_second_method_is_refused_and_changes_nothing(first, second):
    model = add_lora(llama(), LoRAConfig(r=2)) if first == "lora" else with_method(llama, first)
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="already, so .* cannot be added"):
        ALL[second][0](model, ALL[second][1])
    assert [n for n, _ in model.named_parameters()] == names


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_prompt_that_fills_the_context_is_refused(name):
    add, config = ALL[name]
    with pytest.raises(ValueError, match="length=64 leaves no room for text in this model's context of 64"):
        add(llama(), type(config)(64))
    model = add(llama(), type(config)(60))
    assert model(text(1, 4)).logits.shape == (1, 4, VOCAB)
    with pytest.raises(ValueError, match="5 tokens of text after 60 virtual ones are 65"):
        model(text(1, 5))
    with pytest.raises(ValueError, match="5 tokens of text after 60"):
        model.generate(input_ids=text(1, 2), max_new_tokens=9, min_new_tokens=9, pad_token_id=0)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_masks_of_four_dimensions_and_static_caches_are_refused(name):
    model = with_method(llama, name)
    with pytest.raises(ValueError, match=r"mask of the text as \(batch, time\)"):
        model(text(1, 4), attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="static"):
        model.generate(input_ids=text(1, 4), max_new_tokens=3, cache_implementation="static", pad_token_id=0)


def test_layers_that_are_not_there_are_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"'k_porj' matches no linear layer.*did you mean 'k_proj'\?"):
        add_ia3(llama(), IA3Config(outputs=["k_porj"], inputs=[]))
    bert = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(ValueError, match="none of the names that .IA..3 knows"):
        add_ia3(bert)
    assert all(p.requires_grad for p in bert.parameters())
    with pytest.raises(ValueError, match="a block of it has: attention, intermediate, output"):
        add_bottleneck(bert, BottleneckConfig(4, where=("mlp",)))
    with pytest.raises(ValueError, match="does not say how wide"):
        add_bottleneck(torch.nn.Linear(2, 2), BottleneckConfig(4))
    with pytest.raises(ValueError, match="size=64 is no bottleneck in a model of width 64"):
        add_bottleneck(llama(), BottleneckConfig(64))


def test_layers_with_other_names_can_be_named():
    bert = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    )
    add_ia3(bert, IA3Config(outputs=["key", "value"], inputs=["0.output.dense"]))
    assert trainable(bert).trainable == 32 + 32 + 48


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (PromptConfig, {"length": 0}),
        (PromptConfig, {"length": 2.5}),
        (PromptConfig, {"init": "zeros"}),
        (PromptConfig, {"init": "text"}),
        (PromptConfig, {"text": "only"}),
        (PrefixConfig, {"length": True}),
        (PrefixConfig, {"projection": 0}),
        (PrefixConfig, {"init": "vocab"}),
        (PrefixConfig, {"init": "text", "text": "a", "projection": 8}),
        (BottleneckConfig, {"size": 0}),
        (BottleneckConfig, {"form": "both"}),
        (BottleneckConfig, {"where": "mlp"}),
        (BottleneckConfig, {"where": ("ffn",)}),
        (BottleneckConfig, {"activation": "swish"}),
        (BottleneckConfig, {"scale": 0}),
        (BottleneckConfig, {"init": "random"}),
        (IA3Config, {"outputs": ["k_proj"]}),
        (IA3Config, {"outputs": "k_proj", "inputs": []}),
        (IA3Config, {"outputs": [], "inputs": []}),
        (IA3Config, {"outputs": ["a"], "inputs": ["a"]}),
    ],
)
def test_config_out_of_range_says_what_is_allowed(config, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config(**wrong)


def test_lora_refuses_a_model_that_another_method_has_adapted():
    model = add_prompt(llama(), PromptConfig(4, init="random"))
    with pytest.raises(ValueError, match=r"PromptConfig already.*remove\(model\)"):
        add_lora(model, LoRAConfig(r=2))
    assert any(parameter.requires_grad for parameter in model.parameters())
