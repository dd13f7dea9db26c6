"""Exercise checks: `check.<name>(your_function)` tries it on fresh inputs, and names the mistake that it looks like."""

from labkit.lab.check.beyond import (
    bottleneck_forward,
    bottleneck_parameters,
    ia3_merge,
    prefix_attention,
    prefix_cache_bytes,
)
from labkit.lab.check.compare import NotYet
from labkit.lab.check.double_quantization import constant_bytes, double_quantize, dynamic_decade, pair_table
from labkit.lab.check.lora import (
    break_even_rank,
    greedy_token,
    llama_lora_parameters,
    lora_forward,
    lora_gradients,
    lora_parameters,
    merged_weight,
    supervise,
    training_flops,
)
from labkit.lab.check.paging import belady_victim, lru_faults, read_moment, state_bytes
from labkit.lab.check.quantization import (
    bits_per_weight,
    nearest_code,
    normal_float,
    outlier_victims,
    scale_blocks,
    unpack_nibbles,
    weight_bytes,
)
from labkit.lab.check.spectra import (
    count_intruders,
    effective_rank,
    factored_singular_values,
    keep_largest,
    similarity,
)
from labkit.lab.check.variants import (
    dora_forward,
    lora_plus_rates,
    pissa_split,
    plain_factors,
    rslora_scaling,
)

__all__ = [
    "NotYet",
    "belady_victim",
    "bits_per_weight",
    "bottleneck_forward",
    "bottleneck_parameters",
    "break_even_rank",
    "constant_bytes",
    "count_intruders",
    "dora_forward",
    "double_quantize",
    "dynamic_decade",
    "effective_rank",
    "factored_singular_values",
    "greedy_token",
    "ia3_merge",
    "keep_largest",
    "llama_lora_parameters",
    "lora_forward",
    "lora_gradients",
    "lora_parameters",
    "lora_plus_rates",
    "lru_faults",
    "merged_weight",
    "nearest_code",
    "normal_float",
    "outlier_victims",
    "pair_table",
    "pissa_split",
    "plain_factors",
    "prefix_attention",
    "prefix_cache_bytes",
    "read_moment",
    "rslora_scaling",
    "scale_blocks",
    "similarity",
    "state_bytes",
    "supervise",
    "training_flops",
    "unpack_nibbles",
    "weight_bytes",
]
