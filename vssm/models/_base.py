"""The timm surface of every family, written once: heads, features, layer groups, checkpointing, input sizes.

`GridBackbone` is for models whose stages halve the resolution, `TokenBackbone` for models of one resolution with or
without a class token. They hold no mathematics: a family brings its stem, its blocks and its norm.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vssm.layers.stem import TokenStem

# Parameters that say how fast states decay or where tokens are, and biases, which timm knows by their one dimension
# while ours have one row per direction.
_NOT_DECAYED = frozenset(
    {"A_log", "D", "bias", "dt_bias", "cls_token", "pos_embed", "move_B", "rel_pos_bias", "global_pos_bias"}
)


class _Backbone(nn.Module):
    """What both bases share."""

    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]

    def __init__(self, *, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images (b, in_chans, H, W); returns logits (b, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that an optimizer should not decay."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in _NOT_DECAYED}

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"{type(self).__name__}: expected images (b, {self.in_chans}, height, width), got {tuple(images.shape)}"
            )

    def _check_output_fmt(self, output_fmt: str, native: str) -> None:
        if output_fmt not in ("NCHW", native):
            raise ValueError(f"{type(self).__name__}: output_fmt must be 'NCHW' or {native!r}, got {output_fmt!r}")


class Stage(nn.Module):
    """Blocks of one resolution: downsamples a map, runs its blocks on the map's tokens, and norms these.

    Args:
        blocks: Modules that map tokens (b, l, c) and the grid ``size`` = (h, w) to tokens (b, l, c).
        downsample: Maps (b, h, w, c) to a map of this stage's resolution and channels.
        norm: Norm of the stage's result; none when not given.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], *, downsample: nn.Module | None = None, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm or nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, h, w, c) to (b, h', w', c')."""
        return self.norm(self.run_blocks(self.downsample(x)))

    def run_blocks(self, x: Tensor) -> Tensor:
        """Maps (b, h, w, c) to a map of the same shape."""
        size = (x.shape[1], x.shape[2])
        tokens = x.flatten(1, 2)
        for block in self.blocks:
            tokens = checkpoint(block, tokens, size) if self.grad_checkpointing else block(tokens, size)
        return tokens.unflatten(1, size)


def make_stages(
    make_block: Callable[[int, float], nn.Module],
    *,
    dims: Sequence[int],
    depths: Sequence[int],
    downsample_layer: Callable[[int, int], nn.Module],
    drop_path_rate: float,
) -> list[Stage]:
    """Makes the stages of a pyramid, all but the first with a downsampling.

    Args:
        make_block: Makes a block from the index of its stage and its rate of stochastic depth.
        dims: Channels of each stage.
        depths: Blocks of each stage.
        downsample_layer: Makes a downsampling from the channels before and after.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """
    rates = iter(cast("list[float]", calculate_drop_path_rates(drop_path_rate, list(depths))))
    return [
        Stage(
            [make_block(i, next(rates)) for _ in range(depth)],
            downsample=downsample_layer(dims[i - 1], dims[i]) if i > 0 else None,
        )
        for i, depth in enumerate(depths)
    ]


class GridBackbone(_Backbone):
    """Backbone of several stages with maps (b, h, w, c) between them; it takes images of any size.

    Args:
        stem: Maps images (b, in_chans, H, W) to (b, h, w, c).
        stages: One `Stage` per resolution.
        dims: Channels after each stage.
        strides: Pixels per map cell after each stage.
        norm: Norm of the last map, before pooling.
        head_layer: Makes what pools and classifies, a `ClassifierHead` with the number of pooled channels as its
            ``in_features``, from the channels of the last map and the arguments of that class.
        num_classes: Classes of the classifier; 0 for none.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier, as timm names it.
        drop_rate: Dropout before the classifier.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: Sequence[Stage],
        dims: Sequence[int],
        strides: Sequence[int],
        norm: nn.Module,
        head_layer: Callable[..., ClassifierHead] = ClassifierHead,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.norm = norm
        self.head = head_layer(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC")
        self.num_features = dims[-1]
        self.head_hidden_size = self.head.in_features * self.head.global_pool.feat_mult()
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(dims, strides, strict=True))
        ]

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images (b, in_chans, H, W) to the last stage's map (b, h, w, c), before the norm."""
        self._check_images(x)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Norm, pooling, dropout and, unless ``pre_logits``, the classifier, of a map (b, h, w, c)."""
        return self.head(self.norm(x), pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps images to the maps of several stages.

        Args:
            x: Images (b, in_chans, H, W).
            indices: Stages to take: the last n for an int, all for None.
            norm: Apply the final norm to the last stage's map, the only one that it fits.
            stop_early: Leave out stages after the last one taken.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: Return the list of maps alone.

        Returns:
            The result of `forward_features`, and the maps in the order of the stages.

        Raises:
            ValueError: If ``output_fmt`` is something else.
        """
        self._check_output_fmt(output_fmt, "NHWC")
        self._check_images(x)
        taken, last = feature_take_indices(len(self.stages), cast("list[int] | int | None", indices))
        maps = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in taken:
                maps.append(self.norm(x) if norm and i == len(self.feature_info) - 1 else x)
        if output_fmt == "NCHW":
            maps = [each.permute(0, 3, 1, 2).contiguous() for each in maps]
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what maps of the given stages do not need; returns their indices counted from the front."""
        taken, last = feature_take_indices(len(self.stages), cast("list[int] | int", indices))
        ends_early = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if ends_early:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or ends_early:
            self.norm = nn.Identity()
        if prune_head or ends_early:
            self.head = ClassifierHead(self.num_features, 0, pool_type="", input_fmt="NHWC")
            self.num_classes = 0
        return taken

    def get_classifier(self) -> nn.Module:
        """The last linear layer, an identity if there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier; ``num_classes`` 0 removes it, ``global_pool`` None keeps the pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        like = next(self.stages.parameters())  # of which older versions of timm make a new layer regardless
        self.head.to(device=like.device, dtype=like.dtype)
        self.head_hidden_size = self.head.in_features * self.head.global_pool.feat_mult()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of storing its activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put every parameter into the group of its block, or of its stage if ``coarse``."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
        ]
        stages = [(r"^stages\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": [*(stages if coarse else blocks), (r"^norm", (99999,))]}


class TokenBackbone(_Backbone):
    """Backbone of one resolution: patches, possibly a class token among them, learnt positions, blocks, a norm.

    ``pos_embed`` holds its entries in the order of the sequence, that of the class token included.

    Args:
        stem: Maps images to a map of patches.
        blocks: Modules that map tokens (b, l, c) and the patch grid ``size`` = (h, w) to tokens (b, l, c).
        norm: Norm of the last tokens.
        embed_dim: Channels of the tokens.
        img_size: Height and width of the images, in pixels.
        dynamic_img_size: Take images of any size, with positions resized to their grid; else ``img_size`` only.
        class_token: Whether the sequence has a class token, at `class_token_index`.
        num_classes: Classes of the classifier; 0 for none.
        in_chans: Channels of the images.
        global_pool: What the classifier sees: ``"token"`` the class token, ``"avg"`` the mean of the patch tokens,
            ``""`` each token.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        *,
        stem: TokenStem,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        embed_dim: int,
        img_size: int | tuple[int, int] = 224,
        dynamic_img_size: bool = False,
        class_token: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.img_size = _pair(img_size)
        self.dynamic_img_size = dynamic_img_size
        self.grid_size = stem.grid_size(*self.img_size)
        self.grad_checkpointing = False
        self.stem = stem
        self.cls_token = _embedding(1, embed_dim) if class_token else None
        self.pos_embed = _embedding(self.grid_size[0] * self.grid_size[1] + class_token, embed_dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.global_pool = self._checked_pool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_classifier()
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": stem.stride, "module": f"blocks.{i}"} for i in range(len(blocks))
        ]

    def class_token_index(self, tokens: int) -> int | None:
        """Place of the class token in a sequence of so many tokens, itself included; None if there is none."""
        return None if self.cls_token is None else (tokens - 1) // 2

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images (b, in_chans, H, W) to normed tokens (b, l, c), the class token at its place among them."""
        x, size = self._embed(x)
        for block in self.blocks:
            x = self._run(block, x, size)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and, unless ``pre_logits``, the classifier, of normed tokens (b, l, c)."""
        x = self.head_drop(self._pool(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps images to the patch tokens after several blocks, without the class token.

        Args:
            x: Images (b, in_chans, H, W).
            indices: Blocks to take: the last n for an int, all for None.
            norm: Apply the final norm to what is taken.
            stop_early: Leave out blocks after the last one taken.
            output_fmt: ``"NCHW"`` for maps (b, c, h, w), ``"NLC"`` for tokens (b, h·w, c).
            intermediates_only: Return the list of maps alone.

        Returns:
            The result of `forward_features`, and the maps in the order of the blocks.

        Raises:
            ValueError: If ``output_fmt`` is something else.
        """
        self._check_output_fmt(output_fmt, "NLC")
        taken, last = feature_take_indices(len(self.blocks), cast("list[int] | int | None", indices))
        maps = []
        x, size = self._embed(x)
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run(block, x, size)
            if i in taken:
                maps.append(self._patches(self.norm(x) if norm else x))
        if output_fmt == "NCHW":
            maps = [each.unflatten(1, size).permute(0, 3, 1, 2).contiguous() for each in maps]
        return maps if intermediates_only else (self.norm(x), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the tokens after the given blocks do not need; returns their indices counted from the front."""
        taken, last = feature_take_indices(len(self.blocks), cast("list[int] | int", indices))
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """The last linear layer, an identity if there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier; ``num_classes`` 0 removes it, ``global_pool`` None keeps the pooling."""
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        device, dtype, training = self.pos_embed.device, self.pos_embed.dtype, self.training
        self.head = self._make_classifier().to(device=device, dtype=dtype).train(training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put every parameter into the group of its block; ``coarse`` changes nothing here."""
        return {"stem": r"^stem|^cls_token|^pos_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Prepares the model for images of another size by resizing its positions.

        Args:
            img_size: Height and width of the images, in pixels.
        """
        img_size = _pair(img_size)
        grid_size = self.stem.grid_size(*img_size)
        with torch.no_grad():
            resized = self._resize_positions(self.pos_embed, self.grid_size, grid_size)
        self.pos_embed = nn.Parameter(resized.clone(), requires_grad=self.pos_embed.requires_grad)
        self.img_size, self.grid_size = img_size, grid_size

    def adapt_pos_embed(self, pos_embed: Tensor, *, class_token: bool) -> Tensor:
        """Makes the positions of a checkpoint fit this model.

        Args:
            pos_embed: Entries (1, l, c) in the order of the sequence.
            class_token: Whether one of them, at the place this model would have it, belongs to a class token. It is
                dropped if this model has none.

        Returns:
            (1, l', c). Entries of another grid, which must be square, are resized to this model's. As many entries as
            this model's grid has are taken for its own.

        Raises:
            ValueError: If the number of entries fits neither this model's grid nor a square.
        """
        if class_token and self.cls_token is None:
            pos_embed, _ = _take_out(pos_embed, (pos_embed.shape[1] - 1) // 2)
        if self.cls_token is not None and not class_token:
            return pos_embed  # the check of the keys will say that the class token is missing
        patches = pos_embed.shape[1] - (self.cls_token is not None)
        if patches == self.grid_size[0] * self.grid_size[1]:
            return pos_embed
        side = int(patches**0.5)
        if side * side != patches:
            raise ValueError(
                f"{type(self).__name__}: the checkpoint has positions of {patches} patches, neither a square grid nor "
                f"this model's {self.grid_size[0]}×{self.grid_size[1]}: build the model with the checkpoint's img_size"
            )
        return self._resize_positions(pos_embed, (side, side), self.grid_size)

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (b, l, c) of images, with class token and positions, and the size (h, w) of the patch grid."""
        self._check_images(images)
        self._check_size(images.shape[2], images.shape[3])
        x = self.stem(images)
        size = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = _insert(x, self.cls_token.expand(x.shape[0], -1, -1), self._class_place(x.shape[1] + 1))
        if not self.dynamic_img_size:
            return x + self.pos_embed, size
        return x + self._resize_positions(self.pos_embed, self.grid_size, size), size

    def _run(self, block: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
        return checkpoint(block, x, size) if self.grad_checkpointing else block(x, size)

    def _pool(self, x: Tensor) -> Tensor:
        if self.global_pool == "token":
            place = self._class_place(x.shape[1])
            return x[:, place : place + 1].squeeze(1)  # a plain index would fix the number of tokens when compiled
        return self._patches(x).mean(1) if self.global_pool == "avg" else x

    def _patches(self, x: Tensor) -> Tensor:
        """Tokens (b, l, c) without the class token."""
        return x if self.cls_token is None else _take_out(x, self._class_place(x.shape[1]))[0]

    def _class_place(self, tokens: int) -> int:
        index = self.class_token_index(tokens)
        assert index is not None, "asked for only where there is a class token"
        return index

    def _resize_positions(self, pos_embed: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
        """Positions for a grid of another size; the class token's entry moves to its new place unchanged."""
        class_entry = None
        if self.cls_token is not None:
            pos_embed, class_entry = _take_out(pos_embed, self._class_place(pos_embed.shape[1]))
        pos_embed = _resize_grid(pos_embed, old_size, new_size)
        if class_entry is not None:
            pos_embed = _insert(pos_embed, class_entry, self._class_place(pos_embed.shape[1] + 1))
        return pos_embed

    def _check_size(self, height: int, width: int) -> None:
        if not self.dynamic_img_size and (height, width) != self.img_size:
            raise ValueError(
                f"{type(self).__name__}: expected images of {self.img_size[0]}×{self.img_size[1]} pixels, got "
                f"{height}×{width}; call set_input_size, or build the model with img_size or dynamic_img_size=True"
            )

    def _checked_pool(self, global_pool: str) -> Literal["token", "avg", ""]:
        allowed = ("token", "avg", "") if self.cls_token is not None else ("avg", "")
        if global_pool not in allowed:
            without = "" if self.cls_token is not None else " without a class token"
            raise ValueError(
                f"{type(self).__name__}: global_pool{without} must be one of {', '.join(map(repr, allowed))}, "
                f"got {global_pool!r}"
            )
        return cast('Literal["token", "avg", ""]', global_pool)

    def _make_classifier(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        classifier = nn.Linear(self.num_features, self.num_classes)
        trunc_normal_(classifier.weight, std=0.02)
        nn.init.zeros_(classifier.bias)
        return classifier


def _pair(img_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = to_2tuple(img_size)
    return int(height), int(width)


def _embedding(entries: int, dim: int) -> nn.Parameter:
    return nn.Parameter(trunc_normal_(torch.empty(1, entries, dim), std=0.02))


def _resize_grid(positions: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Positions (1, h·w, c) resized bicubically, as the official codes do it; timm smooths where the grid shrinks.

    timm's function also takes grids of as many cells for the same grid.
    """
    if not torch.compiler.is_exporting() and old_size == new_size:  # an exported program must take either way
        return positions
    grid = positions.unflatten(1, old_size).permute(0, 3, 1, 2).float()
    resized = F.interpolate(grid, size=new_size, mode="bicubic")
    return resized.flatten(2).transpose(1, 2).to(positions.dtype)


def _insert(x: Tensor, token: Tensor, index: int) -> Tensor:
    return torch.cat([x[:, :index], token, x[:, index:]], dim=1)


def _take_out(x: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Splits tokens (b, l, c) into all but one, (b, l − 1, c), and that one, (b, 1, c)."""
    return torch.cat([x[:, :index], x[:, index + 1 :]], dim=1), x[:, index : index + 1]
