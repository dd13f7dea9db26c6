"""What a step of fine-tuning is, to the memory ledger: every choice that decides how many bytes it takes.

Published figures differ because these choices differ, and are seldom stated. Two sets of them have names
here: `Setup()` is this course's own step, with adapters, their gradients and AdamW's moments in fp32;
`PUBLISHED` holds those of others.
"""

from dataclasses import asdict, dataclass, fields

import torch

from labkit.checks import check_choice, check_whole, is_number, nearest, not_known, use_python_numbers
from labkit.models.shapes import ATTENTION
from labkit.quant.config import BLOCKSIZES, QuantConfig
from labkit.training.loss import LOGITS

METHODS = ("full", "lora", "qlora")
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setup:
    """One step of fine-tuning.

    Args:
        method: "full", "lora", or "qlora": LoRA over a base in 4 bits.
        r, targets: of LoRA; see `labkit.LoRAConfig`.
        max_length: tokens per example, all of them used.
        batch_size: examples per forward pass.
        optimizer: "adamw", "adamw8bit" (both moments in blocks of 256 8-bit codes), or "sgd" without
            momentum.
        checkpointing: keep only the input of each block, and run the block again in the backward pass.
        recompute_act: recompute act(gate) in the backward pass (`labkit.training.recompute`), as this course
            does; most others keep it.
        dtype: "fp32", "bf16" or "fp16": of the weights that are not in 4 bits, and of what is computed from
            them.
        adapter_dtype: of LoRA's A and B, their gradients and moments: "fp32" in this course, "bf16" in
            torchtune.
        state_dtype: of the optimizer's moments; None: that of the parameter, as in torch.optim.
        gradient_dtype: None: that of the parameter.
        master: keep an fp32 copy of every trained parameter of lower precision, and fp32 moments (mixed
            precision as in Megatron and DeepSpeed).
        compute_dtype: of the products with 4-bit weights; None: `dtype`.
        blocksize, double_quant: of the 4-bit weights.
        quantize: which linear layers are in 4 bits: "all-linear", or any other value that `targets` may have.
        train_embeddings: with LoRA, train the embedding and the output layer too, in full.
        attention: "sdpa" (no matrix of scores) or "eager" (all of it).
        logits: of the "supervised" positions only, a few rows at a time where possible
            (`labkit.training.loss`), or of "all" positions, as in most trainers.
        supervised: share of the positions whose prediction counts in the loss, above 0, up to 1; rounded to
            whole positions, the last `per_example` of every example.
        device: "cuda" counts the blocks that CUDA's caching allocator gives to static tensors; "cpu" does not,
            and keeps one buffer for dequantized weights.

    Raises:
        ValueError: a value is out of its range.
    """

    method: str = "qlora"
    r: int = 16
    targets: str | tuple[str, ...] | list[str] = "all-linear"
    max_length: int = 512
    batch_size: int = 1
    optimizer: str = "adamw"
    checkpointing: bool = False
    recompute_act: bool = True
    dtype: str = "bf16"
    adapter_dtype: str = "fp32"
    state_dtype: str | None = None
    gradient_dtype: str | None = None
    master: bool = False
    compute_dtype: str | None = None
    blocksize: int = 64
    double_quant: bool = True
    quantize: str | tuple[str, ...] | list[str] = "all-linear"
    train_embeddings: bool = False
    attention: str = "sdpa"
    logits: str = "supervised"
    supervised: float = 1.0
    device: str = "cuda"

    def __post_init__(self):
        use_python_numbers(self)
        choices = (
            ("method", METHODS),
            ("optimizer", OPTIMIZERS),
            ("dtype", tuple(DTYPES)),
            ("adapter_dtype", tuple(DTYPES)),
            ("state_dtype", (*DTYPES, None)),
            ("gradient_dtype", (*DTYPES, None)),
            ("compute_dtype", (*DTYPES, None)),
            ("blocksize", BLOCKSIZES),
            ("attention", ATTENTION),
            ("logits", LOGITS),
            ("device", ("cuda", "cpu")),
        )
        for name, allowed in choices:
            check_choice(name, getattr(self, name), allowed)
        for name in ("r", "max_length", "batch_size"):
            check_whole(name, getattr(self, name))
        if self.max_length < 2:
            raise ValueError(
                "max_length=1 has nothing to predict: position t predicts token t + 1; give at least 2"
            )
        if not is_number(self.supervised) or not 0 < self.supervised <= 1:
            raise ValueError(
                f"supervised={self.supervised!r} is the share of positions in the loss: above 0, up to 1"
            )
        if self.method == "full" and self.train_embeddings:
            raise ValueError("train_embeddings is a choice of LoRA; full fine-tuning trains them anyway")

    @property
    def tokens(self) -> int:
        """Tokens per forward pass."""
        return self.batch_size * self.max_length

    @property
    def per_example(self) -> int:
        """Supervised positions per example, of the max_length - 1 that have a next token."""
        return max(1, round(self.supervised * (self.max_length - 1)))

    @property
    def n_supervised(self) -> int:
        """Supervised positions per forward pass."""
        return self.batch_size * self.per_example

    @property
    def quantization(self) -> QuantConfig:
        """How the 4-bit weights are stored, and multiplied."""
        dtype = self.compute_dtype and DTYPES[self.compute_dtype]
        return QuantConfig(blocksize=self.blocksize, double_quant=self.double_quant, compute_dtype=dtype)

    @property
    def width(self) -> int:
        """Bytes of a number in `dtype`."""
        return itemsize(self.dtype)

    def describe(self) -> str:
        """One line."""
        how = self.method if self.method == "full" else f"{self.method} r={self.r} on {self.targets}"
        check = ", checkpointing" if self.checkpointing else ""
        return f"{how}, {self.batch_size} × {self.max_length} tokens, {self.optimizer}, {self.dtype}{check}"

    def as_dict(self) -> dict:
        """All fields."""
        return asdict(self)


# what others call a setting
OTHER_NAMES = {
    "rank": "r",
    "batch": "batch_size",
    "sequence": "max_length",
    "sequence_length": "max_length",
    "seq_len": "max_length",
    "gradient_checkpointing": "checkpointing",
}


def setup_of(method: str, settings: dict) -> Setup:
    """The setup with these settings.

    Raises:
        ValueError: a setting has another name here, or there is none like it.
    """
    known = [f.name for f in fields(Setup)]
    for name in settings:
        if name not in known:
            hint = (
                f"; it is called {OTHER_NAMES[name]!r} here." if name in OTHER_NAMES else nearest(name, known)
            )
            raise ValueError(f"{name!r} is not a setting{hint} The settings are {', '.join(known)}")
    return Setup(method=method, **settings)


def itemsize(dtype: str) -> int:
    """Bytes of a number.

    >>> itemsize("bf16")
    2
    """
    return DTYPES[dtype].itemsize


def dtype_name(dtype: torch.dtype | str) -> str:
    """ "fp32", "bf16" or "fp16", from a torch dtype or its name.

    Raises:
        ValueError: another dtype.
    """
    for name, known in DTYPES.items():
        if dtype in (name, known, str(known), str(known).removeprefix("torch.")):
            return name
    raise not_known("dtype", dtype, DTYPES)


PUBLISHED = {
    # The tutorial "Fine-Tuning Llama2 with QLoRA" and
    # recipes/configs/llama2/7B_{lora,qlora}_single_device.yaml. Its table gives peak memory *reserved*: LoRA
    # 13.98 GB after loading and 15.57 GB in training, QLoRA 9.13 and 9.29 GB. So QLoRA's figure was reached
    # while loading: torchao quantized a weight all at once, with 16 candidates per number (later "in chunks",
    # says a note in its nf4tensor.py, because of "a large memory spike"), and what is reserved stays
    # reserved.
    "torchtune": dict(
        r=8,
        targets=("q_proj", "v_proj"),
        batch_size=2,
        dtype="bf16",
        adapter_dtype="bf16",
        checkpointing=True,
        recompute_act=False,
        logits="all",
    ),
}
