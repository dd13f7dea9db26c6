"""What `optimizer.state` is while an optimizer is paged: a dictionary whose values lie in a `PageTable`."""

from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from typing import Any

from labkit.optim.page_table import PageTable


class PagedState(MutableMapping):
    """{parameter: {name: tensor or number}} under the budget of `table`.

    Looking up pages in, and assigning pages out. What `state[p]` returns is good until the next look-up pages
    it out again. `items()` and `values()` give copies, and move nothing. A copy of an optimizer (deepcopy,
    pickle) has all of its state in memory, and no pager.
    """

    def __init__(self, table: PageTable):
        self.table = table

    def __getitem__(self, key) -> dict:
        page = self.table.page(key)
        return page.state if page is self.table.current else self.table.touch(page)

    def __setitem__(self, key, state: dict) -> None:
        self.table.put(key, state)

    def __delitem__(self, key) -> None:
        if key not in self:
            raise KeyError(key)
        self.table.drop(self.table.pages.pop(key))

    def __contains__(self, key) -> bool:
        return key in self.table.pages and self.table.pages[key].exists

    def __iter__(self) -> Iterator:
        return iter([key for key, page in self.table.pages.items() if page.exists])

    def __len__(self) -> int:
        return sum(page.exists for page in self.table.pages.values())

    def get(self, key, default=None):
        return self[key] if key in self else default  # noqa: SIM401  # `self.get` is this very method

    def items(self) -> Any:
        return ((key, self.table.copy(self.table.pages[key])) for key in self)

    def values(self) -> Any:
        return (state for _, state in self.items())

    def __reduce__(self):
        return defaultdict, (dict, dict(self.items()))
