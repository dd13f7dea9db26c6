"""Pretrain tiny-llama: a Llama of 4.0 M parameters on 18 MB of text, in fp32, on one CPU thread.

    python -m recipes.tiny_llama.pretrain                      # everything: text, tokenizer, training,
    data/tiny-llama python -m recipes.tiny_llama.pretrain --tokens 2000000     # the same, shorter

A *step* sees `batch` windows of `context` tokens of the training stream; `settings` says which, and at what
learning rate. The budget, `--tokens`, decides when the run ends; nothing depends on the clock.

Every 100 steps, and on SIGTERM, all state (weights, both moments, step, log) goes to a temporary folder that
is then renamed, as safetensors and JSON. Run the command again to go on: the result is that of an
uninterrupted run, bit for bit (tests/recipes/test_tiny_llama.py). torch.compile (`--compile`) makes it 1.2×
faster and rounds differently.
"""

import argparse
import hashlib
import json
import signal
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from recipes.tiny_llama import corpus, tokens
from recipes.tiny_llama.checkpoint import load_checkpoint, save_checkpoint
from recipes.tiny_llama.corpus import DOMAINS
from recipes.tiny_llama.finish import finish, provenance
from recipes.tiny_llama.settings import ARCHITECTURE, Plan, make_model, make_optimizer, windows
from recipes.tiny_llama.tokens import ids_of


def check_same_run(state: dict, plan: Plan, data: str, step: int) -> None:
    """A checkpoint continues only its own run; but the budget may change while both decays lie ahead."""
    was, now = dict(state["plan"]), json.loads(json.dumps(asdict(plan)))
    before = Plan(**{**was, "betas": tuple(was["betas"])})
    different = [key for key in now if now[key] != was[key] and key != "tokens"]
    if different or state["data"] != data:
        what = ", ".join(f"{key} {was[key]} -> {now[key]}" for key in different) or "the training text"
        raise ValueError(
            f"the checkpoint is of another run ({what}); delete it, or choose another --work folder"
        )
    if plan.tokens != before.tokens and step > min(before.decay_from, plan.decay_from):
        raise ValueError(
            f"the budget cannot change from {before.tokens} to {plan.tokens} tokens at step {step}: the decay "
            f"of one of them begins at step {min(before.decay_from, plan.decay_from)}. Go on with --tokens "
            f"{before.tokens}"
        )


def mixed_token_loss(model, ids: Tensor) -> Tensor:
    """`token_loss` with its matrix products in bfloat16, which AMX units do 4 to 10 times as fast as fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        return token_loss(model, ids)


def token_loss(model, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of windows (batch, context + 1)."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # (batch, context, vocab)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def pretrain(
    stream: np.ndarray,
    plan: Plan,
    folder: Path,
    architecture: dict = ARCHITECTURE,
    probes: dict[str, Tensor] | None = None,
    stop_at: int | None = None,
    every: int = 100,
) -> tuple[LlamaForCausalLM, dict]:
    """Train to the end of the plan, from the newest checkpoint in `folder` if there is one.

    Args:
        stream: token ids (n,) of the training text, uint16.
        plan: see `Plan`.
        folder: of the checkpoints.
        architecture: arguments of LlamaConfig.
        probes: held-out windows {domain: ids (n, context + 1)} whose loss is logged every 250 steps.
        stop_at: end early after this step, as a kill would.
        every: steps between checkpoints.

    Returns:
        the model and the state: step, tokens, seconds, log, plan, hash of the data.
    """
    data = hashlib.sha256(stream.tobytes()).hexdigest()
    model = make_model(architecture, plan.seed)
    optimizer = make_optimizer(model, plan)
    state = load_checkpoint(folder, model, optimizer)
    if state is None:
        state = {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "sessions": 0, "log": [], "data": data}
    else:
        check_same_run(state, plan, data, state["step"])
        print(f"resumed at step {state['step']} of {plan.steps}", flush=True)
    state |= {"plan": asdict(plan), "sessions": state["sessions"] + 1}
    loss_of = mixed_token_loss if plan.bf16 else token_loss
    if plan.compile:
        loss_of = torch.compile(loss_of)
    stopping = []
    previous = signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    start, cpu_start = time.time(), time.process_time()
    base, cpu_base = state["seconds"], state["cpu_seconds"]
    # losses since the last log line; kept in checkpoints, so the log resumes too
    recent: list[float] = [*state.pop("recent", [])]
    try:
        while state["step"] < plan.steps and not stopping and state["step"] != stop_at:
            step = state["step"]
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(step)
            loss = loss_of(model, windows(stream, plan, step))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append(loss.item())
            state["step"] = step = step + 1
            state["seconds"] = base + time.time() - start
            state["cpu_seconds"] = cpu_base + time.process_time() - cpu_start
            if step % 50 == 0 or step == plan.steps:
                row = {
                    "step": step,
                    "tokens": step * plan.batch * plan.context,
                    "loss": float(np.mean(recent)),
                }
                row |= {"lr": plan.rate(step - 1), "grad_norm": norm.item(), "seconds": state["seconds"]}
                if probes and (step % 250 == 0 or step == plan.steps):
                    with torch.no_grad():
                        row |= {
                            f"held_out/{name}": token_loss(model, ids).item() for name, ids in probes.items()
                        }
                state["log"].append(row)
                recent.clear()
                print(progress_line(row, plan), flush=True)
            if step % every == 0 or step == plan.steps:
                save_checkpoint(folder, model, optimizer, state | {"recent": recent})
    finally:
        signal.signal(signal.SIGTERM, previous)
    if stopping or state["step"] == stop_at:
        save_checkpoint(folder, model, optimizer, state | {"recent": recent})
    return model, state


def progress_line(row: dict, plan: Plan) -> str:
    """What is printed of a line of the log."""
    left = row["seconds"] / row["step"] * (plan.steps - row["step"]) / 60
    held = "  ".join(f"{key[9:]} {value:.3f}" for key, value in row.items() if key.startswith("held_out/"))
    return (
        f"step {row['step']}/{plan.steps} ({row['step'] / plan.steps:.0%})  loss {row['loss']:.3f}  "
        f"lr {row['lr']:.1e}  {row['tokens'] / row['seconds']:.0f} tokens/s  {left:.0f} min left  {held}"
    )


def held_out_probes(documents, tokenizer, context: int, n: int = 4) -> dict[str, Tensor]:
    """The first n windows of each trained domain's held-out text, for the log only."""
    probes = {}
    for domain in DOMAINS:
        texts = [d.text for d in documents if d.held_out and d.domain == domain]
        flat = [token for ids in ids_of(texts, tokenizer) for token in (tokenizer.eos_token_id, *ids)]
        probes[domain] = torch.tensor(flat[: n * context + 1]).unfold(0, context + 1, context)
    return probes


def main() -> None:
    defaults = Plan()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/tiny-llama"), help="text, tokenizer, checkpoints"
    )
    parser.add_argument("--out", type=Path, default=Path("data/tiny-llama"), help="the finished model")
    parser.add_argument("--debs", type=Path, help="folder with the Debian packages, if already downloaded")
    parser.add_argument("--tokens", type=int, default=defaults.tokens)
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, needs a C++ compiler")
    parser.add_argument(
        "--bf16", action="store_true", help="products in bfloat16: only for a CPU with native support"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stop-at", type=int, help="save and stop after this step")
    parser.add_argument("--no-finish", action="store_true", help="leave out evaluation and export")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    documents = corpus.make(args.work, args.debs)
    tokenizer = tokens.make_tokenizer(args.work, documents)
    stream = tokens.make_stream(args.work, documents, tokenizer)
    plan = Plan(tokens=args.tokens, lr=args.lr, seed=args.seed, compile=args.compile, bf16=args.bf16)
    print(
        f"{len(stream):,} training tokens; {plan.steps:,} steps, {plan.tokens / len(stream):.2f} epochs",
        flush=True,
    )
    probes = held_out_probes(documents, tokenizer, plan.context)
    model, state = pretrain(stream, plan, args.work / "checkpoints", probes=probes, stop_at=args.stop_at)
    if state["step"] == plan.steps and not args.no_finish:
        packages = json.loads((args.work / "packages.json").read_text())
        finish(model, tokenizer, documents, state, provenance(state, packages), args.out, args.work)


if __name__ == "__main__":
    main()
