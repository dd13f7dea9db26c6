"""From a record to token ids."""

import torch


def test_a_prompt_and_its_completion_tokenize_the_same_apart_and_together(tokenizer, records):
    from labkit.data.encoding import encode

    for record in records:
        one = encode(record, tokenizer)
        whole = tokenizer.apply_chat_template(record["messages"], tokenize=False).rstrip()
        assert one.prompt + one.completion == tokenizer(whole)["input_ids"]
        assert one.completion[-1] == tokenizer.eos_token_id
        assert torch.tensor(one.completion).ne(tokenizer.eos_token_id).sum() == len(one.completion) - 1
