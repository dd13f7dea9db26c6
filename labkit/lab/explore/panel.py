"""Controls above a figure that is computed live. Headless, the same function draws static figures."""

from collections.abc import Callable, Sequence

from IPython.display import display

from labkit.lab.interactive import is_interactive

# how a control looks; a slow one redraws when it is let go
WIDE = {"layout": {"width": "28em"}, "style": {"description_width": "7em"}}
SLOW = WIDE | {"continuous_update": False}


def panel(draw: Callable, controls: dict, static: Sequence[dict]) -> None:
    """Show `draw(**values)` with a widget for each of its arguments; headless, for the values in `static`.

    Args:
        draw: makes its figure or output, and shows it.
        controls: {argument: ipywidgets widget}, which the caller makes only when interactive; see
            `ticket_explorer`.
        static: the arguments of the calls to show headless.
    """
    if not is_interactive():
        for values in static:
            draw(**values)
        return
    from ipywidgets import VBox, interactive_output

    display(VBox(list(controls.values())), interactive_output(draw, controls))


def item_and_strength(name: str, count: int, description: str) -> dict:
    """Sliders for one of `count` items, called `name`, and for the strength of an adapter, 0 to 2."""
    from ipywidgets import FloatSlider, IntSlider

    return {
        name: IntSlider(0, 0, count - 1, description=description, **SLOW),
        "strength": FloatSlider(1.0, min=0, max=2, step=0.1, description="adapter ×", **SLOW),
    }
