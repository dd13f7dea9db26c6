"""A LoRA adapter as a GGUF file, which llama.cpp puts on a base at run time.

llama.cpp computes W x + (alpha / r) B A x, where alpha is one number for the whole file, and r the width of each B. It
knows no rsLoRA and no alphas by layer. So the file says alpha = s r, with the scaling s that the adapter really has;
where s r differs between layers, the B of the fewer is multiplied by what is left. B's rows follow those of q and k,
see `labkit.models.gguf_layout`.

The file names no base beyond its architecture, and llama.cpp compares shapes only: on another base of the same shape it
loads, and is noise.

Agrees with: llama.cpp's `convert_lora_to_gguf.py` in the tensors, and not in alpha, where that loses rsLoRA.
"""

from collections import Counter
from pathlib import Path

from torch import Tensor, nn

from labkit.checks import check_choice, needed
from labkit.formats.gguf_file import GGUFTensor, write_gguf
from labkit.formats.gguf_model import check_llama
from labkit.lora.layer import LoRALinear
from labkit.lora.mounting import Adapter, check_standing, mounted_adapter
from labkit.lora.plain import plain_factors
from labkit.models.gguf_layout import gguf_name, heads_of, rows_in_pairs
from labkit.models.walk import unwrap

ADAPTER_NUMBERS = ("F32", "F16")
MERGE = "Merge it instead: labkit.formats.save_gguf(model, tokenizer, path) writes the whole model"


def save_gguf_adapter(
    model: nn.Module, path: str | Path, numbers: str = "F32", name: str | None = None
) -> Path:
    """Write the mounted adapter as a GGUF file, to be loaded beside the GGUF file of its base.

    LoRA and rsLoRA are written as they are, PiSSA and OLoRA as LoRA of twice the rank on the original base; ranks and
    alphas may differ between layers.

    Args:
        model: a Llama with an adapter, not merged.
        path: of the file; a GGUF file there is replaced.
        numbers: "F32" or "F16".
        name: what the file calls the adapter; default: the name of the file.

    Returns:
        `path`.

    Raises:
        ValueError: no adapter, another architecture, or an adapter that a GGUF file cannot hold (DoRA, LoftQ, modules
            trained in full). The message says how to go on; nothing is written.
        FileExistsError: something else is at `path`.
        ModuleNotFoundError: the gguf package is not there.
        labkit.files.CannotWrite: no space, no permission; what was there is intact.
    """
    path = Path(path)
    check_choice("numbers", numbers, ADAPTER_NUMBERS)
    needed("gguf", "writing a GGUF file")
    adapter = mounted_adapter(model)
    if adapter is None:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no LoRA adapter to save; call add_lora or load_adapter first"
        )
    check_llama(model)
    check_standing(model)
    check_expressible(adapter)
    factors = {layer_name: plain_factors(layer) for layer_name, layer in adapter.layers.items()}
    wanted = {n: adapter.layers[n].scaling * A.shape[0] for n, (A, _) in factors.items()}
    alpha = common_alpha(wanted.values())
    values: dict[str, object] = {
        "general.type": "adapter",
        "general.name": name or path.stem,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    config = unwrap(model).config
    tensors = []
    for layer_name, (A, B) in factors.items():
        tensors += pair_of(
            adapter.layers[layer_name], layer_name, A, B, wanted[layer_name] / alpha, numbers, config
        )
    return write_gguf(path, "llama", values, tensors)


def check_expressible(adapter: Adapter) -> None:
    """Raise a `ValueError` if a GGUF adapter has no place for a part of `adapter`."""
    whole = [name for name in adapter.modules if name not in adapter.layers]
    if adapter.config.is_dora:
        raise ValueError(f"a GGUF adapter has no place for DoRA's magnitudes. {MERGE}")
    if whole:
        raise ValueError(f"a GGUF adapter has no place for {whole[0]}, which trained in full. {MERGE}")
    if adapter.config.is_loftq:
        raise ValueError(
            f"init={adapter.config.init!r} fits the adapter to the error of its own 4-bit base, which no GGUF file has. "
            f"{MERGE}"
        )


def common_alpha(wanted) -> float:
    """The alpha of the file: that of most layers, so that the fewest are multiplied."""
    [(alpha, _)] = Counter(wanted).most_common(1)
    return alpha


def pair_of(
    layer: LoRALinear, name: str, A: Tensor, B: Tensor, factor: float, numbers: str, config
) -> list[GGUFTensor]:
    """The two tensors of a layer: A (r, in) and B (out, r); for an embedding A is transposed, (vocabulary, r).

    Raises:
        ValueError: llama.cpp's Llama has no place for the layer.
    """
    there = gguf_name(f"{name}.weight")
    if there is None:
        raise ValueError(f"llama.cpp's Llama has no place for an adapter on {name}. {MERGE}")
    heads = heads_of(there, config)
    a = A.detach().T if isinstance(layer.base, nn.Embedding) else A.detach()
    b = B.detach() if heads is None else rows_in_pairs(B.detach(), heads)
    if factor != 1:
        b = factor * b
    return [
        GGUFTensor(f"{there}.lora_a", tuple(a.shape), numbers, lambda: a),
        GGUFTensor(f"{there}.lora_b", tuple(b.shape), numbers, lambda: b),
    ]
