"""Count what a training step holds throughout: weights, constants, adapters, gradients, moments.

Nothing here is an estimate. The parameters are those of the model's own modules, built on the meta device;
which of them are quantized or adapted follows from the rules of `quantize_model` and `add_lora`
(`labkit.lora.targets.matching_layers`); and a byte count is a number of parameters times the bytes per
number. For a weight of n numbers in 4 bits with blocks of 64, double-quantized,

    codes  n / 2      scales  n / 64 (8 bits)  +  4 · n / (64 · 256)  +  4      = 0.127 bit per weight

Sources: QLoRA (Dettmers et al. 2023), section 3; `torch/optim/adamw.py` (two moments in the parameter's
dtype, a step count); bitsandbytes `optim/optimizer.py` (8-bit moments in blocks of 256, none below 4,096
numbers).
"""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.targets import matching_layers
from labkit.memory.ledger import LedgerRow
from labkit.memory.setup import DTYPES, Setup, itemsize
from labkit.models.shapes import config_of, meta_model
from labkit.quant.blockwise import NESTED_BLOCKSIZE

STATE_BLOCK = 256  # values that share a scale in 8-bit AdamW
SMALLEST_8BIT = 4096  # values below which bitsandbytes keeps a tensor's state in fp32


@dataclass
class ModelTensors:
    """The tensors of a model under a setup, as sizes.

    Attributes:
        name: of the model.
        parameters: {name: how many numbers} of every parameter, tied ones once.
        buffers: {name: bytes} of every buffer.
        quantized: names of the weights in 4 bits.
        adapted: {name: (in, out)} of each adapted layer.
        embeddings: names of the embedding's and the output layer's weights; tied: are they one?
    """

    name: str
    parameters: dict[str, int]
    buffers: dict[str, int]
    quantized: set[str] = field(default_factory=set)
    adapted: dict[str, tuple[int, int]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    tied: bool = False

    @property
    def total(self) -> int:
        """Numbers of all parameters."""
        return sum(self.parameters.values())

    def adapters(self, setup: Setup) -> dict[str, int]:
        """{name: how many numbers} of every adapter parameter."""
        r = setup.r
        sides = {f"{name}.lora_A": r * i for name, (i, _) in self.adapted.items()}
        return sides | {f"{name}.lora_B": r * o for name, (_, o) in self.adapted.items()}

    def trained(self, setup: Setup) -> dict[str, tuple[int, str]]:
        """{name: (how many numbers, dtype)} of every parameter that trains."""
        if setup.method == "full":
            return {name: (n, setup.dtype) for name, n in self.parameters.items()}
        trained = {name: (n, setup.adapter_dtype) for name, n in self.adapters(setup).items()}
        if setup.train_embeddings:
            trained |= {name: (self.parameters[name], setup.dtype) for name in sorted(self.embeddings)}
        return trained

    def counts(self, setup: Setup) -> dict[str, int]:
        """The counts that claims are about; see `Ledger.counts`."""
        trained = self.trained(setup)
        adapters = sum(self.adapters(setup).values())
        quantized = sum(self.parameters[name] for name in self.quantized)
        scales = [constants_bytes(self.parameters[name], setup) for name in self.quantized]
        single = replace(setup, double_quant=False)
        return {
            "parameters": self.total,
            "trainable": sum(n for n, _ in trained.values()),
            "adapter_parameters": adapters,
            "adapter_bytes": adapters * itemsize(setup.adapter_dtype),
            "adapted_layers": len(self.adapted),
            "quantized_parameters": quantized,
            "constants_bytes": sum(scales),
            "constants_bytes_single": sum(
                constants_bytes(self.parameters[name], single) for name in self.quantized
            ),
        }

    def tensor_bytes(self, setup: Setup) -> list[int]:
        """Bytes of every static tensor: weights, constants, adapters, moments."""
        found = [n * setup.width for name, n in self.parameters.items() if name not in self.quantized]
        found += list(self.buffers.values())
        for name in self.quantized:
            n = self.parameters[name]
            blocks = math.ceil(n / setup.blocksize)
            nested = math.ceil(blocks / NESTED_BLOCKSIZE)
            found += [math.ceil(n / 2), *([blocks, 4 * nested, 4] if setup.double_quant else [4 * blocks])]
        if setup.method != "full":
            found += [n * itemsize(setup.adapter_dtype) for n in self.adapters(setup).values()]
        for n, dtype in self.trained(setup).values():
            found += state_tensors(n, dtype, setup)
        return found


def tensors_of(config, setup: Setup) -> ModelTensors:
    """Count the tensors of a model, and find what is quantized and adapted.

    Raises:
        ValueError: see `plan`.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest and setup.max_length > longest:
        raise ValueError(
            f"max_length={setup.max_length} is above the {longest} positions that this model knows; "
            f"give at most {longest}"
        )
    model = _built(json.dumps(config.to_dict(), sort_keys=True, default=str), setup.attention, setup.dtype)
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    output = model.get_output_embeddings()
    ends = [model.get_input_embeddings(), output]
    weights = {id(module.weight) for module in ends if module is not None}
    tensors = ModelTensors(
        name=getattr(config, "name_or_path", "") or config.model_type,
        parameters=parameters,
        buffers={name: b.nbytes for name, b in model.named_buffers()},
        embeddings={name for name, p in model.named_parameters() if id(p) in weights},
        tied=len(weights) == 1,
    )
    if setup.method == "full":
        return tensors
    LoRAConfig(r=setup.r, targets=setup.targets)  # its checks
    for name in _matching(model, _hashable(setup.targets)):
        layer = model.get_submodule(name)
        limit = min(layer.in_features, layer.out_features)
        if setup.r > limit:
            raise ValueError(
                f"r={setup.r} is above {limit}, the smaller side of {name} ({layer.out_features} × "
                f"{layer.in_features}); choose a smaller r, or leave that layer out of targets"
            )
        tensors.adapted[name] = layer.in_features, layer.out_features
    if setup.method == "qlora":
        tensors.quantized = {f"{name}.weight" for name in _matching(model, _hashable(setup.quantize))}
    return tensors


@functools.lru_cache(maxsize=16)
def _built(config: str, attention: str, dtype: str) -> nn.Module:
    """The meta model of a config; cached, because building one takes longer than counting it."""
    return meta_model(config_of(json.loads(config)), attention, DTYPES[dtype])


@functools.lru_cache(maxsize=64)
def _matching(model: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """Its `matching_layers`; cached, because an explorer plans a hundred batches of one model."""
    return matching_layers(model, targets)


def _hashable(targets: str | Sequence[str]) -> str | tuple[str, ...]:
    return targets if isinstance(targets, str) else tuple(targets)


def constants_bytes(n: int, setup: Setup | None = None) -> int:
    """Bytes of the scales of a 4-bit weight of n numbers.

    >>> round(8 * constants_bytes(4096 * 4096) / 4096**2, 4)
    0.127
    """
    setup = setup or Setup()
    blocks = math.ceil(n / setup.blocksize)
    return blocks + 4 * math.ceil(blocks / NESTED_BLOCKSIZE) + 4 if setup.double_quant else 4 * blocks


def weight_rows(tensors: ModelTensors, setup: Setup) -> list[LedgerRow]:
    """Weights by how they are stored, and constants."""
    source = "counted on the meta device"
    plain = sum(n for name, n in tensors.parameters.items() if name not in tensors.quantized)
    ends = sum(tensors.parameters[name] for name in tensors.embeddings)
    rows = []

    def row(component, kind, n, formula):
        rows.append(LedgerRow(component, kind, n, n, formula, source))

    w = setup.width
    row(
        "weights",
        f"embeddings, {setup.dtype}",
        w * ends,
        f"{w} B × {ends:,}{' (tied)' if tensors.tied else ''}",
    )
    row("weights", f"others, {setup.dtype}", w * (plain - ends), f"{w} B × {plain - ends:,}")
    if tensors.quantized:
        sizes = [tensors.parameters[name] for name in tensors.quantized]
        packed = sum(math.ceil(n / 2) for n in sizes)
        row("weights", "4 bits", packed, f"0.5 B × {sum(sizes):,}")
        scales = sum(constants_bytes(n, setup) for n in sizes)
        how = f"{setup.blocksize} weights per scale, " + (
            "8-bit scales, fp32 scales of 256 of them" if setup.double_quant else "fp32"
        )
        row("constants", "scales", scales, f"{8 * scales / sum(sizes):.4f} bit × {sum(sizes):,}: {how}")
    row("weights", "buffers", sum(tensors.buffers.values()), "rotary frequencies, fp32")
    return rows


def training_rows(tensors: ModelTensors, setup: Setup) -> list[LedgerRow]:
    """Adapters, gradients, and the optimizer's state."""
    rows = []
    trained = tensors.trained(setup)
    if setup.method != "full":
        n, a = sum(tensors.adapters(setup).values()), itemsize(setup.adapter_dtype)
        formula = f"{a} B × r Σ (in + out) over {len(tensors.adapted)} layers = {a} × {n:,}"
        rows.append(
            LedgerRow(
                "lora", setup.adapter_dtype, a * n, a * n, formula, "LoRA (Hu et al. 2021), section 4.1"
            )
        )
    gradients = sum(n * gradient_width(dtype, setup) for n, dtype in trained.values())
    many = sum(n for n, _ in trained.values())
    formula = f"{gradients / many:.3g} B × {many:,}"
    rows.append(LedgerRow("gradients", "of all that trains", gradients, gradients, formula, "torch.autograd"))
    state = sum(sum(state_tensors(n, dtype, setup)) for n, dtype in trained.values())
    formula = (
        f"{state / many:.3g} B × {many:,}: "
        + {
            "adamw": "two moments",
            "adamw8bit": f"two moments of 1 B, and an fp32 scale for every {STATE_BLOCK}",
            "sgd": "no state",
        }[setup.optimizer]
    )
    formula += ", an fp32 copy" if setup.master else ""
    rows.append(
        LedgerRow("optimizer", setup.optimizer, state, state, formula, "torch.optim, bitsandbytes.optim")
    )
    return rows


def gradient_width(dtype: str, setup: Setup) -> int:
    return itemsize(setup.gradient_dtype or dtype)


def state_tensors(n: int, dtype: str, setup: Setup) -> list[int]:
    """Bytes of each tensor of optimizer state that a parameter of n numbers has.

    AdamW's step count, 4 bytes, is among them. 8-bit AdamW has two moments of 1 byte per number, in blocks
    with an fp32 scale each; a tensor of fewer than 4,096 numbers keeps fp32 moments.
    """
    master = setup.master and itemsize(dtype) < 4
    found = [4 * n] if master else []
    moment = 4 if master else itemsize(setup.state_dtype or dtype)
    if setup.optimizer == "sgd":
        return found
    if setup.optimizer == "adamw8bit":
        if n < SMALLEST_8BIT:
            return [*found, 4 * n, 4 * n]
        return [*found, *2 * [n, 4 * math.ceil(n / STATE_BLOCK)]]
    return [*found, moment * n, moment * n, 4]
