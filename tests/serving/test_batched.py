"""A batch of rows with different adapters: each row is what it is alone, and the base is left as it was."""

import copy
import threading
from unittest import mock

import pytest
import torch
from torch import nn

import labkit
from labkit import models
from labkit.hardware import set_fast
from labkit.lora.fingerprint import AdapterMismatch, fingerprint
from labkit.quant.model import quantize_model
from labkit.serving.batched import AdapterBank, BatchedLinear
from tests.conftest import make_small_llama
from tests.serving.adapters import CONFIGS, make_folder, make_folders

IDS = torch.randint(0, 4096, (8, 11), generator=torch.Generator().manual_seed(0))
ROWS = ["sql", None, "support", "poet", None, "support", "clerk", "sql"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    model, _ = models.load("tiny-llama", dtype=torch.float32)
    return make_folders(model, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def model():
    return models.load("tiny-llama", dtype=torch.float32)[0]


@pytest.fixture
def bank(model, folders):
    bank = AdapterBank(model)
    for name, folder in folders.items():
        bank.load(folder, name)
    return bank


@pytest.fixture(params=[True, False], ids=["fast", "reference"])
def either_path(request):
    set_fast(request.param)
    yield
    set_fast(True)


@torch.no_grad()
def log_probs(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits.log_softmax(-1)


def mixed(bank, rows=ROWS, ids=IDS):
    with bank.rows(rows):
        return log_probs(bank.model, ids)


def test_each_row_of_a_mixed_batch_is_what_load_adapter_computes_alone(bank, folders, either_path):
    ours = mixed(bank)
    alone, _ = models.load("tiny-llama", dtype=torch.float32)
    for name, folder in folders.items():
        labkit.load_adapter(alone, folder, name)
    for i, name in enumerate(ROWS):
        labkit.use_adapter(alone, name)
        torch.testing.assert_close(ours[i : i + 1], log_probs(alone, IDS[i : i + 1]), **CLOSE)
    distance = (ours[ROWS.index("support")] - log_probs(alone, IDS[2:3])[0]).abs().max()
    assert distance > 0.1, "the adapters change too little to be seen"


def test_rows_of_the_base_are_the_base_bit_for_bit_whatever_is_loaded(bank, either_path):
    plain, _ = models.load("tiny-llama", dtype=torch.float32)
    base, rows = log_probs(plain), [i for i, name in enumerate(ROWS) if name is None]
    assert torch.equal(mixed(bank)[rows], base[rows])
    assert torch.equal(mixed(bank, [None] * 8), base)
    assert torch.equal(log_probs(bank.model), base)


def test_a_mixed_batch_equals_pefts(bank, folders):
    peft = pytest.importorskip("peft")
    base, _ = models.load("tiny-llama", dtype=torch.float32)
    theirs = None
    for name, folder in folders.items():
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(base, folder, adapter_name=name)
        else:
            theirs.load_adapter(folder, name)
    with torch.no_grad():
        names = ["__base__" if name is None else name for name in ROWS]
        logits = theirs.eval()(input_ids=IDS, use_cache=False, adapter_names=names).logits
    torch.testing.assert_close(mixed(bank), logits.log_softmax(-1), **CLOSE)


@pytest.mark.parametrize(
    "rows",
    [["sql"] * 8, [None] * 5 + ["poet"] * 3, ["poet", None] * 4, ["clerk"] + [None] * 7],
    ids=["one for all", "at the end", "every other", "first"],
)
def test_the_fast_path_agrees_with_the_reference_however_rows_stand(bank, rows):
    ours = mixed(bank, rows)
    with mock.patch("labkit.serving.fast.fast_paths", lambda: False):
        torch.testing.assert_close(ours, mixed(bank, rows), **CLOSE)


@pytest.mark.parametrize("rows", [ROWS, ["sql"] * 8], ids=["mixed", "one for all"])
def test_single_tokens_are_what_they_are_alone(bank, folders, rows):
    ours = mixed(bank, rows, IDS[:, :1])
    alone, _ = models.load("tiny-llama", dtype=torch.float32)
    for name in set(rows) - {None}:
        labkit.load_adapter(alone, folders[name], name)
    for i, name in enumerate(rows):
        labkit.use_adapter(alone, name)
        torch.testing.assert_close(ours[i : i + 1], log_probs(alone, IDS[i : i + 1, :1]), **CLOSE)


def test_gradients_flow_to_the_input_through_either_path(bank, either_path):
    x = torch.randn(3, 1, 256, requires_grad=True)
    layer = bank.model.model.layers[0].self_attn.q_proj
    A, B, scaling = bank.adapters["sql"].factors["model.layers.0.self_attn.q_proj"]
    with bank.rows([None, "sql", ("support", 0)]):
        (grad,) = torch.autograd.grad(layer(x).sum(), x)
    weight = layer.base.weight
    expected = torch.stack([weight, weight + scaling * B @ A, weight]).sum(1, keepdim=True)
    torch.testing.assert_close(grad, expected, **CLOSE)


def test_the_strength_of_a_row_is_the_factor_of_its_correction(bank, folders):
    ours = mixed(bank, ["sql", ("sql", 0.5), ("sql", 0), ("sql", -1.0)], IDS[:1].repeat(4, 1))
    alone, _ = models.load("tiny-llama", dtype=torch.float32)
    base = log_probs(alone, IDS[:1])[0]
    labkit.load_adapter(alone, folders["sql"])
    for row, strength in enumerate([1, 0.5, 0, -1]):
        with labkit.adapter_strength(alone, strength):
            torch.testing.assert_close(ours[row], log_probs(alone, IDS[:1])[0], **CLOSE)
    torch.testing.assert_close(ours[2], base, **CLOSE)


def test_the_base_may_be_in_four_bits(folders):
    model, _ = models.load("tiny-llama", dtype=torch.float32)
    quantize_model(model, "nf4")
    alone = copy.deepcopy(model)
    bank = AdapterBank(model)
    for name in ("sql", "poet"):
        bank.load(folders[name], name)
        labkit.load_adapter(alone, folders[name], name)
    rows = ["poet", None, "sql", "poet"]
    ours = mixed(bank, rows, IDS[:4])
    for i, name in enumerate(rows):
        labkit.use_adapter(alone, name)
        # in four bits other sums are rounded for one row than for several
        torch.testing.assert_close(ours[i : i + 1], log_probs(alone, IDS[i : i + 1]), rtol=1e-4, atol=1e-4)


def test_an_embedding_may_be_adapted_and_a_base_be_in_bf16(tmp_path):
    base = make_small_llama(tie_word_embeddings=False, vocab_size=300)
    config = labkit.LoRAConfig(r=4, targets=["embed_tokens", "lm_head", "down_proj"])
    folder, ids = make_folder(base, tmp_path / "words", config, 5), IDS % 300
    for dtype, close in ((torch.float32, CLOSE), (torch.bfloat16, {"rtol": 0.02, "atol": 0.02})):
        alone = labkit.load_adapter(
            make_small_llama(tie_word_embeddings=False, vocab_size=300).to(dtype), folder
        )
        bank = AdapterBank(make_small_llama(tie_word_embeddings=False, vocab_size=300).to(dtype))
        bank.load(folder, "words")
        ours = mixed(bank, [None, "words"] * 4, ids)[1::2]
        torch.testing.assert_close(ours, log_probs(alone, ids)[1::2], **close)


def test_layers_get_one_wrapper_each_and_the_base_back_when_nobody_needs_them(model, folders):
    before, weights = dict(model.named_modules()), fingerprint(model)
    bank = AdapterBank(model)
    for name in ("support", "sql", "poet"):
        bank.load(folders[name], name)
    wrappers = [module for module in model.modules() if isinstance(module, BatchedLinear)]
    assert len(wrappers) == 28 and not any(isinstance(one.base, BatchedLinear) for one in wrappers)
    assert fingerprint(model) == weights
    bank.unload("support")  # the others adapt only q, v and the MLPs
    assert sum(isinstance(module, BatchedLinear) for module in model.modules()) == 4 * 5
    bank.unload("sql")
    bank.unload("poet")
    after = dict(model.named_modules())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_other_weights_have_another_version_and_need_another_name(bank, model, folders, tmp_path):
    plain, _ = models.load("tiny-llama", dtype=torch.float32)
    again = make_folder(plain, tmp_path / "again", CONFIGS["sql"], seed=99)
    with pytest.raises(ValueError, match="loaded already"):
        bank.load(again, "sql")
    new = bank.load(again, "sql@v2")
    assert new.version != bank.adapters["sql"].version and new.base == bank.base
    assert bank.load(folders["sql"], "sql again").version == bank.adapters["sql"].version
    assert new.nbytes == 4 * 4 * sum(
        sum(layer.A.shape[1:] + layer.B.shape[:1]) for layer in new.factors.values()
    )


def test_an_adapter_reloaded_under_its_name_is_not_mistaken_for_the_old_one(bank, folders, tmp_path):
    old = mixed(bank, ["sql"] * 8)
    bank.unload("sql")
    plain, _ = models.load("tiny-llama", dtype=torch.float32)
    bank.load(make_folder(plain, tmp_path / "again", CONFIGS["sql"], seed=99), "sql")
    assert (mixed(bank, ["sql"] * 8) - old).abs().max() > 0.1


def test_an_unknown_adapter_is_an_error_and_never_the_base(bank):
    with (
        pytest.raises(KeyError, match="no adapter 'sqll' is loaded; did you mean 'sql'"),
        bank.rows(["sqll"]),
    ):
        pass
    with pytest.raises(KeyError, match="Loaded: support, sql, poet, clerk"):
        bank.unload("nobody")
    with pytest.raises(ValueError, match="strength=nan"), bank.rows([("sql", float("nan"))]):
        pass


def test_a_batch_of_other_rows_than_planned_is_refused(bank):
    with pytest.raises(ValueError, match="in a batch of 3 rows"):
        mixed(bank, ["sql", None, "poet"])


def test_what_a_batch_uses_is_not_unloaded_meanwhile(bank):
    with bank.rows(["sql", ("poet", 0)]):
        for name in ("sql", "poet"):
            with pytest.raises(ValueError, match="in use by a batch"):
                bank.unload(name)
    bank.unload("sql")


def test_threads_have_rows_of_their_own(bank):
    wanted = {name: mixed(bank, [name] * 8) for name in (*CONFIGS, None)}
    got = {}
    threads = [
        threading.Thread(target=lambda name=name: got.update({name: mixed(bank, [name] * 8)}))
        for name in wanted
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def saved_by_peft(config, path):
    peft = pytest.importorskip("peft")
    base, _ = models.load("tiny-llama", dtype=torch.float32)
    peft.get_peft_model(base, config).save_pretrained(path)
    return path


REFUSED = {
    "dora": (labkit.LoRAConfig(r=2, variant="dora"), "it is DoRA, which divides"),
    "head": (
        labkit.LoRAConfig(r=2, targets=["q_proj"], modules_to_save=["norm"]),
        "brings modules of its own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_share_a_base_is_refused_with_the_reason(model, tmp_path, name):
    config, reason = REFUSED[name]
    plain, _ = models.load("tiny-llama", dtype=torch.float32)
    labkit.save_adapter(labkit.add_lora(plain, config), tmp_path / name)
    with pytest.raises(ValueError, match=f"cannot share a base with others: .*{reason}"):
        AdapterBank(model).load(tmp_path / name, name)
    assert not any(isinstance(module, BatchedLinear) for module in model.modules())


def test_pissa_is_served_as_plain_lora_and_refused_as_a_change_of_the_base(tmp_path):
    model = make_small_llama(vocab_size=300)
    adapted = labkit.add_lora(make_small_llama(vocab_size=300), labkit.LoRAConfig(r=2, init="pissa"))
    bank = AdapterBank(model)
    bank.load(labkit.save_adapter(adapted, tmp_path / "plain"), "plain")
    with pytest.raises(ValueError, match="plain=True"):
        bank.load(labkit.save_adapter(adapted, tmp_path / "changed", plain=False), "changed")


def test_soft_prompts_are_refused_with_the_reason(model, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    folder = saved_by_peft(config, tmp_path / "soft")
    with pytest.raises(ValueError, match="a soft prompt or a prefix changes the length of a row"):
        AdapterBank(model).load(folder, "soft")


def test_adapters_of_another_base_are_refused(bank, folders, tmp_path):
    with pytest.raises(AdapterMismatch, match="other layers or sizes"):
        AdapterBank(make_small_llama()).load(folders["sql"], "sql")
    other, _ = models.load("tiny-llama", dtype=torch.float32)
    other.model.norm.weight.data.mul_(1.01)
    with pytest.raises(AdapterMismatch, match="with other weights"):
        AdapterBank(other).load(folders["sql"], "sql")


def test_a_model_with_adapters_merged_or_not_has_no_bank_and_a_bank_no_second_kind(bank, folders):
    adapted = labkit.merge(labkit.add_lora(make_small_llama(vocab_size=300), labkit.LoRAConfig(r=2)))
    with pytest.raises(ValueError, match="has LoRA adapters already, which an AdapterBank"):
        AdapterBank(adapted)
    for again in (AdapterBank, lambda model: labkit.add_lora(model, labkit.LoRAConfig())):
        with pytest.raises(ValueError, match="unload them from their AdapterBank"):
            again(bank.model)
    with pytest.raises(ValueError, match="has adapters of a bank already"):
        labkit.load_adapter(bank.model, folders["sql"])


def test_tokens_without_rows_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4))
    folder = make_folder(model, tmp_path / "flat", labkit.LoRAConfig(r=2), 0)
    bank = AdapterBank(model)
    bank.load(folder, "flat")
    with pytest.raises(ValueError, match="x must have these rows first"), bank.rows(["flat", None]):
        model(torch.randn(2, 6))
