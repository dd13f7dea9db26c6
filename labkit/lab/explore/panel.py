"""Controls above a figure that is computed live. Headless, the same function draws static figures."""

from collections.abc import Callable, Sequence

from IPython.display import display

from labkit.lab.interactive import is_interactive


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
