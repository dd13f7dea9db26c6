"""A memory ledger: where the bytes of a training step go, a row per component, each with its formula.

Two columns, because there are two questions. `bytes` is how large a component is when all of it is there;
`at_peak` is how much of it is there at the one moment when the total is largest. Calculators add up the
first. The card must hold the second: gradients grow while activations shrink, so the peak is less than the
sum.

    peak = sum of at_peak <= total = sum of bytes

The same rows come from a formula (`labkit.memory.plan`), from the code run without numbers (`simulate`), and
from a real step (`measure`), and `predicted.compare(measured)` puts them side by side.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from labkit.checks import check_choice, check_number, needed

COMPONENTS = {
    "weights": "the model's own parameters and buffers",
    "constants": "what dequantizing needs besides the codes: scales, and the scales of scales",
    "lora": "the adapters' parameters",
    "gradients": "one for each parameter that trains",
    "optimizer": "its state: moments, step counts, master copies",
    "activations": "what the forward pass keeps for the backward pass",
    "temporary": "what lives for a few operations only, around the peak",
    "overhead": "what the allocator adds: rounding, and what it holds unused",
}


@dataclass(frozen=True)
class LedgerRow:
    """One line of a ledger.

    Attributes:
        component: one of `COMPONENTS`.
        kind: which part of it ("bf16", "attention", "logits" …).
        bytes: how large it is, all in all.
        at_peak: how much of it is there at the moment of the peak.
        formula: how `bytes` is made up, as text; source: where the formula comes from, or what was measured.
    """

    component: str
    kind: str
    bytes: int
    at_peak: int
    formula: str = ""
    source: str = ""

    def __post_init__(self):
        check_choice("component", self.component, COMPONENTS)
        for name in ("bytes", "at_peak"):
            value = getattr(self, name)
            if type(value) is not int:
                raise TypeError(f"{name}={value!r} of {self.component} must be a whole number of bytes (int)")


@dataclass
class Ledger:
    """The bytes of one training step.

    Attributes:
        rows: the lines, in the order of `COMPONENTS`.
        title: what it is the ledger of.
        moment: when the peak is ("backward of the last layer" …).
        settings: every assumption that the numbers rest on.
        counts: numbers of parameters and such: `parameters`, `trainable`, `adapter_bytes`, `constants_bytes`
            …
        timeline: of a run, real or simulated: live bytes after each allocation and release; else None.
        notes: what these numbers do not say.
        tensors: of a measured run: the time line of tensors alone, without what operations take inside.
    """

    rows: list[LedgerRow]
    title: str = ""
    moment: str = ""
    settings: dict = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    timeline: "Timeline | None" = None
    notes: list[str] = field(default_factory=list)
    tensors: "Timeline | None" = None

    def __post_init__(self):
        order = list(COMPONENTS)
        self.rows = sorted(self.rows, key=lambda row: order.index(row.component))

    @property
    def peak(self) -> int:
        """The most bytes that are in use at one time."""
        return sum(row.at_peak for row in self.rows)

    @property
    def total(self) -> int:
        """All components at full size, as if all were there at once: what a simple calculator says."""
        return sum(row.bytes for row in self.rows)

    @property
    def static(self) -> int:
        """What is in use throughout a run: weights, constants, adapters, optimizer state."""
        return sum(self[name] for name in ("weights", "constants", "lora", "optimizer"))

    def __getitem__(self, name: str) -> int:
        """Bytes of a component, `ledger["weights"]`, or of one kind of it, `ledger["activations/mlp"]`."""
        return sum(row.bytes for row in self.select(name))

    def at_peak(self, name: str) -> int:
        """The same at the moment of the peak."""
        return sum(row.at_peak for row in self.select(name))

    def select(self, name: str) -> list[LedgerRow]:
        """The rows of a component or of one of its kinds.

        Raises:
            KeyError: there is no such component or kind.
        """
        component, _, kind = name.partition("/")
        if component not in COMPONENTS:
            raise KeyError(f"{name!r}: the components are {', '.join(COMPONENTS)}")
        rows = [row for row in self.rows if row.component == component and kind in ("", row.kind)]
        if kind and not rows:
            kinds = [row.kind for row in self.rows if row.component == component]
            raise KeyError(f"{name!r}: {component} has the kinds {', '.join(kinds) or '(none)'}")
        return rows

    def components(self, at_peak: bool = False) -> dict[str, int]:
        """Bytes by component, all components in a fixed order."""
        return {name: self.at_peak(name) if at_peak else self[name] for name in COMPONENTS}

    def kinds(self, component: str, at_peak: bool = False) -> dict[str, int]:
        """Bytes of each kind of one component, `ledger.kinds("activations")`."""
        rows = self.select(component)
        return {row.kind: row.at_peak if at_peak else row.bytes for row in rows}

    def fits(self, gigabytes: float, reserve: float = 0.0) -> bool:
        """Does the peak fit a card of so many GB (10⁹ bytes), if CUDA and a screen take `reserve` of them?"""
        check_number("gigabytes", gigabytes, at_least=0)
        check_number("reserve", reserve, at_least=0)
        return self.peak <= (gigabytes - reserve) * 1e9

    def to_frame(self):
        """The rows as a pandas DataFrame."""
        pd = needed("pandas", "Ledger.to_frame")
        return pd.DataFrame([vars(row) for row in self.rows])

    def compare(self, other: "Ledger", kinds: bool = True):
        """This ledger beside another: the bytes of both and their ratio, by component and at the peak.

        Args:
            other: usually the measured one.
            kinds: a line for every kind of activation as well.

        Returns:
            A DataFrame with columns `component`, `kind`, `self`, `other`, and `ratio` (self / other).
        """
        pd = needed("pandas", "Ledger.compare")
        lines = []

        def line(component, kind, mine, theirs):
            ratio = mine / theirs if theirs else (1.0 if not mine else float("inf"))
            lines.append(
                {"component": component, "kind": kind, "self": mine, "other": theirs, "ratio": ratio}
            )

        for name in COMPONENTS:
            mine, theirs = self.kinds(name), other.kinds(name)
            if kinds and name == "activations":
                for kind in dict.fromkeys([*mine, *theirs]):
                    line(name, kind, mine.get(kind, 0), theirs.get(kind, 0))
            if self[name] or other[name]:
                line(name, "all", self[name], other[name])
        line("peak", "all", self.peak, other.peak)
        return pd.DataFrame(lines)

    def __iter__(self) -> Iterator[LedgerRow]:
        return iter(self.rows)

    def __str__(self) -> str:
        def line(name: str, of_all: str, at_peak: str, how: str) -> str:
            return f"{name:36} {of_all:>12} {at_peak:>12}   {how}"

        rows = [
            line(f"{row.component:13} {row.kind[:22]}", size(row.bytes), size(row.at_peak), row.formula)
            for row in self.rows
            if row.bytes or row.at_peak
        ]
        moment = f"<- the peak: {self.moment or 'not known when'}"
        last = line("sum", size(self.total), size(self.peak), moment)
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([self.title, line("", "bytes", "at the peak", "how"), *rows, last, *notes])


@dataclass
class Timeline:
    """Live bytes over the course of a step.

    Attributes:
        live: for each event (an allocation or a release) the bytes of every component: {component: [int, …]}.
        phases: (name, first event) of "forward", "backward", "optimizer".
    """

    live: dict[str, list[int]]
    phases: list[tuple[str, int]]

    @property
    def total(self) -> list[int]:
        """Live bytes of all components together after each event."""
        return [sum(values) for values in zip(*self.live.values())]


def size(n: int) -> str:
    """Bytes for people: in GB, MB or kB (10⁹, 10⁶ or 10³ bytes).

    >>> size(13_476_831_232), size(8_388_608), size(512)
    ('13.477 GB', '8.389 MB', '512 B')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= factor:
            return f"{n / factor:.3f} {unit}"
    return f"{n} B"
