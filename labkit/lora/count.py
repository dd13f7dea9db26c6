"""How many parameters train, and where: the count that every claim about "0.1 % of the weights" rests on.

A 4-bit weight counts with the weights that it stands for. PyTorch sees one byte for two of them, and a count
that asks it halves the model: a common mistake in reports about QLoRA.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from labkit.lora.inject import lora_layers
from labkit.models.walk import PACKED, Layer, describe, left_out, own_name, unwrap, walk


@dataclass(frozen=True)
class Trainable:
    """Counts of parameters: `per_module` of those that train, `trainable` and `total` over the model.

    A 4-bit weight counts with the number of weights that it stands for, not with its packed bytes.
    """

    per_module: dict[str, int]
    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters train ({self.share:.2%})"


def trainable(model: nn.Module) -> Trainable:
    """Count the parameters of `model` that train, per module (by own name, see `labkit.models.walk`) and in all."""
    per_module: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = own_name(model, name).rpartition(".")[0]
            per_module[module] = per_module.get(module, 0) + parameter.numel()
    packed = [layer.module for layer in walk(model) if layer.kind == PACKED]
    stored = {
        id(p) for m in packed for name, p in m.named_parameters(recurse=False) if name != "bias"
    }  # bytes
    total = sum(p.numel() for p in model.parameters() if id(p) not in stored)
    total += sum(m.in_features * m.out_features for m in packed)
    return Trainable(per_module, sum(per_module.values()), total)


@dataclass(frozen=True)
class AdaptedModule:
    """A row of a report: a module with an adapter, or one that trains in full, without `r` and `scaling`."""

    name: str
    shape: tuple[int, ...]  # (out, in) of an adapted layer; of the largest weight otherwise
    r: int | None
    scaling: float | None
    parameters: int


class AdapterReport(list[AdaptedModule]):
    """A list of `AdaptedModule`. As text, a table: shape, r, scaling, parameters, share of all that train.

    Attributes:
        left: the layers of the model that the adapter does not reach; their bytes are the last line of the text.
    """

    def __init__(self, rows: Iterable[AdaptedModule], left: Sequence[Layer] = ()):
        super().__init__(rows)
        self.left = list(left)

    def __str__(self) -> str:
        total = sum(row.parameters for row in self)
        width = max([len(row.name) for row in self] + [5])
        lines = [
            f"{'module':{width}}  {'out x in':>14}  {'r':>4}  {'scaling':>7}  {'parameters':>11}  "
            f"{'share':>6}"
        ]
        for row in self:
            r, scaling = ("full", "") if row.r is None else (str(row.r), f"{row.scaling:.4g}")
            shape = " x ".join(map(str, row.shape))
            lines.append(
                f"{row.name:{width}}  {shape:>14}  {r:>4}  {scaling:>7}  {row.parameters:>11,}  "
                f"{row.parameters / total:6.1%}"
            )
        lines.append(f"{'total':{width}}  {'':14}  {'':4}  {'':7}  {total:>11,}  {1:6.1%}")
        return "\n".join(lines + [f"not adapted: {describe(self.left)}"] * bool(self.left))


def adapter_report(model: nn.Module) -> AdapterReport:
    """What the mounted adapter of `model` adds, module by module, and what of the model it does not reach.

    Raises:
        ValueError: there is no adapter.
    """
    adapted = lora_layers(model)
    if not adapted:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no LoRA adapter to report on; call add_lora first"
        )
    rows = []
    for name, layer in adapted.items():
        number = sum(p.numel() for p in layer.parameters(recurse=False))
        rows.append(
            AdaptedModule(name, (layer.out_features, layer.in_features), layer.r, layer.scaling, number)
        )
    for part in walk(model):
        own = [p for p in part.module.parameters(recurse=False) if p.requires_grad]
        if own:
            shape, number = max(own, key=lambda p: p.numel()).shape, sum(p.numel() for p in own)
            rows.append(AdaptedModule(part.name, tuple(shape), None, None, number))
    return AdapterReport(rows, left_out(model, [row.name for row in rows]))
