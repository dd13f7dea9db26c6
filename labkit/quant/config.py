"""How a weight is put into four bits: the settings that travel together, in one validated object.

transformers' `BitsAndBytesConfig` calls the same things bnb_4bit_quant_type, bnb_4bit_use_double_quant and
bnb_4bit_compute_dtype; its block size is always 64.
"""

from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

import torch

from labkit.checks import check_choice, nearest
from labkit.quant.codebooks import codebook as levels_of

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALE_ROUNDINGS = ("nearest", "lookup")


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize a weight, and how to multiply with it.

    Args:
        codebook: a 4-bit codebook of `labkit.quant.codebooks`.
        blocksize: weights per scale, one of `BLOCKSIZES`.
        double_quant: store the scales in 8 bits too.
        scale_rounding: how double quantization rounds a scale: to the "nearest" level, as bitsandbytes does
            on CUDA, or by "lookup" in a table of 65,536 bins, as it does on a CPU. They differ in about 1 of
            600 scales.
        compute_dtype: the floating dtype in which a `QuantLinear` multiplies; None for that of its input.
            What is stored does not depend on it.

    Raises:
        ValueError: a value is not one of those allowed.

    >>> QuantConfig(codebook="nf5")
    Traceback (most recent call last):
    ValueError: codebook='nf5' is not known; choose one of ('nf4', ..., 'optimal-64'); did you mean 'nf4'?
    """

    codebook: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    scale_rounding: str = "nearest"
    compute_dtype: torch.dtype | None = None

    def __post_init__(self):
        check_codebook(self.codebook)
        if isinstance(self.blocksize, Integral):  # numpy's integers too
            object.__setattr__(self, "blocksize", int(self.blocksize))
        check_choice("blocksize", self.blocksize, BLOCKSIZES)
        check_choice("double_quant", self.double_quant, (True, False))
        check_choice("scale_rounding", self.scale_rounding, SCALE_ROUNDINGS)
        check_compute_dtype(self.compute_dtype)

    @classmethod
    def of(cls, config: "QuantConfig | str | None" = None, *others: Any, **settings: Any) -> "QuantConfig":
        """The config that a call was given: as one object, or as its settings, in their order or by name.

        Raises:
            TypeError: there is no setting of that name, or a config and settings are given together.
            ValueError: a value is not one of those allowed.

        >>> config = QuantConfig(codebook="nf4", blocksize=128)
        >>> config == QuantConfig.of(config) == QuantConfig.of("nf4", 128) == QuantConfig.of(blocksize=128)
        True
        """
        for name in settings:
            if name not in SETTINGS:
                raise TypeError(
                    f"{name!r} is not a setting of quantization{nearest(name, SETTINGS)} "
                    f"The settings are {', '.join(SETTINGS)}"
                )
        if not isinstance(config, QuantConfig):
            first = () if config is None and not others else (config,)
            return cls(*first, *others, **settings)
        if others or settings:
            given = ", ".join(
                [*map(repr, others), *(f"{name}={value!r}" for name, value in settings.items())]
            )
            raise TypeError(
                f"{config} and {given} are given together; put the settings into the config, for instance "
                "with dataclasses.replace(config, blocksize=128)"
            )
        return config

    def changes(self) -> dict[str, Any]:
        """The settings that are not the default ones.

        >>> QuantConfig(codebook="fp4").changes()
        {'codebook': 'fp4'}
        """
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


SETTINGS = tuple(field.name for field in fields(QuantConfig))


def check_codebook(name: str) -> None:
    """Raise a `ValueError` unless `name` is that of a codebook for 4 bits."""
    levels = levels_of(name)
    if len(levels) != 16:
        raise ValueError(
            f"codebook={name!r} has {len(levels)} levels; a 4-bit weight needs one with 16, such as 'nf4'"
        )


def check_compute_dtype(dtype: object) -> None:
    """Raise a `ValueError` unless `dtype` is None or a dtype that a product can be computed in."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"compute_dtype={dtype!r} is not a floating dtype; choose torch.float32, torch.bfloat16 or "
            "torch.float16, or None for that of the input"
        )
