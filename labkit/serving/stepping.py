"""One step of the model for some rows: new tokens in, logits of the next ones out, keys and values kept.

transformers' models take a mask, positions and a cache from outside, and know the rest of their family. Rows of any
lengths are computed together, each from its own place on, with padding only on the right, where no token looks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from labkit.models.walk import unwrap
from labkit.serving.batched import AdapterBank, Row
from labkit.serving.kv_cache import RowCache

PROBE = 8  # tokens to compare with the model's own forward pass


class Stepper:
    """A model with a bank of adapters, and the keys and values of the rows that it writes.

    Args:
        bank: the adapters and their base, a causal language model of transformers.
        slots: rows at most.

    Raises:
        ValueError: the model cannot be stepped so: it attends to a window, or keeps another state than keys and values.
    """

    def __init__(self, bank: AdapterBank, slots: int):
        self.bank, self.cache = bank, RowCache(2)  # of the rows that the model is checked with
        parameter = next(bank.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.vocabulary = bank.model.get_input_embeddings().weight.shape[0]
        bank.model.eval()
        self.check_model()
        self.cache = RowCache(slots)

    @torch.no_grad()
    def step(
        self, first: int, starts: Sequence[int], ids: Sequence[Sequence[int]], uses: Sequence[Row]
    ) -> Tensor:
        """Logits after the last of some tokens, (rows, vocabulary).

        Args:
            first: the slot of the first row; the others follow it.
            starts: for each row, how many tokens it has had.
            ids: for each row its next tokens, as many for all.
            uses: for each row its adapter.
        """
        tokens = torch.tensor(ids, device=self.device)
        self.cache.begin(first, starts, tokens.shape[1])
        with self.bank.rows(uses):
            out = self.bank.model(
                input_ids=tokens,
                attention_mask=self.cache.mask(self.dtype, self.device),
                position_ids=self.cache.places.to(self.device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[:, -1]

    @torch.no_grad()
    def check_model(self) -> None:
        """Raise a `ValueError` unless steps of rows of two lengths give the logits of the model's own forward pass."""
        inner, name = unwrap(self.bank.model), type(unwrap(self.bank.model)).__name__
        kinds = set(getattr(inner.config, "layer_types", None) or ()) - {"full_attention"}
        if kinds or getattr(inner.config, "sliding_window", None):
            raise ValueError(
                f"{name} does not attend to the whole text ({', '.join(sorted(kinds)) or 'a window'}), and "
                "this engine keeps and masks keys and values for models that do"
            )
        rows = torch.arange(2 * PROBE).view(2, PROBE) % self.vocabulary
        try:
            own = inner(input_ids=rows.to(self.device), use_cache=False).logits.float()
            for row, length in enumerate((PROBE - 1, PROBE - 3)):
                self.step(row, [0], [rows[row, :length].tolist()], [None])
            ours = self.step(
                0, [PROBE - 1, PROBE - 3], [[int(rows[0, -1])], [int(rows[1, -3])]], [None, None]
            ).float()
        except (AttributeError, TypeError, IndexError, RuntimeError) as error:
            raise ValueError(f"{name} cannot write with this engine's keys and values: {error}") from error
        wanted = torch.stack([own[0, -1], own[1, -3]])
        spread = wanted - wanted.mean(dim=1, keepdim=True)
        if not (ours - wanted).norm() <= 0.1 * spread.norm():  # rounding is far less
            raise ValueError(
                f"{name} computes something else with this engine's keys and values than by itself"
            )
