"""Starts that cannot be made again from the base are refused, both ways."""

import json

import pytest

from labkit.formats import peft_folder
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from tests.lora.cases import make_model


def test_a_random_start_cannot_be_saved_as_it_is_nor_read_from_peft(tmp_path):
    model = add_lora(make_model(), LoRAConfig(r=4, init="pissa_niter_2"))
    with pytest.raises(ValueError, match="plain=True"):
        save_adapter(model, tmp_path / "a", plain=False)
    folder = save_adapter(model, tmp_path / "a")
    config = json.loads((folder / peft_folder.CONFIG).read_text())
    for init in ("pissa_niter_4", "corda", "loftq"):
        (folder / peft_folder.CONFIG).write_text(json.dumps(config | {"init_lora_weights": init}))
        with pytest.raises(ValueError, match=f"init_lora_weights='{init}'"):
            load_adapter(make_model(), folder)
