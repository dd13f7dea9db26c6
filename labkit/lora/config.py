"""What an adapter is to be: rank, scaling, places, variant and start, in one validated object.

PEFT calls the same things r, lora_alpha, target_modules, use_rslora / use_dora and init_lora_weights; `labkit.formats.adapters`
translates. Values are checked when the config is made, so that a typing error costs no training run.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from labkit.checks import check_choice, is_whole

VARIANTS = ("lora", "rslora", "dora", "rsdora")
INITS = (
    "default",
    "gaussian",
    "b_random",
    "b_random_small",
    "pissa",
    "pissa_niter_[number]",
    "olora",
    "loftq",
    "loftq_iter_[number]",
)


@dataclass(frozen=True)
class LoRAConfig:
    """What to add where.

    Args:
        r: rank of the correction, at least 1.
        alpha: numerator of the scaling; the correction is multiplied by alpha / r.
        dropout: probability of dropping an input of the correction in training, 0 <= dropout < 1.
        targets: "all-linear" (every linear layer but the output), "attention", "mlp", a list of layer names
            (`["q_proj", "v_proj"]`: the last parts of a full name count), or a regular expression of full names.
        variant: "lora"; "rslora" with the scaling alpha / sqrt(r) (Kalajdzievski 2023); "dora", a length for each row
            beside its direction (`labkit.lora.dora`); or "rsdora", both.
        init: "default" draws A from U(-1/sqrt(in), 1/sqrt(in)), as PEFT does, "gaussian" from N(0, 1/r^2), B being 0; "b_random"
            draws B from U(-1/sqrt(r), 1/sqrt(r)), A being 0, and "b_random_small" from U(-1/sqrt(in), 1/sqrt(in)). The others start from the weight: see `labkit.lora.starts`.
        rank_pattern, alpha_pattern: r and alpha of single layers, by name or regular expression of the last parts of a name:
            `{"down_proj": 32, r"layers\\.0\\..*": 4}`. The first that matches counts.
        modules_to_save: names of modules that train in full and are saved with the adapter, such as `["score"]`, a new head.

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
        for name, r in (("r", self.r), *self.rank_pattern.items()):
            if not is_whole(r):
                raise ValueError(
                    f"{name}={r!r}: the rank must be a whole number of at least 1; 8 or 16 is a usual start"
                )
        for name, alpha in (("alpha", self.alpha), *self.alpha_pattern.items()):
            if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
                raise ValueError(
                    f"{name}={alpha!r}: alpha must be a positive number; r or 2r is a usual choice"
                )
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: a probability from 0 up to, not including, 1")
        check_choice("variant", self.variant, VARIANTS)
        allowed = "|".join(name.replace("[number]", r"[1-9]\d*") for name in INITS)
        if not re.fullmatch(allowed, self.init):
            raise ValueError(f"init={self.init!r} is not known; choose one of {INITS}")
        if not self.targets:
            raise ValueError(
                "targets is empty; give 'all-linear', 'attention', 'mlp', names, or a regular expression"
            )

    @property
    def scaling(self) -> float:
        """The factor of the correction: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return self.alpha / (math.sqrt(self.r) if self.variant.startswith("rs") else self.r)

    def for_layer(self, name: str) -> "LoRAConfig":
        """The config of the layer `name`: r and alpha as the patterns say."""
        r, alpha = (
            next((value for key, value in pattern.items() if pattern_matches(key, name)), default)
            for pattern, default in ((self.rank_pattern, self.r), (self.alpha_pattern, self.alpha))
        )
        return replace(self, r=r, alpha=alpha, rank_pattern={}, alpha_pattern={})


def pattern_matches(key: str, name: str) -> bool:
    """Does a key of a pattern mean the layer `name`? As PEFT's `get_pattern_key` decides it."""
    return re.match(rf"(.*\.)?({key})$", name) is not None
