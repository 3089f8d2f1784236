"""Models are looked for on the Hub before anything is loaded."""

from __future__ import annotations

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from forgetfilter_callback.data.source_paths import check_hub_model
from forgetfilter_callback.data.tokenizers import check_decoder_only
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


@pytest.mark.parametrize("error", [RepositoryNotFoundError, HfHubHTTPError])
def test_only_a_missing_model_is_an_error_of_the_hub(error, tmp_path, monkeypatch):
    """A mirror can have the files without the API that describes models."""

    def model_info(name, timeout):
        raise error("404 Client Error.", response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    if error is HfHubHTTPError:
        check_hub_model("owner/modle")
        return
    with pytest.raises(DataError, match="the Hub has no such model, or it is private") as raised:
        check_hub_model("owner/modle")
    assert "network" not in str(raised.value)


def test_an_adapter_without_a_base_model_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
    with pytest.raises(DataError, match="does not name its base model"):
        check_decoder_only(str(tmp_path))
