"""Llama-type models with LoRA on a CPU: the trunk's forward and backward by hand, with nothing computed or stored that isn't needed.

What it saves over modules and autograd: linear layers with the same input are one matrix product, which takes LoRA's second product
along (its matrix stands beside the weights); attention runs over each continuation's own block; saved activations live in buffers that
are used again; frozen layers below the first adapter keep nothing. Several pairs can be worked on at once from threads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from unstilted.lm.pages import give_back
from unstilted.lm.tree import Block, Span, Tree

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2"})
"""Types whose layers are RMSNorm, rotary attention and SwiGLU with nothing in between."""


def can_run(model: Any) -> bool:
    """Whether `model` is one of these on a CPU in one plain floating type, its adapters (if any) plain LoRA without dropout."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraLayer

    config = model.config
    weights = list(model.parameters())
    return (
        config.model_type in MODEL_TYPES
        and config.hidden_act == "silu"
        and all(weight.device.type == "cpu" and type(weight) in (Parameter, Tensor) for weight in weights)
        and {weight.dtype for weight in weights} in ({torch.float32}, {torch.float64})
        and all(_is_plain(module) for module in model.modules() if isinstance(module, LoraLayer) and isinstance(module, LoraLinear))
        and all(isinstance(module, LoraLinear) for module in model.modules() if isinstance(module, LoraLayer))
        and not any(weight.requires_grad for name, weight in model.named_parameters() if "lora_" not in name)
    )


def _is_plain(module: Any) -> bool:
    from torch.nn import Identity

    names = set(module.lora_A)
    return (
        names == {"default"}
        and not module.use_dora.get("default", False)
        and not any(module.lora_bias.values())
        and all(type(dropout) is Identity or dropout.p == 0 for dropout in module.lora_dropout.values())
        and not module.merged
    )


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
    The layers' own weights become views into it.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        bases = [getattr(module, "base_layer", module) for module in modules]
        self.adapters = [module if hasattr(module, "lora_A") else None for module in modules]
        self.n_in, self.n_out = bases[0].in_features, sum(base.out_features for base in bases)
        ranks = [adapter.lora_A["default"].weight.shape[0] if adapter else 0 for adapter in self.adapters]
        self.rank = sum(ranks)
        like = bases[0].weight
        self.weight = torch.zeros(self.n_out, self.n_in + self.rank, dtype=like.dtype)
        self.a = torch.zeros(self.rank, self.n_in, dtype=like.dtype)
        self.bias = torch.cat([base.bias.detach() for base in bases]) if bases[0].bias is not None else None
        self.out_spans, self.rank_spans = _spans([base.out_features for base in bases]), _spans(ranks)
        for base, span in zip(bases, self.out_spans, strict=True):
            self.weight[span.start : span.end, : self.n_in] = base.weight.detach()
            give_back(base.weight)
            base.weight.data = self.weight[span.start : span.end, : self.n_in]
        self._seen: list[Any] = []

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
    def refresh(self) -> None:
        """Take over the adapters' present values, where they have changed."""
        present = [(p._version, p.data_ptr()) for p in self.parameters] + [a.scaling["default"] for a in self.adapters if a]
        if present == self._seen:
            return
        self._seen = present
        for adapter, out, rank in zip(self.adapters, self.out_spans, self.rank_spans, strict=True):
            if adapter:
                self.a[rank.start : rank.end] = adapter.lora_A["default"].weight
                beside = self.weight[out.start : out.end, self.n_in + rank.start : self.n_in + rank.end]
                torch.mul(adapter.lora_B["default"].weight, adapter.scaling["default"], out=beside)

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
    """Additive, (L * repeats, keys), for each block."""


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
        self.qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = Projection([attention.o_proj])
        self.gate_up = Projection([mlp.gate_proj, mlp.up_proj])
        self.down = Projection([mlp.down_proj])
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
        self.shape, self.rotary, self.norm = shape, trunk.rotary_emb, _norm(trunk.norm)
        self.embeddings = trunk.embed_tokens.weight.detach()
        self.layers = [Layer(module, index, shape) for index, module in enumerate(trunk.layers)]
        adapted = [layer.index for layer in self.layers if layer.parameters]
        self.first_adapted = adapted[0] if adapted else len(self.layers)
        self.parameters = [parameter for layer in self.layers for parameter in layer.parameters]
        self._tapes, self._short_tapes = list[Tape](), list[Tape]()

    def hidden(self, tree: Tree, adapted: bool = True, lower: Tensor | None = None) -> Tensor:
        """Final hidden states (M, H) at `tree.predicting`; adapted=False is the base model, without gradient.

        lower: what `lower` gave for this tree, so that base and adapted model share it.
        """
        self._refresh()
        if adapted and torch.is_grad_enabled():
            result: Tensor = _Hidden.apply(self, tree, lower, *self.parameters)  # type: ignore[no-untyped-call]
            return result
        with torch.no_grad(), self._tape() as tape:
            run = Pass(self.geometry(tree), tape, adapted)
            return self._final(self._upper(tree, run, self._lower(tree, run) if lower is None else lower, keep=False), tree).hidden

    def lower(self, tree: Tree) -> Tensor:
        """The residual stream (T, H) before the first adapted layer: the same for base and adapted model, and without gradient."""
        with torch.no_grad(), self._tape() as tape:
            return self._lower(tree, Pass(self.geometry(tree), tape, adapted=False)).clone()

    def geometry(self, tree: Tree) -> Geometry:
        half = self.shape.d_head // 2
        cos, sin = self.rotary(self.embeddings[:1], torch.tensor([tree.positions]))
        masks = [self._mask(block.span.size, sum(span.size for span in block.ancestors)) for block in tree.blocks]
        return Geometry(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous(), tree.blocks, masks)

    def _mask(self, n: int, n_before: int) -> Tensor:
        own = torch.full((n, n), -torch.inf, dtype=self.embeddings.dtype).triu(1)
        mask = torch.cat((torch.zeros(n, n_before, dtype=own.dtype), own), 1)
        return mask.repeat_interleave(self.shape.repeats, 0)

    def _refresh(self) -> None:
        for layer in self.layers:
            for projection in layer.projections:
                projection.refresh()

    @contextmanager
    def _tape(self) -> Iterator[Tape]:
        """A tape for a forward that keeps nothing; these are apart, since their rows are longer."""
        tape = self._short_tapes.pop() if self._short_tapes else Tape()
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


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trunk: LlamaTrunk, tree: Tree, lower: Tensor | None, *parameters: Tensor) -> Tensor:
        run = Pass(trunk.geometry(tree), trunk._tapes.pop() if trunk._tapes else Tape(), adapted=True)
        final = trunk._final(trunk._upper(tree, run, trunk._lower(tree, run) if lower is None else lower, keep=True), tree)
        ctx.trunk, ctx.tree, ctx.run, ctx.final = trunk, tree, run, replace(final, hidden=final.hidden.clone())
        ctx.save_for_backward(*parameters)
        return final.hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        trunk, run = ctx.trunk, ctx.run
        if run is None:
            raise RuntimeError("the buffers of this forward have been given back: it can be differentiated only once")
        ctx.run = None
        gradients = trunk._layers_backward(trunk._final_backward(upstream, ctx.final, ctx.tree), run)
        trunk._tapes.append(run.tape)
        return None, None, None, *gradients
