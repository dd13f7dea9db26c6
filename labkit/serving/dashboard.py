"""The dashboard: one page that shows what a server does, and the state that it asks for every two seconds.

    /dashboard      the page, which needs no token because it holds nothing; it asks for one, and keeps it in the tab
    /v1/state       what it shows, for who brings the token

Owners, notes, users and reasons are texts that somebody else wrote. The page puts them in as text and never as HTML,
and its policy (CSP) lets no script run but its own, whose hash is in the policy, and lets nothing be fetched from elsewhere.
"""

import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from labkit.serving.protocol import Refused
from labkit.serving.registry import Registry
from labkit.serving.service import Service
from labkit.serving.versions import Version

PAGE = Path(__file__).with_name("dashboard.html").read_text(encoding="utf-8")
SHOWN = 200  # rows of versions, and of users
LONGEST = 200  # letters of a text
PERCENTILES = (50, 95, 99)


def hash_of(tag: str) -> str:
    """The hash by which a policy knows the inline `<script>` or `<style>` of the page."""
    text = re.search(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    assert text is not None
    return f"'sha256-{b64encode(sha256(text[1].encode()).digest()).decode()}'"


HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; script-src {hash_of('script')}; style-src {hash_of('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def add_dashboard(app: FastAPI, service: Service) -> None:
    """The routes of the page and of its state."""
    versions = Versions(service.registry)

    @app.get("/dashboard")
    def dashboard() -> HTMLResponse:
        return HTMLResponse(PAGE, headers=HEADERS)

    @app.get("/v1/state")
    def state() -> dict[str, Any]:
        return state_of(service, versions)


class Versions:
    """The versions and aliases of a registry, which are read again when its file has changed."""

    def __init__(self, registry: Registry | None):
        self.registry = registry
        self.read: tuple[tuple[int, int], list[Version], dict[str, int]] | None = None

    def now(self) -> tuple[list[Version], dict[str, int]]:
        """As they are; a registry that cannot be read raises what it says."""
        if self.registry is None:
            return [], {}
        seen = self.registry.path.stat()
        mark = (seen.st_mtime_ns, seen.st_size)
        if self.read is None or self.read[0] != mark:
            self.read = (mark, self.registry.versions(), self.registry.aliases())
        return self.read[1:]


def state_of(service: Service, versions: Versions) -> dict[str, Any]:
    """What the page shows, as JSON can hold it."""
    engine, metrics, cache = service.engine, service.metrics, service.engine.adapters
    with metrics.lock:
        outcomes, tokens, recent = dict(metrics.outcomes), metrics.tokens, list(metrics.recent)
    with cache.lock:
        counts = {name: getattr(cache.counts, name) for name in ("hits", "misses", "evictions", "failures")}
        resident = {str(key): size for key, size in cache.resident.items()}
    rows = engine.all_rows()
    writing = len(engine.writing)
    return {
        "base": service.name,
        "is_draining": engine.is_draining,
        "clock": engine.clock(),
        "requests": {
            "writing": writing,
            "rows": engine.limits.rows,
            "waiting": max(0, len(rows) - writing),
            "queue": engine.limits.queue,
        },
        "users": Counter(row.request.tenant[:LONGEST] for row in rows).most_common(SHOWN),
        "cache": {"bytes": cache.nbytes, "budget": cache.budget, "adapters": len(resident), **counts},
        "totals": {"answers": sum(outcomes.values()), "tokens": tokens},
        "outcomes": outcomes,
        "seconds": percentiles(seconds for seconds, _ in recent),
        "first_token": percentiles(first for _, first in recent if first is not None),
        **adapters_of(service, versions, resident),
    }


def percentiles(values: Iterable[float]) -> dict[str, float] | None:
    """Those of the last answers; None if there are none."""
    given = list(values)
    if not given:
        return None
    return {f"p{part}": float(value) for part, value in zip(PERCENTILES, np.percentile(given, PERCENTILES))}


def adapters_of(service: Service, versions: Versions, resident: dict[str, int]) -> dict[str, Any]:
    """The versions of the registry and the adapters loaded by path; those in use first."""
    problem, listed = "", []
    try:
        with service.registry_read():
            found, aliases = versions.now()
    except Refused as error:
        problem, found, aliases = error.message, [], {}
    pointing: dict[str, list[str]] = {}
    for alias, number in aliases.items():
        name, _, short = alias.partition("@")
        pointing.setdefault(f"{name}@v{number}", []).append(short)
    with service.lock:
        loaded = list(service.loaded.values())
    for version in found:
        size = resident.get(f"{version.label} {version.content}")
        names = sorted(pointing.get(version.label, ()))
        listed.append(row_of(version.label, names, size, version.owner, version.note))
    for source in loaded:
        listed.append(row_of(source.label, [], resident.get(f"{source.label} {source.content}"), "", ""))
    listed.sort(key=lambda row: (row["bytes"] is None, not row["aliases"]))
    return {
        "adapters": listed[:SHOWN],
        "more": max(0, len(listed) - SHOWN),
        "registry_problem": problem,
        "has_rollouts": service.rollouts is not None,
    }


def row_of(label: str, aliases: Sequence[str], size: int | None, owner: str, note: str) -> dict[str, Any]:
    """One adapter in the table; `bytes` is None if it is not in memory."""
    texts = {"owner": owner[:LONGEST], "note": note[:LONGEST]}
    return {"label": label, "aliases": list(aliases), "bytes": size, **texts}
