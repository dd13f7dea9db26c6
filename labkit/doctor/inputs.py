"""What is learned, token by token, and whether it is asked for in the same words."""

from collections.abc import Callable
from typing import Any

from labkit.data.chats import chat_prompt
from labkit.data.encoding import Encoded
from labkit.data.records import shortened
from labkit.doctor.case import RECORDS, Case
from labkit.doctor.findings import Finding, Missing, healthy, sick
from labkit.doctor.rows import Row

CUT = 0.05  # of the rows: so many may be cut by a maximal length

FAULTS: dict[str, tuple[Callable[[Row], bool], str, str]] = {
    "none": (
        lambda row: not row.supervised,
        "have no supervised token",
        "the marker that the collator looks for is not in the text: compare its tokens with those of a row",
    ),
    "shifted": (
        lambda row: any(row.labels[i] != row.ids[i] for i in row.supervised),
        "have labels that are not the tokens at their own positions",
        "give the tokens themselves as labels: the model's loss shifts them by one",
    ),
    "prompt": (
        lambda row: any(row.start <= i < row.answer for i in row.supervised),
        "are supervised on the prompt too",
        "supervise the completion only (completion_only_loss=True, or prompt/completion columns)",
    ),
    "first": (
        lambda row: bool(row.supervised) and row.answer > 0 and row.answer not in row.supervised,
        "do not supervise the first token of the answer",
        "let the labels begin where the prompt's tokens end: off by one, or a token across the border",
    ),
    "end": (
        lambda row: row.example.end > 0 and row.end not in row.supervised,
        "do not supervise the mark that ends the answer",
        "add the end mark to the completion, and do not mask it as padding: give the tokenizer a pad token of its own",
    ),
}


def look_at_labels(case: Case) -> Finding:
    """The largest share of rows that have one and the same fault in what they supervise."""
    examples, (_, problems) = case.examples, case.read
    if case.fed is None:
        return own_labels(examples, problems, len(case.records))
    rows = case.rows
    shares = {name: sum(map(has, rows)) / len(rows) for name, (has, _, _) in FAULTS.items()}
    worst = next((name for name, share in shares.items() if share > CUT), None)
    counts = sorted(len(row.supervised) for row in rows)
    median = counts[len(counts) // 2]
    if worst is None:
        says = f"the answer, with its end mark, and nothing else: a median of {median} tokens in {len(rows)} rows"
        return healthy(says, max(shares.values()), supervised=median, **shares)
    _, what, cure = FAULTS[worst]
    says = f"{shares[worst]:.0%} of {len(rows)} rows {what}"
    return sick(says, shares[worst], cure, supervised=median, **shares)


def own_labels(examples: list[Encoded], problems: list[str], n: int) -> Finding:
    """The answer where labkit makes the labels."""
    share = len(problems) / n
    if share > CUT:
        return sick(
            f"{len(problems)} of {n} records cannot be trained on: {problems[0]}",
            share,
            "repair these records; labkit.data.own.read_records lists what is wrong with a file",
        )
    counts = [one.n_supervised for one in examples]
    return healthy(
        f"{min(counts)} to {max(counts)} supervised tokens in a record, as labkit encodes them; give fed to see what "
        "another trainer feeds",
        share,
    )


def look_at_template(case: Case) -> Finding:
    """The share of records whose prompt is served with other tokens than it was trained with."""
    if case.served is None:
        raise Missing("the prompts that the server sends (served) were not given")
    given = list(case.served)[:RECORDS]
    if not given:
        raise Missing("served is empty")
    trained = trained_prompts(case)[: len(given)]
    pairs = [(mine, ids_served(theirs, case.tokenizer)) for mine, theirs in zip(trained, given)]
    other = [pair for pair in pairs if pair[0] != pair[1]]
    if not other:
        return healthy(f"{len(pairs)} prompts are served as they were trained, token by token", 0.0)
    return sick(
        f"{len(other)} of {len(pairs)} prompts are served otherwise than trained: {difference(*other[0], case.tokenizer)}",
        len(other) / len(pairs),
        "let one function make the prompt for both: labkit.training.evaluate.chat_prompts, or the template saved with the tokenizer",
    )


def trained_prompts(case: Case) -> list[list[int]]:
    """The prompts of the records as they are trained: those of `fed` where it was given, in the order of the data."""
    if len(case.examples) != len(case.records):
        raise Missing("not every record can be read, so the prompts cannot be put beside the served ones")
    fed = {id(row.example): row.prompt for row in (case.rows if case.fed is not None else ())}
    return [fed.get(id(one), one.prompt) for one in case.examples]


def ids_served(prompt: Any, tokenizer) -> list[int]:
    """The tokens of a served prompt. A text is tokenized as servers do, with the tokenizer's own special tokens; a
    chat, with its template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if isinstance(prompt, dict):
        return list(tokenizer(chat_prompt(prompt, tokenizer), add_special_tokens=False)["input_ids"])
    return [int(token) for token in prompt]


def difference(trained: list[int], served: list[int], tokenizer) -> str:
    """How a served prompt differs from the trained one, in words."""
    bos = tokenizer.bos_token_id
    if bos is not None and served[:2] == [bos, bos] and trained[:2] != [bos, bos]:
        return f"a doubled {tokenizer.bos_token}"
    place = next(
        (i for i, (a, b) in enumerate(zip(trained, served)) if a != b), min(len(trained), len(served))
    )
    parts = [shortened(tokenizer.decode(ids[place : place + 12])) for ids in (trained, served)]
    return f"at token {place} {parts[0]} was trained, and {parts[1]} is served"
