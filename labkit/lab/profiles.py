"""Sizes for this machine, small on a laptop and large on a GPU, and why they were chosen."""

import os
from dataclasses import dataclass

import torch

from labkit.checks import check_choice
from labkit.hardware import best_device, compute_dtype, limits, memory_bytes, product_dtype

LARGER_MODEL = "HuggingFaceTB/SmolLM2-1.7B-Instruct"


@dataclass(frozen=True)
class Profile:
    """What the notebooks run with.

    Attributes:
        name: "cpu" or "gpu".
        model: the base model to load; device, dtype: where, and in which format.
        product_dtype: of the products with frozen 4-bit weights.
        train_examples, batch_size, epochs: of a training run.
        eval_batch: how many prompts are answered at a time.
        why: one line that explains the choice.
    """

    name: str
    model: str
    device: torch.device
    dtype: torch.dtype
    product_dtype: torch.dtype
    train_examples: int | None
    batch_size: int
    epochs: float
    eval_batch: int
    why: str

    def __str__(self) -> str:
        return f"profile {self.name!r}: {self.model} on {self.device} in {short(self.dtype)} ({self.why})"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def use_threads() -> None:
    """Use no more threads than this process has processors, unless OMP_NUM_THREADS says how many.

    PyTorch does not see how much *time* a container has on the machine's processors; with more threads than
    that, each of them waits for the others.
    """
    allowed = limits().cpus
    if torch.get_num_threads() > allowed and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(allowed)


def profile(model: str | None = None, name: str | None = None) -> Profile:
    """Pick the sizes for this machine and print them.

    Args:
        model: a base model other than the default; LABKIT_MODEL does the same. On a GPU with 8 GB or more,
            try "HuggingFaceTB/SmolLM2-1.7B-Instruct".
        name: "cpu" or "gpu" to override the choice; LABKIT_PROFILE does the same.

    Raises:
        ValueError: an unknown name, or "gpu" on a machine without one.
    """
    device = best_device()
    by_variable = os.environ.get("LABKIT_PROFILE", "").strip().lower()
    check_choice("name" if name else "LABKIT_PROFILE", name or by_variable or "cpu", ("cpu", "gpu"))
    name = name or by_variable or ("cpu" if device.type == "cpu" else "gpu")
    if name == "gpu" and device.type == "cpu":
        raise ValueError(
            "you asked for the profile 'gpu', but PyTorch sees no GPU; leave it out, or use 'cpu'"
        )
    model = model or os.environ.get("LABKIT_MODEL") or "smollm2-135m"
    if name == "cpu":
        use_threads()
        threads = torch.get_num_threads()
        products = product_dtype("cpu")
        units = (
            "has matrix units for that" if products == torch.bfloat16 else "has no matrix units for bfloat16"
        )
        why = f"{threads} thread{'s' if threads > 1 else ''}, {memory_bytes() / 2**30:.0f} GiB; "
        why += f"4-bit layers multiply in {short(products)}: this processor {units}"
        chosen = Profile("cpu", model, torch.device("cpu"), torch.float32, products, None, 2, 1.0, 100, why)
    else:
        dtype = compute_dtype(device)
        native = "has" if dtype == torch.bfloat16 else "does not have"
        why = f"{memory_bytes(device) / 2**30:.0f} GiB; it {native} bf16 in hardware"
        chosen = Profile("gpu", model, device, dtype, dtype, None, 8, 3.0, 100, why)
    print(chosen)
    return chosen
