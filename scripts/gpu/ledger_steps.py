"""The steps whose memory is measured, the most important first, and the published figure of each, if there is one."""

from dataclasses import dataclass, field
from typing import Any

import torch

from labkit.memory.setup import PUBLISHED, Setup, dtype_name
from labkit.models.shapes import config_of

METHODS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
SMALL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Step:
    """A training step of a model with random weights.

    Attributes:
        name: of a model under `data/configs`, or "small", a Llama for a rehearsal.
        method: "full", "lora" or "qlora".
        settings: of `Setup`; one example of 512 tokens unless it says otherwise.
        seconds: about what it takes on a large GPU.
        by_tensor: is every tensor watched too (`measure`)?
        as_in: of whom the settings are.
        published: a figure for such a step, in words; published_bytes: the same as a number.
    """

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 4.0
    by_tensor: bool = False
    as_in: str = ""
    published: str = ""
    published_bytes: int = 0

    @property
    def key(self) -> str:
        """Its name in the record."""
        setup = self.setup()
        parts = [f"{METHODS[self.method]} {self.name} {setup.batch_size}×{setup.max_length}"]
        parts += ["checkpointing"] if setup.checkpointing else []
        parts += [f"rank {setup.r}"] if setup.r != Setup.r and self.method != "full" else []
        return ", ".join(parts + ([f"as {self.as_in}"] if self.as_in else []))

    def config(self):
        """The config of its model."""
        if self.name != "small":
            return config_of(self.name)
        config = config_of(SMALL)
        config.name_or_path = self.name
        return config

    def setup(self, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Setup:
        """Its settings; adapters that are in 16 bits are in the same 16 bits as all the rest."""
        settings = dict(self.settings)
        if settings.get("adapter_dtype") == "bf16":
            settings["adapter_dtype"] = dtype_name(dtype)
        return Setup(method=self.method, **settings | {"dtype": dtype_name(dtype), "device": device})


CHECKPOINTING = {"checkpointing": True}
LONG = {"max_length": 2048}
# recompute_act concerns steps without checkpointing only, and is no part of this course's step
OF_TORCHTUNE = {name: value for name, value in PUBLISHED["torchtune"].items() if name != "recompute_act"}
OF_TORCHTUNE |= {"max_length": 512}

STEPS = [
    Step(
        "llama-2-7b",
        "qlora",
        CHECKPOINTING,
        by_tensor=True,
        seconds=7,
        published="Unsloth's least for a 7B, 5 GB, of a step that it does not name",
        published_bytes=5_000_000_000,
    ),
    Step(
        "llama-3-70b",
        "qlora",
        CHECKPOINTING,
        seconds=14,
        published="a 70B QLoRA fine-tune fits in 40 to 50 GB",
        published_bytes=50_000_000_000,
    ),
    Step("llama-2-7b", "lora", CHECKPOINTING, by_tensor=True, seconds=7),
    Step("smollm2-1.7b", "full", by_tensor=True, seconds=7),
    Step("llama-2-13b", "qlora", CHECKPOINTING),
    Step(
        "llama-33b",
        "qlora",
        CHECKPOINTING | {"r": 64},
        seconds=8,
        as_in="the QLoRA paper",
        published="a 33B does not quite fit 24 GB",
        published_bytes=24_000_000_000,
    ),
    Step("llama-2-13b", "lora", CHECKPOINTING),
    Step("llama-2-7b", "full", CHECKPOINTING, seconds=6),
    Step(
        "llama-2-7b",
        "qlora",
        OF_TORCHTUNE | {"targets": "all-linear"},
        as_in="torchtune",
        published="torchtune's table, 9.29 GB reserved, of which 9.13 GB were reserved while loading",
        published_bytes=9_290_000_000,
    ),
    Step(
        "llama-2-7b",
        "lora",
        OF_TORCHTUNE,
        as_in="torchtune",
        published="torchtune's table, 15.57 GB reserved",
        published_bytes=15_570_000_000,
    ),
    Step(
        "llama-3-8b",
        "qlora",
        CHECKPOINTING | {"r": 32},
        published="Llama-3-8B with QLoRA takes 6.5 GB",
        published_bytes=6_500_000_000,
    ),
    Step(
        "llama-3-8b",
        "lora",
        {"r": 32},
        published="Llama-3-8B with LoRA of rank 32 takes 22 GB",
        published_bytes=22_000_000_000,
    ),
    Step(
        "llama-3-8b",
        "full",
        CHECKPOINTING,
        seconds=6,
        published="Llama-3-8B in full takes 128 GB, in mixed precision at 16 bytes per parameter; here it is 8",
        published_bytes=128_000_000_000,
    ),
    Step("llama-2-7b", "qlora", LONG, by_tensor=True, seconds=7),
    Step("llama-2-7b", "qlora", LONG | CHECKPOINTING),
    Step("llama-2-7b", "qlora"),
    Step("llama-2-7b", "lora"),
    Step("llama-2-7b", "lora", LONG | CHECKPOINTING),
    Step("llama-3-8b", "qlora", {"r": 32}),
    Step("llama-3-8b", "lora", CHECKPOINTING | {"r": 32}),
    Step("smollm2-1.7b", "full", CHECKPOINTING),
    Step("smollm2-1.7b", "full", LONG),
    Step("llama-2-13b", "qlora", LONG | CHECKPOINTING),
    Step("llama-3-70b", "qlora", LONG | CHECKPOINTING, seconds=14),
    Step(
        "llama-2-70b",
        "qlora",
        CHECKPOINTING,
        seconds=14,
        published="Unsloth's least for a 70B, 41 GB, of a step that it does not name",
        published_bytes=41_000_000_000,
    ),
    Step(
        "llama-3-70b",
        "qlora",
        {"r": 32},
        seconds=14,
        published="Llama-3-70B with QLoRA takes 53 GB",
        published_bytes=53_000_000_000,
    ),
]
OF_A_REHEARSAL = [
    Step("small", "qlora", {"max_length": 64, "checkpointing": True}, by_tensor=True),
    Step("small", "qlora", {"max_length": 64}),
    Step("small", "lora", {"max_length": 64, "checkpointing": True}),
    Step("small", "full", {"max_length": 64}, by_tensor=True),
]
