"""Run stages/finetune_lora.py and record what every rank computes: RECORD=folder python record.py

Writes  RECORD/RANK.pt: `logits` of the first validation row before the first step (B, T, V/tp); `steps`: for each step
        the trainable parameters before it and their gradients, reduced over ranks and replicas but not yet clipped;
        `attentions` (backend nxd only): how often the attention of a layer was computed from then on
"""

import os
import runpy
from pathlib import Path
from typing import Any

import torch

from trnlora.backends.mkl import settle_vector_math
from trnlora.errors import run
from trnlora.training import module as finetuner

main = runpy.run_path(str(Path(__file__).parents[3] / "stages" / "finetune_lora.py"))["main"]

# AdamW changes a parameter by about lr · gradient / (|gradient| + eps). With the usual eps of 1e-8, it makes a full
# step even if the gradient is so small that its sign is rounding error, as are lora_A's gradients, which start at 0.
EPS = 1e-3


def copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", copy=True)


class Recorder(finetuner.LoraFinetuner):
    def on_train_start(self) -> None:
        assert self.model is not None
        rows = (self.validation_rows[name][:1] for name in ("input_ids", "position_ids", "document_ids"))
        self.model.eval()
        with torch.no_grad():
            logits = self.model.logits(self.model(*(row.to(self.device, self.model.backend.id_dtype) for row in rows)))
        self.model.train()
        self.record: dict[str, Any] = {"logits": logits.cpu(), "steps": [], "attentions": 0}
        if "NXD_CPU_MODE" in os.environ:
            from trnlora.backends import nxd

            scores = nxd._core_attention

            def counted(*args: torch.Tensor) -> torch.Tensor:
                self.record["attentions"] += 1
                return scores(*args)

            nxd._core_attention = counted

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        for group in configured["optimizer"].param_groups:
            group["eps"] = EPS
        return configured

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        parameters = self._trainable()
        weights = {name: copy(parameter.detach()) for name, parameter in parameters.items()}
        gradients = {name: copy(parameter.grad) for name, parameter in parameters.items()}  # type: ignore[arg-type]
        self.record["steps"].append({"weights": weights, "gradients": gradients})
        super().configure_gradient_clipping(*args, **kwargs)

    def on_train_end(self) -> None:
        torch.save(self.record, Path(os.environ["RECORD"]) / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    finetuner.LoraFinetuner = Recorder  # type: ignore[misc]
    if "GRAPHS" in os.environ:
        from trnlora.backends import neuron_training

        neuron_training.DEVICE = torch.device("cpu")
    if "RANK" in os.environ:
        settle_vector_math()  # as the torch backend does
    run(main)
