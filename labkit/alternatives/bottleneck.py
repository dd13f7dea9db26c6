"""Bottleneck adapters: a small MLP of two layers in every sub-layer f, all else frozen.

    serial (Houlsby)   y + s (W_up a(W_down y + b) + b'), y = f(x)      after f, before the residual sum
    parallel (He)      f(x) + s (W_up a(W_down x + b) + b')             beside f, from the same input

W_down: (size, width), W_up: (width, size). The parallel form around one linear layer, without the
nonlinearity and the biases, *is* LoRA. The nonlinearity decides inference: LoRA's correction is a matrix and
can be added to the weight; this one cannot, so each token pays for it in every layer.

With `init="zero"` W_up starts at zero, so the untrained model is exactly the base. Houlsby et al. train the
layer norms too; here they stay frozen.

Sources: Houlsby et al. 2019, section 2.1; He et al. 2021, table 1 and section 4.2 (parallel, scale s).
"""

import inspect
import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from labkit.alternatives.methods import AddedMethod, check_unadapted, install
from labkit.alternatives.sublayers import device_of, input_embeddings, sublayers_of, train_dtype
from labkit.checks import check_choice, check_positive, check_whole
from labkit.models.shapes import decoder_shape
from labkit.models.stand_in import StandIn
from labkit.models.walk import own_name, unwrap

FORMS = ("serial", "parallel")
INITS = ("zero", "near-identity")
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True)
class BottleneckConfig:
    """What to add where.

    Args:
        size: width of the bottleneck, at least 1 and below the model's width.
        form: "serial" or "parallel".
        where: "attention", "mlp" or both. Houlsby takes both; He et al. find the parallel form best at the
            MLP.
        activation: "relu", "gelu" or "silu".
        scale: factor of the correction; 1 for Houlsby, 4 is usual for the parallel form.
        init: "zero", or "near-identity", Houlsby's: N(0, 0.01^2), cut at two deviations.

    Raises:
        ValueError: a value is out of its range.
    """

    size: int = 32
    form: str = "serial"
    where: tuple[str, ...] = ("attention", "mlp")
    activation: str = "relu"
    scale: float = 1.0
    init: str = "zero"

    def __post_init__(self):
        check_whole("size", self.size, usual="16 to 64 is a usual width of the bottleneck")
        check_positive("scale", self.scale)
        if isinstance(self.where, str) or not self.where or set(self.where) - {"attention", "mlp"}:
            raise ValueError(f"where={self.where!r}: give ('attention',), ('mlp',) or ('attention', 'mlp')")
        allowed = {"form": FORMS, "activation": tuple(ACTIVATIONS), "init": INITS}
        for name, values in allowed.items():
            check_choice(name, getattr(self, name), values)


class Bottleneck(StandIn):
    """A sub-layer with an adapter after it, or beside it; what else is read of it is the sub-layer's own.

    Args:
        base: attention or MLP of a block; maps (batch, time, width) to the same, or to a tuple that begins
            with it.
        width: of the model.
        config: see `BottleneckConfig`.
        device, dtype: of the adapter.
    """

    def __init__(self, base: nn.Module, width: int, config: BottleneckConfig, device=None, dtype=None):
        super().__init__(base)
        if config.size >= width:
            raise ValueError(
                f"size={config.size} is not a bottleneck in a model of width {width}; choose a smaller size"
            )
        self.config, self.is_used = config, False
        self.takes = next(iter(inspect.signature(base.forward).parameters))  # the name of its input
        self.down = nn.Linear(width, config.size, device=device, dtype=dtype)
        self.up = nn.Linear(config.size, width, device=device, dtype=dtype)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if config.init == "zero":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        else:
            for layer in (self.down, self.up):
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)

    def correction(self, h: Tensor) -> Tensor:
        """`scale * (W_up a(W_down h + b) + b')`, (..., width) to the same."""
        z = ACTIVATIONS[self.config.activation](self.down(h.to(self.down.weight.dtype)))  # (..., size)
        return (self.config.scale * self.up(z)).to(h.dtype)

    def forward(self, *args, **kwargs):
        """What `base` returns, corrected."""
        self.is_used = True
        output = self.base(*args, **kwargs)
        y = output[0] if isinstance(output, (tuple, list)) else output  # (batch, time, width)
        if self.config.form == "serial":
            y = y + self.correction(y)
        else:
            y = y + self.correction(args[0] if args else kwargs[self.takes])
        return type(output)([y, *output[1:]]) if isinstance(output, (tuple, list)) else y

    def put_over(self, base: nn.Module) -> None:
        """Stand over `base`, as this module did before over it, or over what it was then."""
        self.base = base
        self.down.to(device_of(base))
        self.up.to(device_of(base))

    def plain_base(self) -> nn.Module:
        """The sub-layer without the adapter."""
        return self.base


def add_bottleneck(model: nn.Module, config: BottleneckConfig) -> nn.Module:
    """Freeze `model` and put an adapter in each sub-layer of `config.where`; in place. Returns `model`.

    Raises:
        ValueError: the model has a method already, has no such sub-layers, or is not wider than the
            bottleneck. Nothing is changed then.
    """
    check_unadapted(model, "a bottleneck adapter")
    inner = unwrap(model)
    width, device = decoder_shape(inner).hidden_size, device_of(input_embeddings(inner))
    layers = {
        path: Bottleneck(module, width, config, device, train_dtype(inner)).train(module.training)
        for kind in config.where
        for path, module in sublayers_of(inner, kind).items()
    }
    return install(model, AddedMethod(config, layers))


def bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    """The adapted sub-layers of `model`, by the names that they have in the base."""
    return {own_name(model, path): m for path, m in model.named_modules() if isinstance(m, Bottleneck)}
