"""The public names, what importing them costs, and that objects with arrays can be compared."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
from helpers import sample_ids, two_populations

import forgetfilter_callback
from forgetfilter_callback import FilterConfig
from forgetfilter_callback.data.token_sample import sample_of_inputs
from forgetfilter_callback.filtering.filter_by_values import filter_by_values
from forgetfilter_callback.scoring.packing import lay_out, plan_packs
from forgetfilter_callback.scoring.scores import Scores


PUBLIC_NAMES = [
    "FilterConfig",
    "FilterResult",
    "FilteredSFTTrainer",
    "FilteredTrainer",
    "ForgetFilter",
    "ForgetFilterError",
    "ForgetTracker",
    "ReviewQueue",
    "RunConfig",
    "Trace",
    "encode_rows",
    "filtered",
    "find_forgotten",
    "load_rows",
    "run",
    "score_checkpoints",
    "to_dataset",
]


def test_the_public_names_do_not_change_by_accident():
    assert sorted(forgetfilter_callback.__all__) == sorted(PUBLIC_NAMES)


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_public_name_can_be_imported(name):
    found = getattr(forgetfilter_callback, name)
    assert found.__name__ == name and found.__module__.startswith("forgetfilter_callback.")
    assert found.__doc__


def test_star_import_gives_exactly_the_public_names():
    namespace: dict[str, object] = {}
    exec("from forgetfilter_callback import *", namespace)
    assert sorted(namespace.keys() - {"__builtins__"}) == sorted(PUBLIC_NAMES)


def test_the_version_is_that_of_the_installed_package():
    assert forgetfilter_callback.__version__ == version("forgetfilter-callback")


def test_dir_lists_the_public_names_and_the_version():
    assert dir(forgetfilter_callback) == sorted([*PUBLIC_NAMES, "__version__"])


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'forgetfilter_callback' has no attribute 'FilterTrainer'"):
        forgetfilter_callback.FilterTrainer  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'FilterTrainer'"):
        from forgetfilter_callback import FilterTrainer  # noqa: F401


@pytest.mark.parametrize(
    "code",
    [
        "import forgetfilter_callback",
        "import forgetfilter_callback; forgetfilter_callback.__version__; dir(forgetfilter_callback)",
        "import forgetfilter_callback.cli.commands",
        "import forgetfilter_callback.measures.names",
        "from forgetfilter_callback import FilterConfig, ForgetFilterError",
    ],
)
def test_light_imports_do_not_load_torch(code):
    """`forgetfilter --help` must answer at once: torch and transformers take seconds to import."""
    check = "import sys; print(*sorted({'torch', 'transformers', 'trl', 'peft'} & sys.modules.keys()))"
    process = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=True, env=os.environ
    )
    assert process.stdout.strip() == ""


@pytest.fixture(params=["EncodedRows", "FilterResult", "Scores", "Pack", "Layout", "Sample"])
def array_object(request, rows):
    """An instance of each dataclass that holds arrays."""
    values, _ = two_populations(0.25, count=40)
    packs = plan_packs(rows, longest=None)
    objects = [
        rows,
        filter_by_values(sample_ids(40), values, FilterConfig("loss")),
        Scores(np.zeros(3, np.float32), np.zeros((1, 2), np.float16)),
        packs[0],
        lay_out(rows, packs[:2]),
        sample_of_inputs([5, 6], [5, 6]),
    ]
    return next(each for each in objects if type(each).__name__ == request.param)


def test_objects_that_hold_arrays_compare_by_identity(array_object):
    """Comparing the arrays would raise "truth value of an array is ambiguous", and hashing them a `TypeError`."""
    twin = copy.copy(array_object)
    assert array_object == array_object and array_object != twin
    assert (array_object in [twin]) is False and array_object in [twin, array_object]
    assert hash(array_object) == hash(array_object) and len({array_object, twin, array_object}) == 2
