"""GGUF files: the weights, logits and tokens that transformers reads from the same file."""

import pytest
import torch

from labkit import models
from labkit.models import gguf as gguf_reader

NAME = "smollm2-135m"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The same GGUF through transformers' own reader: half a minute, and not our code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.fetch(NAME)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="source.gguf", dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file="source.gguf")


@pytest.mark.slow
def test_weights_equal_transformers_own_gguf_reader_bit_for_bit(smollm2, reference):
    ours, theirs = smollm2[0].state_dict(), reference[0].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
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
