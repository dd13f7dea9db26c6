"""Explorers without a browser: what they show headless, and what they draw for any values of their
controls.
"""

from collections.abc import Callable
from types import ModuleType

import pytest
from matplotlib.figure import Figure


def shown(module: ModuleType, show: Callable[[], None]) -> list:
    """All that `show` displays where nobody can click; `module` is the explorer's."""
    displayed: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABKIT_STATIC", "1")
        patch.setattr(module, "display", displayed.append)
        show()
    return displayed


class Explorer:
    """An explorer caught as it calls its panel, so it is set up once and can draw again and again.

    Attributes:
        draw: its function from the values of its controls to a figure, which it displays.
        controls: its widgets, {argument of `draw`: widget}; empty unless `interactive`.
        static: the arguments of the calls that it makes headless.
    """

    def __init__(self, module: ModuleType, show: Callable[[], None], interactive: bool = False):
        self.module = module
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "is_interactive", lambda: interactive)
            patch.setattr(module, "panel", self.catch)
            show()

    def catch(self, draw: Callable, controls: dict, static: list[dict]) -> None:
        self.draw, self.controls, self.static = draw, controls, static

    def figure(self, **values) -> Figure:
        """The figure for the first static values, changed by `values`; it must be the only thing
        displayed.
        """
        displayed: list = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.module, "display", displayed.append)
            self.draw(**{**self.static[0], **values})
        (figure,) = displayed
        return figure

    def figure_at_controls(self) -> Figure:
        """The figure for the values that the widgets have now."""
        return self.figure(**{name: widget.value for name, widget in self.controls.items()})


def title(figure: Figure, axes: int = 0) -> str:
    return figure.axes[axes].get_title(loc="left")
