"""The metadata of a GGUF file, read so that nothing in it is passed over.

Each key that a reader asks for is crossed off. What describes the model and is left at the end is something that
the reader does not know: the file is refused by the name of the key, since its numbers might depend on it.
"""

from collections.abc import Iterable

NOTHING = object()


class Metadata:
    """Keys and values of a file, and which of them have been read.

    Args:
        values: key → value.
        file: its name, for messages.
    """

    def __init__(self, values: dict[str, object], file: str):
        self.values, self.file = values, file
        self.read: set[str] = set()

    def look(self, key: str, default: object = NOTHING):
        """The value of `key`, or `default` if there is none, without crossing it off.

        Raises:
            ValueError: there is neither.
        """
        value = self.values.get(key, default)
        if value is NOTHING:
            raise self.refusal(f"it has no {key!r}, without which it says too little about the model")
        return value

    def take(self, key: str, default: object = NOTHING):
        """The value of `key`, crossed off; see `look`."""
        self.read.add(key)
        return self.look(key, default)

    def expect(self, key: str, allowed: object, why: str) -> None:
        """Cross off `key`, whose value, if there is one, must be `allowed` (or one of a tuple).

        Raises:
            ValueError: another value; `why` says what is amiss.
        """
        choices = allowed if isinstance(allowed, tuple) else (allowed,)
        value = self.take(key, choices[0])
        if value not in choices:
            raise self.refusal(f"{key}={value!r}: {why}")

    def refuse_rest(self, prefixes: tuple[str, ...]) -> None:
        """Raise a `ValueError` if a key that begins with one of `prefixes` was never asked for."""
        rest = sorted(key for key in self.values if key.startswith(prefixes) and key not in self.read)
        if rest:
            raise self.refusal(f"it sets {', '.join(rest)}, of which this reader does not know the meaning")

    def cross_off(self, keys: Iterable[str]) -> None:
        """Take note of keys that change nothing in what is read."""
        self.read.update(keys)

    def refusal(self, why: str) -> ValueError:
        """The error to raise when the file cannot be read."""
        return ValueError(f"{self.file} cannot be read: {why}")
