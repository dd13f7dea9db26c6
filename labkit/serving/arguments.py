"""What the command line of a registry takes."""

import argparse
import os
from pathlib import Path

PLACE = "LABKIT_REGISTRY"
FORMS = ("float32", "bfloat16", "float16", "nf4")
STATUS = (
    "exit status: 0 done; 1 refused, or something is wrong; 2 not understood; 3 there is no such adapter; "
    "4 locked by another process, try again"
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of `python -m labkit.registry`."""
    parser = argparse.ArgumentParser(
        prog="python -m labkit.registry",
        description="Versions of adapters, and aliases that point to them.",
        epilog=STATUS,
    )
    parser.add_argument(
        "--registry", type=Path, default=os.environ.get(PLACE), help=f"its folder; default: {PLACE}"
    )
    parser.add_argument(
        "--wait", type=float, default=10.0, help="seconds to wait for another process that writes"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser("init", help="make a registry")
    one.add_argument(
        "--base", required=True, help="the base model, as labkit.models.load takes it: smollm2-135m"
    )
    help = "in which forms it is used; their fingerprints are recorded"
    one.add_argument("--forms", nargs="+", choices=FORMS, default=["float32"], help=help)

    one = commands.add_parser("publish", help="make a PEFT folder the next version of an adapter")
    one.add_argument("name", help="of the adapter")
    one.add_argument("folder", type=Path, help="as labkit.save_adapter or PEFT writes it")
    one.add_argument("--owner", required=True, help="who answers for it")
    one.add_argument("--note", default="", help="what is new")
    one.add_argument("--code", default="", help="the version of the code that trained it, such as a commit")
    help = "hash a file that it was trained on"
    one.add_argument("--data", type=Path, action="append", default=[], metavar="FILE", help=help)
    one.add_argument(
        "--config", type=Path, metavar="FILE", help="a JSON file with the settings of the training"
    )
    help = "of an evaluation; may be given again"
    one.add_argument("--result", action="append", default=[], metavar="DATASET.METRIC=VALUE", help=help)
    help = "state that it was trained on the base of the registry, where the folder cannot show it"
    one.add_argument("--trust-base", action="store_true", help=help)
    one.add_argument("--alias", metavar="ALIAS", help="let this alias of the adapter point to it")

    one = commands.add_parser("list", help="list versions and aliases")
    one.add_argument("name", nargs="?", help="of one adapter")
    one.add_argument("--deleted", action="store_true", help="deleted versions too")

    for command, help in (
        ("show", "all that is known of a version"),
        ("card", "print the model card of a version"),
    ):
        one = commands.add_parser(command, help=help)
        one.add_argument("version", help="NAME, NAME@ALIAS or NAME@v2")

    one = commands.add_parser("alias", help="let an alias point to a version, or (--remove) to nothing")
    one.add_argument("alias", help="NAME@ALIAS")
    one.add_argument("number", nargs="?", help="of the version: 2 or v2")
    one.add_argument("--remove", action="store_true", help="let it point to nothing")
    signed(one)

    one = commands.add_parser("rollback", help="let an alias point to the version before")
    one.add_argument("alias", help="NAME@ALIAS")
    signed(one)

    one = commands.add_parser("history", help="all moves of an alias")
    one.add_argument("alias", help="NAME@ALIAS")

    one = commands.add_parser("delete", help="take the files of a version away, which no alias needs")
    one.add_argument("version", help="NAME@v2")

    one = commands.add_parser("verify", help="hash every file, and say what is damaged, missing, or too many")
    one.add_argument(
        "--repair", action="store_true", help="put right links, cards, and what killed writers left"
    )
    one.add_argument("--remove-orphans", action="store_true", help="take away files that no version has, too")

    one = commands.add_parser("best", help="the version with the best result")
    one.add_argument("metric", help="exact_match")
    one.add_argument("--on", required=True, metavar="DATASET", help="tickets")
    one.add_argument("--since", metavar="TIME", help="published then or later")
    one.add_argument("--name", help="of one adapter")
    one.add_argument("--lowest", action="store_true", help="the lowest value is the best, as of a loss")

    one = commands.add_parser("at", help="what the aliases pointed to at a time")
    one.add_argument("time", help="2026-11-29T14:05 or 14:05 (today), in UTC")
    one.add_argument("alias", nargs="?", help="NAME@ALIAS; default: all")

    one = commands.add_parser(
        "why", help="which version gave an answer of a trial, and why; or all to a user"
    )
    one.add_argument("answer", help="its id, or with --user the name that came with the requests")
    one.add_argument("--user", action="store_true", help="list the answers to a user")

    one = commands.add_parser(
        "vllm", help="print the command that serves versions with vLLM, if it takes them"
    )
    one.add_argument("versions", nargs="*", help="default: every adapter's alias production")
    one.add_argument("--base", help="folder or hub id of the base; default: where it is on this machine")
    return parser


def signed(parser: argparse.ArgumentParser) -> None:
    """The options of a move."""
    parser.add_argument("--author", default="", help="who moves it")
    parser.add_argument("--note", default="", help="why")
    help = "the version that it must point to until now; else nothing is moved"
    parser.add_argument("--expected", metavar="NUMBER", help=help)
