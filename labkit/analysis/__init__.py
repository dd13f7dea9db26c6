"""What training changed: updates, their spectra and subspaces, each beside a control."""

from labkit.analysis.subspace import add_subspace, matching_lr
from labkit.analysis.summary import effect_numbers, spectral_numbers
from labkit.analysis.updates import linear_layers, with_update

__all__ = [
    "add_subspace",
    "effect_numbers",
    "linear_layers",
    "matching_lr",
    "spectral_numbers",
    "with_update",
]
