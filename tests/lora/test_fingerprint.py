"""A fingerprint is of the base, whatever is mounted on it."""

from labkit.lora.fingerprint import fingerprint
from labkit.lora.merging import merge
from tests.conftest import make_small_llama
from tests.formats.cases import adapted


def test_fingerprint_does_not_see_adapters_merged_or_not():
    model = adapted()
    assert fingerprint(make_small_llama()) == fingerprint(model)
    assert fingerprint(merge(model)) == fingerprint(make_small_llama())
