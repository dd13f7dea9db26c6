"""Checks of the exercises on LoRA and on training."""

import itertools
import math
import random
from collections.abc import Callable

import torch

from labkit.lab.check.compare import compare


def lora_forward(function: Callable) -> None:
    """`function(x, W, A, B, alpha, r)`: x (n, in), W (out, in), A (r, in), B (out, r) to (n, out)."""

    def inputs():
        n, d, k, r = (random.randint(3, 9) for _ in range(4))
        shapes = (n, d), (k, d), (r, d), (k, r)
        return (*(torch.randn(s) for s in shapes), float(random.choice([8, 16, 32])), r)

    compare(
        "lora_forward",
        function,
        lambda x, W, A, B, alpha, r: x @ W.T + alpha / r * (x @ A.T @ B.T),
        {
            "scaling is alpha / r; yours looks like alpha": lambda x, W, A, B, alpha, r: (
                x @ W.T + alpha * (x @ A.T @ B.T)
            ),
            "the scaling alpha / r is missing": lambda x, W, A, B, alpha, r: x @ W.T + x @ A.T @ B.T,
            "scaling is alpha / r; yours looks like alpha / sqrt(r), which is rsLoRA's": lambda x, W, A, B, alpha, r: (
                x @ W.T + alpha / math.sqrt(r) * (x @ A.T @ B.T)
            ),
            "this is the correction alone; the base's x W^T is missing": lambda x, W, A, B, alpha, r: (
                alpha / r * (x @ A.T @ B.T)
            ),
            "the scaling multiplies the base too; it belongs to the correction only": lambda x, W, A, B, alpha, r: (
                alpha / r * (x @ W.T + x @ A.T @ B.T)
            ),
        },
        inputs,
    )


def lora_parameters(function: Callable) -> None:
    """`function(shapes, r)`: trained parameters of LoRA on layers of (out, in) shapes."""

    def inputs():
        return [
            (random.randint(8, 900), random.randint(8, 900)) for _ in range(random.randint(2, 5))
        ], random.randint(2, 8)

    compare(
        "lora_parameters",
        function,
        lambda shapes, r: sum(r * (out + inp) for out, inp in shapes),
        {
            "twice too many: A has r * in and B has out * r, which makes r * (in + out) and not 2 * r * (in + out)": (
                lambda shapes, r: sum(2 * r * (out + inp) for out, inp in shapes)
            ),
            "that is the number of weights in the layers themselves, which LoRA freezes": (
                lambda shapes, r: sum(out * inp for out, inp in shapes)
            ),
            "only one of the two matrices is counted": lambda shapes, r: sum(r * inp for out, inp in shapes),
            "the product r * in * out is the cost of multiplying B A out; stored are only the two factors": (
                lambda shapes, r: sum(r * out * inp for out, inp in shapes)
            ),
        },
        inputs,
    )


def supervise(function: Callable) -> None:
    """`function(prompt_ids, completion_ids)`: the targets, -100 where there is no loss."""

    def inputs():
        return tuple([random.randint(5, 999) for _ in range(random.randint(3, 9))] for _ in range(2))

    compare(
        "supervise",
        function,
        lambda prompt, completion: [-100] * len(prompt) + completion,
        {
            "the prompt is supervised too; it should carry -100": lambda p, c: p + c,
            "the prompt is missing: targets are as long as prompt and completion together": lambda p, c: c,
            "shifted by one already; the loss does the shift, and twice is once too often": lambda p, c: (
                [-100] * (len(p) - 1) + c + [-100]
            ),
            "the completion carries -100 and the prompt is supervised; it is the other way round": lambda p, c: (
                p + [-100] * len(c)
            ),
            "use -100, cross_entropy's ignore_index; 0 is a real token": lambda p, c: [0] * len(p) + c,
        },
        inputs,
    )


def training_flops(function: Callable) -> None:
    """`function(weights, tokens, frozen)`: multiply-adds count two; forward and backward."""
    frozen = itertools.cycle([True, False])  # both come up, whatever the luck
    compare(
        "training_flops",
        function,
        lambda weights, tokens, frozen: (4 if frozen else 6) * weights * tokens,
        {
            "that is the forward pass alone: 2 operations a weight and token": lambda w, t, f: 2 * w * t,
            "a frozen weight needs no gradient of its own: forward 2 and gradient of the input 2 make 4": lambda w, t, f: (
                6 * w * t
            ),
            "a trained weight needs three products: forward, gradient of the input, gradient of the weight": lambda w, t, f: (
                4 * w * t
            ),
            "a multiplication and an addition are two operations": lambda w, t, f: (2 if f else 3) * w * t,
        },
        lambda: (random.randint(10**6, 10**8), random.randint(100, 2000), next(frozen)),
    )


def greedy_token(function: Callable) -> None:
    """`function(logits)`: logits (time, vocab) to the id of the next token, greedily."""
    compare(
        "greedy_token",
        function,
        lambda logits: int(logits[-1].argmax()),
        {
            "that predicts from the first position; the next token is predicted at the last": lambda x: int(
                x[0].argmax()
            ),
            "that is the largest logit's value; the question asks for its index": lambda x: float(
                x[-1].max()
            ),
            "argmax over the whole matrix; take the last row first": lambda x: int(x.argmax()),
            "that is a prediction for every position; only the last is new": lambda x: x.argmax(dim=-1),
        },
        lambda: (torch.randn(random.randint(3, 6), random.randint(20, 50)),),
    )


def llama_lora_parameters(function: Callable) -> None:
    """`function(hidden, heads, kv_heads, head_dim, mlp, layers, r)`: LoRA on all seven linear layers of each block."""

    def inputs():
        kv_heads = random.randint(2, 4)
        heads = kv_heads * random.randint(2, 4)
        head_dim = random.choice([16, 32, 64])
        # the heads together are not as wide as the model, as in Qwen3 and Gemma: no two mistakes give one number
        hidden = heads * head_dim + random.randint(9, 15)
        mlp = 3 * hidden + random.randint(1, 99)
        return hidden, heads, kv_heads, head_dim, mlp, random.choice([2, 4, 5, 6]), random.randint(8, 11)

    def count(h, q, kv, mlp, copies, attention=True, feed_forward=True):
        sides = attention * (2 * (h + q) + 2 * (h + kv)) + feed_forward * 3 * (h + mlp)
        return copies * sides

    compare(
        "llama_lora_parameters",
        function,
        lambda h, n, kv, d, mlp, L, r: count(h, n * d, kv * d, mlp, L * r),
        {
            "k and v are counted as wide as q; with grouped queries they have kv_heads * head_dim outputs": (
                lambda h, n, kv, d, mlp, L, r: count(h, n * d, n * d, mlp, L * r)
            ),
            "twice too many: a layer has r * (in + out), without another 2": (
                lambda h, n, kv, d, mlp, L, r: count(h, n * d, kv * d, mlp, 2 * L * r)
            ),
            "that is one block; multiply by the number of layers": lambda h, n, kv, d, mlp, L, r: count(
                h, n * d, kv * d, mlp, r
            ),
            "the MLP's gate, up and down are missing": lambda h, n, kv, d, mlp, L, r: count(
                h, n * d, kv * d, mlp, L * r, feed_forward=False
            ),
            "q, k, v and o are missing": lambda h, n, kv, d, mlp, L, r: count(
                h, n * d, kv * d, mlp, L * r, attention=False
            ),
            "q and o are counted as hidden * hidden; they have heads * head_dim on one side, which here is not hidden": (
                lambda h, n, kv, d, mlp, L, r: count(h, h, kv * d, mlp, L * r)
            ),
            "that is the number of weights in the layers themselves, which LoRA freezes": (
                lambda h, n, kv, d, mlp, L, r: L * h * (2 * n * d + 2 * kv * d + 3 * mlp)
            ),
            "the rank is missing": lambda h, n, kv, d, mlp, L, r: count(h, n * d, kv * d, mlp, L),
        },
        inputs,
    )


def lora_gradients(function: Callable) -> None:
    """`function(x, g, A, B, s)`: x (n, in), g = dL/dy (n, out) to the gradients of A (r, in) and of B (out, r)."""

    def inputs():
        n, d, k, r = random.sample(range(2, 9), 4)  # all different: a transposed matrix shows in its shape
        scaling = random.choice([0.5, 1.5, 2.5])  # never the number of tokens
        return torch.randn(n, d), torch.randn(n, k), torch.randn(r, d), torch.randn(k, r), scaling

    def flat(answer):
        """Shapes and values in one tensor, so that a transposed gradient differs; what is no pair stays as it is."""
        if not (isinstance(answer, (tuple, list)) and len(answer) == 2 and all(map(torch.is_tensor, answer))):
            return answer
        shapes = torch.tensor([side for part in answer for side in (part.dim(), *part.shape)])
        return torch.cat([shapes.double(), *(part.detach().double().flatten() for part in answer)])

    def of_A(x, g, A, B, s):
        return s * B.T @ g.T @ x

    def of_B(x, g, A, B, s):
        return s * g.T @ (x @ A.T)

    def pair(first, second):
        return lambda *inputs: flat((first(*inputs), second(*inputs)))

    compare(
        "lora_gradients",
        lambda *inputs: flat(function(*inputs)),
        pair(of_A, of_B),
        {
            "the scaling is missing: y = Wx + s B A x, so that both gradients carry s": (
                lambda x, g, A, B, s: flat((of_A(x, g, A, B, 1), of_B(x, g, A, B, 1)))
            ),
            "the two are swapped: A's gradient comes first": pair(of_B, of_A),
            "both are transposed: a gradient has the shape of its matrix": pair(
                lambda *i: of_A(*i).T, lambda *i: of_B(*i).T
            ),
            "A's gradient is transposed: it has A's shape, (r, in)": pair(lambda *i: of_A(*i).T, of_B),
            "B's gradient is transposed: it has B's shape, (out, r)": pair(of_A, lambda *i: of_B(*i).T),
            "A's gradient lacks the scaling": pair(lambda x, g, A, B, s: of_A(x, g, A, B, 1), of_B),
            "B's gradient lacks the scaling": pair(of_A, lambda x, g, A, B, s: of_B(x, g, A, B, 1)),
            "these are means over the tokens; a gradient is their sum": (
                lambda x, g, A, B, s: flat((of_A(x, g, A, B, s) / len(x), of_B(x, g, A, B, s) / len(x)))
            ),
            "the sign is that of a step downhill; the gradient points uphill": (
                lambda x, g, A, B, s: flat((-of_A(x, g, A, B, s), -of_B(x, g, A, B, s)))
            ),
        },
        inputs,
    )


def merged_weight(function: Callable) -> None:
    """`function(W, A, B, alpha, r)`: the weight with the correction in it, (out, in); `W` itself stays as it is."""

    def inputs():
        d, r = random.randint(4, 9), random.randint(2, 3)
        # square, so that a transposed correction fits and must be told apart by its values
        return torch.randn(d, d), torch.randn(r, d), torch.randn(d, r), float(random.choice([8, 16])), r

    def theirs(W, A, B, alpha, r):
        given = W.clone()
        answer = function(W, A, B, alpha, r)
        changed = not torch.equal(W, given)
        W.copy_(given)  # the right answer is computed from it next
        if not torch.is_tensor(answer):
            return answer
        return answer.double().clone() if not changed else flagged(given, A, B, alpha, r)

    def right(W, A, B, alpha, r):
        return W + alpha / r * (B @ A)

    def flagged(W, A, B, alpha, r):
        return torch.full((1,), math.inf)  # a shape that no answer has

    compare(
        "merged_weight",
        theirs,
        right,
        {
            "W itself was changed: another layer may share it (tied embeddings), and merging twice adds twice. Write "
            "`W + …`, not `W += …`": flagged,
            "that is the correction alone; add W": lambda W, A, B, alpha, r: alpha / r * (B @ A),
            "scaling is alpha / r; yours looks like alpha": lambda W, A, B, alpha, r: W + alpha * (B @ A),
            "the scaling alpha / r is missing": lambda W, A, B, alpha, r: W + B @ A,
            "the correction is transposed: B A, (out, in), as W": lambda W, A, B, alpha, r: (
                W + alpha / r * (B @ A).T
            ),
            "the scaling multiplies W too; it belongs to the correction only": lambda W, A, B, alpha, r: (
                alpha / r * (W + B @ A)
            ),
            "that takes the correction away; merging adds it": lambda W, A, B, alpha, r: (
                W - alpha / r * (B @ A)
            ),
        },
        inputs,
    )


def break_even_rank(function: Callable) -> None:
    """`function(n_in, n_out)`: the rank at which a step of LoRA takes as many operations as full fine-tuning."""
    compare(
        "break_even_rank",
        function,
        lambda d, k: d * k / (3 * (d + k)),
        {
            "there LoRA has as many *parameters* as W; the frozen W still costs 4 operations a weight, and A and B cost 6": (
                lambda d, k: d * k / (d + k)
            ),
            "yours lets W cost 2 operations; frozen it still costs 4, forward and the gradient of the input": (
                lambda d, k: 2 * d * k / (3 * (d + k))
            ),
            "A and B train: they pay forward, gradient of the input and gradient of the weight, 6 and not 4": (
                lambda d, k: d * k / (2 * (d + k))
            ),
            "a layer has r * (in + out) parameters; yours has twice as many": lambda d, k: (
                d * k / (6 * (d + k))
            ),
            "the answer may be a fraction; yours is rounded down": lambda d, k: d * k // (3 * (d + k)),
        },
        lambda: (random.randrange(100, 900, 7), random.randrange(101, 900, 7)),
    )
