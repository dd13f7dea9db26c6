"""Exercise checks: `check.<name>(your_function)` tries it on fresh inputs and names the mistake."""

from labkit.lab.check.alternatives import (
    bottleneck_forward,
    bottleneck_parameters,
    ia3_merge,
    prefix_attention,
    prefix_cache_bytes,
)
from labkit.lab.check.bill import eight_bit_state, largest_batch, static_bytes, step_peak
from labkit.lab.check.breakdown import (
    checkpoint_bytes,
    crossover_tokens,
    linear_keeps,
    peak_of_events,
    step_flops,
)
from labkit.lab.check.capstone import ahead, pairs_until
from labkit.lab.check.compare import NotYet
from labkit.lab.check.double_quantization import constant_bytes, double_quantize, dynamic_decade, pair_table
from labkit.lab.check.failures import effective_rate, label_counts, matrix_rates, silent_share
from labkit.lab.check.forgetting import bits_per_parameter, forgetting_rise, gain_within, gap_share
from labkit.lab.check.injection import inject
from labkit.lab.check.lora import (
    break_even_rank,
    llama_lora_parameters,
    lora_forward,
    lora_gradients,
    merged_weight,
)
from labkit.lab.check.merging import cat_factors, gguf_rows, moved_codes, survival_share
from labkit.lab.check.own_data import budget_steps, near_copy, share_interval
from labkit.lab.check.paging import belady_victim, lru_faults, read_moment, state_bytes
from labkit.lab.check.pipeline import completion_labels, their_rate, two_means
from labkit.lab.check.quantization import (
    nearest_code,
    normal_float,
    outlier_victims,
    scale_blocks,
    unpack_nibbles,
)
from labkit.lab.check.ranks import best_rate, interval95, pareto_front, rank_for_budget, target_parameters
from labkit.lab.check.scaling import layer_part, rank_memory, sent_per_rank, shared_gradient
from labkit.lab.check.serving import mixed_forward, reusable_tokens, segment_rows, step_seconds
from labkit.lab.check.spectra import (
    count_intruders,
    effective_rank,
    factored_singular_values,
    keep_largest,
    similarity,
)
from labkit.lab.check.start import greedy_token, training_flops, weight_bytes
from labkit.lab.check.tickets import diagnose, quant_backward, strict_match
from labkit.lab.check.variants import (
    dora_forward,
    lora_plus_rates,
    pissa_split,
    plain_factors,
    rslora_scaling,
)

__all__ = [
    "NotYet",
    "ahead",
    "belady_victim",
    "best_rate",
    "bits_per_parameter",
    "bottleneck_forward",
    "bottleneck_parameters",
    "break_even_rank",
    "budget_steps",
    "cat_factors",
    "checkpoint_bytes",
    "completion_labels",
    "constant_bytes",
    "count_intruders",
    "crossover_tokens",
    "diagnose",
    "dora_forward",
    "double_quantize",
    "dynamic_decade",
    "effective_rank",
    "effective_rate",
    "eight_bit_state",
    "factored_singular_values",
    "forgetting_rise",
    "gain_within",
    "gap_share",
    "gguf_rows",
    "greedy_token",
    "ia3_merge",
    "inject",
    "interval95",
    "keep_largest",
    "label_counts",
    "largest_batch",
    "layer_part",
    "linear_keeps",
    "llama_lora_parameters",
    "lora_forward",
    "lora_gradients",
    "lora_plus_rates",
    "lru_faults",
    "matrix_rates",
    "merged_weight",
    "mixed_forward",
    "moved_codes",
    "near_copy",
    "nearest_code",
    "normal_float",
    "outlier_victims",
    "pair_table",
    "pairs_until",
    "pareto_front",
    "peak_of_events",
    "pissa_split",
    "plain_factors",
    "prefix_attention",
    "prefix_cache_bytes",
    "quant_backward",
    "rank_for_budget",
    "rank_memory",
    "read_moment",
    "reusable_tokens",
    "rslora_scaling",
    "scale_blocks",
    "segment_rows",
    "sent_per_rank",
    "share_interval",
    "shared_gradient",
    "silent_share",
    "similarity",
    "state_bytes",
    "static_bytes",
    "step_flops",
    "step_peak",
    "step_seconds",
    "strict_match",
    "survival_share",
    "target_parameters",
    "their_rate",
    "training_flops",
    "two_means",
    "unpack_nibbles",
    "weight_bytes",
]
