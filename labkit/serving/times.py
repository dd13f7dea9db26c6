"""Points in time, in UTC, as the registry records them: text that sorts as the times do."""

from datetime import UTC, datetime, time

FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


def utc_now() -> datetime:
    """The time now. Whatever needs it takes a function like this one, so that a test can say what time it is."""
    return datetime.now(UTC)


def written(when: datetime) -> str:
    """A time as text: "2026-11-29T14:05:00.000000Z".

    Raises:
        ValueError: a time without a zone, which means another moment on another machine.
    """
    if not isinstance(when, datetime) or when.tzinfo is None:
        raise ValueError(f"{when!r} is not a time with a zone; give datetime.now(UTC), or the like")
    return when.astimezone(UTC).strftime(FORMAT)


def read(text: str) -> datetime:
    """The time that `written` wrote."""
    return datetime.strptime(text, FORMAT).replace(tzinfo=UTC)


def understood(text: str, now: datetime) -> datetime:
    """A time as people write it, in UTC unless it says otherwise: a date, a date with a time, or a time of today.

    Args:
        text: "2026-11-29", "2026-11-29T14:05", "2026-11-29 14:05+01:00", "14:05".
        now: which says what today is.

    Raises:
        ValueError: it is none of them.
    """
    try:
        if "-" not in text and ":" in text:
            made = datetime.combine(now.astimezone(UTC).date(), time.fromisoformat(text))
        else:
            made = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a time; give 2026-11-29, 2026-11-29T14:05 or 14:05 (today), in UTC"
        ) from None
    return made.replace(tzinfo=UTC) if made.tzinfo is None else made.astimezone(UTC)
