"""Cards, the link between them, rank and bits: how long a step waits for the wire."""

from collections.abc import Mapping, Sequence
from typing import Any

from IPython.display import display
from matplotlib import pyplot as plt

from labkit.lab.explore.panel import WIDE, panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.memory.formulas import plan
from labkit.models.shapes import known_models
from labkit.scale import traffic

CARDS = (2, 4, 8, 16, 32, 64)
RANKS = (4, 8, 16, 32, 64, 128, 256)
BITS = {"bf16": 16.0, "8 bits": 8.0, "NF4": 4.127}
TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
TERAFLOPS = (40, 150, 400)  # that a consumer's card, an A100, an H100 reach; data sheets say more


def lost_times(
    model: str, cards: int, link: str, r: int, bits: str, tokens: int, teraflops: float
) -> dict[str, tuple[float, float]]:
    """{way to share: (seconds of computing, seconds on the wire)} of a step of one card, without overlap.

    Args:
        model: one of `known_models()`.
        cards: N.
        link: of `labkit.scale.traffic.LINKS`; a card's own, in one direction.
        r: of LoRA on all linear layers; adapters and their gradients in fp32.
        bits: of a frozen weight, one of `BITS`.
        tokens: per card and step.
        teraflops: that a card reaches.
    """
    counts = plan(model, "qlora", r=r, max_length=64).counts
    base, adapters = counts["parameters"], counts["adapter_parameters"]
    frozen = base * BITS[bits] / 8 + 4 * adapters
    computing = tokens * traffic.operations_per_weight(True) * base / (teraflops * 1e12)
    full = (
        tokens * (traffic.operations_per_weight(True) + 2) * base / (teraflops * 1e12)
    )  # and the weights' own gradient
    part = (cards - 1) / cards
    return {
        "LoRA, DDP": (computing, traffic.seconds(2 * part * 4 * adapters, link)),
        "LoRA, FSDP": (computing, traffic.seconds(part * (2 * frozen + 4 * adapters), link)),
        "full, DDP": (full, traffic.seconds(2 * part * 2 * base, link)),
    }


def short(seconds: float) -> str:
    """Two digits, and no powers of ten."""
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"


def wire_explorer(static: Sequence[Mapping[str, Any]]) -> None:
    """Choose a model, cards, their link, rank, bits and tokens: computing and the wire, side by side, for three ways to share.

    Args:
        static: what to show headless: the arguments of `lost_times`.
    """

    def draw(model: str, cards: int, link: str, r: int, bits: str, tokens: int, teraflops: float) -> None:
        times = lost_times(model, cards, link, r, bits, tokens, teraflops)
        figure, axes = canvas(width=8.6, height=2.7)
        longest = max(max(pair) for pair in times.values())
        for row, (way, (computing, wire)) in enumerate(times.items()):
            lost = max(0.0, wire - computing)
            axes.barh(row - 0.19, computing, 0.36, color=COLOURS["base"])
            axes.barh(
                row + 0.19,
                wire,
                0.36,
                color=COLOURS["lora" if way.startswith("LoRA") else "full"],
                hatch="//",
                edgecolor="white",
            )
            said = f"wire {short(wire)} s: " + (
                f"{short(lost)} s lost" if lost else "can hide behind computing"
            )
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
            axes.text(wire + 0.01 * longest, row + 0.19, said, va="center", fontsize=9.5, bbox=box)
            axes.text(
                computing + 0.01 * longest,
                row - 0.19,
                f"computing {short(computing)} s",
                va="center",
                fontsize=9.5,
                bbox=box,
            )
        axes.set_yticks(range(len(times)), list(times))
        axes.set_xlim(0, 1.45 * longest)
        axes.invert_yaxis()
        finish(
            axes,
            f"{model}, {cards} cards, {link}, rank {r}, {bits}, {tokens:,} tokens a card",
            "seconds per step",
            "",
        )
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, SelectionSlider

        large = [
            name for name in known_models() if name.endswith("b") and float(name.split("-")[-1][:-1]) >= 7
        ]
        start = dict(static[0])
        controls = {
            "model": Dropdown(options=large, value=start["model"], description="model", **WIDE),
            "cards": SelectionSlider(options=CARDS, value=start["cards"], description="cards", **WIDE),
            "link": Dropdown(options=list(traffic.LINKS), value=start["link"], description="link", **WIDE),
            "r": SelectionSlider(options=RANKS, value=start["r"], description="rank", **WIDE),
            "bits": Dropdown(options=list(BITS), value=start["bits"], description="bits", **WIDE),
            "tokens": SelectionSlider(
                options=TOKENS, value=start["tokens"], description="tokens a card", **WIDE
            ),
            "teraflops": SelectionSlider(
                options=TERAFLOPS, value=start["teraflops"], description="TFLOP/s", **WIDE
            ),
        }
    panel(draw, controls, [dict(values) for values in static])
