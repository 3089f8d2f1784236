"""What is known about a row applies to the rows that are trained on the same tokens."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from forgetfilter_callback.data.identical_rows import places_in


@pytest.mark.parametrize("seed", range(5))
def test_a_row_is_found_by_its_id_or_its_tokens(seed):
    rng = np.random.default_rng(seed)

    def draw(count: int) -> list[str]:
        contents = rng.integers(0, 12, count).tolist()
        return [f"{content}-{contents[:place].count(content)}" for place, content in enumerate(contents)]

    known, wanted = draw(10), [*draw(30), None]
    contents = [id_.partition("-")[0] for id_ in known]
    expected = []
    for id_ in wanted:
        content = id_.partition("-")[0] if id_ else None
        expected.append(known.index(id_) if id_ in known else contents.index(content) if content in contents else None)
    places = places_in(pa.array(wanted), pa.array(known)).to_pylist()
    assert places == expected
    copies = sum(
        id_ is not None and id_ not in known and place is not None for id_, place in zip(wanted, places, strict=True)
    )
    assert copies > 0 and places.count(None) > 1
