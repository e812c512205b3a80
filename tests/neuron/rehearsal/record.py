"""Run stages/finetune_lora.py and record what every rank computes: RECORD=folder python record.py

Writes  RECORD/RANK.pt: `logits` of the first validation row before the first step (B, T, V/tp); `steps`: for each step
        the loss, the trainable parameters before it and their gradients, summed but not yet clipped;
        `attentions` (backend nxd only): how often the attention of a layer was computed from then on
"""

import os
import runpy
from pathlib import Path

import torch

from trnlora.backends.mkl import settle_vector_math
from trnlora.errors import run
from trnlora.training import module as finetuner
from trnlora.training.recorder import Recorder

main = runpy.run_path(str(Path(__file__).parents[3] / "stages" / "finetune_lora.py"))["main"]


class StageRecorder(Recorder):
    def on_train_start(self) -> None:
        super().on_train_start()
        self.record["attentions"] = 0
        if "NXD_CPU_MODE" in os.environ:
            from trnlora.backends import nxd

            scores = nxd._core_attention

            def counted(*args: torch.Tensor) -> torch.Tensor:
                self.record["attentions"] += 1
                return scores(*args)

            nxd._core_attention = counted

    def on_train_end(self) -> None:
        torch.save(self.record, Path(os.environ["RECORD"]) / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    finetuner.LoraFinetuner = StageRecorder  # type: ignore[misc]
    if "GRAPHS" in os.environ:
        from trnlora.backends import neuron_training

        neuron_training.DEVICE = torch.device("cpu")
    if "RANK" in os.environ:
        settle_vector_math()  # as the torch backend does
    run(main)
