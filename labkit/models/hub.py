"""Is the hub there? Asked once and briefly, because each of its own requests is repeated for up to half a minute."""

import threading

SECONDS = 5.0  # to wait for the answer, which takes a tenth of one where there is a network


def is_reachable() -> bool:
    """Does the hub answer, with whatever status, within `SECONDS`? False if HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return False
    answers: list[int] = []

    def ask() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=SECONDS).status_code)
        except Exception:  # of the many kinds that a network can raise, each means no
            return

    # a thread, because looking up a name has no time limit of its own
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return bool(answers)
