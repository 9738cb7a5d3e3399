"""Llama-type models with LoRA on a CPU: the trunk's forward and backward by hand, with nothing computed or stored that isn't needed.

What it saves over modules and autograd: linear layers with the same input are one matrix product, which takes LoRA's second product
along (its matrix stands beside the weights); attention runs over each continuation's own block; saved activations live in buffers that
are used again; frozen layers below the first adapter keep nothing. Several pairs can be worked on at once from threads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from unstilted.lm.pages import give_back
from unstilted.lm.tree import Block, Span, Tree

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2"})
"""Types whose layers are RMSNorm, rotary attention and SwiGLU with nothing in between."""


CHANGING_ROPE = frozenset({"dynamic", "longrope"})
"""Rotary positions whose frequencies depend on how long the longest conversation of a row is."""


def can_run(model: Any) -> bool:
    """Whether `model` is one of these on a CPU in one plain floating type, with at most plain LoRA without dropout to train."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    config = model.config
    weights = list(model.parameters())
    adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    return (
        config.model_type in MODEL_TYPES
        and config.hidden_act == "silu"
        and not config.attention_dropout
        and config.rope_parameters["rope_type"] not in CHANGING_ROPE
        and len(set(getattr(config, "layer_types", None) or ())) <= 1
        and all(weight.device.type == "cpu" and type(weight) in (Parameter, Tensor) for weight in weights)
        and {weight.dtype for weight in weights} in ({torch.float32}, {torch.float64})
        and all(type(module) is LoraLinear and _is_plain(module) for module in adapters)
        and not any(weight.requires_grad for name, weight in model.named_parameters() if "lora_" not in name)
    )


def _is_plain(module: Any) -> bool:
    """Whether a LoRA layer is base + scale * B A, with neither variant nor second adapter, and not in the base weights already."""
    return (
        type(module.base_layer) is torch.nn.Linear
        and [*module.lora_A] == module.active_adapters == ["default"]
        and not module.lora_variant
        and not module.lora_bias["default"]
        and getattr(module.lora_dropout["default"], "p", 0) == 0
        and not module.merged
    )


def _window(config: Any) -> float:
    """How many positions, its own included, each one sees."""
    if "full_attention" in (getattr(config, "layer_types", None) or ()):
        return float("inf")
    return getattr(config, "sliding_window", None) or float("inf")


@dataclass
class Tape:
    """What one forward keeps for its backward: buffers by (slot, name, width) that serve one row of tokens after another.

    A layer that keeps its activations has a slot of its own; the others, and whatever a layer needs only while it runs, share one.
    """

    n_rows: int = 0
    buffers: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)
    probabilities: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def fit(self, n_rows: int) -> None:
        """Make room for that many rows; everything goes before something larger comes, so that memory doesn't break into pieces."""
        self.probabilities.clear()
        if n_rows > self.n_rows:
            self.buffers.clear()
            self.n_rows = n_rows

    def rows(self, slot: int, name: str, like: Tensor, width: int) -> Tensor:
        """A contiguous (T, width) buffer with any content, T being the rows of `like`."""
        buffer = self.buffers.get((slot, name, width))
        if buffer is None:
            buffer = self.buffers[slot, name, width] = torch.empty(self.n_rows * width, dtype=like.dtype)
        return buffer[: len(like) * width].view(len(like), width)


SHARED = -1
"""The slot of buffers that every layer uses in its turn."""


class Projection:
    """Linear layers that read the same input, and their adapters, as one matrix.

    weight: (N, K + R), the R columns at the end holding scale * lora_B of each layer in its own rows. The input's last R columns hold
    the input times lora_A, so one product gives base and adapter, and one backward product the gradients of both.
    The layers' own weights and biases become views into it and `bias`.
    """

    def __init__(self, parent: Any, *names: str) -> None:
        self.parent, self.modules = parent, {name: getattr(parent, name) for name in names}
        self.bases = [getattr(module, "base_layer", module) for module in self.modules.values()]
        self.adapters = [module if hasattr(module, "lora_A") else None for module in self.modules.values()]
        self.n_in, self.n_out = self.bases[0].in_features, sum(base.out_features for base in self.bases)
        ranks = [adapter.lora_A["default"].weight.shape[0] if adapter else 0 for adapter in self.adapters]
        self.rank = sum(ranks)
        self.out_spans, self.rank_spans = _spans([base.out_features for base in self.bases]), _spans(ranks)
        weights, biases = [base.weight for base in self.bases], [base.bias for base in self.bases if base.bias is not None]
        self.weight = _as_one(weights, self.n_in + self.rank)
        self.bias = _as_one([bias[:, None] for bias in biases], 1)[:, 0] if biases else None
        for base, span in zip(self.bases, self.out_spans, strict=True):
            base.weight.data = self.weight[span.start : span.end, : self.n_in]
            if self.bias is not None:
                base.bias.data = self.bias[span.start : span.end]
        self.a = torch.zeros(self.rank, self.n_in, dtype=self.weight.dtype)
        self._pointers = [weight.data_ptr() for weight in weights]
        self._seen: list[Any] = []
        self.refresh()

    @property
    def parameters(self) -> list[Parameter]:
        """lora_A and lora_B of each adapted layer."""
        return [
            matrix
            for adapter in self.adapters
            if adapter
            for matrix in (adapter.lora_A["default"].weight, adapter.lora_B["default"].weight)
        ]

    @torch.no_grad()
    def refresh(self) -> bool:
        """Take over the adapters' present values; returns whether they have changed. Raises RuntimeError where more than values has."""
        if not self._is_current():
            raise RuntimeError(
                "layers or adapters have been replaced, merged, moved or unfrozen since this scorer was made: make a new one"
            )
        present = [(p._version, p.data_ptr()) for p in self.parameters] + [a.scaling["default"] for a in self.adapters if a]
        if present == self._seen:
            return False
        for adapter, out, rank in zip(self.adapters, self.out_spans, self.rank_spans, strict=True):
            if adapter:
                self.a[rank.start : rank.end] = adapter.lora_A["default"].weight
                beside = self.weight[out.start : out.end, self.n_in + rank.start : self.n_in + rank.end]
                torch.mul(adapter.lora_B["default"].weight, adapter.scaling["default"], out=beside)
        self._seen = present
        return True

    def _is_current(self) -> bool:
        return (
            all(getattr(self.parent, name) is module for name, module in self.modules.items())
            and [base.weight.data_ptr() for base in self.bases] == self._pointers
            and not any(base.weight.requires_grad for base in self.bases)
            and all(_is_plain(adapter) for adapter in self.adapters if adapter)
        )

    def forward(self, inputs: Tensor, out: Tensor, adapted: bool) -> Tensor:
        """out (T, N) from inputs (T, K + R), whose last R columns are filled here."""
        if self.rank:
            thin = inputs[:, self.n_in :]
            if adapted:
                torch.mm(inputs[:, : self.n_in], self.a.t(), out=thin)
            else:
                thin.zero_()  # the same product with nothing added: the same bits as an adapter of zeros
        if self.bias is None:
            return torch.mm(inputs, self.weight.t(), out=out)
        return torch.addmm(self.bias, inputs, self.weight.t(), out=out)

    def backward(self, upstream: Tensor, inputs: Tensor, out: Tensor, with_input: bool = True) -> list[Tensor]:
        """Gradients of `parameters`; the gradient of the first K input columns goes into out[:, :K], with out of shape (T, K + R)."""
        thin = out[:, self.n_in :]
        if with_input:
            torch.mm(upstream, self.weight, out=out)
        elif self.rank:
            torch.mm(upstream, self.weight[:, self.n_in :], out=thin)
        gradients = list[Tensor]()
        if not self.rank:
            return gradients
        of_a = thin.t() @ inputs[:, : self.n_in]
        of_b = upstream.t() @ inputs[:, self.n_in :]
        for adapter, rows, rank in zip(self.adapters, self.out_spans, self.rank_spans, strict=True):
            if adapter:
                gradients += [
                    of_a[rank.start : rank.end],
                    of_b[rows.start : rows.end, rank.start : rank.end] * adapter.scaling["default"],
                ]
        if with_input:
            out[:, : self.n_in].addmm_(thin, self.a)
        return gradients


def _as_one(parts: Sequence[Tensor], width: int) -> Tensor:
    """The rows of all parts under each other, (N, width), and zeros beside them. Not copied where they lie so already."""
    first, sizes, n_columns = parts[0].detach(), [len(part) for part in parts], parts[0].shape[1]
    starts = [first.data_ptr() + span.start * width * first.element_size() for span in _spans(sizes)]
    end = (first.storage_offset() + sum(sizes) * width) * first.element_size()
    # one matrix alone, or what an earlier scorer has put together: two copies would double the memory and part from each other
    if first.stride() == (width, 1) and [part.data_ptr() for part in parts] == starts and end <= first.untyped_storage().nbytes():
        one = first.as_strided((sum(sizes), width), (width, 1))
        one[:, n_columns:] = 0
        return one
    one = torch.zeros(sum(sizes), width, dtype=first.dtype)
    for part, rows in zip(parts, torch.split(one, sizes), strict=True):
        rows[:, :n_columns] = part.detach()
        give_back(part)
    return one


def _spans(sizes: Sequence[int]) -> list[Span]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [Span(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@dataclass(frozen=True)
class Norm:
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4)."""

    weight: Tensor
    eps: float

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Writes the normalised x into out; returns 1 / rms(x), shape (T, 1)."""
        inverse = torch.linalg.vector_norm(x, dim=1, keepdim=True).square_().div_(x.shape[1]).add_(self.eps).rsqrt_()
        torch.mul(x, inverse, out=out).mul_(self.weight)
        return torch.as_tensor(inverse)

    def add_backward(self, total: Tensor, upstream: Tensor, x: Tensor, normed: Tensor, inverse: Tensor) -> None:
        """Adds d/dx to `total`; `upstream` is used up."""
        along = (upstream * normed).sum(1, keepdim=True).mul_(inverse.square()).div_(-x.shape[1])
        total.addcmul_(upstream.mul_(self.weight), inverse).addcmul_(x, along)


@dataclass(frozen=True)
class Shape:
    """Heads of an attention layer."""

    n_heads: int
    n_kv: int
    d_head: int

    @property
    def repeats(self) -> int:
        return self.n_heads // self.n_kv


@dataclass(frozen=True)
class Geometry:
    """What all layers share about one row of tokens."""

    cos: Tensor
    """(T, d_head / 2)"""
    sin: Tensor
    blocks: list[Block]
    masks: list[Tensor]
    """Additive, (L * repeats, keys), for each block; keys in the order of `_seen`."""


@dataclass(frozen=True)
class Pass:
    """One forward, and the backward behind it."""

    geometry: Geometry
    tape: Tape
    adapted: bool


class Layer:
    """One decoder layer."""

    def __init__(self, module: Any, index: int, shape: Shape) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.index, self.shape = index, shape
        self.qkv = Projection(attention, "q_proj", "k_proj", "v_proj")
        self.o = Projection(attention, "o_proj")
        self.gate_up = Projection(mlp, "gate_proj", "up_proj")
        self.down = Projection(mlp, "down_proj")
        self.norms = [_norm(module.input_layernorm), _norm(module.post_attention_layernorm)]
        self.projections = (self.qkv, self.o, self.gate_up, self.down)

    @property
    def parameters(self) -> list[Parameter]:
        return [parameter for projection in self.projections for parameter in projection.parameters]

    def forward(self, x: Tensor, slot: int, run: Pass) -> Tensor:
        """The residual stream (T, H) behind this layer. What the backward needs stays on the tape under `slot`."""
        rows, scratch = partial(run.tape.rows, slot), partial(run.tape.rows, SHARED)
        width, n_inner = self.shape.n_heads * self.shape.d_head, self.down.n_in
        h1 = rows("h1", x, self.qkv.n_in + self.qkv.rank)
        rows("r1", x, 1).copy_(self.norms[0].forward(x, h1[:, : self.qkv.n_in]))
        qkv = self.qkv.forward(h1, scratch("qkv", x, self.qkv.n_out), run.adapted)
        attended = rows("o", x, width + self.o.rank)
        self._attend(qkv, attended[:, :width], slot, run)
        middle = self.o.forward(attended, rows("middle", x, x.shape[1]), run.adapted).add_(x)
        h2 = rows("h2", x, self.gate_up.n_in + self.gate_up.rank)
        rows("r2", x, 1).copy_(self.norms[1].forward(middle, h2[:, : self.gate_up.n_in]))
        self.gate_up.forward(h2, rows("gate_up", x, self.gate_up.n_out), run.adapted)
        acted = self._act(x, slot, run.tape)[1]
        # the layer before may have left x in the shared slot
        out = rows("out" if slot != SHARED else f"out {self.index % 2}", x, x.shape[1])
        self.down.forward(acted, out, run.adapted).add_(middle)
        rows("thin", x, self.down.rank).copy_(acted[:, n_inner:])
        return out

    def backward(self, dx: Tensor, x: Tensor, run: Pass, with_input: bool) -> list[Tensor]:
        """Gradients of `parameters`; dx (T, H) goes in as the gradient behind this layer and comes out as the one before it."""
        rows, scratch = partial(run.tape.rows, self.index), partial(run.tape.rows, SHARED)
        n, n_inner, width = x.shape[1], self.down.n_in, self.shape.n_heads * self.shape.d_head
        gate, up = rows("gate_up", x, 2 * n_inner).tensor_split(2, dim=1)
        gated, acted = self._act(x, self.index, run.tape)  # once more: a tenth of the memory for a hundredth of the time
        acted[:, n_inner:] = rows("thin", x, self.down.rank)
        d_acted = scratch("d_acted", x, n_inner + self.down.rank)
        of_down = self.down.backward(dx, acted, d_acted)
        d_gate_up = scratch("d_gate_up", x, 2 * n_inner)
        d_gate, d_up = d_gate_up.tensor_split(2, dim=1)
        torch.mul(d_acted[:, :n_inner], gated, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_acted[:, :n_inner].mul_(up), gate, grad_input=d_gate)
        h2, d_h2 = rows("h2", x, n + self.gate_up.rank), scratch("d_h2", x, n + self.gate_up.rank)
        of_gate_up = self.gate_up.backward(d_gate_up, h2, d_h2)
        self.norms[1].add_backward(dx, d_h2[:, :n], rows("middle", x, n), h2[:, :n], rows("r2", x, 1))
        d_o = scratch("d_o", x, width + self.o.rank)
        of_o = self.o.backward(dx, rows("o", x, width + self.o.rank), d_o)
        d_qkv = scratch("d_qkv", x, self.qkv.n_out)
        self._attend_backward(d_o[:, :width], d_qkv, run)
        h1, d_h1 = rows("h1", x, n + self.qkv.rank), scratch("d_h1", x, n + self.qkv.rank)
        of_qkv = self.qkv.backward(d_qkv, h1, d_h1, with_input)
        if with_input:
            self.norms[0].add_backward(dx, d_h1[:, :n], x, h1[:, :n], rows("r1", x, 1))
        return [*of_qkv, *of_o, *of_gate_up, *of_down]

    def _act(self, x: Tensor, slot: int, tape: Tape) -> tuple[Tensor, Tensor]:
        """silu(gate) (T, I) and, in the first I columns, silu(gate) * up (T, I + R)."""
        gate, up = tape.rows(slot, "gate_up", x, 2 * self.down.n_in).tensor_split(2, dim=1)
        gated = torch.ops.aten.silu.out(gate, out=tape.rows(SHARED, "gated", x, self.down.n_in))
        acted = tape.rows(SHARED, "acted", x, self.down.n_in + self.down.rank)
        torch.mul(gated, up, out=acted[:, : self.down.n_in])
        return gated, acted

    def _attend(self, qkv: Tensor, out: Tensor, slot: int, run: Pass) -> None:
        """out (T, heads * d) from qkv (T, N); queries, keys and values stay on the tape."""
        queries, keys, values = self._buffers(run.tape, slot, qkv)
        in_queries, in_keys, in_values = self._parts(qkv)
        cos, sin = run.geometry.cos, run.geometry.sin
        _turn(in_queries, queries, cos[:, None], sin[:, None])
        _turn(in_keys, keys, cos, sin)
        values.copy_(in_values)
        for number, (block, mask) in enumerate(zip(run.geometry.blocks, run.geometry.masks, strict=True)):
            k, v = _seen(block, keys), _seen(block, values)
            scores = torch.baddbmm(mask, self._own(queries, block), k.transpose(1, 2), alpha=self.shape.d_head**-0.5)
            probabilities = run.tape.probabilities[slot, number] = torch.softmax(scores, -1)
            _heads(out, block.span, self.shape).copy_(torch.bmm(probabilities, v).view(self.shape.n_kv, -1, *queries.shape[2:]))

    def _attend_backward(self, d_out: Tensor, d_qkv: Tensor, run: Pass) -> None:
        """d_qkv (T, N) from d_out (T, heads * d)."""
        queries, keys, values = self._buffers(run.tape, self.index, d_qkv)
        d_queries, d_keys, d_values = self._buffers(run.tape, SHARED, d_qkv)
        for number, block in enumerate(run.geometry.blocks):
            k, v, probabilities = _seen(block, keys), _seen(block, values), run.tape.probabilities[self.index, number]
            upstream = _heads(d_out, block.span, self.shape).reshape(self.shape.n_kv, -1, self.shape.d_head)
            d_scores = torch.ops.aten._softmax_backward_data(torch.bmm(upstream, v.transpose(1, 2)), probabilities, -1, upstream.dtype)
            d_scores.mul_(self.shape.d_head**-0.5)
            self._own(d_queries, block).copy_(torch.bmm(d_scores, k))
            _give_back(d_keys, torch.bmm(d_scores.transpose(1, 2), self._own(queries, block)), block)
            _give_back(d_values, torch.bmm(probabilities.transpose(1, 2), upstream), block)
        out_queries, out_keys, out_values = self._parts(d_qkv)
        cos, sin = run.geometry.cos, run.geometry.sin
        _turn(d_queries, out_queries, cos[:, None], -sin[:, None])
        _turn(d_keys, out_keys, cos, -sin)
        out_values.copy_(d_values)

    def _buffers(self, tape: Tape, slot: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (kv, T, repeats, d), keys and values (kv, T, d); a block's queries then lie together as (kv, L * repeats, d)."""
        shape, n = self.shape, len(like)
        queries = tape.rows(slot, "queries", like, shape.n_heads * shape.d_head).view(shape.n_kv, n, shape.repeats, shape.d_head)
        keys, values = (tape.rows(slot, name, like, shape.n_kv * shape.d_head).view(shape.n_kv, n, -1) for name in ("keys", "values"))
        return queries, keys, values

    def _parts(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three parts of (T, N) in the shapes of `_buffers`."""
        shape = self.shape
        q, k, v = torch.split(qkv, [shape.n_heads * shape.d_head, shape.n_kv * shape.d_head, shape.n_kv * shape.d_head], 1)
        queries = q.view(-1, shape.n_kv, shape.repeats, shape.d_head).transpose(0, 1)
        return queries, k.view(-1, shape.n_kv, shape.d_head).transpose(0, 1), v.view(-1, shape.n_kv, shape.d_head).transpose(0, 1)

    def _own(self, queries: Tensor, block: Block) -> Tensor:
        """The block's queries as (kv, L * repeats, d)."""
        return queries[:, block.span.start : block.span.end].flatten(1, 2)


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), float(module.variance_epsilon))


def _heads(out: Tensor, span: Span, shape: Shape) -> Tensor:
    """(kv, L, repeats, d) of (T, heads * d)."""
    return out[span.start : span.end].view(-1, shape.n_kv, shape.repeats, shape.d_head).transpose(0, 1)


def _seen(block: Block, rows: Tensor) -> Tensor:
    """The rows that a block sees, (kv, S, d): its ancestors', then its own."""
    parts = [rows[:, span.start : span.end] for span in (*block.ancestors, block.span)]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _give_back(total: Tensor, part: Tensor, block: Block) -> None:
    """Adds up what `_seen` had taken; a block comes before those that have it as an ancestor."""
    parts = torch.split(part, [span.size for span in (*block.ancestors, block.span)], 1)
    total[:, block.span.start : block.span.end] = parts[-1]
    for span, ancestors_part in zip(block.ancestors, parts, strict=False):
        total[:, span.start : span.end] += ancestors_part


def _turn(source: Tensor, out: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 34), halves paired as in Llama's weights; with -sin the way back."""
    (first, second), (out_first, out_second) = source.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)


@dataclass(frozen=True)
class Final:
    """The last norm at the predicting places."""

    hidden: Tensor
    """(M, H), normalised."""
    last: Tensor
    """(M, H), before."""
    inverse: Tensor
    """1 / rms, (M, 1)."""


class LlamaTrunk:
    """A model from token ids to final hidden states at predicting positions, differentiable in its adapter's parameters."""

    def __init__(self, model: Any) -> None:
        trunk, config = model.get_decoder(), model.config
        d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = Shape(config.num_attention_heads, config.num_key_value_heads, d_head)
        self.shape, self.window, self.rotary, self.norm = shape, _window(config), trunk.rotary_emb, _norm(trunk.norm)
        self.embeddings = trunk.embed_tokens.weight.detach()
        self.layers = [Layer(module, index, shape) for index, module in enumerate(trunk.layers)]
        adapted = [layer.index for layer in self.layers if layer.parameters]
        self.first_adapted = adapted[0] if adapted else len(self.layers)
        self.parameters = [parameter for layer in self.layers for parameter in layer.parameters]
        self.version = 0
        """Grows with every change of the adapter."""
        self._lock = Lock()
        self._tapes, self._short_tapes = list[Tape](), list[Tape]()

    def hidden(self, tree: Tree, adapted: bool = True, lower: Tensor | None = None) -> Tensor:
        """Final hidden states (M, H) at `tree.predicting`; adapted=False, or PEFT's `disable_adapter`, is the base without gradient.

        lower: what `lower` gave for this tree, so that base and adapted model share it. Raises RuntimeError where the model isn't
        any more what this was made for.
        """
        self.refresh()
        adapted = adapted and not self._is_disabled()
        if adapted and torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters):
            result: Tensor = _Hidden.apply(self, tree, lower, *self.parameters)  # type: ignore[no-untyped-call]
            return result
        with self._tape() as tape:
            run = Pass(self.geometry(tree), tape, adapted)
            return self._final(self._upper(tree, run, self._lower(tree, run) if lower is None else lower, keep=False), tree).hidden

    def lower(self, tree: Tree) -> Tensor:
        """The residual stream (T, H) before the first adapted layer: the same for base and adapted model, and without gradient."""
        with self._tape() as tape:
            return self._lower(tree, Pass(self.geometry(tree), tape, adapted=False)).clone()

    def geometry(self, tree: Tree) -> Geometry:
        half = self.shape.d_head // 2
        cos, sin = self.rotary(self.embeddings[:1], torch.tensor([tree.positions]))
        masks = [self._mask(block, torch.tensor(tree.positions)) for block in tree.blocks]
        return Geometry(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous(), tree.blocks, masks)

    def _mask(self, block: Block, positions: Tensor) -> Tensor:
        keys = torch.cat([positions[span.start : span.end] for span in (*block.ancestors, block.span)])
        distance = positions[block.span.start : block.span.end, None] - keys
        mask = torch.zeros(distance.shape, dtype=self.embeddings.dtype)
        mask.masked_fill_((distance < 0) | (distance >= self.window), -torch.inf)
        return mask.repeat_interleave(self.shape.repeats, 0)

    def refresh(self) -> None:
        """Take over the adapter's present values."""
        with self._lock:  # a second thread must not go on before the first has written them
            changed = [projection.refresh() for layer in self.layers for projection in layer.projections]
            self.version += any(changed)

    def _is_disabled(self) -> bool:
        states = {adapter.disable_adapters for layer in self.layers for part in layer.projections for adapter in part.adapters if adapter}
        if len(states) > 1:
            raise RuntimeError("some of the adapter's layers are disabled and others aren't")
        return True in states

    @contextmanager
    def _tape(self) -> Iterator[Tape]:
        """A tape for a forward that keeps nothing; these are apart, since their rows are longer."""
        with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not be written outside of it
            tape = _take(self._short_tapes)
            yield tape
            self._short_tapes.append(tape)

    def _lower(self, tree: Tree, run: Pass) -> Tensor:
        run.tape.fit(len(tree.tokens))
        x = torch.index_select(self.embeddings, 0, torch.tensor(tree.tokens))
        for layer in self.layers[: self.first_adapted]:
            x = layer.forward(x, SHARED, run)
        return x

    def _upper(self, tree: Tree, run: Pass, x: Tensor, keep: bool) -> Tensor:
        """The residual stream (T, H) behind all layers; keep=False runs every layer in the same buffers."""
        run.tape.fit(len(tree.tokens))
        if keep:
            x = run.tape.rows(SHARED, "first", x, x.shape[1]).copy_(x)
        for layer in self.layers[self.first_adapted :]:
            x = layer.forward(x, layer.index if keep else SHARED, run)
        return x

    def _final(self, x: Tensor, tree: Tree) -> Final:
        last = torch.index_select(x, 0, torch.tensor(tree.predicting))
        hidden = torch.empty_like(last)
        return Final(hidden, last, self.norm.forward(last, hidden))

    def _final_backward(self, upstream: Tensor, final: Final, tree: Tree) -> Tensor:
        d_last = torch.zeros_like(final.last)
        self.norm.add_backward(d_last, upstream.clone(), final.last, final.hidden, final.inverse)
        dx = torch.zeros(len(tree.tokens), d_last.shape[1], dtype=d_last.dtype)
        return dx.index_add_(0, torch.tensor(tree.predicting), d_last)

    def _layers_backward(self, dx: Tensor, run: Pass) -> list[Tensor]:
        """Gradients of `parameters` from dx (T, H) behind all layers."""
        gradients = list[Tensor]()
        for layer in reversed(self.layers[self.first_adapted :]):
            lowest = layer.index == self.first_adapted
            x = run.tape.rows(SHARED, "first", dx, dx.shape[1]) if lowest else run.tape.rows(layer.index - 1, "out", dx, dx.shape[1])
            gradients = layer.backward(dx, x, run, with_input=not lowest) + gradients
        return gradients


def _take(tapes: list[Tape]) -> Tape:
    try:  # not asked first: another thread may take the last one meanwhile
        return tapes.pop()
    except IndexError:
        return Tape()


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trunk: LlamaTrunk, tree: Tree, lower: Tensor | None, *parameters: Tensor) -> Tensor:
        run = Pass(trunk.geometry(tree), _take(trunk._tapes), adapted=True)
        final = trunk._final(trunk._upper(tree, run, trunk._lower(tree, run) if lower is None else lower, keep=True), tree)
        ctx.trunk, ctx.tree, ctx.run, ctx.final = trunk, tree, run, replace(final, hidden=final.hidden.clone())
        ctx.version = trunk.version
        return final.hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        trunk, run = ctx.trunk, ctx.run
        if run is None:
            raise RuntimeError("the buffers of this forward have been given back: it can be differentiated only once")
        trunk.refresh()
        if trunk.version != ctx.version:
            raise RuntimeError("the adapter has been changed between this forward and its backward")
        ctx.run = None
        gradients = trunk._layers_backward(trunk._final_backward(upstream, ctx.final, ctx.tree), run)
        trunk._tapes.append(run.tape)
        return None, None, None, *gradients
