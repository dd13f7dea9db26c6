"""The settings of a step: each mistake is explained."""

import pytest
import torch

from labkit.memory.formulas import plan
from labkit.memory.setup import OTHER_NAMES, Setup, dtype_name


@pytest.mark.parametrize(
    ("model", "choices", "message"),
    [
        ("llama2-7b", {}, "not a known config; did you mean 'llama-2-7b'"),
        ({"hidden_size": 3}, {}, "not the config of a model that transformers knows"),
        (3, {}, "int is not a model"),
        ("tiny-llama", dict(method="dora"), "method='dora' is not known; choose one of"),
        ("tiny-llama", dict(max_length=513), "max_length=513 is above the 512 positions"),
        ("tiny-llama", dict(max_length=1), "nothing to predict"),
        (
            "tiny-llama",
            dict(r=129),
            "r=129 is above 128, the smaller side of model.layers.0.self_attn.k_proj",
        ),
        ("tiny-llama", dict(r=-1), "r=-1 must be a whole number"),
        ("tiny-llama", dict(batch_size=0), "batch_size=0 must be a whole number"),
        ("tiny-llama", dict(targets="q_porj"), "did you mean 'q_proj'"),
        ("tiny-llama", dict(max_lenght=4), "'max_lenght' is not a setting; did you mean 'max_length'"),
        ("tiny-llama", dict(sequence=4), "'sequence' is not a setting; it is called 'max_length' here"),
        ("tiny-llama", dict(batch=4), "'batch' is not a setting; it is called 'batch_size' here"),
        ("tiny-llama", dict(rank=4), "'rank' is not a setting; it is called 'r' here"),
        (
            "tiny-llama",
            dict(wheels=4),
            "'wheels' is not a setting. The settings are method, r, targets, max_length",
        ),
        ("tiny-llama", dict(dtype="int4"), "dtype='int4' is not known"),
        ("tiny-llama", dict(optimizer="lion"), "optimizer='lion' is not known; choose one of"),
        ("tiny-llama", dict(supervised=0), "above 0, up to 1"),
        ("tiny-llama", dict(blocksize=100), "blocksize=100 is not known"),
        ("tiny-llama", dict(method="full", train_embeddings=True), "full fine-tuning trains them anyway"),
    ],
)
def test_bad_input_is_explained(model, choices, message):
    with pytest.raises(ValueError, match=message):
        plan(model, **choices)


def test_every_other_name_leads_to_a_setting():
    known = Setup().as_dict()
    assert set(OTHER_NAMES.values()) <= set(known) and not set(OTHER_NAMES) & set(known)


def test_supervised_positions_are_a_share_of_those_with_a_next_token():
    setup = Setup(batch_size=3, max_length=101, supervised=0.25)
    assert (setup.tokens, setup.per_example, setup.n_supervised) == (303, 25, 75)
    assert Setup(max_length=2, supervised=1e-9).n_supervised == 1, "never none"


@pytest.mark.parametrize("given", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_has_one_name_however_it_is_given(given):
    assert dtype_name(given) == "bf16"
    with pytest.raises(ValueError, match="dtype=torch.int8 is not known"):
        dtype_name(torch.int8)
