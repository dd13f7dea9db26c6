"""What stands in for a published model in a rehearsal."""

from transformers import LlamaConfig


def small_llama(hidden_size: int, intermediate_size: int, layers: int) -> LlamaConfig:
    """The config of a Llama with few heads and a small vocabulary."""
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
