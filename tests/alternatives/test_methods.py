"""Every method alike: PEFT computes the same, the base comes back, and training moves nothing else."""

import copy

import peft
import pytest
import torch

from labkit import models
from labkit.alternatives.cost import cost
from labkit.alternatives.ia3 import add_ia3, ia3_layers
from labkit.alternatives.methods import base_only, method_of, remove
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.alternatives.sized import SIZED_METHODS
from labkit.data.batches import IGNORE, Batch
from labkit.lora.config import LoRAConfig
from labkit.lora.count import trainable
from labkit.lora.inject import add_lora
from labkit.quant.model import quantize_model
from labkit.training.config import TrainConfig
from labkit.training.loop import train
from labkit.training.loss import supervised_loss
from labkit.training.recompute import checkpoint_blocks
from tests.alternatives.cases import ALL, MAKERS, METHODS, N, llama, randomize, text, with_method


def pairs(ours, theirs):
    """(our parameter, PEFT's) for each that trains."""
    if ia3_layers(ours):
        modules = dict(theirs.get_base_model().named_modules())
        return [(layer.vector, modules[name].ia3_l["default"]) for name, layer in ia3_layers(ours).items()]
    tokens, encoder = method_of(ours).tokens, theirs.prompt_encoder["default"]
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
    torch.testing.assert_close(
        ours(ids, attention_mask=mask, labels=targets).loss, loss, rtol=1e-5, atol=1e-5
    )
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
    with base_only(ours):
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


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@torch.no_grad()
def test_base_only_and_remove_give_the_base_back(make, name):
    base, model = make(), with_method(make, name)
    expected, adapted = base(text()).logits, model(text()).logits
    assert not torch.allclose(adapted, expected, atol=1e-3)
    with base_only(model):
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


@pytest.mark.parametrize("name", ALL)
def test_the_base_is_alone_for_the_block_only_also_after_an_error(name):
    model = with_method(llama, name)
    adapted = model(text()).logits
    with pytest.raises(KeyboardInterrupt), base_only(model):
        assert method_of(model).positions == 0
        with pytest.raises(ValueError, match="none of the methods"), base_only(model):
            pass
        with pytest.raises(ValueError, match="already, so .* cannot be added"):
            ALL[name][0](model, ALL[name][1])
        raise KeyboardInterrupt
    assert torch.equal(model(text()).logits, adapted)
    assert method_of(model).positions == (N if name.startswith("pr") else 0)


@torch.no_grad()
def test_the_base_under_lora_is_left_alone_too():
    base, model = llama(), randomize(add_lora(llama(), LoRAConfig(r=2)))
    adapted = model(text()).logits
    assert not torch.allclose(adapted, base(text()).logits, atol=1e-3)
    with base_only(model):
        assert torch.equal(model(text()).logits, base(text()).logits)
    assert torch.equal(model(text()).logits, adapted)
    with pytest.raises(ValueError, match="none of the methods"), base_only(base):
        pass


@pytest.mark.parametrize("name", SIZED_METHODS)
def test_a_sized_method_has_the_size_that_was_asked_for(name):
    model = SIZED_METHODS[name].add_to(llama(), 6)
    config = method_of(model).config
    assert 6 in (getattr(config, "length", None), getattr(config, "size", None))
    assert cost(model).trained == trainable(model).trainable


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
            checkpoint_blocks(model)
        supervised_loss(model, Batch(text(), text())).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ALL)
def test_a_base_in_bf16_trains_in_fp32(name):
    model = ALL[name][0](llama().bfloat16(), ALL[name][1])
    out = model(text()).logits
    assert out.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    out.float().square().mean().backward()
    assert any(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["ia3", "serial", "parallel"])
def test_before_training_it_is_the_base_bit_for_bit(name, quantized):
    model = llama()
    if quantized:
        quantize_model(model, progress=False)
    with torch.no_grad():
        expected = model(text()).logits
        assert torch.equal(ALL[name][0](model, ALL[name][1])(text()).logits, expected)


@pytest.mark.parametrize("second", ALL)
@pytest.mark.parametrize("first", ["ia3", "prompt", "serial", "lora"])
def test_a_second_method_is_refused_and_changes_nothing(first, second):
    model = add_lora(llama(), LoRAConfig(r=2)) if first == "lora" else with_method(llama, first)
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="already, so .* cannot be added"):
        ALL[second][0](model, ALL[second][1])
    assert [n for n, _ in model.named_parameters()] == names


def test_lora_refuses_a_model_that_another_method_has_adapted():
    model = add_prompt(llama(), PromptConfig(4, init="random"))
    with pytest.raises(ValueError, match=r"Prompt already.*remove\(model\)"):
        add_lora(model, LoRAConfig(r=2))
    assert any(parameter.requires_grad for parameter in model.parameters())
