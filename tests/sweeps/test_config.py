"""Settings of a run that do not go together are refused."""

import json

import pytest

from labkit.paths import data_folder
from labkit.sweeps.config import RunConfig


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "prefix"}, "size goes with prompt, prefix, bottleneck"),
        ({"method": "lora", "size": 8}, "size goes with"),
        ({"method": "prompt", "size": 0}, "size=0 must be a whole number"),
        ({"method": "full", "lora_plus": 16}, "is a rate for LoRA's B"),
        ({"method": "lora", "init": "loftq"}, "it goes with method='qlora'"),
        ({"method": "lora", "products": "bfloat16"}, "is the dtype of a 4-bit layer's products"),
        ({"method": "qlora", "products": "float16"}, "products='float16' is not known"),
        ({"method": "full", "adapter_dtype": "bfloat16"}, "is for A and B"),
        ({"batching": "sorted"}, "batching='sorted' is not known"),
        ({"method": "subspace"}, "d goes with method='subspace'"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**settings)


def test_runs_know_the_family_and_recorded_lines_keep_their_meaning():
    experiments = sorted((data_folder().parent / "experiments").glob("*.toml"))
    assert experiments
    for path in (data_folder() / "results" / f"{one.stem}.jsonl" for one in experiments):
        old = RunConfig.from_dict(json.loads(path.read_text().splitlines()[0])["config"])
        assert old.lora_plus == 1 and old.train_config().lora_plus == 1
    config = RunConfig(variant="dora", lora_plus=16)
    assert config.train_config().lora_plus == 16 and config.lora_config().variant == "dora"
    with pytest.raises(ValueError, match="method='full' has none"):
        RunConfig(method="full", lora_plus=16)
    with pytest.raises(ValueError, match="goes with method='qlora'"):
        RunConfig(init="loftq")
