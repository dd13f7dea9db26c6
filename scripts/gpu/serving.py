"""Serving many adapters on one base: the cost of a token by the number of adapters, once labkit serves them."""

from gpu.measurement import Measurement, Numbers, Section, Skipped, Stage


def cost_curve(stage: Stage) -> Numbers:
    """Nothing, as long as there is nothing that serves."""
    raise Skipped("labkit does not serve adapters yet")


SECTION = Section(
    "serving",
    "Serving many adapters: the cost of a token",
    lambda stage: [Measurement("cost curve", cost_curve)],
    {"adapters": "adapters"},
)
