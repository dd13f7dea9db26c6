"""The shape of a decoder, from its config, against the modules that transformers builds."""

import pytest
from torch import nn
from transformers import BloomConfig, GPT2Config, MambaConfig

from labkit.models.shapes import config_of, decoder_shape, meta_model


@pytest.mark.parametrize("name", ["tiny-llama", "smollm2-135m", "qwen3-8b", "gemma-2-9b"])
def test_a_decoder_shape_is_that_of_the_modules(name):
    model = meta_model(config_of(name))
    shape, blocks = decoder_shape(model), model.model.layers
    assert shape == decoder_shape(model.config)
    assert shape.num_hidden_layers == len(blocks)
    assert tuple(model.get_input_embeddings().weight.shape) == (shape.vocab_size, shape.hidden_size)
    assert tuple(blocks[0].self_attn.q_proj.weight.shape) == (shape.q_width, shape.hidden_size)
    assert tuple(blocks[0].self_attn.k_proj.weight.shape) == (shape.kv_width, shape.hidden_size)
    assert blocks[0].mlp.up_proj.out_features == shape.intermediate_size
    assert shape.q_width % shape.num_attention_heads == shape.kv_width % shape.num_key_value_heads == 0


def test_what_a_config_leaves_out_is_derived_or_none():
    gpt2 = decoder_shape(GPT2Config())
    assert (gpt2.num_key_value_heads, gpt2.head_dim) == (gpt2.num_attention_heads, 768 // 12)
    assert gpt2.intermediate_size is None and gpt2.max_position_embeddings == 1024
    assert decoder_shape(BloomConfig()).max_position_embeddings is None  # ALiBi: no table of positions


@pytest.mark.parametrize("given", [nn.Linear(2, 2), MambaConfig(), 3])
def test_what_is_no_decoder_is_refused(given):
    with pytest.raises(ValueError, match=f"{type(given).__name__} does not say how wide and deep it is"):
        decoder_shape(given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ('{"model_type": "llama", "model_type": "gpt2"}', "'model_type' stands there twice"),
        ("[" * 10**5, "nested too deeply"),
        ("[1]", "it needs a model_type, such as 'llama'"),
        ('{"hidden_size": 64}', "it needs a model_type"),
        ('{"model_type": ["llama"]}', "it needs a model_type"),
        ('{"model_type": "no-such-model"}', "not the config of a model that transformers knows"),
        (
            '{"model_type": "llama", "hidden_size": "wide"}',
            "not the config of a model that transformers knows",
        ),
        (
            '{"model_type": "llama", "rope_parameters": 5}',
            "not the config of a model that transformers knows",
        ),
        (" " * (16 * 2**20 + 1), "at most 16,777,216 are read"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused_with_the_reason(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path)


def test_a_config_that_is_a_pipe_or_a_device_does_not_hang(tmp_path):
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="is not a known config"):
        config_of(tmp_path)
