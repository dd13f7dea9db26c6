"""What a model must compute after any calls: transformers' own model, with the weights that the equations give.

The oracle never looks at labkit's layers. It has the base weights from transformers, bitsandbytes' four bits,
PyTorch's singular values and the factors that the test itself put into the adapters, and makes one weight of
them for each layer: W + s B A, rescaled by rows for DoRA. Its logits are those of transformers' model with
these weights.
"""

import copy
import math
from dataclasses import dataclass, field, replace

import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

VOCABULARY = 4096  # of the tokenizer of tiny-llama, which the training steps use
USUAL = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
)
GROUPED = dict(USUAL, num_key_value_heads=2)
ENDS = dict(bos_token_id=1, eos_token_id=0, pad_token_id=0)
ARCHITECTURES = {
    "llama": GROUPED,
    "llama, tied": dict(GROUPED, model_type="llama", tie_word_embeddings=True),
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": dict(GROUPED, head_dim=8),
    "gemma": dict(GROUPED, head_dim=8),
    "gemma2": dict(GROUPED, head_dim=8),
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "gpt_neox": USUAL,
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, vocab_size=VOCABULARY),
    "opt": dict(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
        word_embed_proj_dim=32, max_position_embeddings=256,
    ),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY),
    "falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY),
}  # fmt: skip
IDS = torch.arange(5, 29).view(2, 12)


def make_base(architecture: str) -> nn.Module:
    """A tiny model of transformers with random weights, the same for each call."""
    settings = dict(ARCHITECTURES[architecture]) | ENDS
    kind = settings.pop("model_type", architecture)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings)).eval()


@dataclass
class Correction:
    """An adapter as the equations have it: factors by layer, scaling, row norms (DoRA), what the start took from W."""

    A: dict[str, Tensor]
    B: dict[str, Tensor]
    scaling: float
    magnitude: dict[str, Tensor] | None = None
    taken: dict[str, Tensor] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> "Correction":
        def to(tensors: dict[str, Tensor] | None):
            return tensors and {name: tensor.to(dtype) for name, tensor in tensors.items()}

        return replace(
            self, A=to(self.A), B=to(self.B), magnitude=to(self.magnitude), taken=to(self.taken) or {}
        )

    def weight(self, name: str, base: Tensor) -> Tensor:
        """The one weight of a layer, (out, in), that does what its base and the correction do together."""
        whole = base - self.taken.get(name, 0) + self.scaling * self.B[name] @ self.A[name]
        if self.magnitude is None:
            return whole
        return self.magnitude[name][:, None] * whole / whole.norm(dim=1, keepdim=True)


class Oracle:
    """The expected model."""

    def __init__(self, architecture: str):
        self.model = make_base(architecture)
        self.weights = {
            name: (m.weight.T if isinstance(m, Conv1D) else m.weight).detach().double()
            for name, m in self.model.named_modules()
            if isinstance(m, (nn.Linear, Conv1D)) and m is not self.model.get_output_embeddings()
        }
        self.corrections: dict[str, Correction] = {}
        self.active: str | None = None

    def fix(self, weights: dict[str, Tensor]) -> None:
        """From now on these are the base weights."""
        self.weights = dict(weights)

    def effective(self) -> dict[str, Tensor]:
        """The weights that the model must compute with."""
        if self.active is None:
            return self.weights
        now = self.corrections[self.active]
        return {n: now.weight(n, w) if n in now.A else w for n, w in self.weights.items()}

    def quantize(self) -> None:
        """Round every layer to NF4 in blocks of 64 with double quantization, as bitsandbytes does."""
        for name, weight in self.weights.items():
            flat = weight.float().reshape(
                1, -1
            )  # on a CPU its dequantize is wrong for rows shorter than a block
            packed, state = quantize_4bit(flat, blocksize=64, quant_type="nf4", compress_statistics=True)
            self.weights[name] = dequantize_4bit(packed, state).double().view(weight.shape)

    def cast(self, dtype: torch.dtype) -> None:
        """Round everything to `dtype`."""
        self.model.to(dtype)
        self.weights = {name: weight.to(dtype).double() for name, weight in self.weights.items()}
        self.corrections = {name: c.cast(dtype).cast(torch.float64) for name, c in self.corrections.items()}

    @torch.no_grad()
    def logits(self, dtype: torch.dtype) -> Tensor:
        """The logits for `IDS`, computed in `dtype`."""
        model = copy.deepcopy(self.model).to(dtype)
        for name, weight in self.effective().items():
            module = model.get_submodule(name)
            module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
        return model(IDS).logits


def principal(weight: Tensor, r: int) -> Tensor:
    """The part of `weight` that its r largest singular values make: what PiSSA takes out of the base."""
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    return U[:, :r] * S[:r] @ V[:r]


def scaling_of(r: int, alpha: float, variant: str) -> float:
    return alpha / (math.sqrt(r) if variant == "rslora" else r)
