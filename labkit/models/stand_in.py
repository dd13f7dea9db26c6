"""A layer that stands where another one stood: to all other code, it is that layer.

An adapter takes the place of a layer and calls it as its `base`. But a layer is not only called. T5 asks
`self.wo.weight` for its dtype; Mamba and PyTorch's attention read a weight and multiply by it themselves. So a
`StandIn` answers for the layer:

- what it does not have itself, it asks of `base` (`padding_idx`, `num_embeddings`, a bias);
- an adapter that changes the map gives as `weight` the one *with the adapter in it*: whoever multiplies by that
  computes, and trains, what calling the layer would;
- what it keeps aside, out of the counts and the `state_dict` (a weight from before a merge), moves and is cast with
  the rest.

PEFT's `BaseTunerLayer.weight` is the base's: there a reader passes the adapter by until it is merged.
"""

from torch import nn


class StandIn(nn.Module):
    """A module in place of `base`, which is its child.

    Attributes:
        base: the layer it stands in for.
        aside: modules to put back later. They are no children, which would be counted, trained and saved.
    """

    base: nn.Module
    aside: tuple[nn.Module, ...]

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.aside = base, ()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            # no base yet: in the middle of copying. An error within a property of the class is that error
            if name == "base" or name.startswith("__") or hasattr(type(self), name):
                raise
            return getattr(self.base, name)

    def _apply(self, fn, recurse=True):
        for module in self.aside:
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)
