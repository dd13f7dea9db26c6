"""Who is next: the tenant that has had the least, not the one that asks the most.

First come, first served lets one tenant's thousand requests stand before another's first. Here each tenant has a
counter of the work that was done for it, in tokens, those that were written counted twice. The next request is taken
from the tenant with the smallest. A tenant that comes back after a while starts where the others are: it cannot save up.

Source: "Fairness in Serving Large Language Models" (Sheng et al. 2024), the virtual token counter.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

READ, WRITTEN = 1, 2  # what a token costs
TENANTS = 4096  # whose counters are kept while they ask for nothing

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Requests that wait, by tenant, and what each tenant has had."""

    def __init__(self):
        self.waiting: dict[str, deque[Item]] = {}
        self.served: dict[str, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    def __iter__(self) -> Iterator[Item]:
        """All that wait, by tenant."""
        return (item for queue in self.waiting.values() for item in queue)

    def put(self, tenant: str, item: Item) -> None:
        """Let a request wait behind those of its tenant."""
        if tenant not in self.waiting:
            level = min((self.served[other] for other in self.waiting), default=0.0)
            if len(self.served) > TENANTS:
                self.served = {other: self.served[other] for other in self.waiting}
            self.served[tenant] = max(self.served.get(tenant, 0.0), level)
            self.waiting[tenant] = deque()
        self.waiting[tenant].append(item)

    def take(self, is_ready: Callable[[Item], bool]) -> Item | None:
        """The next request that is ready, of the tenant that has had the least; None if there is none."""
        for tenant in sorted(self.waiting, key=lambda one: self.served[one]):
            for item in self.waiting[tenant]:
                if is_ready(item):
                    self.remove(tenant, item)
                    return item
        return None

    def remove(self, tenant: str, item: Item) -> None:
        """Take out a request wherever it stands."""
        self.waiting[tenant].remove(item)
        if not self.waiting[tenant]:
            del self.waiting[tenant]

    def charge(self, tenant: str, read: int = 0, written: int = 0) -> None:
        """Count work for a tenant, in tokens."""
        self.served[tenant] = self.served.get(tenant, 0.0) + READ * read + WRITTEN * written
