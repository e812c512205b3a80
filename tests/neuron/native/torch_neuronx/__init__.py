"""A stand-in for torch_neuronx on a CPU: the names of its device, process groups and compiler, and nothing else.

The process groups are gloo's. The compiler runs each graph as it is, after AOTAutograd, and appends a line to
GRAPHS/RANK.txt: the number of its operations and whether it has collectives. It refuses what Trainium does not have:
64-bit values and shapes that vary. Tensors stay on the CPU: record.py gives `neuron_training` that device.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch._dynamo import register_backend
from torch._dynamo.backends.common import aot_autograd
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("neuron")
dist.Backend.register_backend(
    "neuron", lambda store, rank, size, timeout: dist.ProcessGroupGloo(store, rank, size, timeout), devices=["cpu"]
)


def _compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    nodes = list(graph.graph.nodes)
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            assert value.dtype not in (torch.int64, torch.float64), f"{node} is {value.dtype}"
            assert all(isinstance(size, int) for size in value.shape), f"{node} has the shape {value.shape}"
    if folder := os.environ.get("GRAPHS"):
        collectives = sum("_c10d_functional.all_reduce" in str(node.target) for node in nodes)
        with (Path(folder) / f"{os.environ['RANK']}.txt").open("a") as file:
            file.write(f"{len(nodes)} {collectives}\n")
    return make_boxed_func(graph.forward)


register_backend(name="neuron", compiler_fn=aot_autograd(fw_compiler=_compile_graph))
