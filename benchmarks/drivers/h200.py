"""Compiles for an H200 on a machine without a GPU: XLA's CUDA compiler needs no device.

It measures no time, but shows what a program launches, and its memory. Which matrix product would
be the fastest cannot be tried without a device, so autotuning is off; how many there are is known.
Needs `jax[cuda12]`. Import it before JAX.
"""

import os
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# From NVIDIA's data sheet of the H200 and the CUDA programming guide (compute capability 9.0).
_H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}
"""


def compile_for_gpu(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)` compiled for an H200; `args` are trees of arrays, or of their shapes."""
    jax.devices()  # starts JAX, and with it the compilers of its plugins
    topology = topologies.get_topology_desc(
        "1x1x1", platform="cuda", target_config=_H200, topology="1x1x1"
    )
    there = SingleDeviceSharding(topology.devices[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), args)
    return jax.jit(fn).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()
