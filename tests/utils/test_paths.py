"""Absolute paths, Hub ids and names of models."""

from __future__ import annotations

import pytest

from forgetfilter_callback.utils.paths import absolute_path_or_hub_id, short_model_name


def test_paths_become_absolute_and_hub_ids_are_unchanged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert absolute_path_or_hub_id("model") == str(tmp_path / "model")
    assert absolute_path_or_hub_id("org/model") == "org/model" and absolute_path_or_hub_id("") == ""


HASH = "12fd25f77366fa6b3b4b768ec3050bf629380bac"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (f"/home/me/.cache/huggingface/hub/models--org--my-model/snapshots/{HASH}", "org/my-model"),
        (f"C:\\Users\\me\\hub\\models--gpt2\\snapshots\\{HASH}", "gpt2"),
        (f"/models/llama/{HASH}", "llama"),
        ("/data/models/llama-3-8b", "llama-3-8b"),
        ("/data/models/llama-3-8b/", "llama-3-8b"),
        ("/runs/first/checkpoint-500", "first/checkpoint-500"),
        ("runs/first/checkpoint-500", "first/checkpoint-500"),
        ("org/model", "org/model"),
        ("tiny", "tiny"),
        ("", ""),
    ],
)
def test_models_have_short_names(name, short):
    assert short_model_name(name) == short
