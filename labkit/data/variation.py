"""More tickets out of those there are: the same message with another customer, brand and order number.

What has to be copied out of a message (`customer`, `product`, `order`) stands in it letter by letter, so it can be replaced in
both. What has to be understood stays: whose problem it is, which of two numbers is meant, what is asked for. A model
that sees the same message with other names at each pass cannot learn the names by heart; it has to learn to copy.

Names and brands come from other training tickets only, so that nothing of validation or test slips in. Of a product only
the first word changes: "Vogel Ladder" becomes "Umeå Ladder", and its rungs still break. An order number keeps its pattern
of digits and letters. The customer's first and last name and the brand are replaced wherever they stand.
"""

import random
import re
import string
from collections.abc import Sequence

TRIES = 100  # for a name that the message does not have already


def varied(tickets: Sequence[dict], seed: int = 0) -> list[dict]:
    """A variation of each ticket, in their order; `tickets` are unchanged.

    Args:
        tickets: with "message" and "label" (`labkit.data.tickets.load_tickets`).
        seed: of the draw.
    """
    draw = random.Random(seed)
    customers = [t["label"]["customer"] for t in tickets if t["label"]["customer"]]
    brands = [t["label"]["product"].split()[0] for t in tickets if t["label"]["product"]]
    return [vary(ticket, customers, brands, draw) for ticket in tickets]


def vary(ticket: dict, customers: Sequence[str], brands: Sequence[str], draw: random.Random) -> dict:
    """The ticket with another customer, brand and order number, where its label has them.

    Args:
        ticket: with "message" and "label".
        customers, brands: to choose from.
        draw: where chance comes from.
    """
    message, label = ticket["message"], dict(ticket["label"])
    swaps: dict[str, str] = {}
    if (order := label["order"]) and (new := unused(lambda: reshuffled(order, draw), message, swaps)):
        swaps[order] = label["order"] = new
    if customer := label["customer"]:
        words = customer.split()
        alike = [c for c in customers if len(c.split()) == len(words)] if len(words) > 1 else customers
        new = unused(lambda: " ".join(draw.choice(alike).split()[: len(words)]), message, swaps)
        if new and not set(words) & set(swaps):
            swaps |= {old: like(old, word) for old, word in zip(words, new.split())}
            label["customer"] = " ".join(swaps[word] for word in words)
    if product := label["product"]:
        brand, _, kind = product.partition(" ")
        new = unused(lambda: draw.choice(brands), message, swaps)
        if new and kind and brand not in swaps:
            swaps[brand] = like(brand, new)
            label["product"] = f"{swaps[brand]} {kind}"
    return ticket | {"message": replaced(message, swaps), "label": label}


def unused(make, message: str, swaps: dict[str, str]) -> str | None:
    """What `make` gives, if none of its words is in the message or new there; None after `TRIES`."""
    taken = {word.lower() for text in (message, *swaps, *swaps.values()) for word in words_of(text)}
    for _ in range(TRIES):
        new = make()
        if not taken & {word.lower() for word in words_of(new)}:
            return new
    return None


def words_of(text: str) -> list[str]:
    """Runs of letters, digits and what joins them in numbers and names."""
    return re.findall(r"[\w/.-]*\w", text)


def reshuffled(number: str, draw: random.Random) -> str:
    """An order number of the same pattern: a digit for each digit, none of them a zero in front; a letter for each."""

    def other(at: int, one: str) -> str:
        if one.isdigit():
            within = at and number[at - 1].isdigit()
            return draw.choice(string.digits if within else "123456789")
        if one.isascii() and one.isalpha():
            return draw.choice(string.ascii_uppercase if one.isupper() else string.ascii_lowercase)
        return one

    return "".join(other(at, one) for at, one in enumerate(number))


def like(old: str, new: str) -> str:
    """`new` with a capital or without one, as `old` has it: some who write type none."""
    return new.lower() if old == old.lower() else new[0].upper() + new[1:]


def replaced(message: str, swaps: dict[str, str]) -> str:
    """The message with each of the words replaced wherever it stands as a word, all at once."""
    if not swaps:
        return message
    longest_first = sorted(swaps, key=len, reverse=True)
    pattern = rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])"
    return re.sub(pattern, lambda found: swaps[found.group()], message)
