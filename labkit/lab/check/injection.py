"""Check of the exercise that puts a layer of one's own around the linear layers of a model.

There is no number to compare: a model is injected, and looked at module by module for what goes wrong when people write this.
"""

import random
from collections.abc import Callable

import torch
from torch import nn

from labkit.lab.check.compare import TRIES, NotYet, describe, raised_at


class SmallModel(nn.Module):
    """Two blocks with linear layers at two depths, and an output layer, as a language model has."""

    def __init__(self, width: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q_proj": nn.Linear(width, width),
                    "mlp": nn.ModuleDict(
                        {"up": nn.Linear(width, 3 * width), "down": nn.Linear(3 * width, width)}
                    ),
                    "norm": nn.LayerNorm(width),
                }
            )
            for _ in range(2)
        )
        self.lm_head = nn.Linear(width, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)  # (time, width)
        for block in self.layers:
            x = block["norm"](x + block["q_proj"](x))
            x = x + block["mlp"]["down"](block["mlp"]["up"](x).relu())
        return self.lm_head(x)


def inject(function: Callable) -> None:
    """`function(model, r, alpha)`: freeze the model, put a layer with `base`, A and B around each linear layer but
    `lm_head`, in place, and return the model.
    """
    for _ in range(TRIES):
        model, r, alpha = (
            SmallModel(random.choice([6, 8, 10])),
            random.choice([2, 3]),
            random.choice([4.0, 12.0]),
        )
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        ids = torch.randint(0, 11, (5,))
        before = model(ids).detach()
        try:
            returned = function(model, r, alpha)
        except Exception as error:
            raise NotYet(
                f"inject: your function raised {type(error).__name__}: {error}{raised_at(error)}"
            ) from error
        if problem := what_is_wrong(model, returned, linear, r, alpha):
            raise NotYet(f"inject: {problem}")
        if not torch.equal(model(ids), before):
            raise NotYet(
                "inject: the model's output has changed; with B = 0 it must be the base's, bit for bit"
            )
    print(f"inject: correct, on {TRIES} fresh models.")


def what_is_wrong(model: nn.Module, returned, linear: dict[str, nn.Linear], r: int, alpha: float) -> str:
    """The first mistake in an injected model, in words; empty if there is none."""
    wanted = {name: layer for name, layer in linear.items() if name != "lm_head"}
    now = {name: model.get_submodule(name) for name in linear}
    changed = [name for name in linear if now[name] is not linear[name]]
    if returned is None and not changed:
        return "your function returned None, and nothing was replaced; has the stub been filled in?"
    if returned is not model:
        return f"expected the model that was given, changed in place; got {describe(returned)}"
    if not changed:
        return (
            "no layer was replaced. `module = LoRALinear(module, …)` gives a variable of the loop another value; the model "
            "changes when you set the attribute of the *parent*"
        )
    if "lm_head" in changed:
        return (
            "the output layer, lm_head, has an adapter too; leave it out (its weight may be the embedding's)"
        )
    if missed := [name for name in wanted if name not in changed]:
        return f"{', '.join(missed)} have no adapter; is the parent of a layer deep in the model found?"
    if odd := [name for name in wanted if getattr(now[name], "base", None) is not linear[name]]:
        return f"{odd[0]}: `base` is not the original layer; was it wrapped twice, or made anew?"
    own = {id(p) for layer in linear.values() for p in layer.parameters()}
    adapters = [p for name in wanted for p in now[name].parameters() if id(p) not in own]
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if any(not p.requires_grad for p in adapters):
        return "A and B are frozen too: freeze the model first, then inject"
    if extra := [name for name, p in trains.items() if not any(p is a for a in adapters)]:
        return f"{extra[0]} still trains; all of the model is frozen, not only the layers that get an adapter"
    expected = sum(r * (layer.in_features + layer.out_features) for layer in wanted.values())
    if (n := sum(p.numel() for p in adapters)) != expected:
        return f"{n} numbers train, and r = {r} wants {expected}; is `r` passed on?"
    if any(getattr(now[name], "scaling", alpha / r) != alpha / r for name in wanted):
        return f"the scaling is not alpha / r = {alpha / r:g}; is `alpha` passed on?"
    return ""
