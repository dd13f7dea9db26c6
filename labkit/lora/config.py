"""What an adapter is to be: rank, scaling, places, variant and start, in one validated object.

PEFT calls the same things r, lora_alpha, target_modules, use_rslora / use_dora and init_lora_weights;
`labkit.formats.peft_config` translates. Values are checked when the config is made, so a typing error does
not cost a training run.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from labkit.checks import check_choice, is_number, is_whole, not_known, use_python_numbers
from labkit.models.patterns import matches_whole

VARIANTS = ("lora", "rslora", "dora", "rsdora")
RANDOM_STARTS = ("default", "gaussian", "b_random", "b_random_small")  # they leave the base as it is
WEIGHT_STARTS = ("pissa", "pissa_niter_[number]", "olora", "loftq", "loftq_iter_[number]")
INITS = (*RANDOM_STARTS, *WEIGHT_STARTS)
SMALLEST_ALPHA, LARGEST_ALPHA = 1e-37, 1e38  # what fp32 can hold, also divided by r


@dataclass(frozen=True)
class LoRAConfig:
    """What to add where.

    Args:
        r: rank of the correction, at least 1.
        alpha: numerator of the scaling; the correction is multiplied by alpha / r.
        dropout: probability of dropping an input of the correction during training, 0 <= dropout < 1.
        targets: "all-linear" (every linear layer but the output), "attention", "mlp", a list of layer names
            (`["q_proj", "v_proj"]`: the last parts of a full name count), or a regular expression of full
            names.
        variant: "lora"; "rslora", whose scaling is alpha / sqrt(r) (Kalajdzievski 2023); "dora", which learns
            the length of each row apart from its direction (`labkit.lora.dora`); or "rsdora", both.
        init: "default" draws A from U(-1/sqrt(in), 1/sqrt(in)), as PEFT does, and "gaussian" from N(0,
            1/r^2), with B = 0; "b_random" draws B from U(-1/sqrt(r), 1/sqrt(r)), and "b_random_small" from
            U(-1/sqrt(in), 1/sqrt(in)), with A = 0. The others start from the weight: see
            `labkit.lora.starts`.
        rank_pattern, alpha_pattern: r and alpha of single layers, by a name or a regular expression for the
            last parts of a name: `{"down_proj": 32, r"layers\\.0\\..*": 4}`. The first that matches counts.
        modules_to_save: names of modules that train in full and are saved with the adapter, such as
            `["score"]`, a new head.

    Raises:
        ValueError: a value is out of its range.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] | list[str] = "all-linear"
    variant: str = "lora"
    init: str = "default"
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    modules_to_save: tuple[str, ...] | list[str] = ()

    def __post_init__(self):
        use_python_numbers(self)
        for name, r in (("r", self.r), *self.rank_pattern.items()):
            if not is_whole(r):
                raise ValueError(
                    f"{name}={r!r}: the rank must be a whole number of at least 1; 8 or 16 is a usual start"
                )
        for name, alpha in (("alpha", self.alpha), *self.alpha_pattern.items()):
            if not is_number(alpha) or not SMALLEST_ALPHA < alpha < LARGEST_ALPHA:
                raise ValueError(
                    f"{name}={alpha!r}: alpha must be a positive number that fp32 can hold; r or 2r is a usual choice"
                )
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: a probability from 0 up to, not including, 1")
        check_choice("variant", self.variant, VARIANTS)
        allowed = "|".join(name.replace("[number]", r"(?:[1-9]\d?|100)") for name in INITS)
        if not re.fullmatch(allowed, self.init):
            raise not_known("init", self.init, INITS, "[number] is from 1 to 100")
        if not self.targets:
            raise ValueError(
                "targets is empty; give 'all-linear', 'attention', 'mlp', names, or a regular expression"
            )

    @property
    def scaling(self) -> float:
        """The factor of the correction: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return self.alpha / (math.sqrt(self.r) if self.is_rslora else self.r)

    @property
    def is_rslora(self) -> bool:
        """Is the scaling alpha / sqrt(r)?"""
        return self.variant in ("rslora", "rsdora")

    @property
    def is_dora(self) -> bool:
        """Does each row of the weight learn a length of its own?"""
        return self.variant in ("dora", "rsdora")

    @property
    def starts_from_weight(self) -> bool:
        """Does the start look at the weight, and so come with a base of its own (PiSSA, OLoRA, LoftQ)?"""
        return self.init not in RANDOM_STARTS

    @property
    def is_pissa(self) -> bool:
        """Does the adapter start as the principal singular parts of the weight?"""
        return self.init.startswith("pissa")

    @property
    def is_loftq(self) -> bool:
        """Does the adapter start as the best fit to what quantization loses?"""
        return self.init.startswith("loftq")

    @property
    def start_iterations(self) -> int | None:
        """The number at the end of "pissa_niter_4" or "loftq_iter_2"; None if `init` gives none."""
        number = self.init.rpartition("_")[2]
        return int(number) if number.isdigit() else None

    def for_layer(self, name: str) -> "LoRAConfig":
        """The config of the layer `name`: r and alpha as the patterns say."""
        ranks = (r for key, r in self.rank_pattern.items() if pattern_matches(key, name))
        alphas = (alpha for key, alpha in self.alpha_pattern.items() if pattern_matches(key, name))
        r, alpha = next(ranks, self.r), next(alphas, self.alpha)
        return replace(self, r=r, alpha=alpha, rank_pattern={}, alpha_pattern={})


def pattern_matches(key: str, name: str) -> bool:
    """Does a key of a pattern mean the layer `name`? As PEFT's `get_pattern_key` decides it."""
    return matches_whole(rf"(.*\.)?({key})", name)
