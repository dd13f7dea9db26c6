"""Where things are on disk: in the checkout and the user's cache, unless the environment says otherwise."""

from pathlib import Path

import pytest
from platformdirs import user_cache_dir

from labkit import paths
from labkit.optim.page_store import FileStore
from labkit.paths import cache_folder, data_folder

CHECKOUT = Path(__file__).resolve().parent.parent
FOLDERS = {"LABKIT_CACHE": cache_folder, "LABKIT_DATA": data_folder}


def test_the_data_is_in_the_checkout_unless_labkit_data_says_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("LABKIT_DATA", raising=False)
    assert data_folder() == CHECKOUT / "data"
    assert (data_folder() / "tiny-llama" / "model.safetensors").is_file()
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    assert data_folder() == tmp_path


def test_models_are_kept_in_the_users_cache_unless_labkit_cache_says_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    for unset in (lambda: monkeypatch.setenv("LABKIT_CACHE", ""), lambda: monkeypatch.delenv("LABKIT_CACHE")):
        unset()
        assert cache_folder() == Path(user_cache_dir("labkit"))


@pytest.mark.parametrize("variable", FOLDERS)
def test_what_a_shell_would_have_expanded_is_expanded(monkeypatch, tmp_path, variable):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("~/models", "$HOME/models", "${HOME}/models"):
        monkeypatch.setenv(variable, given)
        assert FOLDERS[variable]() == tmp_path / "models"


@pytest.mark.parametrize("variable", FOLDERS)
def test_a_relative_folder_is_the_same_one_from_everywhere(monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, "build/models")
    for place in (CHECKOUT, CHECKOUT / "notebooks", tmp_path):
        monkeypatch.chdir(place)
        assert FOLDERS[variable]() == CHECKOUT / "build" / "models"


def test_the_page_store_is_in_the_same_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LABKIT_CACHE", "~/cache")
    store = FileStore()
    store.close()
    assert store.folder == tmp_path / "cache" / "paging"


@pytest.mark.parametrize("variable", FOLDERS)
def test_a_home_that_does_not_exist_is_refused_by_the_name_of_the_setting(monkeypatch, variable):
    monkeypatch.setenv(variable, "~nobody-of-this-name/models")
    with pytest.raises(ValueError, match=f"home folder that this system does not know; set {variable} to"):
        FOLDERS[variable]()


def test_a_user_without_a_home_is_told_to_set_labkit_cache(monkeypatch):
    monkeypatch.delenv("LABKIT_CACHE", raising=False)
    monkeypatch.setattr(paths, "user_cache_dir", lambda _: "~/.cache/labkit")  # what platformdirs then gives
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(ValueError, match="set LABKIT_CACHE to an absolute path"):
        cache_folder()
