"""Checks of the exercises on fine-tuning with QLoRA: the 4-bit layer's backward pass, a strict scorer, sick runs."""

import json
import random
from collections.abc import Callable

import torch

from labkit.lab.check.compare import TRIES, NotYet, check_filled_in, is_asked, noted
from labkit.lab.diagnosis import DIAGNOSES, make_run
from labkit.quant.tensor import quantize
from labkit.training.metrics import score_json


def call(name: str, function: Callable, *arguments):
    """What the student's function returns; an exception, or nothing at all, is `NotYet`."""
    try:
        got = function(*arguments)
    except NotImplementedError as error:
        got = error
    except Exception as error:
        raise NotYet(f"{name}: your function raised {type(error).__name__}: {error}") from error
    check_filled_in(name, got)
    return got


@noted("quant_backward")
def quant_backward(function: type[torch.autograd.Function]) -> None:
    """`function.apply(x, weight)`: x (..., in), weight a `QuantizedTensor` (out, in), to (..., out); `backward` gives
    the gradient of x, and None for the weight. Nothing dense may be kept in between.
    """
    name = "quant_backward"
    if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
        raise NotYet(f"{name}: expected the class, a torch.autograd.Function, got {function!r}")
    square = [(16, 16)] * 2 + [(8, 24), (24, 8), (16, 32)]  # a transposed square matrix has the right shape
    for n, (n_out, n_in) in enumerate(square):
        dtype = torch.bfloat16 if n == 3 else torch.float32
        weight = quantize(torch.randn(n_out, n_in), blocksize=64)
        dense = weight.dequantize(dtype)
        x = torch.randn(*([2, 3] if n == 4 else [5]), n_in, dtype=dtype, requires_grad=True)
        y = call(name, function.apply, x, weight)
        if not isinstance(y, torch.Tensor) or not close(y, x @ dense.T):
            raise NotYet(
                f"{name}: the forward pass is x W'^T with the dequantized W', and yours is something else"
            )
        if y.grad_fn is None:
            raise NotYet(f"{name}: the output is not connected to x; is it made within torch.no_grad()?")
        kept = [
            *y.grad_fn.saved_tensors,
            *(v for v in vars(y.grad_fn).values() if isinstance(v, torch.Tensor)),
        ]
        if any(
            t.is_floating_point() and t.numel() == n_out * n_in and t.shape != x.shape for t in kept
        ) or any(t.is_floating_point() and (close(t, dense) or close(t, dense.T)) for t in kept):
            size = dense.numel() * dense.element_size()
            raise NotYet(
                f"{name}: the dense weight is kept from forward to backward, {size:,} bytes instead of the "
                f"{weight.nbytes:,} of the packed one; with all layers kept so, the full model is in memory again"
            )
        grad = torch.randn_like(y)
        given = call(name, function.backward, y.grad_fn, grad)
        given = given if isinstance(given, tuple) else (given,)
        check_gradients(name, given, grad, x, dense)
    print(f"{name}: correct, on {TRIES} fresh layers.")


def check_gradients(
    name: str, given: tuple, grad: torch.Tensor, x: torch.Tensor, dense: torch.Tensor
) -> None:
    """Raise `NotYet` unless `given` is the gradient of x, and None for the weight."""
    first = given[0]
    if not isinstance(first, torch.Tensor):
        raise NotYet(
            f"{name}: backward returns one gradient for each input of forward, that of x first; got {first!r}"
        )
    of_weight = grad.reshape(-1, grad.shape[-1]).T @ x.detach().reshape(-1, x.shape[-1])
    if close(first, of_weight):
        raise NotYet(
            f"{name}: that is the gradient of the weight, which is frozen; x needs one, to pass it on"
        )
    if len(given) != 2:
        raise NotYet(f"{name}: forward has two inputs, so backward returns two values; got {len(given)}")
    if given[1] is not None:
        raise NotYet(f"{name}: the weight is frozen and needs no gradient; the second value is None")
    if first.dtype != x.dtype and first.shape == x.shape:
        raise NotYet(f"{name}: x is {x.dtype}, and its gradient must be too; yours is {first.dtype}")
    if not close(first, grad @ dense):
        if dense.shape[0] == dense.shape[1] and close(first, grad @ dense.T):
            hint = "the weight is transposed: y = x W'^T, so the chain rule multiplies by W' itself"
        elif close(first, grad):
            hint = "the gradient is passed on as it came; between y and x there is the weight"
        else:
            hint = f"expected a gradient of shape {tuple(x.shape)}, dL/dy W'; got shape {tuple(first.shape)}"
        raise NotYet(f"{name}: {hint}")


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the rounding of the coarser dtype."""
    tolerance = 2e-2 if torch.bfloat16 in (a.dtype, b.dtype) else 1e-4
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance)


@noted("strict_match")
def strict_match(function: Callable) -> None:
    """`function(answer, gold)`: is the text a JSON object with exactly these fields and values?"""
    name = "strict_match"
    if is_asked(lambda answer, gold: score_json([answer], [gold]).exact == 1):
        return
    for _ in range(TRIES):
        number, person = random.randint(1000, 9999), random.choice(["Ana", "Bo", "Chidi", "Dara"])
        gold = {
            "customer": person,
            "order": str(number),
            "pieces": number % 7 + 2,
            "product": None,
            "gift": True,
        }
        for answer, right, hint in cases(gold):
            got = call(name, function, answer, dict(gold))
            if not isinstance(got, bool):
                raise NotYet(f"{name}: expected True or False, got {got!r}")
            if got != right:
                raise NotYet(f"{name}: {hint}")
    print(f"{name}: correct, on {len(cases(gold))} answers with {TRIES} fresh labels.")


def cases(gold: dict) -> list[tuple[str, bool, str]]:
    """Answers to a label, whether each is right, and what to say to a scorer that thinks otherwise."""
    text = json.dumps(gold)
    turned = json.dumps(dict(reversed(gold.items())))
    without = json.dumps({k: v for k, v in gold.items() if k != "product"})
    twice = text[:-1] + ', "customer": "somebody else"}'
    first_wrong = '{"customer": "somebody else", ' + text[1:]

    def changed(**values) -> str:
        return json.dumps({**gold, **values})

    return [
        (text, True, "an answer that is exactly the label must count"),
        (
            turned,
            True,
            "the keys of a JSON object have no order: the same fields in another order must count",
        ),
        (
            f" {json.dumps(gold, indent=1)}\n",
            True,
            "white space around and within JSON means nothing; it must count",
        ),
        (changed(customer="nobody"), False, "a wrong value counted"),
        (
            text[:-1],
            False,
            "an answer that was cut off counted; what json.loads cannot read is wrong, not an error",
        ),
        ("", False, "an empty answer counted; what json.loads cannot read is wrong, not an error"),
        (
            f"{text} Best regards!",
            False,
            "text after the object counted: whoever reads the answer cannot parse it",
        ),
        (f"```json\n{text}\n```", False, "a fence around the object counted; nothing is repaired here"),
        (f"[{text}]", False, "a list with the right object in it counted; the answer is to be the object"),
        ("null", False, "`null` counted, or was an error: it is JSON, but no object"),
        (
            changed(product="null"),
            False,
            'the text "null" counted where the field is null: one is a name, the other none',
        ),
        (
            changed(order=int(gold["order"])),
            False,
            'a number counted where the label is a text, as "4471" of an order',
        ),
        (changed(pieces=str(gold["pieces"])), False, "a text counted where the label is a number"),
        (changed(gift=1), False, "1 counted for true; in Python 1 == True, in JSON they differ"),
        (without, False, "a missing field counted as null; .get() gives None for both"),
        (
            changed(note="hello"),
            False,
            "a field too many counted; compare all fields, and not only those of the label",
        ),
        (
            twice,
            False,
            "an object that has a key twice counted; json.loads silently keeps the last, see object_pairs_hook",
        ),
        (
            first_wrong,
            False,
            "an object that has a key twice, first with a wrong value, counted; see object_pairs_hook",
        ),
        (
            changed(customer=gold["customer"].upper()),
            False,
            "another case counted; a strict scorer compares texts as they are",
        ),
    ]


HINTS = {  # what a run has that was given another diagnosis
    "healthy": "a run whose losses fall, and whose B is no longer zero, was called {said!r}",
    "frozen": "a run was called {said!r} whose adapters have no gradient at all (None) and will never have one; "
    "what must a parameter be, to get one?",
    "nothing supervised": "a run was called {said!r} whose loss is exactly 0, and so are its gradients; "
    "look at what it is asked to predict",
    "not in the optimizer": "a run was called {said!r} whose adapters have gradients that are not zero, and do not move; "
    "who moves them?",
}


@noted("diagnose")
def diagnose(function: Callable) -> None:
    """`function(run)`: one of `labkit.lab.diagnosis.DIAGNOSES`, of a run that has taken three steps."""
    name, wrong = "diagnose", []
    runs = [(truth, make_run(truth, random.randrange(2**31))) for truth in DIAGNOSES]
    random.shuffle(runs)
    for truth, run in runs:
        said = call(name, function, run)
        if said not in DIAGNOSES:
            raise NotYet(f"{name}: expected one of {', '.join(map(repr, DIAGNOSES))}, got {said!r}")
        if said != truth:
            wrong.append((truth, said))
    if wrong:
        truth, said = min(wrong)
        raise NotYet(f"{name}: {HINTS[truth].format(said=said)}")
    print(f"{name}: correct, on {len(runs)} fresh runs.")
