from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from accelerate.utils import DistributedType
from helpers import tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module

from forgetfilter_callback.utils import parallelism
from forgetfilter_callback.utils.distributed import shard_indices
from forgetfilter_callback.utils.parallelism import (
    leaders_of_processes,
    need_equal_inputs,
    shares_weights,
    why_unsupported,
)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_a_model_on_one_process():
    model = tiny_llama()
    assert not shares_weights(model) and not need_equal_inputs(model) and why_unsupported(model) is None


@pytest.mark.parametrize("name", ["tp", None])
def test_tensor_parallelism(name, process_group):
    model = distribute_module(tiny_llama(), init_device_mesh("cpu", (1,), mesh_dim_names=name and (name,)))
    assert shares_weights(model) and need_equal_inputs(model) and why_unsupported(model) is None
    assert leaders_of_processes(model) == [0]


@pytest.mark.parametrize("names", [None, ("rows",), ("dp_replicate", "dp_shard")])
def test_data_parallelism(names, process_group):
    mesh = init_device_mesh("cpu", (1,) * len(names or "1"), mesh_dim_names=names)
    model = fully_shard(tiny_llama(), mesh=mesh)
    assert shares_weights(model) and not need_equal_inputs(model) and why_unsupported(model) is None


@pytest.mark.parametrize(("names", "reason"), [(("ep",), "the mesh dimension 'ep'"), (("rows", "columns"), "'columns")])
def test_unknown_dimensions_are_refused(names, reason, process_group):
    model = distribute_module(tiny_llama(), init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names))
    assert reason in str(why_unsupported(model))


def test_dimensions_without_names_are_refused(process_group):
    model = distribute_module(tiny_llama(), init_device_mesh("cpu", (1, 1)))
    assert "without names" in str(why_unsupported(model))


@pytest.mark.parametrize(
    ("size", "reason"), [(1, None), (2, "DeepSpeed's automatic tensor parallelism (`autotp_size`)")]
)
def test_tensor_parallelism_of_deepspeed_is_refused(size, reason, monkeypatch):
    plugin = SimpleNamespace(deepspeed_config={"tensor_parallel": {"autotp_size": size}}, zero_stage=2)
    state = SimpleNamespace(parallelism_config=None, deepspeed_plugin=plugin)
    monkeypatch.setattr(parallelism, "AcceleratorState", lambda: state)
    monkeypatch.setattr(
        parallelism, "PartialState", lambda: SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    )
    assert str(reason) in str(why_unsupported(tiny_llama()))


@pytest.mark.parametrize(
    ("leaders", "rank", "expected"),
    [([0, 0], 1, [0, 1, 2, 3, 4]), ([0, 1, 0, 1], 3, [3, 4]), ([0, 0, 2, 2], 1, [0, 1, 2])],
)
def test_processes_with_one_leader_get_one_shard(leaders, rank, expected, monkeypatch):
    monkeypatch.setattr("forgetfilter_callback.utils.distributed.rank_and_world_size", lambda: (rank, len(leaders)))
    assert shard_indices(5, leaders).tolist() == expected
