"""Verify a conversion: the sharded model's logits equal HF's. Holds one layer at a time in memory.

A round trip back to HF would prove nothing: it also succeeds with the wrong order of heads that NxD's converter writes
for trn2. So this runs both models.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from trnlora.model.config import ModelConfig
from trnlora.model.decoder import DecoderLM
from trnlora.model.parallel import Backend
from trnlora.model.tensors import EMBEDDINGS, LM_HEAD
from trnlora.weights.storage import HFCheckpoint, StoredTensor

VOCABULARY_ROWS = 8192  # rows of the head that are in memory at a time


def max_logits_difference(
    folder: Path,
    config: ModelConfig,
    ranks: Sequence[Mapping[str, StoredTensor]],
    kv_size_multiplier: int,
    ids: Tensor,
    run_ranks: Callable[[Callable[[Backend], Tensor]], list[Tensor]],
) -> float:
    """Largest absolute difference between the logits of `ids` (1, T), over the whole vocabulary, in float32.

    folder: the HF folder; ranks: every rank's open shard; run_ranks: calls a function concurrently with each rank's
    backend and returns the results in the order of the ranks. Raises UserError if a shard does not fit the model.
    """
    positions = torch.arange(ids.shape[1])[None]

    @torch.no_grad()
    def rank_logits(backend: Backend) -> Tensor:
        tensors = ranks[backend.tp_rank]
        model = DecoderLM.empty(config, backend, kv_size_multiplier)
        model.check_shard({name: tensor.shape for name, tensor in tensors.items()})
        stream_weights(model, lambda name: tensors[name].read().float())
        return model.logits(model(ids, positions, torch.ones_like(ids)))  # (1, T, V/tp)

    sharded = torch.cat(run_ranks(rank_logits), dim=-1)

    largest = torch.zeros(())
    with HFCheckpoint(folder) as checkpoint:
        hidden = _hf_hidden(folder, checkpoint, ids)
        head = checkpoint[EMBEDDINGS if config.tie_word_embeddings else LM_HEAD]
        for first in range(0, config.vocab_size, VOCABULARY_ROWS):
            rows = slice(first, min(first + VOCABULARY_ROWS, config.vocab_size))
            logits = hidden @ head.read(rows.start, rows.stop).float().T / config.logits_scaling
            largest = torch.maximum(largest, (logits - sharded[..., rows]).abs().max())  # NaN stays NaN
    return largest.item()


@torch.no_grad()
def _hf_hidden(folder: Path, checkpoint: HFCheckpoint, ids: Tensor) -> Tensor:
    """HF's last hidden states (1, T, H) in float32. Reads the weights module by module."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModel

    hf_config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(hf_config, attn_implementation="eager")
    stream_weights(model, lambda name: checkpoint[f"model.{name}"].read().float())
    embeddings = checkpoint[EMBEDDINGS]
    vectors = torch.cat([embeddings.read(token, token + 1) for token in ids[0].tolist()]).float()
    return model(inputs_embeds=vectors[None], use_cache=False).last_hidden_state


def stream_weights(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Load each module's own parameters with `read(full name)` just before it runs, and free them right after."""
    for prefix, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if not names:
            continue

        def load(module: nn.Module, inputs: object, prefix: str = prefix, names: list[str] = names) -> None:
            for name in names:
                setattr(module, name, nn.Parameter(read(f"{prefix}.{name}"), requires_grad=False))

        def drop(module: nn.Module, inputs: object, output: object, names: list[str] = names) -> None:
            for name in names:
                setattr(module, name, nn.Parameter(getattr(module, name).to("meta"), requires_grad=False))

        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop)
