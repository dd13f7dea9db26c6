"""What a model is trained on, token by token: which tokens are context, and which are learned."""

import html
from collections.abc import Mapping

from IPython.display import HTML

from labkit.data.batches import IGNORE, collate
from labkit.data.encoding import encode

KINDS = {  # what each is called, and how it looks; names stand beside colours
    "template": ("template, no loss", "color:#555;border:1px dotted #888"),
    "prompt": ("prompt, no loss", "color:#222;border:1px solid #bbb"),
    "supervised": ("SUPERVISED", "color:#000;background:#fdd0a2;border:1px solid #d95f02;font-weight:bold"),
}
SPACES = str.maketrans({" ": "·", "\n": "⏎", "\t": "→"})


def kinds_of_tokens(record: Mapping, tokenizer) -> list[tuple[str, str, int]]:
    """Of each token of a record its text, its kind (a key of `KINDS`), and its target: its own id, or -100.

    What stands between the texts of the messages is the template's. The targets are those of a batch.
    """
    example = encode(record, tokenizer)
    targets = collate([example], pad_id=0).targets[0].tolist()
    texts = [m["content"] for m in record["messages"]] if "messages" in record else [record["prompt"]]
    ids = example.prompt + example.completion
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    whole = tokenizer.decode(ids)
    inside: list[range] = []  # where in `whole` the messages stand
    for text in texts:
        start = whole.find(text, inside[-1].stop if inside else 0)
        if text and start >= 0:
            inside.append(range(start, start + len(text)))
    found, start = [], 0
    for token, end, target in zip(ids, ends, targets):
        of_message = any(start < span.stop and end > span.start for span in inside)
        kind = "supervised" if target != IGNORE else "prompt" if of_message else "template"
        found.append((tokenizer.decode([token]), kind, target))
        start = end
    return found


def show_supervision(record: Mapping, tokenizer) -> HTML:
    """A record as the model sees it: template, prompt and supervised tokens, each run of a kind in a box with its
    name; a bar parts the tokens, and the marks of the template are shown as they are.

    Args:
        record: to train on, see `labkit.data.encoding`.
        tokenizer: the model's.

    Raises:
        ValueError: a record that cannot be encoded.
    """
    tokens = kinds_of_tokens(record, tokenizer)
    boxes, i = "", 0
    while i < len(tokens):
        kind = tokens[i][1]
        end = next((j for j in range(i, len(tokens)) if tokens[j][1] != kind), len(tokens))
        name, look = KINDS[kind]
        pieces = "<span style='color:#999'>|</span>".join(
            html.escape(text.replace("\ufffd", "▯").translate(SPACES)) for text, *_ in tokens[i:end]
        )
        boxes += (
            f"<div style='display:inline-block;margin:2px 4px 6px 0;vertical-align:top'><small>{name}</small><br>"
            f"<code style='{look};padding:1px 3px;white-space:normal;overflow-wrap:anywhere'>{pieces}</code></div>"
        )
        i = end
    counts = {kind: sum(k == kind for _, k, _ in tokens) for kind in KINDS}
    total = (
        f"<p>{len(tokens)} tokens: {counts['template']} of the template and {counts['prompt']} of the prompt with the "
        f"target {IGNORE} (no loss), {counts['supervised']} supervised, the end mark "
        f"<code>{html.escape(tokens[-1][0].translate(SPACES))}</code> among them.</p>"
    )
    return HTML(f"<div style='max-width:60em;line-height:1.5'>{boxes}</div>{total}")
