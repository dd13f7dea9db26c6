"""Loading a model by name, from a folder, or from the hub; and the ways in which that can fail."""

import pytest
import torch

from labkit import models


def test_model_has_the_published_number_of_parameters(smollm2):
    assert sum(p.numel() for p in smollm2[0].parameters()) == 134_515_008


def test_a_saved_model_loads_from_its_folder(tmp_path, small_llama, tokenizer):
    small_llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = models.load(str(tmp_path))
    assert torch.equal(model.model.norm.weight, small_llama.model.norm.weight)
    assert torch.equal(model.lm_head.weight, small_llama.lm_head.weight)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(models.ModelUnavailable, match="did you mean 'smollm2-135m'"):
        models.load("smolm2-135m")


def test_hub_id_without_network_says_what_works_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        models.ModelUnavailable, match=r"could not get 'nobody/no-such-model' from the hub.*smollm2-135m"
    ):
        models.load("nobody/no-such-model")


def test_folder_with_only_pickle_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(models.ModelUnavailable, match="only pickle files"):
        models.load(str(tmp_path))


def test_truncated_weights_are_reported(tmp_path, small_llama, tokenizer):
    small_llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(models.ModelUnavailable, match="cannot be read"):
        models.load(str(tmp_path))
