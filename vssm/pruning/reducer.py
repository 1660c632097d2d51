"""Token reduction by hooks: a model computes on fewer tokens inside a context, and its code knows nothing of it."""

import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from vssm.layers.conv import CausalTokenConv, TokenConv
from vssm.layers.ssm import SelectiveSSM
from vssm.models._base import GridBackbone, TokenBackbone
from vssm.pruning.policies import METHODS, SCORES, BlockTrace, Policy, Score, clipped_output
from vssm.pruning.prunable import check_block
from vssm.pruning.token_map import Reduction, TokenMap, take
from vssm.scan_order import restrict

ALIGNMENTS = ("decay", "idle", "hold", "none", "mask")
CONVOLUTIONS = ("grid", "compact")


@dataclass(frozen=True)
class _Place:
    """A block in its stack.

    Args:
        block: The block.
        name: Its name in the model.
        index: Its number in the model, counted from 0.
        earlier: Cuts before it in its stage, by their numbers.
        cut: Number of the cut that follows it, which is the block's number counted from 1; None if none does.
        last: Whether it is the last block of its stage.
    """

    block: nn.Module
    name: str
    index: int
    earlier: tuple[int, ...]
    cut: int | None
    last: bool

    @property
    def hooked(self) -> bool:
        """Whether the block has anything to do with reduction."""
        return self.cut is not None or bool(self.earlier)

    def token_map(self, run: "_Run") -> TokenMap | None:
        """The tokens that the block runs on; None if these are all."""
        token_map = run.maps[self.earlier[-1]] if self.earlier else None
        return None if token_map is None or token_map.is_full else token_map


class _Run:
    """What the hooks remember of one forward pass; it holds no tensor that has a gradient.

    Args:
        dense: Blocks, counted from 0, whose output is asked for and must hold all tokens.
    """

    def __init__(self, dense: frozenset[int]) -> None:
        self.dense = dense
        self.maps: dict[int, TokenMap] = {}
        self.reductions: dict[int, Reduction] = {}
        self.routes: dict[tuple[int, int], tuple[Tensor | None, _Route]] = {}


class TokenReducer:
    """Drops or merges tokens after some of a model's blocks, while its context is open.

    A block after which a cut stands gives fewer tokens, on which the blocks after it compute until their stage ends or
    the output of one is asked for by ``forward_intermediates``; then all tokens are there again, those that were
    dropped with the value that they had and those that were merged with that of the token that took them in. Within
    blocks, convolutions and scans learn by hooks which tokens are left; nothing else in them sees neighbours.

        with TokenReducer(model, after=(5, 10, 15), keep=0.8):
            logits = model(images)

    Class tokens always stay. The number of tokens left depends on ``keep`` and on the number before alone, so that
    shapes are static; samples keep different ones.

    Args:
        model: A backbone of this package, or a module with one inside, compiled or not.
        after: Blocks after which to cut, counted from 1 through all stages, ascending.
        keep: Share of the patch tokens that each cut keeps, over 0 and at most 1; one for all cuts or one for each.
            Counts are rounded up, and with a class token to an odd number of tokens, as in the released code of the
            paper, unless all are kept.
        remove: Instead of ``keep``, the number of tokens that each cut removes.
        policy: One of `METHODS`, ``"top"``, ``"merge"``, ``"mtr"`` or ``"utr"``, or a `Policy`.
        score: What the policy asks for each token's importance, one of `SCORES` or a function of a `BlockTrace`; the
            method's own when not given, and ``"clipped_output"`` for a policy that is no name.
        align: How a scan treats dropped tokens: ``"decay"`` lets the state decay over them as over zeros at its own
            input, ``"idle"`` as over what a convolution with a bias makes of zeros, ``"hold"`` and ``"none"`` let it
            be, ``"mask"`` computes on all tokens, those that are dropped being zero before every block. All but the
            last cost as much as the tokens that are left.
        conv: What a convolution sees: ``"grid"``, zeros where tokens are dropped, or ``"compact"``, those that are
            left as if they were neighbours, which a convolution of a grid cannot. When not given, ``"compact"`` for
            ``align="none"`` and ``"grid"`` else.

    Attributes:
        maps: For each cut of the last forward pass its `TokenMap`.

    Raises:
        ValueError: If an argument is out of range, there is no backbone in the model, or a block mixes tokens in other
            ways than by convolution and scan.

    Reference:
        Zhan et al., "Exploring Token Pruning in Vision State Space Models", NeurIPS 2024,
        https://arxiv.org/abs/2409.18962
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        after: Sequence[int],
        keep: float | Sequence[float] | None = None,
        remove: int | None = None,
        policy: str | Policy = "top",
        score: str | Score | None = None,
        align: str = "decay",
        conv: str | None = None,
    ) -> None:
        _check_choice("align", align, ALIGNMENTS)
        _check_choice("conv", conv, (None, *CONVOLUTIONS))
        self.backbone = _backbone_of(model)
        self.after = tuple(after)
        self.keep, self.remove = _amounts(self.after, keep, remove)
        self.policy, self.score = _method(policy, score)
        self.align = align
        self.conv = conv or ("compact" if align == "none" else "grid")
        self.maps: dict[int, TokenMap] = {}
        places = list(_places(self.backbone, self.after))
        self._places = [place for place in places if place.hooked]
        self._cuts_of_last_stage = places[-1].earlier
        for place in self._places:
            check_block(place.block, place.name, conv=self.conv)
        self._handles: list[RemovableHandle] = []
        self._guarded: list[nn.Module] = []
        self._dense: frozenset[int] = frozenset()
        self._run: _Run | None = None  # of the forward pass under way
        self._current: _Run | None = None  # of the block under way, which may be one that is computed again
        self._runs = WeakIdKeyDictionary()  # by the input of a block
        self._bank: dict[int, Tensor] = {}  # tokens that each cut of the run has dropped without merging
        self._seen: dict[str, Any] = {}  # parts of a trace

    @property
    def last_map(self) -> TokenMap | None:
        """The tokens on which the last block of the last forward pass computed; None if no cut is in its stage."""
        return self.maps[self._cuts_of_last_stage[-1]] if self._cuts_of_last_stage else None

    def __enter__(self) -> "TokenReducer":
        if "forward" in vars(self.backbone.stem):
            raise ValueError(f"TokenReducer: {type(self.backbone).__name__} is in the context of a reducer already")
        if isinstance(self.backbone, TokenBackbone):
            self.backbone.forward_intermediates = self._watching(self.backbone.forward_intermediates)
        self._hook_before(self.backbone.stem, self._start)
        for place in self._places:
            self._hook_block(place)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._guarded:
            del module.forward
        if isinstance(self.backbone, TokenBackbone):
            del self.backbone.forward_intermediates
        self._handles, self._guarded = [], []
        self._run = self._current = None
        self._bank, self._seen = {}, {}

    def _hook_block(self, place: _Place) -> None:
        block, masked = place.block, self.align == "mask"
        self._hook_before(block, functools.partial(self._before_block, place))
        for module in block.modules() if place.earlier and not masked else ():
            if isinstance(module, SelectiveSSM):
                restrict_scan = functools.partial(self._restrict_scan, place, _parameters(module))
                self._hook_before(module, restrict_scan, with_kwargs=True)
            elif isinstance(module, TokenConv | CausalTokenConv) and self.conv == "grid":
                self._hook_before(module, functools.partial(self._spread, place))
                self._hook_after(module, functools.partial(self._gather, place))
        if place.cut is not None:
            ssm = _ssm(block)
            self._hook_before(ssm, functools.partial(self._see_scan, _parameters(ssm)), with_kwargs=True)
            self._hook_before(block.get_submodule("mixer.out_proj"), self._see_output)
        self._hook_after(block, functools.partial(self._after_block, place))

    def _hook_before(self, module: nn.Module, hook: Callable, *, with_kwargs: bool = False) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))
        self._guard(module)

    def _hook_after(self, module: nn.Module, hook: Callable) -> None:
        self._handles.append(module.register_forward_hook(hook))
        self._guard(module)

    def _guard(self, module: nn.Module) -> None:
        """Makes compiled code notice that a module has hooks, or has them no more.

        The compiler looks for a ``forward`` of the module's own before it takes earlier code, but not for hooks.
        """
        if "forward" not in vars(module):
            module.forward = types.MethodType(type(module).forward, module)
            self._guarded.append(module)

    def _watching(self, forward_intermediates: Callable) -> Callable:
        """The model's method, which lets the hooks know of which blocks the output is asked for."""

        @functools.wraps(forward_intermediates)
        def watched(x: Tensor, indices: int | Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
            blocks = len(cast(nn.ModuleList, self.backbone.blocks))
            taken, _ = feature_take_indices(blocks, cast("list[int] | int | None", indices))
            self._dense = frozenset(taken)
            try:
                return forward_intermediates(x, indices, *args, **kwargs)
            finally:
                self._dense = frozenset()
                self._bank.clear()

        return watched

    def _start(self, stem: nn.Module, args: tuple) -> None:
        self._run = _Run(self._dense)
        self.maps = self._run.maps
        self._bank, self._seen = {}, {}

    def _before_block(self, place: _Place, block: nn.Module, args: tuple) -> tuple:
        x, *others = args
        run = self._current = self._run_of(x)
        token_map = place.token_map(run)
        if token_map is not None:
            if place.index - 1 in run.dense:
                x = token_map.gather(x)
            if self.align == "mask":
                x = token_map.spread(x)
        return x, *others

    def _after_block(self, place: _Place, block: nn.Module, args: tuple, out: Tensor) -> Tensor:
        run, x = self._now, args[0]
        token_map = place.token_map(run)
        seen, self._seen, trace = self._seen, {}, None
        if place.cut is not None and place.cut not in run.reductions:
            trace = BlockTrace(x, out, ssm=_ssm(block), **seen)
        if self.align == "mask" and token_map is not None:
            x, out = token_map.gather(x), token_map.gather(out)
        if place.cut is not None:
            before = token_map or TokenMap.full(x.shape[0], x.shape[1], size=args[1], device=x.device)
            out = self._cut(run, place.cut, before, trace, x, out)
            token_map = run.maps[place.cut]
        if token_map is None or token_map.is_full or not (place.last or place.index in run.dense):
            return out
        return self._restore(place, token_map, out)

    @property
    def _now(self) -> _Run:
        """The forward pass to which the block under way belongs."""
        assert self._current is not None, "hooks inside of blocks run after those before them"
        return self._current

    def _run_of(self, x: Tensor) -> _Run:
        """The forward pass to which a block's input belongs.

        Gradient checkpointing calls a block once more in the backward pass, with the very tensor of the forward pass,
        after which others may have followed.
        """
        compiling = torch.compiler.is_compiling()
        run = (None if compiling else self._runs.get(x)) or self._run
        if run is None:
            raise RuntimeError(
                "TokenReducer: a block runs outside of a forward pass that began with the model's stem; reentrant "
                "gradient checkpointing does so"
            )
        if not compiling and torch.is_grad_enabled():
            self._runs[x] = run
        return run

    def _cut(
        self, run: _Run, cut: int, before: TokenMap, trace: BlockTrace | None, x_in: Tensor, x_out: Tensor
    ) -> Tensor:
        """Cuts the stream ``x_out`` (b, t, c) behind a block; ``trace`` is None where that is decided already."""
        count = self._count(cut, before)
        if count == before.count:
            run.maps[cut] = before
            return x_out
        if trace is not None:
            run.reductions[cut] = self._decide(trace, before, count)
            run.maps[cut] = before.cut(run.reductions[cut])
        reduction = run.reductions[cut]
        if reduction.target is None:
            dropped = take(x_out, reduction.dropped)
            if trace is not None:
                self._bank[cut] = dropped
            return take(x_out, reduction.kept)
        if reduction.hidden is None:
            return _mean(x_out, reduction, before.weight)
        added = _mean(x_out - x_in, reduction, before.weight, merged=reduction.hidden)
        return _mean(x_in, reduction, before.weight) + added

    @torch.no_grad()
    def _decide(self, trace: BlockTrace, before: TokenMap, count: int) -> Reduction:
        """Asks the policy; where a trace has all tokens, it sees those of the stream."""
        score = self.score
        if trace.x_out.shape[1] != before.count:
            whole, trace = trace, trace.gather(before)
            score = lambda _: before.gather(self.score(whole))  # noqa: E731  a function of one line
        reduction = self.policy(trace, score, count=count, pinned=self._pinned(before))
        batch, tokens = before.kept.shape
        if reduction.kept.shape != (batch, count) or reduction.dropped.shape != (batch, tokens - count):
            raise ValueError(
                f"TokenReducer: expected a policy to keep {count} of {tokens} tokens in each of {batch} samples, got "
                f"kept {tuple(reduction.kept.shape)} and dropped {tuple(reduction.dropped.shape)}"
            )
        return reduction

    def _count(self, cut: int, before: TokenMap) -> int:
        """Tokens that a cut leaves."""
        tokens, pinned = before.count, self._pinned(before).shape[1]
        if self.remove is not None:
            if tokens - self.remove <= pinned:
                raise ValueError(
                    f"TokenReducer: expected remove below the {tokens - pinned} tokens left after block "
                    f"{cut - 1}, got {self.remove}"
                )
            return tokens - self.remove
        return count_kept(tokens, self.keep[self.after.index(cut)], class_token=pinned > 0)

    def _pinned(self, token_map: TokenMap) -> Tensor:
        """Places of class tokens in the stream, (b, 1) or (b, 0)."""
        index = None
        if isinstance(self.backbone, TokenBackbone):
            index = self.backbone.class_token_index(token_map.tokens)
        if index is None:
            return token_map.kept[:, :0]
        return (token_map.kept < index).sum(1, keepdim=True)

    def _restore(self, place: _Place, token_map: TokenMap, x: Tensor) -> Tensor:
        """All tokens (b, l, c), of the stream (b, t, c) after a block."""
        cuts = place.earlier if place.cut is None else (*place.earlier, place.cut)
        bank = [self._bank[cut] for cut in cuts if cut in self._bank] if self._current is self._run else []
        missing = token_map.banked - sum(each.shape[1] for each in bank)
        if missing:  # the block is computed again for its gradients, to which the values of others do not matter
            bank = [x.new_zeros(x.shape[0], token_map.banked, *x.shape[2:])]
        if place.last:
            for cut in cuts:
                self._bank.pop(cut, None)
        return token_map.restore(x, bank)

    def _spread(self, place: _Place, conv: nn.Module, args: tuple) -> tuple | None:
        token_map = place.token_map(self._now)
        return None if token_map is None else (token_map.spread(args[0]), *args[1:])

    def _gather(self, place: _Place, conv: nn.Module, args: tuple, out: Tensor) -> Tensor:
        token_map = place.token_map(self._now)
        return out if token_map is None else token_map.gather(out)

    def _see_scan(self, names: list[str], ssm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = dict(zip(names, args, strict=False)) | kwargs
        self._seen |= {"u": call["x"], "z": call.get("z"), "order": call.get("order")}

    def _see_output(self, out_proj: nn.Module, args: tuple) -> None:
        self._seen["y"] = args[0]

    def _restrict_scan(
        self, place: _Place, names: list[str], ssm: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        run = self._now
        token_map = place.token_map(run)
        if token_map is None:
            return None
        call = dict(zip(names, args, strict=False)) | kwargs
        route = _route(run, place.earlier[-1], token_map, call.get("order"))
        call["order"] = route.order
        if self.align in ("decay", "idle"):
            call["gap"] = route.gap
        if self.align == "idle":
            call["idle"] = _idle_input(place.block.get_submodule("mixer"))
        if route.steps is not None and "moves" in call:
            call["moves"] = call["moves"].expand(len(route.steps), -1, -1).gather(2, route.steps)
        return (call.pop("x"),), call


class _Route(NamedTuple):
    """A scan order restricted to a stream.

    Args:
        order: Places of the stream (k, t) or (b, k, t) in the order in which they are visited; None for their own.
        gap: Tokens that are left out before each step, (b, k, t).
        steps: The step of the whole order that each step is, (b, k, t); None for an order of the stream itself.
    """

    order: Tensor | None
    gap: Tensor
    steps: Tensor | None


def count_kept(tokens: int, keep: float, *, class_token: bool) -> int:
    """Tokens that a cut leaves of so many.

    Args:
        tokens: Tokens before the cut, the class token included.
        keep: Share of the patch tokens to keep.
        class_token: Whether one of them is a class token; then the result is odd, unless all are kept.

    Reference:
        The code released with Zhan et al., 2024, https://arxiv.org/abs/2409.18962, leaves 157, 125 and 101 of 197
        tokens for a share of 0.8.
    """
    if keep == 1:
        return tokens
    share = math.ceil(keep * (tokens - class_token) - 1e-9)  # 0.7·10 is 7, not a little more
    return min(tokens, share + (share + 1) % 2 if class_token else share)


def _route(run: _Run, cut: int, token_map: TokenMap, order: Tensor | None) -> _Route:
    """The route of a scan after a cut, made once for each order."""
    if torch.compiler.is_compiling():
        return _restricted(token_map, order)
    key = (cut, id(order))
    if key not in run.routes:
        run.routes[key] = (order, _restricted(token_map, order))  # the order is kept, for its id not to be reused
    return run.routes[key][1]


def _restricted(token_map: TokenMap, order: Tensor | None) -> _Route:
    steps = token_map.count if order is None else order.shape[-1]
    if order is not None and steps == token_map.tokens:
        places, gap = restrict(order, token_map.kept)
        return _Route(places, gap, (gap + 1).cumsum(2) - 1)
    if steps != token_map.count:
        raise ValueError(
            f"TokenReducer: expected a scan order of all {token_map.tokens} tokens or of the {token_map.count} left, "
            f"got one of {steps}"
        )
    # The mixer reads its tokens as a sequence: it walks what is left of it, forwards or backwards.
    whole = torch.arange(steps, device=token_map.kept.device)[None] if order is None else order.long()
    tokens = take(token_map.kept, whole.expand(len(token_map.kept), -1, -1).flatten(1)).unflatten(1, (-1, steps))
    gap = tokens.diff(dim=2, prepend=tokens[:, :, :1]).abs() - 1
    return _Route(order, gap.clamp(min=0).to(torch.int32), None)


def _mean(x: Tensor, reduction: Reduction, weight: Tensor, *, merged: Tensor | None = None) -> Tensor:
    """Kept tokens (b, t', c), each as the mean of itself and of those merged into it.

    Args:
        x: Tokens (b, t, c).
        reduction: Says which are merged into which.
        weight: Number of tokens (b, t) that each token counts for.
        merged: Which of the dropped ones take part, boolean (b, t − t'); all when not given.
    """
    assert reduction.target is not None, "called for reductions that merge"
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(dtype)[:, :, None]
    own, others = take(weight, reduction.kept), take(weight, reduction.dropped)
    if merged is not None:
        others = others * merged[:, :, None]
    target = reduction.target[:, :, None]
    total = own.scatter_add(1, target, others)
    incoming = take(x, reduction.dropped).to(dtype) * others
    summed = (take(x, reduction.kept).to(dtype) * own).scatter_add(1, target.expand_as(incoming), incoming)
    return (summed / total).to(x.dtype)


def _backbone_of(model: nn.Module) -> GridBackbone | TokenBackbone:
    found = [module for module in model.modules() if isinstance(module, GridBackbone | TokenBackbone)]
    if len(found) != 1:
        raise ValueError(
            f"TokenReducer: expected a model with one backbone of vssm, got {type(model).__name__} with {len(found)}"
        )
    return found[0]


def _places(backbone: GridBackbone | TokenBackbone, after: tuple[int, ...]) -> Iterator[_Place]:
    """All blocks in their order.

    Raises:
        ValueError: If a cut does not stand between two blocks of a stage.
    """
    if isinstance(backbone, GridBackbone):
        stages = {f"stages.{i}.blocks": stage.get_submodule("blocks") for i, stage in enumerate(backbone.stages)}
    else:
        stages = {"blocks": backbone.blocks}
    sizes = [len(cast(nn.ModuleList, blocks)) for blocks in stages.values()]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    allowed = set(range(1, ends[-1])) - set(ends)
    if not after or sorted(set(after)) != list(after) or not allowed.issuperset(after):
        raise ValueError(
            f"TokenReducer: after must hold ascending numbers of blocks from 1 to {ends[-1] - 1}, without the last of "
            f"a stage ({', '.join(map(str, ends))}), got {', '.join(map(str, after)) or 'none'}"
        )
    index = 0
    for (path, blocks), size, end in zip(stages.items(), sizes, ends, strict=True):
        cuts = [cut for cut in after if end - size < cut < end]
        for name, block in blocks.named_children():
            cut = index + 1 if index + 1 in cuts else None
            earlier = tuple(each for each in cuts if each <= index)
            yield _Place(block, f"{path}.{name}", index, earlier, cut, last=index + 1 == end)
            index += 1


def _amounts(
    after: tuple[int, ...], keep: float | Sequence[float] | None, remove: int | None
) -> tuple[tuple[float, ...], int | None]:
    """One share for each cut, or none of them and the number of tokens to remove."""
    if (keep is None) == (remove is None):
        raise ValueError(f"TokenReducer: expected either keep or remove, got keep={keep} and remove={remove}")
    if remove is not None:
        if remove < 0:
            raise ValueError(f"TokenReducer: remove must be at least 0, got {remove}")
        return (), remove
    shares = (keep,) * len(after) if isinstance(keep, int | float) else tuple(cast(Sequence[float], keep))
    if len(shares) != len(after) or not all(0 < share <= 1 for share in shares):
        raise ValueError(
            f"TokenReducer: keep must be a share over 0 and at most 1, or one for each of {len(after)} cuts, got {keep}"
        )
    return shares, None


def _method(policy: str | Policy, score: str | Score | None) -> tuple[Policy, Score]:
    """The functions that are meant by a method's or policy's name and that of a score."""
    usual: Score | None = clipped_output
    if isinstance(policy, str):
        _check_choice("policy", policy, METHODS)
        policy, usual = METHODS[policy]
    if isinstance(score, str):
        _check_choice("score", score, SCORES)
        score = SCORES[score]
    if usual is None and score is not None:
        raise ValueError("TokenReducer: policy 'merge' asks for no score, got one; leave it out")
    return policy, score or usual or clipped_output


def _check_choice(name: str, value: object, known: Iterable[object]) -> None:
    if value not in known:
        choices = ", ".join(repr(each) for each in known if each is not None)
        raise ValueError(f"TokenReducer: {name} must be one of {choices}, got {value!r}")


def _idle_input(mixer: nn.Module) -> Tensor | None:
    """What a mixer's scan reads where its convolution sees nothing but zeros, (d,) or (k, d); None for zeros."""
    conv = getattr(mixer, "conv", None)
    if not isinstance(conv, TokenConv | CausalTokenConv):
        return None
    bias = conv.bias if isinstance(conv, CausalTokenConv) else conv.conv.bias
    if bias is None:
        return None
    activated = isinstance(conv, CausalTokenConv) and conv.activation
    return F.silu(bias) if activated else getattr(mixer, "activate", F.silu)(bias)


def _ssm(block: nn.Module) -> SelectiveSSM:
    return cast(SelectiveSSM, block.get_submodule("mixer.ssm"))


def _parameters(module: nn.Module) -> list[str]:
    """Names of what a module's ``forward`` takes."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
