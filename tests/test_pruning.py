"""Token reduction against a version written out token by token, and the promises of its context."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vssm
from slow_reduction import SlowReducer
from vssm.layers.squeeze_excite import TokenSqueezeExcite
from vssm.pruning import ALIGNMENTS, METHODS, Reduction, TokenReducer, count_kept
from vssm.pruning.prunable import check_block

FAMILIES = {
    "vim": ("test_vim", {"img_size": 64}, (1, 3)),
    "plainmamba": ("test_plainmamba", {"img_size": (64, 80)}, (1, 2)),
    "vmamba": ("test_vmamba", {"depths": (1, 3, 1)}, (2, 3)),
    "vmamba_gate": ("test_vmamba", {"depths": (1, 2), "gate": True, "d_state": 4, "mlp_ratio": 0.0}, (2,)),
}


@torch.no_grad()
def a_model(family: str, **more) -> tuple[nn.Module, tuple[int, ...]]:
    """A model in double precision whose blocks do not start out as nearly the identity, and where to cut it."""
    name, arguments, after = FAMILIES[family]
    model = vssm.create_model(name, num_classes=5, **(arguments | more)).double().eval()
    for key, parameter in model.named_parameters():
        if "A_log" not in key:
            parameter.add_(0.1 * torch.randn_like(parameter))
        if key.endswith("dt_bias"):
            parameter.add_(3.0)  # steps so long that states decay over the tokens that are dropped
    return model, after


def images_of(model: nn.Module, batch: int = 2) -> torch.Tensor:
    size = getattr(model, "img_size", (64, 64))
    return torch.randn(batch, 3, *size, dtype=torch.float64)


# Every policy and every alignment, and pairs of those that have to do with each other.
PAIRS = [
    *itertools.product(METHODS, ["decay"]),
    ("top", "idle"),
    ("top", "hold"),
    ("top", "none"),
    ("top", "mask"),
    ("utr", "mask"),
]


@pytest.mark.parametrize(("policy", "align"), PAIRS)
@pytest.mark.parametrize("family", FAMILIES)
def test_against_token_by_token(family, policy, align):
    model, after = a_model(family)
    images = images_of(model)
    conv = "compact" if align == "none" and family == "vim" else "grid"
    slow = SlowReducer(model, after=after, keep=0.7, policy=policy, align=align, conv=conv)
    with torch.no_grad():
        expected, dense = slow.logits(images), model(images)
        with TokenReducer(model, after=after, keep=0.7, policy=policy, align=align, conv=conv) as reducer:
            logits = model(images)
    assert {cut: each.kept.tolist() for cut, each in reducer.maps.items()} == slow.kept
    torch.testing.assert_close(logits, expected)
    assert (logits - dense).norm() > 1e-3 * dense.norm()


@pytest.mark.parametrize(("policy", "align"), [("top", "decay"), ("merge", "decay"), ("top", "mask")])
def test_intermediate_maps_are_full(policy, align):
    model, after = a_model("vim")
    images = images_of(model)
    slow = SlowReducer(model, after=after, keep=0.7, policy=policy, align=align, conv="grid")
    with torch.no_grad():
        expected = slow.logits(images)
        with TokenReducer(model, after=after, keep=0.7, policy=policy, align=align):
            features, maps = model.forward_intermediates(images)
            early = model.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
            logits = model(images)
    for index, each in enumerate(maps):
        tokens = torch.stack([sample[index] for sample in slow.intermediates])
        patches = torch.cat([tokens[:, :8], tokens[:, 9:]], dim=1)
        torch.testing.assert_close(each.flatten(2).transpose(1, 2), patches)
    torch.testing.assert_close(early[0], maps[1])
    torch.testing.assert_close(model.forward_head(features), expected)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("name", ["test_vim", "test_vmamba"])
def test_features_only_gives_full_maps(name):
    model = vssm.create_model(name, features_only=True).eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        dense = model(images)
        with TokenReducer(model, after=[2], keep=0.5):
            maps = model(images)
    assert [each.shape for each in maps] == [each.shape for each in dense]
    assert torch.equal(maps[0], dense[0])
    assert all(
        each.isfinite().all() and not torch.equal(each, other) for each, other in zip(maps[2:], dense[2:], strict=True)
    )


def replaying(policy: str):
    """A policy that decides once, for one cut, and then always in the same way."""
    decided = []

    def decide(trace, score, *, count, pinned):
        if not decided:
            method = METHODS[policy]
            decided.append(method.policy(trace, method.score, count=count, pinned=pinned))
        return decided[0]

    return decide


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("align", ALIGNMENTS)
def test_keeping_all_changes_no_bit(family, align):
    model, after = a_model(family)
    images = images_of(model)
    with torch.no_grad():
        dense = model(images)
        for policy in METHODS:
            with TokenReducer(model, after=after, keep=1, policy=policy, align=align, conv="grid") as reducer:
                assert torch.equal(model(images), dense)
                assert all(each.is_full for each in reducer.maps.values())


def zero_dropped_scan_inputs(reducer: TokenReducer, after: tuple[int, ...], blocks: dict[int, nn.Module]) -> list:
    """Hooks that set what scans read to zero at tokens that were dropped, where all tokens are computed."""

    def hook_of(number: int):
        def hook(_, args, kwargs):
            earlier = [cut for cut in after if cut < number]
            if not earlier:
                return None
            x = args[0]
            token_map = reducer.maps[max(earlier)]
            return (token_map.spread(token_map.gather(x)), *args[1:]), kwargs

        return hook

    return [
        block.mixer.ssm.register_forward_pre_hook(hook_of(number), with_kwargs=True) for number, block in blocks.items()
    ]


@pytest.mark.parametrize("policy", METHODS)
def test_mask_equals_decay_without_convolution(policy):
    """A token of zeros stays one in a Vim whose convolution sees one token and has no bias."""
    model, _ = a_model("vim", d_conv=1)
    model = model.float()
    for block in model.blocks:
        nn.init.zeros_(block.mixer.conv.bias)
    results = []
    for align in ("mask", "decay", "idle", "hold"):
        with torch.no_grad(), TokenReducer(model, after=(1, 2, 3), keep=0.8, policy=policy, align=align):
            results.append(model(torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))))
    mask, decay, idle, hold = results
    assert (decay - mask).norm() < 2e-6 * mask.norm()
    assert (idle - mask).norm() < 2e-6 * mask.norm()
    assert (hold - mask).norm() > 1e-4 * mask.norm()


@pytest.mark.parametrize("family", ["vim", "vmamba", "vmamba_gate"])
def test_mask_equals_decay_with_zeros_at_scan_inputs(family):
    """Only the scan is left to differ where what convolutions and scans read of dropped tokens is zero."""
    model, after = a_model(family)
    model = model.float()
    images = images_of(model).float()
    blocks = dict(enumerate(model.blocks, 1) if family == "vim" else enumerate(model.stages[1].blocks, 2))
    for block in blocks.values():
        if getattr(block.norm1, "bias", None) is not None:
            nn.init.zeros_(block.norm1.bias)  # else a token of zeros reaches the convolution as something else
    with torch.no_grad():
        with TokenReducer(model, after=after, keep=0.7, align="mask") as reducer:
            handles = zero_dropped_scan_inputs(reducer, after, blocks)
            mask = model(images)
        for handle in handles:
            handle.remove()
        with TokenReducer(model, after=after, keep=0.7, align="decay"):
            decay = model(images)
        with TokenReducer(model, after=after, keep=0.7, align="hold"):
            hold = model(images)
    assert (decay - mask).norm() < 2e-6 * mask.norm()
    assert (hold - mask).norm() > 1e-5 * mask.norm()


def test_class_token_stays_in_the_middle_of_its_neighbours():
    """Samples keep different tokens; the class token, whatever its score, is where it was between them."""
    model, _ = a_model("vim")

    def score(trace):
        tokens = torch.arange(trace.y.shape[1], dtype=torch.float64)
        return torch.stack([tokens, -tokens]) - 100.0 * (tokens == 8)

    with torch.no_grad(), TokenReducer(model, after=[2], keep=0.5, score=score) as reducer:
        model(images_of(model))
    assert reducer.maps[2].kept.tolist() == [
        [8, 9, 10, 11, 12, 13, 14, 15, 16][:1] + list(range(9, 17)),
        list(range(9)),
    ]
    assert reducer.maps[2].target.tolist()[1] == [*range(9), *[-1] * 8]


def test_published_numbers_of_tokens():
    counts = [197]
    for _ in range(3):
        counts.append(count_kept(counts[-1], 0.8, class_token=True))
    assert counts == [197, 157, 125, 101]
    assert count_kept(10, 1, class_token=True) == 10
    assert [count_kept(196, share, class_token=False) for share in (0.7, 0.5, 1)] == [138, 98, 196]
    assert count_kept(10, 0.7, class_token=False) == 7


def test_removing_a_number_of_tokens():
    model, _ = a_model("vim")
    with torch.no_grad(), TokenReducer(model, after=(1, 2, 3), remove=4, policy="merge") as reducer:
        model(images_of(model))
    assert [each.count for each in reducer.maps.values()] == [13, 9, 5]
    assert (reducer.maps[3].weight.sum(1) == 17).all()
    with TokenReducer(model, after=(1, 2, 3), remove=6), pytest.raises(ValueError, match="remove below the 4 tokens"):
        model(images_of(model))


def test_a_policy_and_a_score_of_ones_own():
    model, _ = a_model("plainmamba")

    def every_second(trace, score, *, count, pinned):
        places = torch.arange(trace.x_in.shape[1]).expand(len(trace.x_in), -1)
        assert score(trace).shape == places.shape
        assert torch.equal(trace.hidden, trace.x_out - trace.x_in)
        return Reduction(places[:, ::2], places[:, 1::2])

    with torch.no_grad(), TokenReducer(model, after=[1], keep=0.5, policy=every_second, score="step_size") as reducer:
        model(images_of(model))
    assert reducer.maps[1].kept.tolist() == 2 * [list(range(0, 20, 2))]
    with (
        TokenReducer(model, after=[1], keep=0.3, policy=every_second),
        pytest.raises(ValueError, match="keep 6 of 20 tokens in each of 2 samples, got kept"),
    ):
        model(images_of(model))


def test_backward_scores():
    """The released code's score: of the last direction alone, and of the mirrored sequence."""
    model, _ = a_model("vim")
    mixer, seen = model.blocks[1].mixer, {}
    handle = mixer.ssm.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(u=args[0], **kwargs), with_kwargs=True
    )
    images = images_of(model)
    with torch.no_grad():
        model(images)
        handle.remove()
        u, z = seen["u"], seen["z"]
        dt, B, C = mixer.ssm._project(u)
        y = vssm.directional_scan(
            u[:, :, 1:].flip(1), dt[:, :, 1:].flip(1), mixer.ssm._state_matrix()[1:], B[:, :, 1:].flip(1),
            C[:, :, 1:].flip(1), mixer.ssm.D[1:], dt_weight=mixer.ssm.dt_weight[1:], dt_bias=mixer.ssm.dt_bias[1:],
        ).flip(1)  # fmt: skip
        expected = (y * F.silu(z)).clamp(min=0).sum(-1)
        expected[:, 8] = float("inf")
        for score, values in (("clipped_backward", expected), ("clipped_backward_flipped", expected.flip(1))):
            with TokenReducer(model, after=[2], keep=0.5, score=score) as reducer:
                model(images)
            assert torch.equal(reducer.maps[2].kept, values.topk(9).indices.sort(1).values)


def test_gradients_reach_every_parameter():
    for family, policy in itertools.product(("vim", "plainmamba", "vmamba"), ("top", "utr")):
        model, after = a_model(family)
        model.train()
        with TokenReducer(model, after=after, keep=0.7, policy=policy):
            model(images_of(model)).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, (family, name)
            assert parameter.grad.isfinite().all(), (family, name)
            assert parameter.grad.any(), (family, name)


@pytest.mark.parametrize(("policy", "align"), [("top", "decay"), ("utr", "mask"), ("merge", "hold")])
@pytest.mark.parametrize("family", ["vim", "plainmamba", "vmamba"])
def test_gradients_against_differences(family, policy, align):
    """Along a random direction in all parameters, with tokens chosen as before."""
    model, after = a_model(family, depth=3) if family != "vmamba" else a_model(family)
    after = after[:1]
    images = images_of(model)
    fixed = replaying(policy)
    direction = [torch.randn_like(parameter) for parameter in model.parameters()]
    with TokenReducer(model, after=after, keep=0.7, policy=fixed, align=align):
        model(images).square().sum().backward()
        slope = sum(
            (parameter.grad * each).sum() for parameter, each in zip(model.parameters(), direction, strict=True)
        )
        values = []
        for shift in (1e-6, -2e-6):
            with torch.no_grad():
                for parameter, each in zip(model.parameters(), direction, strict=True):
                    parameter.add_(shift * each)
                values.append(model(images).square().sum())
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=0)


@pytest.mark.parametrize("policy", ["top", "utr"])
@pytest.mark.parametrize("family", ["vim", "vmamba"])
def test_gradient_checkpointing_changes_no_gradient(family, policy):
    """Even where another forward pass, with other tokens, comes before the backward pass."""
    model, after = a_model(family)
    first, second = images_of(model), images_of(model)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        with TokenReducer(model, after=after, keep=0.7, policy=policy) as reducer:
            loss = model(first).square().sum()
            kept = reducer.maps[after[-1]].kept
            loss = loss + model(second).square().sum()
            assert not torch.equal(kept, reducer.maps[after[-1]].kept)
            loss.backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


@pytest.mark.parametrize("policy", METHODS)
@pytest.mark.parametrize("family", ["vim", "plainmamba", "vmamba"])
def test_autocast_is_near_for_the_same_tokens(family, policy):
    model, after = a_model(family)
    model, images, fixed = model.float(), images_of(model).float(), replaying(policy)
    with (
        torch.no_grad(),
        TokenReducer(model, after=after, keep=0.7, policy=policy),
        torch.autocast("cpu", torch.bfloat16),
    ):
        assert model(images).isfinite().all()
    with torch.no_grad(), TokenReducer(model, after=after[:1], keep=0.7, policy=fixed):
        whole = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
    assert 0 < (half - whole).norm() < 0.05 * whole.norm()


def compiled(model: nn.Module, backend: str):
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)


def test_compiled_code_of_outside_is_not_used_inside_nor_vice_versa():
    model, _ = a_model("vim", depth=2)
    images, network = images_of(model), compiled(model, "eager")
    with torch.no_grad():
        dense = network(images)
        with TokenReducer(model, after=[1], keep=0.7) as reducer:
            torch.testing.assert_close(network(images), model(images))
            network(images)
            assert reducer.maps[1].count == 13
            assert not torch.allclose(model(images), dense)
        torch.testing.assert_close(network(images), dense)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "policy", "align"),
    [("vim", "top", "decay"), ("vim", "merge", "none"), ("plainmamba", "mtr", "decay"), ("vmamba", "utr", "mask")],
)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(family, policy, align, backend):
    """In one graph, forward and backward."""
    model, after = a_model(family)
    images, network = images_of(model), compiled(model, backend)
    with TokenReducer(model, after=after, keep=0.7, policy=policy, align=align) as reducer:
        results = []
        for run in (model, network):
            model.zero_grad()
            logits = run(images)
            logits.square().sum().backward()
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            results.append((logits, {cut: each.kept for cut, each in reducer.maps.items()}, gradients))
    torch.testing.assert_close(results[1], results[0])


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_gone_after_the_context_and_after_an_exception():
    model, after = a_model("vim")
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        images = images_of(model)
        dense = model(images)
        reducer = TokenReducer(model, after=after, keep=0.5)
        assert count_hooks(model) == 0
        for _ in range(2):
            with reducer:
                assert count_hooks(model) > 0
                assert not torch.allclose(model(images), dense)
            assert count_hooks(model) == 0
            with pytest.raises(ZeroDivisionError), reducer:
                raise ZeroDivisionError
            assert count_hooks(model) == 0
            assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
            assert torch.equal(model(images), dense)
        assert reducer.maps.keys() == {1, 3}


@pytest.mark.parametrize("family", ["vim", "vmamba"])
def test_a_model_has_one_reducer_at_a_time(family):
    model, after = a_model(family)
    reducer = TokenReducer(model, after=after, keep=0.5)
    with reducer, pytest.raises(ValueError, match="is in the context of a reducer already"), reducer:
        pass
    assert count_hooks(model) == 0


def test_a_failed_forward_pass_leaves_nothing_behind():
    model, after = a_model("vmamba")
    images = images_of(model)
    with torch.no_grad(), TokenReducer(model, after=after, keep=0.5) as reducer:
        expected = model(images)
        handle = model.stages[1].blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images)
        handle.remove()
        torch.testing.assert_close(model(images), expected)
        assert reducer.maps.keys() == {2, 3}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "expected either keep or remove, got keep=None and remove=None"),
        ({"keep": 0.5, "remove": 3}, "expected either keep or remove, got keep=0.5 and remove=3"),
        ({"keep": 0}, "keep must be a share over 0 and at most 1, or one for each of 2 cuts, got 0"),
        ({"keep": (0.5, 0.5, 0.5)}, r"one for each of 2 cuts, got \(0.5, 0.5, 0.5\)"),
        ({"remove": -1}, "remove must be at least 0, got -1"),
        ({"after": (), "keep": 0.5}, r"without the last of a stage \(4\), got none"),
        ({"after": (2, 1), "keep": 0.5}, "ascending numbers of blocks from 1 to 3, without the last .* got 2, 1"),
        ({"after": (4,), "keep": 0.5}, r"from 1 to 3, without the last of a stage \(4\), got 4"),
        ({"keep": 0.5, "policy": "tops"}, "policy must be one of 'top', 'merge', 'mtr', 'utr', got 'tops'"),
        ({"keep": 0.5, "score": "norm"}, "score must be one of 'clipped_output', .*, got 'norm'"),
        ({"keep": 0.5, "policy": "merge", "score": "step_size"}, "policy 'merge' asks for no score"),
        ({"keep": 0.5, "align": "gap"}, "align must be one of 'decay', 'idle', 'hold', 'none', 'mask', got 'gap'"),
        ({"keep": 0.5, "conv": "full"}, "conv must be one of 'grid', 'compact', got 'full'"),
    ],
)
def test_arguments_out_of_range(arguments, expected):
    model = vssm.create_model("test_vim")
    with pytest.raises(ValueError, match=expected):
        TokenReducer(model, **({"after": (1, 2)} | arguments))


@pytest.mark.parametrize(
    ("name", "after", "expected"),
    [
        ("test_msvmamba", [2], r"stages.1.blocks.0.mixer.conv_half cannot run on fewer tokens: TokenConv has a stride"),
        ("test_efficientvmamba", [2], r"stages.1.blocks.0.conv_branch.conv .*: Conv2d is a convolution outside of"),
        ("test_vmamba", [1], r"without the last of a stage \(1, 3, 4, 5\), got 1"),
    ],
)
def test_refusals_say_which_part_and_why(name, after, expected):
    model = vssm.create_model(name, depths=(1, 2, 1, 1))
    with pytest.raises(ValueError, match=expected):
        TokenReducer(model, after=after, keep=0.5)
    assert count_hooks(model) == 0


PRUNABLE = ("test_plainmamba", "test_vim", "test_vmamba")


@pytest.mark.parametrize("name", vssm.list_models("test_*"))
def test_every_block_is_taken_or_refused_with_a_reason(name):
    model = vssm.create_model(name)
    blocks = {path: each for path, each in model.named_modules() if path.rpartition(".")[0].endswith("blocks")}
    assert blocks
    for path, block in blocks.items():
        if name in PRUNABLE:
            check_block(block, path, conv="grid")
            continue
        with pytest.raises(ValueError, match=rf"TokenReducer: {path}[\w.]* cannot run on fewer tokens: [\w ]{{20}}"):
            check_block(block, path, conv="grid")


def test_refusals_of_parts():
    model = vssm.create_model("test_vmamba")
    block = model.stages[1].blocks[1]
    kept = block.mlp
    refused = {
        "TokenSqueezeExcite gates channels by their mean over all tokens": TokenSqueezeExcite(8),
        "MultiheadAttention attends between tokens": nn.MultiheadAttention(8, 2),
        "Bilinear does not promise to treat each token by itself": nn.Bilinear(2, 2, 2),
        "AdaptiveAvgPool2d takes a mean over all tokens": nn.AdaptiveAvgPool2d(1),
    }
    for reason, part in refused.items():
        block.mlp = part
        with pytest.raises(ValueError, match=rf"stages.1.blocks.1.mlp cannot run on fewer tokens: {reason}"):
            TokenReducer(model, after=[2], keep=0.5)
    block.mlp = kept

    class Inheriting(type(block)):
        pass

    block.__class__ = Inheriting
    with pytest.raises(ValueError, match=r"stages.1.blocks.1 cannot run on fewer tokens: Inheriting does not promise"):
        TokenReducer(model, after=[2], keep=0.5)
    Inheriting.token_prunable = True
    TokenReducer(model, after=[2], keep=0.5)


def test_a_convolution_of_a_grid_cannot_be_compact():
    model = vssm.create_model("test_plainmamba")
    with pytest.raises(ValueError, match=r"blocks.0.mixer.conv cannot run on fewer tokens: TokenConv convolves a grid"):
        TokenReducer(model, after=[1], keep=0.5, align="none")


def test_models_without_a_backbone_are_refused():
    with pytest.raises(ValueError, match="expected a model with one backbone of vssm, got Linear with 0"):
        TokenReducer(nn.Linear(2, 2), after=[1], keep=0.5)


def test_too_many_merges_are_refused():
    model, _ = a_model("vim")
    for policy, most in (("merge", 8), ("utr", 8)):
        with (
            TokenReducer(model, after=[1], keep=0.3, policy=policy),
            pytest.raises(ValueError, match=f"merges at most {most} tokens, .* got 12; raise keep"),
        ):
            model(images_of(model))
