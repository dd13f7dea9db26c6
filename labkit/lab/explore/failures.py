"""Pick a specimen and look at any of its tensors, beside the same one of a healthy run."""

from collections.abc import Callable, Mapping, Sequence

from IPython.display import display
from matplotlib import pyplot as plt
from torch import Tensor, nn

from labkit.lab.explore.panel import WIDE, panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.lora.inject import lora_layers
from labkit.quant.layer_kinds import dense_weight

PARTS = ("A", "B", "ΔW", "W")
SIDE = 48  # rows and columns of a matrix that are drawn
FLOOR = 1e-9  # below which an entry counts as zero in the picture


def tensor_of(model: nn.Module, layer: str, part: str) -> Tensor | None:
    """One of `PARTS` of a layer, in fp32, (out, in); None if the layer has no adapter.

    Raises:
        KeyError: the model has no such layer.
    """
    adapted = lora_layers(model).get(layer)
    if part == "W":
        module = adapted.base if adapted is not None else model.get_submodule(layer)
        return dense_weight(module).detach().float()
    if adapted is None:
        return None
    found = {"A": adapted.lora_A, "B": adapted.lora_B, "ΔW": None}[part]
    return (adapted.delta() if found is None else found).detach().float()


def described(tensor: Tensor) -> str:
    """Shape, size, and the share of zeros."""
    if not tensor.isfinite().all():
        return f"{tuple(tensor.shape)}, {(~tensor.isfinite()).double().mean():.0%} not finite"
    zero = (tensor == 0).double().mean().item()
    return f"{tuple(tensor.shape)}, rms {tensor.square().mean().sqrt():.2g}, {zero:.0%} zeros"


def tensor_explorer(
    find: Callable[[str], nn.Module],
    names: Sequence[str],
    healthy: nn.Module,
    static: Sequence[Mapping[str, str]],
) -> None:
    """Choose a specimen, a layer and a tensor of it. Left: its first rows and columns. Right: how large its entries
    are, beside those of a healthy run.

    Args:
        find: gives the model of a specimen by its name; it may breed it, and should keep it.
        names: of the specimens.
        healthy: the model of a run with nothing wrong, adapted in all the layers to choose from.
        static: what to show headless: {"name": …, "layer": …, "part": …}.
    """
    layers = list(lora_layers(healthy))

    def draw(name: str, layer: str, part: str) -> None:
        figure, (left, right) = canvas(width=9, height=3.2, columns=2)
        sound = tensor_of(healthy, layer, part)
        mine = tensor_of(find(name), layer, part)
        short = layer.removeprefix("model.")
        if mine is None:
            left.text(0.5, 0.5, "there is no adapter in this layer", ha="center", transform=left.transAxes)
            left.set_xticks([])
            left.set_yticks([])
            finish(left, f"{name}: {part}", "", "")
        else:
            some = mine[:SIDE, :SIDE]
            largest = max(sound.abs().max().item(), FLOOR)
            image = left.imshow(
                some, cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto", interpolation="none"
            )
            figure.colorbar(image, ax=left, shrink=0.8)
            finish(left, f"{name}: {part}", f"column; {short}", "row")
        for tensor, colour, word in ((sound, "base", "healthy"), (mine, "qlora", name)):
            if tensor is None or not tensor.isfinite().any():
                continue
            kept = tensor[tensor.isfinite()].abs()
            kept = kept[kept > FLOOR].log10().numpy()
            label = f"{word}: {described(tensor)}"
            if not len(kept):
                right.plot([], [], color=COLOURS[colour], label=label)
                continue
            right.hist(kept, bins=60, histtype="step", color=COLOURS[colour], linewidth=1.8, label=label)
        right.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(-0.05, 1.0))
        finish(right, "", "log10 of the size of an entry", "entries")
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown

        controls = {
            "name": Dropdown(options=list(names), description="specimen", **WIDE),
            "layer": Dropdown(options=layers, description="layer", **WIDE),
            "part": Dropdown(options=PARTS, value="B", description="tensor", **WIDE),
        }
    panel(draw, controls, [dict(values) for values in static])
