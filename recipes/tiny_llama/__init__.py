"""How `tiny-llama` was made: text, tokenizer, pretraining, evaluation, model card.

See data/tiny-llama/README.md.
"""
