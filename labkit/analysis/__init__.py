"""What training changed: updates, their spectra and subspaces, each beside a control."""

from labkit.analysis.subspace import add_subspace, matching_lr
from labkit.analysis.summary import effect_numbers, spectral_numbers
from labkit.analysis.updates import Factored, find_updates, linear_layers, with_update

__all__ = [
    "Factored",
    "add_subspace",
    "effect_numbers",
    "find_updates",
    "linear_layers",
    "matching_lr",
    "spectral_numbers",
    "with_update",
]
