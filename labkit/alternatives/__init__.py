"""The methods beside LoRA: prompt and prefix tuning, bottleneck adapters, (IA)^3, and what each costs once trained."""

from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck
from labkit.alternatives.cost import Cost, prefill_flops
from labkit.alternatives.ia3 import IA3Config, add_ia3, merge_ia3, unmerge_ia3
from labkit.alternatives.methods import SIZED, bare, remove
from labkit.alternatives.prefixes import PrefixConfig, add_prefix, fold_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt

__all__ = [
    "SIZED",
    "BottleneckConfig",
    "Cost",
    "IA3Config",
    "PrefixConfig",
    "PromptConfig",
    "add_bottleneck",
    "add_ia3",
    "add_prefix",
    "add_prompt",
    "bare",
    "fold_prefix",
    "merge_ia3",
    "prefill_flops",
    "remove",
    "unmerge_ia3",
]
