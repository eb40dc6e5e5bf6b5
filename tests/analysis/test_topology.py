"""Machines by name, and meshes that they can hold."""

import pytest

from causvid_jax.analysis import topology
from causvid_jax.config import ConfigError, ParallelConfig
from causvid_jax.sharding import mesh


@pytest.mark.parametrize("name", ["h100:8*2", "h100", "h100:8x8x8", "v5p", "v5p:4", "v5p:4x", "v9:2x2", "v5p:0x4"])
def test_unknown_machines_are_refused(name):
    with pytest.raises(ConfigError, match="topology is .*; (accepted: KIND:AxB|its sizes)"):
        topology.describe(name)


def test_left_over_devices_go_to_data():
    assert mesh.mesh_sizes(ParallelConfig(data=0, fsdp=2, context=2), 16) == (4, 2, 2, 1)
    assert mesh.mesh_sizes(ParallelConfig(slices=2, data=0, fsdp=4), 16) == (2, 4, 1, 1)


@pytest.mark.parametrize(
    "config,devices,message",
    [
        (ParallelConfig(slices=3), 8, "8 devices cannot be split into so many equal slices"),
        (ParallelConfig(data=0, fsdp=3), 8, "fsdp x context x tensor is 3; it must divide the 8 devices"),
        (ParallelConfig(data=2, fsdp=2), 8, r"8 devices per slice need a product of 8 \(data 4 fits\)"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(config, devices, message):
    with pytest.raises(ConfigError, match=message):
        mesh.mesh_sizes(config, devices)


@pytest.mark.parametrize(
    "name,size,near",
    [("v5p:2x4x4", 32, 32), ("v5p:2x4x4*2", 64, 32), ("v6e:16x16", 256, 256), ("h100:8", 8, 8), ("h200:8x8", 64, 8)],
)
def test_sizes_of_machines(name, size, near):
    machine = topology.parse(name)
    assert (machine.size, machine.ici_size) == (size, near)
