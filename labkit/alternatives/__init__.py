"""The methods beside LoRA: what each trains in a frozen model, and what that costs once it is trained.

    method                what trains                             merges?   module
    prompt tuning         vectors before the text                 no        prompts
    prefix tuning         keys and values before the text         no        prefixes
    bottleneck adapters   an MLP after or beside each sub-layer   no        bottleneck
    (IA)^3                one factor per activation               yes       ia3

All of them train with `labkit.train`, over a base in 32, 16 or 4 bits, and generate through transformers'
`generate`. `methods` leaves them out again, `cost` counts.

Source: He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning".
"""

from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck
from labkit.alternatives.cost import Cost, prefill_flops
from labkit.alternatives.ia3 import IA3Config, add_ia3, merge_ia3, unmerge_ia3
from labkit.alternatives.methods import AddedMethod, base_only, method_of, remove
from labkit.alternatives.prefixes import PrefixConfig, add_prefix, fold_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.alternatives.sized import SIZED_METHODS

__all__ = [
    "SIZED_METHODS",
    "AddedMethod",
    "BottleneckConfig",
    "Cost",
    "IA3Config",
    "PrefixConfig",
    "PromptConfig",
    "add_bottleneck",
    "add_ia3",
    "add_prefix",
    "add_prompt",
    "base_only",
    "fold_prefix",
    "merge_ia3",
    "method_of",
    "prefill_flops",
    "remove",
    "unmerge_ia3",
]
