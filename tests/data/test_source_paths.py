"""Models are looked for on the Hub before anything is loaded."""

from __future__ import annotations

import huggingface_hub
import pytest

from forgetfilter_callback.data.source_paths import check_hub_model
from forgetfilter_callback.errors import DataError


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json", "tokenizer_config.json"])
def test_what_is_in_the_cache_needs_no_network(file, tmp_path, monkeypatch):
    cached = tmp_path / "models--owner--model" / "snapshots" / "revision"
    cached.mkdir(parents=True)
    (cached / file).write_text("{}")
    (cached.parents[1] / "refs").mkdir()
    (cached.parents[1] / "refs" / "main").write_text("revision")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    check_hub_model("owner/model")
    with pytest.raises(DataError, match="The tokenizer 'owner/other' cannot be loaded"):
        check_hub_model("owner/other", "tokenizer")
