"""Training spread over the processes of a launcher: who does what, and how their parts become one result.

Every process computes whole packs of each batch. A model that fits on one device stays whole in each of them (`Team`), and the packs'
gradients are added up once an optimizer step. A model that doesn't fit is sharded (`Shards`, FSDP2). The main process alone talks to the
user and touches the run folder: the others get recipe, pairs and a checkpoint's content from it, so machines need no common disk.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from unstilted.errors import UserError
from unstilted.lm.chat import TokenPair
from unstilted.lm.score import Scorer, why_not
from unstilted.lm.tree import Tree
from unstilted.models.resolve import BaseModelFiles
from unstilted.processes import n_processes, rank
from unstilted.recipe import Recipe, TrainTable
from unstilted.train.checkpoint import Checkpoint

PATIENCE = timedelta(hours=24)
"""How long processes wait for each other: the main one may be at another stage. One that dies is noticed at once."""
N_EXACT = 2**27
"""Up to so many parameters, gradients are added up in float64; more would need too much memory."""

Parts = Sequence[Sequence[TokenPair]]
"""Pairs as they share forwards."""
Item = TypeVar("Item")


class Called(NamedTuple):
    """What the main process tells the others to train."""

    recipe: Recipe
    pairs: list[TokenPair]
    held_out: list[TokenPair]


class Share(NamedTuple):
    """A pack that a process computes."""

    part: int
    counts: bool
    """Whether its result is used; not where a process only keeps others company (see `Shards`)."""


def call(what: Called | None) -> None:
    """On the main process: tell the others, which wait in `called`, what to train; None lets them go. Alone it does nothing."""
    if n_processes() > 1:
        _meet()
        _from_main(what)


def called() -> Called | None:
    """On any other process: wait for what the main one has to train, or None when there is nothing."""
    _meet()
    what: Called | None = _from_main(None)
    return what


@contextmanager
def together() -> Iterator[None]:
    """Around all that one of several processes does: at its good end the main one lets the others go if it hasn't called them.

    Raises UserError where another process has died. The launcher ends the others where this one fails.
    """
    try:
        yield
        _part()
    except SystemExit as end:
        if not end.code:
            _part()
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "by peer" not in str(error):
            raise
        raise UserError(
            f"another process of this training has ended ({str(error).splitlines()[0]}).",
            where=f"process {rank()} of {n_processes()}",
            do="Look for its own words. The same command goes on from the last checkpoint.",
        ) from error


class Team:
    """The processes of one training, each with the whole model; alone, everything here gives back what it was given.

    All processes must call the same methods in the same order.
    """

    is_sharded = False

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.index: int = accelerator.process_index
        self.size: int = accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def prepare(self, model: Any, optimizer: Any) -> tuple[Any, Any]:
        """Model and optimizer on this process's device."""
        return self.accelerator.prepare_model(model, evaluation_mode=True), optimizer  # in training mode it would come wrapped in DDP

    def scorer(self, model: Any, settings: TrainTable) -> Scorer:
        return Scorer(model)

    def spread(self, parts: list[list[TokenPair]], scorer: Scorer) -> list[list[TokenPair]]:
        """The packs, the largest of them split where they are fewer than processes."""
        return split_up(parts, self.size)

    def own(self, parts: Parts) -> list[Share]:
        """Which packs this process computes."""
        return [Share(index, True) for index in deal([_n_tokens(part) for part in parts], self.size)[self.index]]

    def each(self, work: Callable[..., Any], parts: Parts, by: Callable[..., Iterable[Any]]) -> list[Any]:
        """What `work` gives for each pack, in order, each done by one process by means of its `map`.

        Results are tensors, numbers, or lists and tuples of them.
        """
        mine = self.own(parts)
        return self.join(mine, list(by(lambda share: work(parts[share.part]), mine)))

    def join(self, mine: Sequence[Share], results: Sequence[Any]) -> list[Any]:
        """The results of all processes' shares, in the order of the packs."""
        if self.size == 1:
            return list(results)
        from accelerate.utils import gather_object, send_to_device

        own = [(share.part, send_to_device(result, "cpu")) for share, result in zip(mine, results, strict=True) if share.counts]
        every = dict(gather_object(own))
        return [send_to_device(every[index], self.accelerator.device) for index in range(len(every))]

    def from_main(self, value: Any) -> Any:
        """The main process's value."""
        return _from_main(value) if self.size > 1 else value

    def gradient_sum(self, parameters: Sequence[Tensor]) -> "GradientSum":
        return GradientSum(parameters, self.size > 1)

    def differentiate(self, loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of the loss of a pack, for the `gradient_sum`."""
        return torch.autograd.grad(loss, parameters)

    def clip(self, parameters: Sequence[Tensor], norm: float) -> float:
        """Scale gradients down to this norm where it is more; returns what it was."""
        return float(torch.nn.utils.clip_grad_norm_(parameters, norm))

    def put_away(self, model: Any) -> None:
        """Make the model's parameters what they are between forwards, so that they can be changed."""

    def whole(self, value: Any) -> Any:
        """Tensors, or dictionaries and lists of them, from all processes; on the CPU of the main one, and of no use on the others."""
        return value

    def hand_out(self, saved: Checkpoint | None, parameters: Sequence[Tensor], optimizer: Any) -> None:
        """Give parameters and optimizer of every process their part of what the main one has read; the others have None."""
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                value = saved.parameters[index] if saved else torch.empty(parameter.shape, dtype=parameter.dtype)
                parameter.copy_(self._part(value, parameter))
        state = self.from_main(_without_content(saved.optimizer) if saved else None)
        for index, of_parameter in state["state"].items():
            for name, empty in of_parameter.items():
                if isinstance(empty, Tensor):
                    value = saved.optimizer["state"][index][name] if saved else torch.empty_like(empty, device="cpu")
                    of_parameter[name] = self._part(value, parameters[index] if empty.shape == parameters[index].shape else None)
        optimizer.load_state_dict(state)

    def _part(self, value: Tensor, like: Tensor | None) -> Tensor:
        """What this process has of a tensor that the main one holds; `like` has the same layout, None is whole everywhere."""
        value = value.to(self.accelerator.device) if self.size > 1 else value
        if self.size > 1:
            dist.broadcast(value, 0)
        return value


class Shards(Team):
    """Processes that share one model out among them (FSDP2, Zhao et al. 2023, arXiv 2304.11277): each layer is whole only while it runs.

    So a forward is everybody's, and a process without a pack of its own repeats one for nothing. Gradients are added up by FSDP.
    """

    is_sharded = True

    def prepare(self, model: Any, optimizer: Any) -> tuple[Any, Any]:
        prepared: tuple[Any, Any] = self.accelerator.prepare(model, optimizer)
        return prepared

    def scorer(self, model: Any, settings: TrainTable) -> Scorer:
        return EvenScorer(model, settings.max_tokens)

    def spread(self, parts: list[list[TokenPair]], scorer: Scorer) -> list[list[TokenPair]]:
        one_by_one = not isinstance(scorer, EvenScorer) or not scorer.as_one  # then a pack takes as many forwards as it has answers
        return split_up(parts, _n_pairs(parts) if one_by_one else self.size)

    def own(self, parts: Parts) -> list[Share]:
        dealt = deal([_n_tokens(part) for part in parts], self.size)
        mine = [Share(index, True) for index in dealt[self.index]]
        return mine + [Share(0, False)] * (max(map(len, dealt)) - len(mine))

    def gradient_sum(self, parameters: Sequence[Tensor]) -> "GradientSum":
        return GradientSum((), False)

    def differentiate(self, loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        (loss * self.size).backward()  # type: ignore[no-untyped-call]  # FSDP takes the mean over processes
        return ()

    def clip(self, parameters: Sequence[Tensor], norm: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(parameters, norm).full_tensor())  # type: ignore[attr-defined]

    def put_away(self, model: Any) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def whole(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self.whole(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.whole(item) for item in value]
        if hasattr(value, "full_tensor"):
            whole = value.detach().full_tensor()
            return whole.cpu() if self.is_main else None  # one at a time on the others: together they may not fit
        return value

    def _part(self, value: Tensor, like: Tensor | None) -> Tensor:
        if like is None:
            return super()._part(value, like)
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(self.accelerator.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


class EvenScorer(Scorer):
    """A scorer by a sharded model: the number of forwards depends on nothing but the number of requests."""

    def __init__(self, model: Any, max_tokens: int) -> None:
        super().__init__(model, by_hand=False)
        self.as_one = not why_not(self.model.config.get_text_config(), max_tokens)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def runs_as_one(self, tree: Tree) -> bool:
        return self.as_one

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        with super()._without_adapter():
            for parameter in self.trained:  # PEFT freezes them, and FSDP would make whole ones out of what it sees first
                parameter.requires_grad_(True)
            yield


class GradientSum:
    """Gradients of parameters, added up over packs and processes, in float64 as long as that isn't too much.

    In float64 neither the order of the packs nor the number of processes shows in what is left of the sum in float32.
    """

    def __init__(self, parameters: Sequence[Tensor], across: bool) -> None:
        """across: whether other processes have packs of their own."""
        self.parameters, self.across = parameters, across
        self.sizes = [parameter.numel() for parameter in parameters]
        if parameters:
            first, n = parameters[0], sum(self.sizes)
            exact = n <= N_EXACT and first.device.type != "mps"
            self.total = torch.zeros(n, dtype=torch.float64 if exact else torch.float32, device=first.device)

    def add(self, gradients: Iterable[Tensor]) -> None:
        if self.parameters:
            for total, gradient in zip(torch.split(self.total, self.sizes), gradients, strict=True):
                total += gradient.reshape(-1)

    def finish(self) -> None:
        """Give each parameter its gradient."""
        if not self.parameters:
            return
        if self.across:
            dist.all_reduce(self.total)
        for parameter, total in zip(self.parameters, torch.split(self.total, self.sizes), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype)


def make_team(settings: TrainTable, files: BaseModelFiles) -> Team:
    """The processes of this training, as the launcher's options say. Raises UserError for what they can't do."""
    from accelerate import Accelerator, DistributedType
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        raise UserError(
            "training under DeepSpeed is not supported.",
            where="accelerate launch",
            do="Launch with --use_fsdp --fsdp_version 2, which shards as ZeRO-3 does.",
        )
    _meet()
    accelerator = Accelerator(cpu=n_processes() > 1 and _on_cpu())
    if n_processes() == 1 or os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        return Team(accelerator)
    if accelerator.distributed_type is DistributedType.MULTI_CPU:  # accelerate shards on GPUs only; torch does it with gloo, too
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if not accelerator.is_fsdp2:
        raise UserError("only the second version of FSDP is supported.", where="accelerate launch", do="Add --fsdp_version 2.")
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy  # left out, the whole model would be one piece
    for setting, is_set in (
        ("train.pissa", settings.pissa),
        ("train.optimizer", settings.optimizer != "adamw"),
        ("model.load", files.load != "auto"),
    ):
        if is_set:
            raise UserError("a sharded model can't be trained so.", where=setting, do="Take its default, or launch without --use_fsdp.")
    return Shards(accelerator)


def deal(sizes: Sequence[int], n: int) -> list[list[int]]:
    """Indices of parts of these sizes for each of n processes, about as much for each; none gets over one part more than another."""
    dealt = [list[int]() for _ in range(n)]
    by_size = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    for start in range(0, len(sizes), n):  # there and back: who comes last in one round comes first in the next
        turn = dealt if start % (2 * n) == 0 else dealt[::-1]
        for process, index in zip(turn, by_size[start : start + n], strict=False):
            process.append(index)
    return [sorted(process) for process in dealt]


def split_up(parts: Sequence[list[Item]], n: int) -> list[list[Item]]:
    """At least n parts as far as there are so many items; the order of items stays."""
    parts = list(parts)
    while len(parts) < n and any(len(part) > 1 for part in parts):
        index = max(range(len(parts)), key=lambda i: len(parts[i]))
        part, middle = parts[index], len(parts[index]) // 2
        parts[index : index + 1] = [part[:middle], part[middle:]]
    return parts


def _n_pairs(parts: Parts) -> int:
    return sum(len(part) for part in parts)


def _n_tokens(part: Sequence[TokenPair]) -> int:
    return sum(pair.n_tokens for pair in part)


def _part() -> None:
    if not dist.is_initialized():
        call(None)
    dist.barrier()  # whoever leaves while another still works tears its connections
    dist.destroy_process_group()


def _meet() -> None:
    """Wait until all processes are there."""
    from accelerate import PartialState

    if n_processes() > 1 and not dist.is_initialized():
        PartialState(cpu=_on_cpu(), timeout=PATIENCE)


def _on_cpu() -> bool:
    wants = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
    device = torch.accelerator.current_accelerator(check_available=True)
    return wants or device is None or device.type == "mps"


def _from_main(value: Any) -> Any:
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _without_content(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with empty tensors."""
    empty = {
        index: {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in of_parameter.items()}
        for index, of_parameter in state["state"].items()
    }
    return state | {"state": empty}
