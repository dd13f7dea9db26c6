"""A little of everything, for a process that lacks packages: quantize, train, measure, save, answer. Prints what came out."""

import hashlib
import json
import sys
import warnings

import torch

import labkit
from labkit import models
from labkit.data.tickets import load_tickets, ticket_answer
from labkit.memory import make_batch, measure, plan, simulate
from labkit.training import evaluate


def work(folder: str) -> dict:
    """Quantize tiny-llama, train two steps, measure a step, and save the adapter into `folder`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer = models.load("tiny-llama", dtype=torch.float32)
    labkit.add_qlora(model, labkit.LoRAConfig(r=4))
    layer = next(module for module in model.modules() if isinstance(module, labkit.QuantLinear))
    tickets = [
        {"prompt": t["message"], "completion": ticket_answer(t["label"])} for t in load_tickets("train")[:4]
    ]
    config = labkit.TrainConfig(steps=2, batch_size=2, optimizer="adamw8bit", state_budget_bytes=100_000)
    history = labkit.train(model, tokenizer, tickets, config)
    answers = evaluate.generate(model, tokenizer, [tickets[0]["prompt"]], max_new_tokens=3)
    peaks = [f("tiny-llama", method="qlora", dtype="fp32", max_length=16).peak for f in (plan, simulate)]
    peaks.append(measure(model, make_batch(len(tokenizer), 1, 16)).peak)
    labkit.save_adapter(model, f"{folder}/adapter")
    bits = b"".join(
        tensor.numpy().tobytes() for tensor in (layer.packed, layer.absmax_codes, layer.weight.dequantize())
    )
    digest = hashlib.sha256(bits).hexdigest()
    return {"losses": history.losses, "answers": answers, "peaks": peaks, "bits": digest}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(work(sys.argv[1])))
