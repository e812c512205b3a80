"""The decoder on ranks that are threads: its shards, and the loss and gradients of a packed row."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from trnlora.backends.torch import TorchBackend, pack_frozen_weights, run_as_threads, thread_backends
from trnlora.backends.torch_static import StaticTorchBackend, compile_model
from trnlora.model.config import ModelConfig
from trnlora.model.decoder import DecoderLM
from trnlora.model.lora import add_lora, draw_dropout, whole_weights
from trnlora.model.targets import adapter_tensors
from trnlora.params import Convert, Lora
from trnlora.training.initial_adapter import set_adapter
from trnlora.weights.nxd_layout import Slice, kv_replica_groups, shard_slices


def conversion(tp_size: int, kv_size_multiplier: int, hw_backend: str = "trn2") -> Convert:
    return Convert(
        hw_backend=hw_backend,  # type: ignore[arg-type]  # pydantic checks it
        tp_size=tp_size,
        kv_size_multiplier=kv_size_multiplier,
        max_logits_diff=1.0e-4,
        buffer_mib=1,
    )


def assemble(weights: dict[str, torch.Tensor], slices: list[Slice]) -> torch.Tensor:
    parts = [
        weights[s.hf_key] if s.dim is None else weights[s.hf_key].narrow(s.dim, s.start, s.stop - s.start)
        for s in slices
    ]
    return torch.cat(parts, dim=slices[0].dim or 0).contiguous()


def shards_of(folder: Path, config: ModelConfig, convert: Convert) -> list[dict[str, torch.Tensor]]:
    weights = load_file(folder / "model.safetensors")
    return [
        {name: assemble(weights, slices) for name, slices in shard_slices(config, convert, rank).items()}
        for rank in range(convert.tp_size)
    ]


def packed(lengths: list[int], seq_len: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """One packed row of random documents, the first half of each masked."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (1, seq_len), generator=generator)
    labels, positions = ids.clone(), torch.zeros_like(ids)
    documents = torch.zeros_like(ids)
    start = 0
    for number, length in enumerate(lengths, 1):
        documents[0, start : start + length] = number
        positions[0, start : start + length] = torch.arange(length)
        labels[0, start : start + length // 2] = -100
        start += length
    labels[documents == 0] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "document_ids": documents}


def sharded_gradients(
    folder: Path,
    convert: Convert,
    lora: Lora,
    row: dict[str, torch.Tensor],
    recompute: bool = False,
    make: Callable[..., TorchBackend] = TorchBackend,
    pack: torch.dtype | None = None,
    only_needed: bool = False,
    row_multiple: int = 1,
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """The loss of one packed row, and every rank's adapter and gradients.

    pack: in which dtype to pack the frozen weights, if at all. only_needed: compute only the tokens that are needed,
    padded to a multiple of row_multiple.
    make: of a backend, given the group of all ranks and that of the ranks with the same KV heads.
    B is random, otherwise A has no gradient. Both are small: a large adapter saturates attention, and then the
    gradients are mostly rounding errors.
    """
    config = ModelConfig.from_folder(folder)
    shards = shards_of(folder, config, convert)
    generator = torch.Generator().manual_seed(5)
    values = [
        (tensor, 0.05 * torch.randn(tensor.shape, generator=generator)) for tensor in adapter_tensors(config, lora)
    ]
    backends = thread_backends(kv_replica_groups(config, convert), make)
    models = []
    for backend in backends:
        model = DecoderLM.from_shard(config, backend, convert.kv_size_multiplier, shards[backend.tp_rank])
        pack_frozen_weights(model, functools.partial(shards.__getitem__, backend.tp_rank), lambda name: pack)
        add_lora(model, lora)
        model.recompute_layers = recompute
        model.only_needed_tokens, model.row_multiple = only_needed, row_multiple
        set_adapter(model, values, convert)
        if isinstance(backend, StaticTorchBackend):
            compile_model(model)
        models.append(model)

    def work(backend: TorchBackend) -> torch.Tensor:
        model = models[backend.tp_rank]
        draw_dropout(model, 3, row["labels"])
        loss, _ = model.loss(row["input_ids"], row["position_ids"], row["document_ids"], row["labels"])
        loss.backward()
        whole = [weight.grad for weight in whole_weights(model)]
        backend.add_over_ranks([gradient for gradient in whole if gradient is not None])
        return loss.detach()

    losses = run_as_threads(backends, work)
    trainable = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in models]
    adapters = [{n: p.detach() for n, p in each.items()} for each in trainable]
    return losses[0], adapters, [{n: p.grad for n, p in each.items() if p.grad is not None} for each in trainable]
