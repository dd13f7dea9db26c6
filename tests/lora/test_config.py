"""A config says what it is, and refuses values out of range."""

import pytest

from labkit.lora.config import LoRAConfig


@pytest.mark.parametrize(
    "wrong",
    [{"r": 0}, {"r": -4}, {"r": 2.5}, {"r": True}, {"alpha": 0}, {"alpha": -1}, {"alpha": float("nan")}, {"dropout": 1},
     {"dropout": -0.1}, {"targets": []}, {"variant": "adora"}, {"init": "zeros"},
     {"init": "pissa_niter_0"}, {"init": "pissa_niter_101"}, {"init": "pissa_niter_1000000000"},
     {"init": "loftq_iter_1000000000"}, {"init": "default_100"}, {"alpha": 1e39}, {"alpha": 1e-46}],
)  # fmt: skip
def test_config_out_of_range_says_what_is_allowed(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoRAConfig(**wrong)


@pytest.mark.parametrize(
    ("variant", "rslora", "dora"),
    [("lora", False, False), ("rslora", True, False), ("dora", False, True), ("rsdora", True, True)],
)
def test_a_config_knows_its_variant(variant, rslora, dora):
    config = LoRAConfig(r=16, alpha=8, variant=variant)
    assert (config.is_rslora, config.is_dora) == (rslora, dora)
    assert config.scaling == (2 if rslora else 0.5)


@pytest.mark.parametrize(
    ("init", "from_weight", "pissa", "loftq", "iterations"),
    [
        ("default", False, False, False, None),
        ("gaussian", False, False, False, None),
        ("b_random", False, False, False, None),
        ("b_random_small", False, False, False, None),
        ("pissa", True, True, False, None),
        ("pissa_niter_16", True, True, False, 16),
        ("olora", True, False, False, None),
        ("loftq", True, False, True, None),
        ("loftq_iter_3", True, False, True, 3),
        ("loftq_iter_100", True, False, True, 100),
    ],
)
def test_a_config_knows_its_start(init, from_weight, pissa, loftq, iterations):
    config = LoRAConfig(init=init)
    assert (config.starts_from_weight, config.is_pissa, config.is_loftq) == (from_weight, pissa, loftq)
    assert config.start_iterations == iterations
