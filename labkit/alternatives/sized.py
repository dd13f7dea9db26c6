"""The methods whose size you choose, by name, for a sweep over sizes or an explorer with a slider."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck
from labkit.alternatives.prefixes import PrefixConfig, add_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt


@dataclass(frozen=True)
class SizedMethod:
    """A method of adjustable size.

    Attributes:
        config: makes its configuration from the size: tokens before the text, or the width of a bottleneck.
        add: puts it into a model, as `add_prompt` does.
    """

    config: Callable[[int], object]
    add: Callable[..., nn.Module]

    def add_to(self, model: nn.Module, size: int) -> nn.Module:
        """Add the method in this size, with defaults for everything else; in place. Returns `model`."""
        return self.add(model, self.config(size))


SIZED_METHODS = {
    "prompt": SizedMethod(PromptConfig, add_prompt),
    "prefix": SizedMethod(PrefixConfig, add_prefix),
    "bottleneck": SizedMethod(BottleneckConfig, add_bottleneck),
}
