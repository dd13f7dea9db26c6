"""AdamW written out, its 8-bit form, and optimizer state under a budget of bytes."""

from labkit.optim.adamw import AdamW, AdamW8bit
from labkit.optim.page_table import PageTable
from labkit.optim.pager import Pager
from labkit.optim.paging import PagedAdamW, attach_paging, detach_paging

__all__ = [
    "AdamW",
    "AdamW8bit",
    "PageTable",
    "PagedAdamW",
    "Pager",
    "attach_paging",
    "detach_paging",
]
