"""Absolute paths and Hub ids."""

from __future__ import annotations

from forgetfilter_callback.utils.paths import absolute_path_or_hub_id


def test_paths_become_absolute_and_hub_ids_are_unchanged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert absolute_path_or_hub_id("model") == str(tmp_path / "model")
    assert absolute_path_or_hub_id("org/model") == "org/model" and absolute_path_or_hub_id("") == ""
