"""Settings of a run that do not go together are refused."""

import pytest

from labkit.sweeps.config import RunConfig


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "prefix"}, "size goes with prompt, prefix, bottleneck"),
        ({"method": "lora", "size": 8}, "size goes with"),
        ({"method": "prompt", "size": 0}, "size=0 must be a whole number"),
        ({"method": "full", "lora_plus": 16}, "is a rate for LoRA's B"),
        ({"method": "lora", "init": "loftq"}, "it goes with method='qlora'"),
        ({"method": "subspace"}, "d goes with method='subspace'"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**settings)
