"""The shapes of a model without its weights: from a name, a config, or a model.

A tensor on PyTorch's meta device has a shape and a dtype, and no memory. So a model of 70 B parameters is
built in a second, with the very modules that transformers would load weights into, and its parameters are
counted, not estimated.

The configs under `data/configs` are the models' own `config.json`, cut down to what decides a shape. Their
parameter totals were checked against the published ones.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.checks import check_choice, nearest
from labkit.files.reading import read_json
from labkit.paths import data_folder

ATTENTION = ("sdpa", "eager")
CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that a decoder is made of, under the names that they have in transformers' configs.

    Attributes:
        num_hidden_layers: blocks.
        hidden_size: numbers per token between the blocks.
        intermediate_size: numbers per token inside an MLP; None where the config has no single one.
        num_attention_heads: heads of the queries.
        num_key_value_heads: heads of keys and values; fewer where several heads of the queries share one.
        head_dim: numbers per head.
        vocab_size: rows of the embedding.
        max_position_embeddings: tokens of the longest sequence; None where the config sets no limit.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int | None
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int | None

    @property
    def q_width(self) -> int:
        """Numbers in the queries of one token in one layer."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers in the keys of one token in one layer; as many in its values."""
        return self.num_key_value_heads * self.head_dim


def decoder_shape(model) -> DecoderShape:
    """The shape of a causal language model, from its config.

    Args:
        model: a transformers config, or a model that has one.

    Raises:
        ValueError: the config does not give the sizes of a decoder.
    """
    config = getattr(model, "config", None) if isinstance(model, nn.Module) else model
    try:
        config = config.get_text_config()
        heads, width = config.num_attention_heads, config.hidden_size
        inner = getattr(config, "intermediate_size", None)
        return DecoderShape(
            num_hidden_layers=config.num_hidden_layers,
            hidden_size=width,
            intermediate_size=inner if isinstance(inner, int) else None,  # Gemma 3n: a list, one per block
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,  # GPT-2: one per head
            head_dim=getattr(config, "head_dim", None) or width // heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=getattr(config, "max_position_embeddings", None),
        )
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} does not say how wide and deep it is ({error}); "
            "give a causal language model of transformers"
        ) from None


def known_models() -> list[str]:
    """Names that `config_of` knows, smallest model first."""
    shipped = sorted(
        (data_folder() / "configs").glob("*.json"), key=lambda path: _size(json.loads(path.read_text()))
    )
    return ["tiny-llama", *(path.stem for path in shipped)]


def _size(config: dict) -> int:
    """A number by which to sort models by size."""
    return config["hidden_size"] * config["intermediate_size"] * config["num_hidden_layers"]


def config_of(model):
    """The transformers config of a model.

    Args:
        model: a name of `known_models()`, a folder with a `config.json` or that file, a config, a dict with
            `model_type`, or a model.

    Raises:
        ValueError: an unknown name (the message lists the known ones), or a dict without a usable
            `model_type`.
    """
    from transformers import PretrainedConfig

    if isinstance(model, nn.Module):
        model = getattr(model, "config", model)
    if isinstance(model, PretrainedConfig):
        return model
    if isinstance(model, dict):
        return _from_dict(model)
    if not isinstance(model, str | Path):
        raise ValueError(
            f"{type(model).__name__} is not a model; give a name ({', '.join(known_models())}), a folder "
            "with a config.json, a transformers config, or a transformers model"
        )
    path = Path(model).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    name = str(model).lower()
    if not path.is_file() and name in known_models():
        folder = data_folder()
        path = folder / name / "config.json" if name == "tiny-llama" else folder / "configs" / f"{name}.json"
    if not path.is_file():
        raise ValueError(
            f"{str(model)!r} is not a known config{nearest(name, known_models())} Known: "
            f"{', '.join(known_models())}. Also possible: a folder with a config.json, or "
            "AutoConfig.from_pretrained(…) of any model on the hub"
        )
    config = _from_dict(read_json(path))
    config.name_or_path = path.parent.name if path.name == "config.json" else path.stem
    return config


def _from_dict(values: Any):
    """The transformers config that a `config.json` holds."""
    from transformers import AutoConfig

    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str):
        raise ValueError(
            "not the config of a model that transformers knows: it needs a model_type, such as 'llama'"
        )
    given = {key: value for key, value in values.items() if key not in ("transformers_version", "model_type")}
    try:
        return AutoConfig.for_model(kind, **given)
    except Exception as error:  # transformers checks some settings, and stumbles over others
        raise ValueError(f"not the config of a model that transformers knows: {str(error)[:200]}") from None


def meta_model(config, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The causal language model of `config` on the meta device: every module and shape, no memory.

    Raises:
        ValueError: `attention` is not one of `ATTENTION`, or there is no causal model for this config.
    """
    from transformers import AutoModelForCausalLM

    check_choice("attention", attention, ATTENTION)
    attention = attention_of(config, attention)
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"transformers cannot build a causal language model of a {config.model_type!r} config: "
            f"{str(error)[:200]}"
        ) from None
    return model


def attention_of(config, attention: str) -> str:
    """The attention that a model can run with: SDPA cannot cap the scores, as Gemma 2 requires."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else attention


def changes_logits(config) -> bool:
    """Does the model cap or scale the output of its output layer (Gemma 2, Cohere, Granite)?"""
    return any(getattr(config, key, None) not in (None, 1, 1.0) for key in CHANGES_LOGITS)
