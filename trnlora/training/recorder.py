"""A training that records what a rank computes, to compare it with another backend's."""

from typing import Any

import torch
from torch import Tensor

from trnlora.training.module import LoraFinetuner

# AdamW changes a parameter by about lr · gradient / (|gradient| + eps). With the usual eps of 1e-8, it makes a full
# step even if the gradient is so small that its sign is a rounding error.
EPS = 1e-3


class Recorder(LoraFinetuner):
    """Records what this rank computes: logits before the first step; of each step the loss, gradients and weights."""

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.model is not None
        backend = self.model.backend
        rows = (self.validation_rows[name][:1] for name in ("input_ids", "position_ids", "document_ids"))
        self.model.eval()
        with torch.no_grad():
            logits = self.model.logits(self.model(*(row.to(self.device, backend.id_dtype) for row in rows)))
        self.model.train()
        self.record: dict[str, Any] = {"logits": _copy(logits), "steps": []}

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        for group in configured["optimizer"].param_groups:
            group["eps"] = EPS
        return configured

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Before clipping: gradients are summed over ranks and replicas."""
        parameters = self._trainable()
        weights = {name: _copy(parameter) for name, parameter in parameters.items()}
        gradients = {
            name: _copy(parameter.grad) for name, parameter in parameters.items() if parameter.grad is not None
        }
        super().configure_gradient_clipping(*args, **kwargs)
        self.record["steps"].append({"loss": self.train_loss, "weights": weights, "gradients": gradients})


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
