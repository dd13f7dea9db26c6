"""How many parameters train, and where: the count that every claim about "0.1 % of the weights" rests on.

A 4-bit weight counts with the weights that it stands for. PyTorch sees one byte for two of them, and a count
that asks it halves the model: a common mistake in reports about QLoRA.
"""

from dataclasses import dataclass

from torch import nn

from labkit.lora.inject import lora_layers
from labkit.quant.linear import QuantLinear


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
    """Count the parameters of `model` that train, per module and in all."""
    per_module: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = name.rpartition(".")[0]
            per_module[module] = per_module.get(module, 0) + parameter.numel()
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear))
    total = sum(p.numel() for p in model.parameters()) + packed
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
    """A list of `AdaptedModule`. As text, a table: shape, r, scaling, parameters, share of all that train."""

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
        return "\n".join([*lines, f"{'total':{width}}  {'':14}  {'':4}  {'':7}  {total:>11,}  {1:6.1%}"])


def adapter_report(model: nn.Module) -> AdapterReport:
    """What the mounted adapter of `model` adds, module by module.

    Raises:
        ValueError: there is no adapter.
    """
    adapted = lora_layers(model)
    if not adapted:
        raise ValueError(f"{type(model).__name__} has no LoRA adapter to report on; call add_lora first")
    rows = []
    for name, layer in adapted.items():
        own = sum(p.numel() for p in layer.parameters(recurse=False))
        rows.append(AdaptedModule(name, (layer.out_features, layer.in_features), layer.r, layer.scaling, own))
    counted = {id(p) for layer in adapted.values() for p in layer.parameters()}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in counted]
        if own:
            largest = max(own, key=lambda p: p.numel())
            rows.append(AdaptedModule(name, tuple(largest.shape), None, None, sum(p.numel() for p in own)))
    return AdapterReport(rows)
