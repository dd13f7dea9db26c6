"""Is anybody there to click?"""

import sys
import types

import pytest

from labkit.lab import interactive


@pytest.fixture
def nowhere(monkeypatch):
    """No variable that says where this runs."""
    for name in (
        "LABKIT_STATIC",
        "JPY_SESSION_NAME",
        "VSCODE_PID",
        "KAGGLE_KERNEL_RUN_TYPE",
        "PYCHARM_HOSTED",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(interactive, "_told", False)
    return monkeypatch


def in_a_kernel(monkeypatch, metadata):
    """As in a kernel whose last request had this metadata."""
    kernel = types.SimpleNamespace(get_parent=lambda channel: {"header": {}, "metadata": metadata})
    shell = types.SimpleNamespace(kernel=kernel)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))


def test_interactive_only_where_somebody_can_click(nowhere):
    assert not interactive.is_interactive()
    nowhere.setenv("JPY_SESSION_NAME", "x")
    assert interactive.is_interactive()
    nowhere.setenv("LABKIT_STATIC", "1")
    assert not interactive.is_interactive()


@pytest.mark.parametrize("yes", ["1", "true", "YES", "on"])
@pytest.mark.parametrize("no", ["0", "False", "no", "off"])
def test_the_variable_is_understood_as_people_write_it(nowhere, yes, no, capsys):
    nowhere.setenv("LABKIT_STATIC", yes)
    assert not interactive.is_interactive()
    nowhere.setenv("LABKIT_STATIC", no)
    assert interactive.is_interactive()
    assert capsys.readouterr().out == "", "whoever has said so needs no word"


def test_nonsense_in_the_variable_is_an_error(nowhere):
    nowhere.setenv("LABKIT_STATIC", "maybe")
    with pytest.raises(ValueError, match="LABKIT_STATIC='maybe' is neither yes .* nor no"):
        interactive.is_interactive()


@pytest.mark.parametrize(("run_type", "clicks"), [("Interactive", True), ("Batch", False)])
def test_kaggle_says_whether_somebody_watches(nowhere, run_type, clicks):
    nowhere.setenv("KAGGLE_KERNEL_RUN_TYPE", run_type)
    assert interactive.is_interactive() is clicks


def test_a_front_end_that_names_its_cells_is_one_wherever_its_kernel_runs(nowhere, capsys):
    """VS Code in WSL or a container sets no variable for the kernel."""
    in_a_kernel(nowhere, {"cellId": "vscode-notebook-cell:/x.ipynb#W0"})
    assert interactive.is_interactive() and capsys.readouterr().out == ""


def test_pycharm_is_one(nowhere):
    in_a_kernel(nowhere, {})
    nowhere.setenv("PYCHARM_HOSTED", "1")
    assert interactive.is_interactive()


def test_a_notebook_that_is_taken_for_headless_is_told_once(nowhere, capsys):
    in_a_kernel(nowhere, {})
    assert not interactive.is_interactive() and not interactive.is_interactive()
    said = capsys.readouterr().out
    assert said.count("LABKIT_STATIC=0") == 1 and "static figures" in said


def test_plain_python_needs_no_word(nowhere, capsys):
    nowhere.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert not interactive.is_interactive() and capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize(("metadata", "clicks"), [({}, False), ({"cellId": "one"}, True)])
def test_a_real_kernel_knows_who_asks(nowhere, metadata, clicks):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        content = dict(
            code="from labkit.lab.interactive import is_interactive; is_interactive()", silent=False
        )
        message = client.session.msg("execute_request", content, metadata=metadata)
        client.shell_channel.send(message)
        while (reply := client.get_iopub_msg(timeout=120))["msg_type"] not in ("execute_result", "error"):
            pass
        assert reply["content"].get("data", reply["content"])["text/plain"] == str(clicks)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
