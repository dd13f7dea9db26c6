"""What the model says: of its own training records, of others, and at the end of an answer."""

import math
import statistics

from labkit.data.own.leaks import find_leaks
from labkit.data.records import records_of
from labkit.doctor.case import RECORDS, Case, mean_loss
from labkit.doctor.findings import Finding, Missing, healthy, sick

LEARNED = 0.05  # of the base's loss
APART = 3.0  # times as hard as training records, beyond what the base finds
GAP = 0.05  # nats per token, below which a ratio says nothing
ENOUGH = 30  # supervised tokens, of which a mean loss can be compared
LEAKED = 0.02  # of the held-out records
COMPARED = 2000  # training records whose text is compared with held-out ones
STOPS = 0.5


def look_at_effect(case: Case) -> Finding:
    """How much of the base's loss on its own training records the adapter takes away."""
    if not case.is_trained:
        raise Missing("the adapter is untrained: no history, no folder, and B A is zero")
    base, mine = case.heard_base, case.heard
    change = max((a.first - b.first).abs().max().item() for a, b in zip(base, mine))
    before, after = mean_loss(base), mean_loss(mine)
    gain = (before - after) / before
    numbers = {"logit_change": change, "loss_base": before, "loss": after}
    if change == 0:
        return sick(
            "no logit differs from the base's", 0.0, "load the trained weights: B A is zero", **numbers
        )
    if not gain >= LEARNED:  # NaN is no gain
        return sick(
            f"on training records the loss is {after:.3f}, and the base's {before:.3f}: nothing of them is learned",
            gain,
            "look at the findings above; if all are healthy, the adapter was trained on other data or another base",
            **numbers,
        )
    return healthy(
        f"on training records the loss is {after:.3f}, and the base's {before:.3f}; logits move by up to {change:.3g}",
        gain,
        **numbers,
    )


def look_at_generalization(case: Case) -> Finding:
    """The loss on held-out records by that on training records, beside the same ratio of the base."""
    held = list(records_of(case.held_out if case.held_out is not None else [], "held_out"))[:RECORDS]
    if not held:
        raise Missing("no held_out records were given")
    _ = case.examples, case.held_examples
    train = list(records_of(case.data, "data"))[:COMPARED]
    exact = sum(leak.kind == "exact" for leak in find_leaks(train, held))
    if exact / len(held) > LEAKED:
        return sick(
            f"{exact} of {len(held)} held-out records are in the training data",
            exact / len(held),
            "split again with labkit.data.own.hold_out, which keeps copies on one side; then train and measure again",
            leaked=exact / len(held),
        )
    if not case.is_trained:
        raise Missing("the adapter is untrained; no held-out record is in the training data")
    fewest = min(sum(one.tokens for one in heard) for heard in (case.heard, case.heard_held_out))
    if fewest < ENOUGH:
        raise Missing(
            f"{fewest} supervised tokens are too few to compare; no held-out record is in the training data"
        )
    mine, others = mean_loss(case.heard), mean_loss(case.heard_held_out)
    before = mean_loss(case.heard_held_out_base) / mean_loss(case.heard_base)
    ratio = others / mine / before
    if not math.isfinite(ratio):
        raise Missing("the losses are not finite")
    numbers = {"loss": mine, "loss_held_out": others, "base_ratio": before}
    says = f"the loss is {mine:.3f} on training records and {others:.3f} on held-out ones"
    if ratio > APART and others - mine > GAP:
        return sick(
            f"{says}: {ratio:.3g} times apart, beyond the base's own ratio",
            ratio,
            "fewer epochs, or more records; stop at the lowest held-out loss (eval_every, patience)",
            **numbers,
        )
    return healthy(says, ratio, **numbers)


def look_at_stopping(case: Case) -> Finding:
    """The share of records at whose end the end mark is the most likely token.

    Some texts cannot tell where they end: a passage cut out of a novel. There a model that learned its ends gives the
    mark at least 1 / n, with n the tokens of an answer, and such a model is not sick.
    """
    if not case.is_trained and case.layers:
        raise Missing("the adapter is untrained: no history, no folder, and B A is zero")
    ends = [one for one in case.heard if one.end is not None]
    if not ends:
        raise Missing("the tokenizer has no mark that ends an answer")
    share, probability = (
        statistics.fmean(one.stops for one in ends),
        statistics.median(one.end for one in ends),
    )
    by_length = 1 / statistics.fmean(one.tokens for one in ends)
    numbers = {"probability": probability, "by_length": by_length}
    says = f"the end mark is the most likely token behind {share:.0%} of {len(ends)} answers, at a median of {probability:.2g}"
    if share < STOPS and not probability >= by_length:  # NaN is no probability
        return sick(
            f"{says}; by their length alone it would be {by_length:.2g}",
            share,
            "supervise the end mark; if it is a new token, train its row (modules_to_save), and stop at it when serving",
            **numbers,
        )
    return healthy(says, share, **numbers)
