"""What vLLM's documented rules allow of the folders that are written here."""

import json
import math

import pytest
from safetensors.torch import load_file

from labkit.formats import peft_folder
from labkit.formats.adapters import save_adapter
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from tests.lora.cases import make_model

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank; 16 unless it is given


def vllm_objections(folder, max_lora_rank=16):
    """What vLLM's documented rules (features/lora; `lora/peft_helper.py`, `lora/utils.py`) have against a folder."""
    assert max_lora_rank in VLLM_RANKS
    config = json.loads((folder / "adapter_config.json").read_text())
    objections = [f"missing {key}" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if config.get("modules_to_save"):
        objections.append("vLLM only supports modules_to_save being None")
    if config.get("use_dora"):
        objections.append("vLLM does not yet support DoRA")
    if config.get("bias", "none") != "none":
        objections.append("Adapter bias is not supported")
    if max([config["r"], *config.get("rank_pattern", {}).values()]) > max_lora_rank:
        objections.append("LoRA rank is greater than max_lora_rank")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        objections.append("one r and one lora_alpha scale all modules")
    targets = config["target_modules"]
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        if not key.startswith("base_model.model.") or part not in (
            "A.weight",
            "B.weight",
            "embedding_A",
            "embedding_B",
        ):
            objections.append(f"{key} is an unsupported LoRA weight")
        elif isinstance(targets, list) and module.rpartition(".")[2] not in {
            t.rpartition(".")[2] for t in targets
        }:
            objections.append(f"{module} is not in target_modules")
        elif tensor.shape[0 if "A" in part else 1] != config["r"]:
            objections.append(f"{key} is not of rank {config['r']}")
    return objections


@pytest.mark.parametrize(
    ("config", "objection"),
    [
        ({"r": 16}, None),
        ({"r": 8, "variant": "rslora", "targets": ["q_proj", "v_proj"]}, None),
        ({"r": 8, "init": "pissa"}, None),
        ({"r": 8, "targets": ["layers.0.self_attn.q_proj"]}, None),
        ({"r": 16, "init": "pissa"}, "greater than max_lora_rank"),
        ({"r": 8, "variant": "dora"}, "does not yet support DoRA"),
        ({"r": 8, "modules_to_save": ["model.norm"]}, "modules_to_save"),
        ({"r": 8, "rank_pattern": {"up_proj": 4}}, "one r"),
    ],
)
def test_vllm_takes_what_its_rules_allow(tmp_path, config, objection):
    save_adapter(add_lora(make_model(), LoRAConfig(**config)), tmp_path / "a")
    objections = vllm_objections(tmp_path / "a")
    assert not objections if objection is None else any(objection in o for o in objections)
    if config == {"r": 16, "init": "pissa"}:
        assert not vllm_objections(tmp_path / "a", max_lora_rank=32)


def test_vllm_scales_rslora_as_here(tmp_path):
    model = add_lora(make_model(), LoRAConfig(r=8, alpha=12, variant="rslora", init="pissa"))
    save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / peft_folder.CONFIG).read_text())
    assert config["lora_alpha"] / math.sqrt(config["r"]) == pytest.approx(
        next(iter(lora_layers(model).values())).scaling
    )
