"""TODO"""

from __future__ import annotations

from importlib.metadata import version


_VERSIONS_OF = ("forgetfilter-callback", "transformers", "torch", "peft", "datasets")


def library_versions() -> dict[str, str]:
    """Versions of this library and of those that a result depends on."""
    return {name: version(name) for name in _VERSIONS_OF}
