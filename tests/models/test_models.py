"""What timm expects of a model, for every family: a new family is tested by registering its test model."""

import itertools

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import vssm
from vssm.layers.conv import CausalTokenConv, TokenConv
from vssm.layers.ssm import SelectiveSSM
from vssm.models._base import GridBackbone, TokenBackbone

NAMES = vssm.list_models("test_*")
# Of a sequence of one token, that of GroupMamba's class block, no state decays.
WITHOUT_INFLUENCE = {"class_stage.blocks.0.mixer.ssm.A_log"}
# Shapes of dilated windows are long expressions in a symbolic size, on which tracing takes its time.
ANY_SIZE_NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "test_a2mamba" else name for name in NAMES]
TOKEN_NAMES = [name for name in NAMES if isinstance(vssm.create_model(name), TokenBackbone)]


def images(model: nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *model.pretrained_cfg["input_size"])


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The last layers, two of them where the model has a teacher."""
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", NAMES)
def test_small_and_classifies_each_image_by_itself(name):
    model = vssm.create_model(name, num_classes=7).eval()
    assert sum(parameter.numel() for parameter in vssm.create_model(name).parameters()) < 0.5e6
    batch = images(model, 3)
    with torch.no_grad():
        logits = model(batch)
        torch.testing.assert_close(logits[1:2], model(batch[1:2]), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits[0], logits[1])
        torch.testing.assert_close(logits, model.forward_head(model.forward_features(batch)))
    assert logits.shape == (3, 7)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    model = vssm.create_model(name)
    model(images(model)).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any() == (parameter_name not in WITHOUT_INFLUENCE), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_no_gradient(name):
    model = vssm.create_model(name, drop_path_rate=0.0)
    batch = images(model)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(batch).square().sum().backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_runs_every_block_twice(name):
    model = vssm.create_model(name)
    model.set_grad_checkpointing()
    runs = []
    for module in model.modules():
        if isinstance(module, SelectiveSSM):
            module.register_forward_hook(lambda *_: runs.append(1))
    model(images(model)).sum().backward()
    assert len(runs) == 2 * sum(isinstance(module, SelectiveSSM) for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_features_only_gives_the_maps_it_announces(name):
    model = vssm.create_model(name, features_only=True).eval()
    batch = images(model)
    with torch.no_grad():
        maps = model(batch)
    assert len(maps) == len(model.feature_info.channels()) > 1
    for each, channels, reduction in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert each.shape == (2, channels, batch.shape[2] // reduction, batch.shape[3] // reduction)
    assert len({tuple(each.flatten()[:4].tolist()) for each in maps}) == len(maps)


@pytest.mark.parametrize("name", NAMES)
def test_features_only_equals_the_whole_model(name):
    whole = vssm.create_model(name).eval()
    early = vssm.create_model(name, features_only=True, out_indices=(0, 1)).eval()
    early.model.load_state_dict(whole.state_dict(), strict=False)
    batch = images(whole)
    with torch.no_grad():
        expected = whole.forward_intermediates(batch, indices=(0, 1), intermediates_only=True)
        for mine, other in zip(early(batch), expected, strict=True):
            torch.testing.assert_close(mine, other)
    assert len(list(early.parameters())) < len(list(whole.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_forward_intermediates(name):
    model = vssm.create_model(name).eval()
    batch = images(model)
    native = "NHWC" if isinstance(model, GridBackbone) else "NLC"
    with torch.no_grad():
        features, maps = model.forward_intermediates(batch)
        torch.testing.assert_close(features, model.forward_features(batch))
        assert len(maps) == len(model.feature_info)

        first = model.forward_intermediates(batch, indices=[0], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(first, maps[:1])
        channels_last = model.forward_intermediates(batch, indices=2, output_fmt=native, intermediates_only=True)
        for tokens, each in zip(channels_last, maps[-2:], strict=True):
            torch.testing.assert_close(tokens.reshape(2, -1, each.shape[1]), each.flatten(2).transpose(1, 2))

        (normed,) = model.forward_intermediates(batch, indices=1, norm=True, intermediates_only=True)
        torch.testing.assert_close(normed, model.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or"):
        model.forward_intermediates(batch, output_fmt="NCWH")


@pytest.mark.parametrize("name", NAMES)
def test_reset_classifier(name):
    model = vssm.create_model(name).double().eval()
    batch = images(model).double()
    model.reset_classifier(5)
    assert {model.num_classes, *(layer.out_features for layer in classifiers(model))} == {5}
    assert model(batch).shape == (2, 5)
    model.reset_classifier(0)
    pooled = model(batch)
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(pooled, model.forward_head(model.forward_features(batch), pre_logits=True))
    model.reset_classifier(3, "avg")
    assert model(batch).shape == (2, 3)
    model.reset_classifier(0, "")
    features = model.forward_features(batch)
    assert features.shape[-1] == model.num_features
    assert model(batch).shape == (*features.shape[:-1], model.head_hidden_size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("in_chans", "img_size"), [(1, (96, 96)), (5, (64, 112)), (3, (97, 75))])
def test_channels_and_sizes(name, in_chans, img_size):
    arguments = {"img_size": img_size} if name in TOKEN_NAMES else {}
    model = vssm.create_model(name, in_chans=in_chans, num_classes=4, **arguments)
    logits = model(torch.randn(2, in_chans, *img_size))
    assert logits.shape == (2, 4)
    assert logits.isfinite().all()
    with pytest.raises(ValueError, match=f"expected images \\(b, {in_chans}, height, width\\), got \\(2, 2,"):
        model(torch.randn(2, 2, *img_size))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("coarse", [False, True])
def test_layer_groups(name, coarse):
    model = vssm.create_model(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    assert sorted(itertools.chain(*groups.values())) == sorted(key for key, _ in model.named_parameters())
    classifier = {key for key, _ in model.named_parameters() if key.startswith("head")}
    assert set(groups[len(groups) - 1]) == classifier
    of_stem = [i for i, keys in groups.items() if any(key.startswith("stem") for key in keys)]
    assert of_stem == [0]
    of_blocks = [key for key in groups[1] if "blocks." in key]  # besides a norm after the stage's last one
    blocks = {key.rpartition("blocks.")[0] + key.rpartition("blocks.")[2].split(".")[0] for key in of_blocks}
    assert len(blocks) == 1 or coarse


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_is_for_matrices(name):
    model = vssm.create_model(name)
    shapes = {id(parameter): key for key, parameter in model.named_parameters()}
    undecayed, decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    assert {shapes[id(parameter)].rpartition(".")[2] for parameter in decayed["params"]} <= {"weight", "dt_weight"}
    last_parts = {shapes[id(parameter)].rpartition(".")[2] for parameter in undecayed["params"]}
    assert {"A_log", "D", "dt_bias", "bias"} <= last_parts


@pytest.mark.parametrize("name", NAMES)
def test_names_of_parts(name):
    model = vssm.create_model(name)
    stages = getattr(model, "stages", [model])
    assert isinstance(model.stem, nn.Module)
    mixing = [block for stage in stages for block in stage.blocks if hasattr(block, "mixer")]
    scanning = [block for block in mixing if any(isinstance(part, SelectiveSSM) for part in block.mixer.modules())]
    assert scanning
    for block in scanning:
        assert {"norm1", "mixer"} <= {key for key, _ in block.named_children()}
        assert {"in_proj", "conv", "ssm", "out_proj"} <= {key for key, _ in block.mixer.named_children()}
        assert isinstance(block.mixer.ssm, SelectiveSSM)
        assert isinstance(block.mixer.conv, TokenConv | CausalTokenConv)


@pytest.mark.parametrize("name", NAMES)
def test_timm_finds_it(name):
    model = timm.create_model(name, num_classes=2)
    assert type(model) is type(vssm.create_model(name))
    cfg = model.pretrained_cfg
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    named = [cfg["classifier"]] if isinstance(cfg["classifier"], str) else cfg["classifier"]
    assert [model.get_submodule(each) for each in named] == list(classifiers(model))
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == cfg["input_size"]


@pytest.mark.parametrize("name", NAMES)
def test_moves_between_dtypes(name):
    model = vssm.create_model(name).eval()
    batch = images(model)
    with torch.no_grad():
        exact = model.double()(batch.double())
        single = model.float()(batch)
        half = model.bfloat16()(batch.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            automatic = model.float()(batch)
    assert half.dtype == automatic.dtype == torch.bfloat16
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-5)
    for rounded in (half, automatic):
        assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_exports_with_any_batch(name):
    model = vssm.create_model(name).eval()
    batch = images(model, 3)
    program = torch.export.export(model, (batch,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},))
    assert any(node.target is torch.ops.vssm.scan.default for node in program.graph.nodes)
    other = images(model, 5)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(name, backend):
    model = vssm.create_model(name, num_classes=4)
    batch = images(model)
    expected = model(batch)
    expected.square().sum().backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)(batch)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    largest = max(gradient.norm() for gradient in gradients.values())
    rounding = 1e-7 * largest
    for key, parameter in model.named_parameters():
        if key.endswith("bias") and gradients[key].norm() < 1e-6 * largest:  # one before a batch norm: rounding alone
            assert parameter.grad.norm() < 1e-6 * largest, key
            continue
        error = (parameter.grad - gradients[key]).norm()
        assert error < 1e-4 * gradients[key].norm() + rounding, f"{key}: {error} of {gradients[key].norm()}"


def of_any_size(name: str, *, stages: int) -> nn.Module:
    """A shallow model that takes images of any size."""
    if name in TOKEN_NAMES:
        return vssm.create_model(name, dynamic_img_size=True, depth=2).eval()
    model = vssm.create_model(name).eval()
    model.prune_intermediate_layers([stages - 1])
    return model


@pytest.mark.parametrize("name", ANY_SIZE_NAMES)
def test_exports_with_any_size(name):
    model = of_any_size(name, stages=2)
    home = tuple(model.pretrained_cfg["input_size"][1:])
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    example = torch.randn(1, 3, 112, 80)
    program = torch.export.export(model, (example,), dynamic_shapes=(sizes,), strict=True).module()
    for size in (home, (64, 144), (97, 75)):  # its own, another grid of as many patches, and an odd one
        other = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(program(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ANY_SIZE_NAMES)
def test_compiles_for_any_size(name):
    model = of_any_size(name, stages=1)
    home = tuple(model.pretrained_cfg["input_size"][1:])
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    graphs = []
    for size in ((128, 96), (96, 160), (160, 112), home):
        other = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(other), model(other), rtol=1e-4, atol=1e-5)
        graphs.append(counter.frame_count)
    assert len(set(graphs[:-1])) == 1  # its own size may be another graph: positions are taken as they are


@pytest.mark.parametrize("name", TOKEN_NAMES)
def test_dynamic_size_equals_set_input_size(name):
    model = vssm.create_model(name, dynamic_img_size=True).eval()
    batch = torch.randn(2, 3, 128, 80)
    home = images(model)
    with torch.no_grad():
        dynamic, at_home = model(batch), model(home)
        model.set_input_size((128, 80))
        torch.testing.assert_close(model(batch), dynamic)
        fixed = vssm.create_model(name, img_size=(128, 80)).eval()
        fixed.load_state_dict(model.state_dict())
        torch.testing.assert_close(fixed(batch), dynamic)
    assert not torch.allclose(dynamic, at_home)
    with pytest.raises(ValueError, match="expected images of 128×80 pixels, got 96×96; call set_input_size"):
        fixed(torch.randn(1, 3, 96, 96))
