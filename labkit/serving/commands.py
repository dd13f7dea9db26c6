"""The commands of a registry: what each does, and what it prints."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import torch

from labkit import models
from labkit.files.reading import read_json
from labkit.files.writing import InUse
from labkit.quant.model import quantize_model
from labkit.serving import audit, contents, times, trial_log
from labkit.serving.admission import Base
from labkit.serving.arguments import PLACE, make_parser
from labkit.serving.naming import VERSION, check_name
from labkit.serving.registry import Registry
from labkit.serving.version_card import version_card
from labkit.serving.versions import Move, Version
from labkit.serving.vllm_line import vllm_line

DONE, WRONG, UNKNOWN, LOCKED, INTERRUPTED = 0, 1, 3, 4, 130


class Answer(NamedTuple):
    """What a command answers: for a program, for people, the exit status, and what to say beside it."""

    value: Any
    text: str
    status: int = DONE
    warnings: Sequence[str] = ()


def main(arguments: Sequence[str] | None = None, clock: Callable[[], datetime] = times.utc_now) -> int:
    """Run one command; the exit status. `clock` says the time."""
    parser = make_parser()
    chosen = parser.parse_args(arguments)
    if chosen.registry is None:
        parser.error(f"no registry; give --registry FOLDER, or set {PLACE}")
    try:
        answer = COMMANDS[chosen.command](chosen, clock)
    except InUse as error:
        return failed(error, LOCKED)
    except LookupError as error:
        return failed(error, UNKNOWN)
    except (ValueError, RuntimeError, OSError) as error:
        return failed(error, WRONG)
    except KeyboardInterrupt:
        return failed("stopped; what was under way is not there, or whole", INTERRUPTED)
    for warning in answer.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(json.dumps(answer.value, indent=2, ensure_ascii=False) if chosen.json else answer.text)
    return answer.status


def failed(error: object, status: int) -> int:
    """Say on stderr what went wrong; `status`."""
    print(f"error: {error}", file=sys.stderr)
    return status


def opened(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Registry:
    return Registry(chosen.registry, chosen.wait, clock)


def init(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Answer:
    contents.check_free(chosen.registry)  # before models are loaded
    base = Base.of(chosen.base, *(form_of(chosen.base, form) for form in dict.fromkeys(chosen.forms)))
    registry = Registry.create(chosen.registry, base, wait=chosen.wait, clock=clock)
    value = {"root": str(registry.root), "base": base.name, "forms": list(base.forms)}
    return Answer(value, f"a registry for adapters of {base.name} is in {registry.root}")


def form_of(name: str, form: str) -> torch.nn.Module:
    """The base `name` in a dtype, or with the linear layers in 4 bits (NF4) as `labkit.quantize_model` makes it."""
    model, _ = models.load(name, dtype="float32" if form == "nf4" else form)
    if form == "nf4":
        quantize_model(model, progress=False)
    return model


def publish(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Answer:
    registry = opened(chosen, clock)
    if chosen.alias is not None:
        check_name(chosen.alias, "alias")
    data = {str(file): contents.digest(file) for file in chosen.data}
    version = registry.publish(
        chosen.name,
        chosen.folder,
        owner=chosen.owner,
        note=chosen.note,
        code=chosen.code,
        data=data or None,
        config=read_json(chosen.config) if chosen.config else None,
        results=results_of(chosen.result),
        trust_base=chosen.trust_base,
    )
    text, warnings = f"{version.label} is in {version.place}", []
    if left := contents.left_out(chosen.folder):
        warnings.append(f"left out, as no part of an adapter: {', '.join(left)}")
    warnings += [
        f"it cannot share a base with others in one batch: {reason}" for reason in version.facts["alone"]
    ]
    if chosen.alias is not None:
        move = registry.set_alias(f"{version.name}@{chosen.alias}", version.number, author=chosen.owner)
        text += f"\n{said(move)}"
    return Answer(version.as_json(), text, warnings=warnings)


def results_of(given: Sequence[str]) -> dict[str, dict[str, float]]:
    """Results as the command line has them.

    Raises:
        ValueError: not DATASET.METRIC=VALUE, or one of them twice.
    """
    made: dict[str, dict[str, float]] = {}
    for one in given:
        where, _, number = one.rpartition("=")
        dataset, _, metric = where.partition(".")
        try:
            value = float(number)
        except ValueError:
            dataset = ""
        if not dataset or not metric or metric in made.get(dataset, ()):
            raise ValueError(
                f"--result {one!r} must be DATASET.METRIC=VALUE, each once, as tickets.exact_match=0.81"
            )
        made.setdefault(dataset, {})[metric] = value
    return made


def list_all(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Answer:
    registry = opened(chosen, clock)
    versions, aliases = registry.versions(chosen.name, chosen.deleted), registry.aliases(chosen.name)
    value = {"base": registry.base.name, "versions": [v.as_json() for v in versions], "aliases": aliases}
    pointed = [f"{alias} → v{number}" for alias, number in aliases.items()]
    return Answer(value, "\n".join([*map(line_of, versions), *pointed]) or "no versions")


def line_of(version: Version) -> str:
    """A version in one line."""
    facts = version.facts
    found = [
        f"{data} {metric} {value:g}" for data, of in version.results.items() for metric, value in of.items()
    ]
    parts = [f"{facts['variant']} r={facts['r']}", f"{facts['bytes']:,} bytes", version.owner, *found]
    state = (
        f"deleted {times.written(version.deleted)}" if version.deleted else times.written(version.published)
    )
    return "  ".join([version.label, state, *parts, version.note.partition("\n")[0]]).rstrip()


def show(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Answer:
    value = opened(chosen, clock).resolve(chosen.version).as_json()
    return Answer(value, json.dumps(value, indent=2, ensure_ascii=False))


def card(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Answer:
    registry = opened(chosen, clock)
    version = registry.resolve(chosen.version)
    text = version_card(version, registry.base.name)
    return Answer({"version": version.label, "card": text}, text.rstrip("\n"))


def alias(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Answer:
    registry = opened(chosen, clock)
    if chosen.remove == (chosen.number is not None):
        raise ValueError("give the number of a version, or --remove")
    if chosen.remove:
        move = registry.remove_alias(chosen.alias, chosen.author, chosen.note)
    else:
        number, expected = number_of(chosen.number), number_of(chosen.expected)
        move = registry.set_alias(chosen.alias, number, chosen.author, chosen.note, expected)
    return Answer(move.as_json(), said(move))


def number_of(given: str | None) -> int | None:
    """The number of a version, "2" or "v2".

    Raises:
        ValueError: it is none.
    """
    if given is None:
        return None
    match = VERSION.fullmatch(given if given.startswith("v") else f"v{given}")
    if match is None:
        raise ValueError(f"{given!r} is not the number of a version; give 2 or v2")
    return int(match[1])


def said(move: Move) -> str:
    """A move in words."""
    where = "points to nothing" if move.number is None else f"points to v{move.number}"
    by = f" by {move.author}" if move.author else ""
    why = f": {move.note}" if move.note else ""
    return f"{move.alias} {where} since {times.written(move.at)} ({move.kind}{by}{why})"


def rollback(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Answer:
    expected = number_of(chosen.expected)
    move = opened(chosen, clock).rollback(chosen.alias, chosen.author, chosen.note, expected)
    return Answer(move.as_json(), said(move))


def history(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Answer:
    moves = opened(chosen, clock).history(chosen.alias)
    return Answer([move.as_json() for move in moves], "\n".join(map(said, moves)))


def delete(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Answer:
    version = opened(chosen, clock).delete(chosen.version)
    return Answer(version.as_json(), f"{version.label} is deleted; its record is kept")


def verify(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Answer:
    registry = opened(chosen, clock)
    mend = chosen.repair or chosen.remove_orphans
    problems = audit.repair(registry, chosen.remove_orphans) if mend else audit.verify(registry)
    versions = len(registry.versions())
    text = (
        "\n".join(map(str, problems)) or f"all is well: {versions} versions, every file as it was published"
    )
    value = {"versions": versions, "problems": [problem._asdict() for problem in problems]}
    return Answer(value, text, WRONG if problems else DONE)


def best(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Answer:
    since = times.understood(chosen.since, clock()) if chosen.since else None
    version = opened(chosen, clock).best(chosen.metric, chosen.on, since, chosen.name, not chosen.lowest)
    return Answer(version.as_json(), line_of(version))


def at(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Answer:
    when = times.understood(chosen.time, clock())
    pointed = opened(chosen, clock).at(when, chosen.alias)
    lines = [f"{one} → v{number}" for one, number in pointed.items()]
    return Answer(
        {"at": times.written(when), "aliases": pointed}, "\n".join(lines) or "nothing pointed anywhere then"
    )


def why(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Answer:
    root = opened(chosen, clock).root
    if chosen.user:
        given = trial_log.answers_of(root, chosen.answer)
        lines = [f"{one['at']} {one['answer']} {one['version']}: {one['why']}" for one in given]
        return Answer(given, "\n".join(lines) or f"no trial gave an answer to {chosen.answer}")
    text = trial_log.explain(root, chosen.answer)
    return Answer(text.splitlines(), text)


def vllm(chosen: argparse.Namespace, clock: Callable[[], datetime]) -> Answer:
    line = vllm_line(opened(chosen, clock), chosen.versions, chosen.base)
    found = {name: list(map(str, fitness.objections)) for name, (_, fitness) in line.served.items()}
    warnings = [f"{name}: {objection}" for name, objections in found.items() for objection in objections]
    value = {"command": line.arguments, "objections": found}
    return Answer(value, str(line), WRONG if line.arguments is None else DONE, warnings)


COMMANDS: dict[str, Callable[[argparse.Namespace, Callable[[], datetime]], Answer]] = {
    "init": init,
    "publish": publish,
    "list": list_all,
    "show": show,
    "card": card,
    "alias": alias,
    "rollback": rollback,
    "history": history,
    "delete": delete,
    "verify": verify,
    "best": best,
    "at": at,
    "why": why,
    "vllm": vllm,
}
