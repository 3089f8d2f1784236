"""Error messages for optional dependencies that are not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def requires_extra(extra: str, feature: str) -> Iterator[None]:
    """Wraps the import of optional packages and names the extra that installs them.

    ```python
    with requires_extra("report", "The report"):
        from plotly.offline import get_plotlyjs
    ```

    Args:
        extra (`str`):
            The extra of `forgetfilter-callback` that installs the packages imported in the block.
        feature (`str`):
            The feature that needs them; the error message starts with it.

    Raises:
        ImportError: if a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0].replace("_", "-")
        raise ImportError(
            f'{feature} needs the package {package}: pip install "forgetfilter-callback[{extra}]"', name=error.name
        ) from error
