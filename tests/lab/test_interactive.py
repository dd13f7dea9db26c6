"""Is anybody there to click?"""

from labkit.lab import interactive


def test_interactive_only_where_somebody_can_click(monkeypatch):
    for name in ("LABKIT_STATIC", "JPY_SESSION_NAME", "VSCODE_PID"):
        monkeypatch.delenv(name, raising=False)
    assert not interactive.is_interactive()
    monkeypatch.setenv("JPY_SESSION_NAME", "x")
    assert interactive.is_interactive()
    monkeypatch.setenv("LABKIT_STATIC", "1")
    assert not interactive.is_interactive()
