"""LoRA on the decoder's linear layers: layers over a backend's parallel layers, with NxD's parameter names.

Source: NxD 0.18 (SDK 2.29), modules/lora/tp_layer.py. `trnlora.model.targets` lists the tensors and how they are cut.
The adapter is float32 whatever the model's dtype. Every backend uses these layers, so an adapter is the same on each.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trnlora.model.decoder import IGNORED, MLP, Attention, DecoderLM, next_tokens
from trnlora.model.targets import peft_modules
from trnlora.params import Lora


class LoraLayer(nn.Module):
    """base(x) + scaling · B(A(dropout(x)))."""

    lora_A: nn.Module
    lora_B: nn.Module

    def __init__(self, base_layer: nn.Module, input_size: int, model: DecoderLM, lora: Lora):
        """input_size: of the whole layer."""
        super().__init__()
        self.backend = model.backend
        self.tp_rank, self.tp_size = model.backend.tp_rank, model.backend.tp_size
        self.input_size = input_size
        self.base_layer = base_layer
        self.r = lora.r
        self.scaling = lora.scaling
        self.dropout = min(round(lora.lora_dropout * 2**16), 2**16 - 1) / 2**16  # what the words can draw
        self.words: tuple[Tensor, Tensor] | None = None  # by `draw_dropout`

    def dropped(self, x: Tensor) -> Tensor:
        """x (…, inputs), with values set to 0 at random while training; `scale` makes up for them.

        x may be this rank's part of the inputs or, with sequence parallelism, of the tokens. The mask is that part of
        the whole one, so the losses are those of any other cut, unless ranks hold the inputs in another order: o_proj
        on trn1 with copies of KV heads.
        """
        if not self.training or self.dropout == 0:
            return x
        assert self.words is not None, "draw_dropout comes before a forward pass"
        rows, columns = self.words
        tokens, width = x.shape[-2:]
        if tokens < rows.shape[-1]:
            rows = rows.narrow(-1, self.tp_rank * tokens, tokens)
        if width < columns.shape[-1]:
            columns = columns.narrow(-1, self.tp_rank * width, width)
        return x.masked_fill(dropout_mask(rows, columns, self.dropout), 0)

    @property
    def scale(self) -> float:
        """The factor on B(A(dropped x))."""
        return self.scaling / (1 - self.dropout) if self.training else self.scaling

    def adds_in_place(self, x: Tensor) -> bool:
        """Whether `in_place` computes the layer for this input."""
        is_dropped = self.training and self.dropout > 0
        return self.backend.adds_lora_in_place and x.dtype == torch.float32 and not is_dropped

    def in_place(self, x: Tensor, b: Sequence[Tensor | None]) -> Any:
        """base(x) + scaling · B(A(x)) as one operation. b: for each output, or None if it is not trained."""
        base_layer: Any = self.base_layer
        return base_layer.with_lora(x, self.scaling, self.lora_A.get_parameter("weight"), b)

    def whole_weights(self) -> Iterator[nn.Parameter]:
        """The trained weights that are whole on every rank. Each rank computes a part of their gradients."""
        raise NotImplementedError


class _LoraFusedLinear(LoraLayer):
    """A layer with several outputs that are cut by rows: A is whole on every rank, B is cut as the base weight is.

    trained: for each output, whether LoRA trains it. lora_A: one matrix that the outputs share, or one for each.
    """

    def __init__(self, base_layer: nn.Module, model: DecoderLM, trained: list[bool], lora: Lora):
        super().__init__(base_layer, model.config.hidden_size, model, lora)
        self.trained = trained
        self.shared = lora.share_a or sum(trained) == 1
        self.lora_A = nn.Linear(self.input_size, lora.r if self.shared else lora.r * sum(trained), bias=False)

    def whole_weights(self) -> Iterator[nn.Parameter]:
        yield from self.lora_A.parameters()

    def low(self, x: Tensor) -> Tensor:
        """scale · A(dropped x): (…, r), or (…, r · number of trained outputs)."""
        return self.lora_A(self.dropped(x.float())) * self.scale


class LoraGQAQKVParallelLinear(_LoraFusedLinear):
    """q, k and v. B holds a weight for each; those that are not trained stay zero, are frozen and are not saved."""

    def __init__(self, base_layer: nn.Module, model: DecoderLM, trained: list[bool], lora: Lora):
        config = model.config
        super().__init__(base_layer, model, trained, lora)
        sizes = (config.q_size, config.kv_size)
        self.lora_B = model.backend.gqa_qkv_linear(lora.r, sizes, model.kv_size_multiplier)
        self.share = model.backend.share_input(self.base_layer, self.lora_B)
        for letter, is_trained in zip("qkv", trained, strict=True):
            nn.init.zeros_(self.lora_B.get_parameter(f"weight_{letter}").requires_grad_(is_trained))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.share(x)
        if self.adds_in_place(x):
            weights = (self.lora_B.get_parameter(f"weight_{letter}") for letter in "qkv")
            b = [weight if is_trained else None for weight, is_trained in zip(weights, self.trained, strict=True)]
            return self.in_place(x, b)
        low = self.low(x)
        inputs: Tensor | tuple[Tensor, ...] = low
        if not self.shared:
            parts = iter(low.split(self.r, dim=-1))
            inputs = tuple(next(parts) if is_trained else low[..., : self.r] for is_trained in self.trained)
        outputs = zip(self.base_layer(x), self.lora_B(inputs), self.trained, strict=True)
        return tuple(y + delta.to(y.dtype) if is_trained else y for y, delta, is_trained in outputs)


class LoraColumnParallelLinear(_LoraFusedLinear):
    """gate and up, each half of the base layer's output."""

    def __init__(self, base_layer: nn.Module, model: DecoderLM, trained: list[bool], lora: Lora):
        config = model.config
        super().__init__(base_layer, model, trained, lora)
        self.lora_B = model.backend.column_parallel_linear(lora.r, config.intermediate_size * sum(trained))
        nn.init.zeros_(self.lora_B.get_parameter("weight"))
        self.share = model.backend.share_input(self.base_layer, self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        x = self.share(x)
        if self.adds_in_place(x):
            weight = self.lora_B.get_parameter("weight")
            if self.shared and all(self.trained):
                return self.in_place(x, [weight])
            parts = iter(weight.chunk(sum(self.trained)))
            return self.in_place(x, [next(parts) if is_trained else None for is_trained in self.trained])
        low = self.low(x)
        delta = self.lora_B(low if self.shared else tuple(low.split(self.r, dim=-1)))
        y = self.base_layer(x)
        if not all(self.trained):
            delta = F.pad(delta, (0, delta.shape[-1]) if self.trained[0] else (delta.shape[-1], 0))
        return y + delta.to(y.dtype)


class LoraRowParallelLinear(LoraLayer):
    """o or down: A is cut by columns as the base weight is. B is whole."""

    def __init__(self, base_layer: nn.Module, input_size: int, model: DecoderLM, lora: Lora):
        super().__init__(base_layer, input_size, model, lora)
        self.lora_A = model.backend.row_parallel_linear(input_size, lora.r)
        self.lora_B = nn.Linear(lora.r, model.config.hidden_size, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.complete = model.backend.share_output(self.base_layer, self.lora_A)

    def whole_weights(self) -> Iterator[nn.Parameter]:
        yield from self.lora_B.parameters()

    def forward(self, x: Tensor) -> Tensor:
        if self.adds_in_place(x):
            return self.complete(self.in_place(x, [self.lora_B.get_parameter("weight")]))
        y = self.base_layer(x)
        low = self.lora_A(self.dropped(x.float())) * self.scale
        return self.complete(y + self.lora_B(low).to(y.dtype))


def add_lora(model: DecoderLM, lora: Lora) -> None:
    """Wrap the targets of every layer in place, on the CPU. lora_B is 0, and lora_A has no values yet.

    See `trnlora.training.initial_adapter`.
    """
    config = model.config
    trained = set(peft_modules(lora.target_modules))

    def flags(*names: str) -> list[bool]:
        return [name in trained for name in names]

    for module in list(model.modules()):
        if isinstance(module, Attention):
            if any(qkv := flags("q_proj", "k_proj", "v_proj")):
                module.qkv_proj = LoraGQAQKVParallelLinear(module.qkv_proj, model, qkv, lora)
            if "o_proj" in trained:
                module.o_proj = LoraRowParallelLinear(module.o_proj, config.q_size, model, lora)
        elif isinstance(module, MLP):
            if any(gate_up := flags("gate_proj", "up_proj")):
                module.gate_up_proj = LoraColumnParallelLinear(module.gate_up_proj, model, gate_up, lora)
            if "down_proj" in trained:
                module.down_proj = LoraRowParallelLinear(module.down_proj, config.intermediate_size, model, lora)


def whole_weights(model: DecoderLM) -> list[nn.Parameter]:
    """The trained weights that are whole on every rank, in the order of the model."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return [weight for layer in layers for weight in layer.whole_weights()]


def draw_dropout(model: DecoderLM, seed: int, labels: Tensor) -> None:
    """Draw the random words of all layers' dropout masks for the next forward and backward pass.

    seed: the same on all ranks of a replica. labels (B, T): of the micro-batch. The masks depend on nothing else: not
    on the backend, the device, the cut or how much padding was cut off. A recomputed layer has the same ones.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and layer.dropout > 0]
    if not layers:
        return
    generator = torch.Generator().manual_seed(seed)
    columns = random_words((3 * sum(layer.input_size for layer in layers),), generator)
    rows = random_words((*labels.T.shape, len(layers), 3), generator)
    if model.backend.static_shapes:
        columns, rows = columns.int() << 16, rows.int() << 16  # an accelerator may not have int16
    rows = rows.permute(2, 3, 1, 0).contiguous().to(labels.device)  # (layers, 3, B, T)
    parts = columns.to(labels.device).split([3 * layer.input_size for layer in layers])
    for layer, own_rows, own_columns in zip(layers, rows, parts, strict=True):
        layer.words = own_rows, own_columns.view(3, -1)
    if not model.backend.static_shapes:
        labelled = next_tokens(labels) != IGNORED
        for later in model.layers_of_labelled_tokens():
            if isinstance(later, LoraLayer) and later.words:
                all_rows, own_columns = later.words
                later.words = all_rows[:, labelled], own_columns


def random_words(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """int16, uniform. Four from each word of 64 bits: a CPU draws that as fast as one of 16."""
    size = math.prod(shape)
    wide = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return wide.view(torch.int16)[:size].view(shape)


def dropout_mask(rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """A bool mask (…, inputs) whose values are True with probability `p`, a multiple of 2⁻¹⁶.

    rows (3, …) and columns (3, inputs): random words, int16, or int32 with zeros in the lower half. Any three values of
    the mask are independent. Made of AND, XOR and shifts, which are exact on every device; its generator is not needed.
    """
    row, column = rows[..., None], columns.view(3, *[1] * (rows.dim() - 1), -1)
    words = row[0] & column[0]
    words ^= row[1] & column[1]
    words ^= row[2]
    words ^= column[2]
    # So far a bit of a row is one of eight. Bits take up lower ones; different words stay different.
    for shift, other in ((1, 5), (2, 7)):
        words ^= (words << shift) & (words << other)
    return words < round((p - 0.5) * 2 ** (8 * words.itemsize))


def adapter_state(model: DecoderLM) -> dict[str, Tensor]:
    """This rank's part of the adapter under NxD's keys."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
