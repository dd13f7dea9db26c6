"""Where things are on disk: in the checkout and the user's cache, unless the environment says otherwise."""

from pathlib import Path

from platformdirs import user_cache_dir

from labkit.paths import cache_folder, data_folder


def test_the_data_is_in_the_checkout_unless_labkit_data_says_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("LABKIT_DATA", raising=False)
    assert data_folder() == Path(__file__).resolve().parent.parent / "data"
    assert (data_folder() / "tiny-llama" / "model.safetensors").is_file()
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    assert data_folder() == tmp_path


def test_models_are_kept_in_the_users_cache_unless_labkit_cache_says_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    for unset in (lambda: monkeypatch.setenv("LABKIT_CACHE", ""), lambda: monkeypatch.delenv("LABKIT_CACHE")):
        unset()
        assert cache_folder() == Path(user_cache_dir("labkit"))
