"""Lightning's accelerator on Trainium: each process has one logical NeuronCore, which the runtime has chosen."""

import torch
from pytorch_lightning.accelerators import Accelerator


class NeuronCoreAccelerator(Accelerator):
    """A subclass names the device in `get_parallel_devices`."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing: making the process groups sets it up, and must be the first use of it."""

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: int) -> int:
        return devices

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "neuron"
