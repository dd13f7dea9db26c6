"""Loading a model by name, from a folder, or from the hub; and the ways in which that can fail."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from labkit import LoRAConfig, add_lora, dequantize_model, merge, models, quantize_model, save_adapter, unload
from labkit.lora.inject import lora_layers
from labkit.models import hub, loading
from tests.models.small_gguf import make_llama

IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def saved(tmp_path, tiny):
    """Saves a model and a tokenizer to a folder, and gives the folder."""

    def save(model=None, tokenizer=True, **options) -> Path:
        folder = tmp_path / "model"
        (make_llama() if model is None else model).save_pretrained(folder, **options)
        if tokenizer:
            tiny[1].save_pretrained(folder)
        return folder

    return save


def edit_weights(folder: Path, without: tuple = (), **tensors) -> Path:
    """Save the weights again, without some and with others."""
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if name not in without}
    save_file(weights | tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_json(path: Path, without: tuple = (), **values) -> None:
    known = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in known.items() if k not in without} | values))


def test_model_has_the_published_number_of_parameters(smollm2):
    assert sum(p.numel() for p in smollm2[0].parameters()) == 134_515_008


def test_a_saved_model_loads_from_its_folder(tmp_path, small_llama, tokenizer):
    small_llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = models.load(str(tmp_path))
    assert torch.equal(model.model.norm.weight, small_llama.model.norm.weight)
    assert torch.equal(model.lm_head.weight, small_llama.lm_head.weight)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("backbone", [False, True])
def test_what_is_whole_loads_with_the_logits_that_it_was_saved_with(saved, tied, backbone):
    model = make_llama(tie_word_embeddings=tied)
    if backbone and not tied:
        with pytest.raises(models.ModelUnavailable, match=r"missing: 1 \(lm_head.weight\)"):
            models.load(saved(model.model))
        return
    folder = saved(model.model if backbone else model)
    assert tied == ("lm_head.weight" not in load_file(folder / "model.safetensors"))
    assert torch.equal(models.load(folder)[0](IDS).logits, model(IDS).logits)


def test_shards_a_config_without_architectures_and_old_buffers_load(saved):
    folder = saved(max_shard_size="100KB")
    edit_json(folder / "config.json", without=("architectures",))
    assert torch.equal(models.load(folder)[0](IDS).logits, make_llama()(IDS).logits)
    whole = edit_weights(saved(), **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert torch.equal(models.load(whole)[0](IDS).logits, make_llama()(IDS).logits)


# what transformers only logs


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_missing_are_refused_by_name(saved, name):
    with pytest.raises(models.ModelUnavailable, match=rf"missing: 1 \({name}\)\. .*would be random numbers"):
        models.load(edit_weights(saved(), without=(name,)))


def test_tied_weights_of_which_both_are_missing_are_refused(saved):
    folder = saved(make_llama(tie_word_embeddings=True))
    with pytest.raises(
        models.ModelUnavailable, match=r"missing: 2 \(lm_head.weight, model.embed_tokens.weight\)"
    ):
        models.load(edit_weights(folder, without=("model.embed_tokens.weight",)))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "v_head.weight"])
def test_weights_for_which_the_model_has_no_place_are_refused_by_name(saved, name):
    with pytest.raises(
        models.ModelUnavailable, match=rf"no place: 1 \({name}\)\. .*other numbers; config.json"
    ):
        models.load(edit_weights(saved(), **{name: torch.ones(64)}))


def test_weights_of_another_shape_are_refused_by_name(saved):
    match = r"another shape: 1 \(model.norm.weight \(32,\) in place of \(64,\)\)"
    with pytest.raises(models.ModelUnavailable, match=match):
        models.load(edit_weights(saved(), **{"model.norm.weight": torch.ones(32)}))


def test_a_model_of_another_task_is_refused_since_its_output_layer_would_be_random(saved):
    model = LlamaForSequenceClassification(make_llama(pad_token_id=0).config)
    with pytest.raises(
        models.ModelUnavailable, match=r"missing: 1 \(lm_head.weight\);.*no place: 1 \(score.weight\)"
    ):
        models.load(saved(model))


def test_a_quantized_model_is_refused_with_what_to_do(saved):
    model = make_llama()
    quantize_model(model, progress=False)
    match = "missing: 14 .*Its layers are quantized.*save it before quantize_model or after dequantize_model, and call"
    with pytest.raises(models.ModelUnavailable, match=match):
        models.load(saved(model))


def test_a_dequantized_model_loads_from_its_folder(saved):
    model = make_llama()
    quantize_model(model, progress=False)
    want = model(IDS).logits
    dequantize_model(model)
    again = models.load(saved(model))[0](IDS).logits
    assert torch.equal(again, model(IDS).logits)
    torch.testing.assert_close(again, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_saved_with_an_adapter_on_is_refused_with_what_to_do_and_that_helps(saved, merged):
    model = add_lora(make_llama(), LoRAConfig(r=4))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    want = model(IDS).logits
    if merged:
        merge(model)
    with pytest.raises(
        models.ModelUnavailable, match="saved with an adapter on: keep .* save what unload gives"
    ):
        models.load(saved(model))
    again = models.load(saved(unload(model)))[0](IDS).logits
    torch.testing.assert_close(again, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("base_too", [False, True])
def test_an_adapter_in_the_folder_is_refused_and_not_put_on_in_silence(saved, base_too):
    folder = saved()
    save_adapter(add_lora(make_llama(), LoRAConfig(r=4)), folder)
    if not base_too:
        (folder / "model.safetensors").unlink()
    with pytest.raises(
        models.ModelUnavailable, match="holds an adapter .*put the adapter on with load_adapter"
    ):
        models.load(folder)


# files


def test_an_index_that_names_missing_shards_is_refused_by_their_name(saved):
    folder = saved(max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(models.ModelUnavailable, match=f"has no {shards[1].name}"):
        models.load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        models.ModelUnavailable, match=f"neither model.safetensors nor .*only {shards[0].name}"
    ):
        models.load(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "outside of the folder"),
        ({}, "which file holds which weight"),
        ([1], "which file holds which weight"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(saved, index, message):
    folder = saved(max_shard_size="100KB")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(models.ModelUnavailable, match=message):
        models.load(folder)


def test_a_folder_without_a_tokenizer_or_a_config_says_so(saved):
    folder = saved(tokenizer=False)
    with pytest.raises(models.ModelUnavailable, match="no tokenizer in .*save the model's own there with"):
        models.load(folder)
    folder = saved()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(models.ModelUnavailable, match="no tokenizer in"):
        models.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(models.ModelUnavailable, match="has no config.json; save it with save_pretrained"):
        models.load(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "large", "twice", "deep"])
def test_a_file_that_would_hang_or_fill_the_process_is_refused(saved, name, kind):
    folder = saved()
    path = folder / name
    if name == "tokenizer.json" and kind in ("twice", "deep"):
        return  # is read by tokenizers itself
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(2**33)  # a hole: 8 GiB that take no space
    else:
        path.write_text('{"a": 1, "a": 2}' if kind == "twice" else "[" * 10**6)
    with pytest.raises(models.ModelUnavailable, match=rf"cannot be read \(.*{name}"):
        models.load(folder)


def test_weights_with_a_header_that_is_a_bomb_are_refused(saved):
    folder = saved()
    with (folder / "model.safetensors").open("wb") as file:
        file.write((2**33).to_bytes(8, "little"))
        file.truncate(2**34)
    with pytest.raises(models.ModelUnavailable, match=r"cannot be read \(.*a header of 8,589,934,592 bytes"):
        models.load(folder)


def test_files_that_are_no_part_of_a_model_are_left_alone(saved):
    folder = saved()
    os.mkfifo(folder / "progress.json")
    (folder / "optimizer.safetensors").write_bytes(b"cut off")
    with (folder / "trainer_state.json").open("wb") as file:
        file.truncate(2**33)
    assert torch.equal(models.load(folder)[0](IDS).logits, make_llama()(IDS).logits)


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


def test_damage_to_the_model_in_the_checkout_is_found(tmp_path, monkeypatch):
    source = models.shipped("tiny-llama")
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    for path in source.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    content = bytearray((source / "model.safetensors").read_bytes())
    (folder / "model.safetensors").write_bytes(content)
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    models.load("tiny-llama")
    content[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(models.ModelUnavailable, match="is damaged: it has not the sha256 in provenance.json"):
        models.load("tiny-llama")
    (folder / "provenance.json").unlink()
    with pytest.raises(models.ModelUnavailable, match="cannot be checked"):
        models.load("tiny-llama")


# code that a model brings along


@pytest.fixture
def with_code(saved, monkeypatch):
    """A folder whose configs name code beside them, which must not run; nor may anybody be asked."""

    def make(**config) -> Path:
        folder = saved()
        (folder / "own.py").write_text("raise SystemExit('the code ran')\n")
        edit_json(
            folder / "config.json",
            auto_map={"AutoConfig": "own.A", "AutoModelForCausalLM": "own.B"},
            **config,
        )
        return folder

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    return make


def test_code_in_a_folder_is_not_run_where_transformers_has_the_model_itself(with_code):
    with pytest.warns(UserWarning, match="brings code of its own, which was not run.*own LlamaForCausalLM"):
        model, _ = models.load(with_code())
    assert torch.equal(model(IDS).logits, make_llama()(IDS).logits)


def test_a_model_that_needs_its_own_code_is_refused_in_one_sentence(with_code):
    with pytest.raises(
        models.ModelUnavailable, match="code that it brings with it, which labkit never runs"
    ) as error:
        models.load(with_code(model_type="own"))
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_needs_its_own_code_is_refused(with_code):
    folder = with_code()
    edit_json(folder / "config.json", without=("auto_map",))
    edit_json(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", None]}, tokenizer_class="T"
    )
    with pytest.raises(models.ModelUnavailable, match="the tokenizer of .* can only be loaded by code"):
        models.load(folder)


# names, dtypes, devices, the hub


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(models.ModelUnavailable, match="did you mean 'smollm2-135m'"):
        models.load("smolm2-135m")


def test_a_path_is_a_folder_and_never_an_id_on_the_hub(saved, monkeypatch):
    monkeypatch.setattr(loading, "is_reachable", lambda: pytest.fail("asked the hub"))
    folder = saved()
    monkeypatch.chdir(folder.parent)
    assert models.load(Path("model"))[0].config.name_or_path == "model"
    with pytest.raises(models.ModelUnavailable, match="'runs/model' is not a known model"):
        models.load(Path("runs/model"))
    with pytest.raises(models.ModelUnavailable, match="is a file; give the folder"):
        models.load(folder / "config.json")


@pytest.mark.parametrize("name", [3, None, ["tiny-llama"], b"tiny-llama"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=r"name=.* must be the name of a model, its folder, or its id"):
        models.load(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "torch.float16", torch.float64])
def test_a_dtype_may_be_given_by_its_name(dtype):
    model, _ = models.load("tiny-llama", dtype=dtype)
    assert str(model.dtype).endswith(str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("dtype", ["bf16", "auto", torch.int8, torch.complex64, 32, True, ""])
def test_a_dtype_that_weights_cannot_have_is_refused_with_those_that_they_can(dtype):
    with pytest.raises(
        ValueError, match=r"dtype=.* is not known; choose one of \('float32', 'bfloat16', 'float16'"
    ):
        models.load("tiny-llama", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", 3.5, "", torch.device("cuda", 99)])
def test_a_device_that_is_not_here_is_refused_with_the_one_that_is(device):
    with pytest.raises(ValueError, match=r"device=.* cannot be used here \(.*\); this machine has"):
        models.load("tiny-llama", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_without_cuda_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(loading, "local_folder", lambda _: pytest.fail("loading"))
    with pytest.raises(ValueError, match="device='cuda' cannot be used here .*this machine has"):
        models.load("tiny-llama", device="cuda")


def test_hub_id_without_network_says_what_works_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        models.ModelUnavailable, match=r"could not get 'nobody/no-such-model' from the hub.*smollm2-135m"
    ):
        models.load("nobody/no-such-model")


@pytest.mark.parametrize("listens", [False, True])
def test_a_hub_that_does_not_answer_is_asked_once_and_gives_one_sentence(monkeypatch, listens):
    """transformers asks for each of ten files, and repeats each request for up to half a minute."""
    monkeypatch.setattr(hub, "SECONDS", 1.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen()
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}"
        )
        with pytest.raises(models.ModelUnavailable, match="could not get 'nobody/no-such-model'") as error:
            models.load("nobody/no-such-model")
        assert "\n" not in str(error.value) and "there is no folder of that name" in str(error.value)
        silent.setblocking(False)
        if listens:
            silent.accept()[0].close()
            with pytest.raises(BlockingIOError):
                silent.accept()
