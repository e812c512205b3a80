"""Stands in for AWS's packages that need a device (torch_neuronx, libneuronxla, neuronxcc, nki), so that NxD is usable.

Everything that is not defined here is an inert MagicMock. Call `install` before any part of NxD is imported.
NEURON_PLATFORM_TARGET_OVERRIDE (trn1 | trn2) is the hardware that NxD detects.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from unittest.mock import MagicMock

import torch


class FakeModule(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        mock = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, mock)
        return mock


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, modules):
        self.modules = modules
        self.roots = {name.split(".")[0] for name in modules}

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in self.roots:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return FakeModule(spec.name)

    def exec_module(self, module):
        vars(module).update(self.modules.get(module.__name__, {}))


class CollectivesConfig:
    def __init__(self, replica_groups=None):
        self.replica_groups = replica_groups
        self.rank_src_tgt_pairs = {each: [] for group in replica_groups for each in group}


def get_platform_target(*unused):
    return os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")


MODULES = {
    "libneuronxla": {},
    "nki": {},
    "nkilib": {},
    "torch_neuronx.utils": {"get_platform_target": get_platform_target, "SUPPORTED_TYPES": {}},
    "torch_neuronx.utils.utils": {"get_platform_target": get_platform_target, "SUPPORTED_TYPES": {}},
    "neuronxcc.nki._pre_prod_kernels.collectives": {"CollectivesConfig": CollectivesConfig},
    "neuronxcc.nki._private_kernels.collectives": {"CollectivesConfig": CollectivesConfig},
}


class NeuronClasses:
    """torch.classes.neuron, where NxD looks for the types of the runtime."""

    def __getattr__(self, name):
        kind = type(name, (), {})
        setattr(self, name, kind)
        return kind


def install(more_modules=None):
    """Let imports of these packages find the stand-ins. more_modules: further ones, with what they define."""
    sys.meta_path.insert(0, Finder(MODULES | (more_modules or {})))
    torch.classes.neuron = NeuronClasses()
