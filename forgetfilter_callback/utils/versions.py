"""Installed versions of the libraries that results depend on."""

from __future__ import annotations

from importlib.metadata import version


_PACKAGES = ("forgetfilter-callback", "transformers", "torch", "peft", "datasets")


def library_versions() -> dict[str, str]:
    """Return the installed version of this library and of each library that results depend on."""
    return {package: version(package) for package in _PACKAGES}
