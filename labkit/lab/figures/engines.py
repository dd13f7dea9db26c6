"""Three engines on one registry, as recorded: tokens a second by number of adapters, agreement, and what each does in a
case that goes wrong in silence.

The engines took turns within a lap on the same prompts, so what is compared is the ratio within a lap; its spread over
laps says how much to believe it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from labkit.files.reading import read_json_lines
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.paths import data_folder

RESULTS = "results/serving_engines.jsonl"
ENGINES = {"labkit": COLOURS["qlora"], "llama.cpp": COLOURS["base"], "vLLM": COLOURS["lora"]}
KINDS = ("agreement", "behaviour", "speed")


def engine_records(kind: str, path: str | Path | None = None) -> list[dict]:
    """The recorded lines of a kind: "agreement", "behaviour" or "speed".

    Args:
        kind: of the lines.
        path: of a file that `python -m recipes.serving_engines` wrote; default: the one that comes with the course.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no lines of this kind; says which it has.
    """
    path = data_folder() / RESULTS if path is None else Path(path)
    lines = read_json_lines(path)
    found = [line for line in lines if line["kind"] == kind]
    if not found:
        there = ", ".join(sorted({line["kind"] for line in lines})) or "none"
        raise ValueError(f"{path.name} has no lines of the kind {kind!r}; it has: {there}")
    return found


def engine_rates(lines: Sequence[Mapping]) -> pd.DataFrame:
    """Tokens a second of each engine and lap.

    Args:
        lines: of the kind "speed".

    Returns:
        columns engine, n (distinct adapters among the requests), lap, rate (tokens written per second, the reading of
        the prompts included) and ratio (rate of labkit in this lap, divided by this rate).
    """
    frame = pd.DataFrame(lines)
    frame["rate"] = frame["tokens"] / frame["seconds"]
    own = frame[frame["engine"] == "labkit"].set_index(["n", "lap"])["rate"]
    places = pd.MultiIndex.from_frame(frame[["n", "lap"]])
    frame["ratio"] = own.reindex(places).to_numpy() / frame["rate"]
    return frame[["engine", "n", "lap", "rate", "ratio"]]


def rate_table(lines: Sequence[Mapping]) -> pd.DataFrame:
    """A row for each n: the median rate of each engine, and labkit's multiple of the others' with its range over laps."""
    frame = engine_rates(lines)
    rows = []
    for n, part in frame.groupby("n"):
        row: dict[str, object] = {"adapters": n}
        groups = {engine: part[part["engine"] == engine] for engine in ENGINES}
        here = {engine: group for engine, group in groups.items() if len(group)}
        row |= {f"{engine}, tokens/s": round(group["rate"].median(), 1) for engine, group in here.items()}
        for engine, group in here.items():
            if engine != "labkit":
                ratios = group["ratio"]
                row[f"labkit : {engine}"] = f"{ratios.median():.2f} ({ratios.min():.2f}–{ratios.max():.2f})"
        rows.append(row)
    return pd.DataFrame(rows).set_index("adapters")


def engine_speeds(lines: Sequence[Mapping], axes: Axes | None = None) -> pd.DataFrame:
    """Draw tokens a second over distinct adapters: laps as dots, medians joined, each engine named at its last point.

    Args:
        lines: of the kind "speed".
        axes: where to draw; default: a new figure.

    Returns:
        what was drawn: the median rate by engine and n.
    """
    if axes is None:
        _, axes = canvas(6.4, 3.4)
    frame = engine_rates(lines)
    medians = frame.groupby(["engine", "n"], as_index=False)["rate"].median()
    for engine, colour in ENGINES.items():
        dots, line = frame[frame["engine"] == engine], medians[medians["engine"] == engine]
        if line.empty:
            continue
        axes.plot(dots["n"], dots["rate"], "o", color=colour, markersize=3.5, alpha=0.6)
        axes.plot(line["n"], line["rate"], "-", color=colour, linewidth=2)
    ends = medians.sort_values("n").groupby("engine").tail(1).sort_values("rate")
    height = -1.0
    for engine, n, rate in ends[["engine", "n", "rate"]].itertuples(index=False):
        height = max(rate, height + 0.07 * frame["rate"].max())  # names of lines that end together stay apart
        beside = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "color": ENGINES[engine]}
        axes.annotate(f"{engine}, {rate:.0f}", (n, height), **beside)
    axes.set_xscale("log", base=2)
    counts = sorted(frame["n"].unique())
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.set_xlim(counts[0] / 1.15, counts[-1] * 2.2)
    axes.set_ylim(0, None)
    requests = max(line["requests"] for line in lines)
    finish(axes, f"{requests} requests at once", "distinct adapters among them", "tokens a second")
    return medians


def behaviour_table(lines: Sequence[Mapping]) -> pd.DataFrame:
    """A row for each case, a column for each engine: its outcome, with the HTTP status; worst where it was tried twice.

    Args:
        lines: of the kind "behaviour".
    """
    worst = ("right", "refused", "cannot", "wrong")
    cases = list(dict.fromkeys(case_of(line) for line in lines))
    engines = [engine for engine in ENGINES if any(line["engine"] == engine for line in lines)]
    table = pd.DataFrame("–", index=pd.Index(cases, name="case"), columns=engines)
    for case in cases:
        for engine in engines:
            tried = [line for line in lines if case_of(line) == case and line["engine"] == engine]
            if tried:
                line = max(tried, key=lambda line: worst.index(line["outcome"]))
                status = f" ({line['status']})" if line["status"] not in (None, 200) else ""
                table.loc[case, engine] = line["outcome"] + status
    return table


def case_of(line: Mapping) -> str:
    """The case, with vLLM's setting where it makes a difference."""
    return f"{line['case']}, max_loras={line['max_loras']}" if "max_loras" in line else line["case"]


def words_of(lines: Sequence[Mapping], case: str) -> dict[str, str]:
    """What each engine said in a case, in its own words.

    Raises:
        ValueError: no such case; says which there are.
    """
    found = {line["engine"]: line["words"] for line in lines if case_of(line) == case}
    if not found:
        known = ", ".join(dict.fromkeys(map(case_of, lines)))
        raise ValueError(f"no case {case!r} was recorded; cases: {known}")
    return found


def agreement_table(lines: Sequence[Mapping]) -> pd.DataFrame:
    """A row for each adapter, a column for each engine: the largest difference of a log-probability from PEFT's.

    Args:
        lines: of the kind "agreement".
    """
    frame = pd.DataFrame(lines)
    frame["adapter"] = frame["adapter"].fillna("the base")
    table = frame.pivot_table(index="adapter", columns="engine", values="apart", aggfunc="max", sort=False)
    return table[[engine for engine in ENGINES if engine in table]]
