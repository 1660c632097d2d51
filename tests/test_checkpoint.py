"""Checkpoint files: reading without running code, loading with clear refusals, downloading, converting."""

import argparse
import concurrent.futures
import contextlib
import hashlib
import http.server
import json
import re
import sys
import threading
import types
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file

import vssm
from golden import records
from vssm import checkpoint
from vssm.cli import main
from vssm.engine.convert import convert


@pytest.fixture(scope="module")
def record():
    return records.load("vim/vim_tiny")


@pytest.fixture(scope="module")
def official_file(record, tmp_path_factory):
    """A file like those of the authors: weights among the rest of a training run, and an average that differs."""
    path = tmp_path_factory.mktemp("official") / "vim_t_midclstok_76p1acc.pth"
    content = {
        "model": record.state_dict,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        "lr_scheduler": {"base_values": [1e-3]},
        "epoch": 299,
        "model_ema": {key: torch.zeros_like(value) for key, value in record.state_dict.items()},
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="vim", batch_size=128),
    }
    torch.save(content, path)
    return path


@pytest.fixture
def small_state():
    return vssm.create_model("test_vim", num_classes=3).state_dict()


@pytest.mark.parametrize("legacy", [False, True])
def test_reads_the_weights_of_a_training_file(record, tmp_path, legacy):
    state = {"norm_f.weight": record.state_dict["norm_f.weight"]}
    path = tmp_path / "run.pth"
    content = {
        "epoch": 3,
        "args": argparse.Namespace(lr=1),
        "model": state,
        "model_ema": {"norm_f.weight": torch.ones(3)},
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    weights, left_out = checkpoint.read_with_report(path)
    torch.testing.assert_close(weights, state)
    assert left_out.keys() == {"epoch", "args", "model_ema"}
    assert left_out["epoch"] == "not in the entry 'model', which holds the weights"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"model_ema": state, "epoch": 1},
        lambda state: {"state_dict_ema": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {
            "state_dict": {f"backbone.{key}": value for key, value in state.items()} | {"neck.w": torch.ones(1)}
        },
        lambda state: OrderedDict(state),
    ],
)
def test_unwraps(wrap, tmp_path):
    state = {"a.weight": torch.randn(2), "b": torch.arange(3)}
    torch.save(wrap(state), tmp_path / "file.pth")
    torch.testing.assert_close(checkpoint.read(tmp_path / "file.pth"), state)


def test_reads_the_entry_asked_for(small_state, tmp_path):
    average = {key: value + 1 for key, value in small_state.items()}
    torch.save({"model": dict(small_state), "model_ema": average, "epoch": 3}, tmp_path / "run.pth")
    torch.testing.assert_close(checkpoint.read(tmp_path / "run.pth", entry="model_ema"), average)
    command = ["convert", str(tmp_path / "run.pth"), "--model", "test_vim", "--num-classes", "3"]
    assert main([*command, "--entry", "model_ema"]) == 0
    torch.testing.assert_close(checkpoint.read(tmp_path / "run.safetensors"), average)
    with pytest.raises(ValueError, match=r"no weights: expected tensors by name, under 'ema'; got entries model, "):
        checkpoint.read(tmp_path / "run.pth", entry="ema")
    torch.save(average, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"under 'model_ema'; got entries "):
        checkpoint.read(tmp_path / "plain.pth", entry="model_ema")


def test_a_classifier_beside_the_backbone_is_kept(tmp_path):
    weights = {"backbone.a": torch.ones(2), "head.fc.weight": torch.zeros(3), "ema_backbone_a": torch.ones(2)}
    torch.save({"meta": {}, "state_dict": weights}, tmp_path / "file.pth")
    state, left_out = checkpoint.read_with_report(tmp_path / "file.pth")
    torch.testing.assert_close(state, {"a": torch.ones(2), "head.fc.weight": torch.zeros(3)})
    assert left_out["ema_backbone_a"] == "not part of the backbone"


def test_reads_safetensors_whatever_its_name(small_state, tmp_path):
    checkpoint.write(tmp_path / "model.safetensors", small_state, {})
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    torch.testing.assert_close(checkpoint.read(tmp_path / "model.bin"), dict(small_state))


def test_reads_a_yacs_node_without_yacs(monkeypatch, tmp_path):
    class CfgNode(dict):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    for name in ("yacs", "yacs.config"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["yacs.config"].CfgNode = CfgNode
    path = tmp_path / "run.pth"
    torch.save({"model": {"a": torch.ones(2)}, "config": CfgNode(MODEL=CfgNode(NAME="x"))}, path)
    for name in ("yacs", "yacs.config"):
        monkeypatch.delitem(sys.modules, name)
    assert checkpoint.read(path).keys() == {"a"}


class Malicious:
    def __reduce__(self):
        return exec, ("import test_checkpoint_victim as v; v.ran = True",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_does_not_run(monkeypatch, tmp_path, legacy):
    victim = types.ModuleType("test_checkpoint_victim")
    victim.ran = False
    monkeypatch.setitem(sys.modules, "test_checkpoint_victim", victim)
    path = tmp_path / "evil file.pth"
    content = {"model": {"a": torch.ones(2)}, "args": Malicious()}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)

    command = f"vssm convert '{path}' --model NAME --trust-pickle"
    with pytest.raises(ValueError, match=rf"needs exec, and loading it could run code.*{re.escape(command)}"):
        checkpoint.read(path)
    assert not victim.ran
    assert checkpoint.read(path, trust_pickle=True).keys() == {"a"}
    assert victim.ran


def test_class_that_is_not_installed_is_named(monkeypatch, tmp_path):
    absent = types.ModuleType("absent_package")
    absent.Config = type("Config", (), {"__module__": "absent_package"})
    monkeypatch.setitem(sys.modules, "absent_package", absent)
    torch.save({"model": {"a": torch.ones(2)}, "config": absent.Config()}, tmp_path / "run.pth")
    monkeypatch.delitem(sys.modules, "absent_package")
    with pytest.raises(ValueError, match=r"needs absent_package.Config, and loading it could run code"):
        checkpoint.read(tmp_path / "run.pth")
    with pytest.raises(ValueError, match=r"run.pth' needs a package .* \(No module named 'absent_package'\)"):
        checkpoint.read(tmp_path / "run.pth", trust_pickle=True)


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("trust_pickle", [False, True])
def test_truncated_pickle_is_refused(small_state, tmp_path, legacy, trust_pickle):
    path = tmp_path / "cut.pth"
    torch.save({"model": small_state}, path, _use_new_zipfile_serialization=not legacy)
    _cut(path)
    with pytest.raises(ValueError, match=r"cut.pth' is incomplete or not a checkpoint \(") as error:
        checkpoint.read(path, trust_pickle=trust_pickle)
    assert "\n" not in str(error.value)


def test_truncated_safetensors_is_refused(small_state, tmp_path):
    path = tmp_path / "cut.safetensors"
    checkpoint.write(path, small_state, {})
    _cut(path)
    with pytest.raises(ValueError, match=r"cut.safetensors' is not a complete safetensors file"):
        checkpoint.read(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_pickle_is_refused_or_read(small_state, tmp_path, legacy):
    """Whatever a damaged byte makes torch raise, it is reported as the file's."""
    path = tmp_path / "damaged.pth"
    torch.save({"head.bias": small_state["head.bias"]}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    messages = []
    for position in range(0, len(content), 2):
        damaged = bytearray(content[: len(content) - position % 40])
        damaged[min(position, len(damaged) - 1)] ^= 0x15
        path.write_bytes(damaged)
        try:
            checkpoint.read(path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > len(content) / 8
    assert not [each for each in messages if "\n" in each]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 nor this", b"\x80\x02}."])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint.read: .*(not a checkpoint|holds no weights)") as error:
        checkpoint.read(path)
    assert "\n" not in str(error.value)


def test_file_without_weights_is_refused(tmp_path):
    torch.save({"epoch": 3, "loss": [0.5]}, tmp_path / "log.pth")
    with pytest.raises(ValueError, match=r"holds no weights: expected tensors by name.*got entries epoch, loss"):
        checkpoint.read(tmp_path / "log.pth")
    with pytest.raises(FileNotFoundError, match=r"no file '.*missing.pth'"):
        checkpoint.read(tmp_path / "missing.pth")


def test_load_names_the_number_of_classes(small_state):
    with pytest.raises(ValueError, match=r"has 3 classes and Vim has 1000: .*num_classes=3 \(--num-classes 3\)"):
        checkpoint.load(vssm.create_model("test_vim"), small_state)


def test_load_counts_what_does_not_fit(small_state, record):
    model = vssm.create_model("test_vim", num_classes=3, depth=3)
    with pytest.raises(ValueError, match=r"does not fit Vim: 10 unexpected \(blocks.3.mixer.conv.bias, .*\.\.\.\)$"):
        checkpoint.load(model, small_state)
    with pytest.raises(ValueError, match=r"does not fit Vim: .* of another shape .*: got \(192,\), expected \(64,\)"):
        checkpoint.load(model, record.state_dict)
    before = model.head.weight.clone()
    with pytest.raises(ValueError, match="1 missing"):
        checkpoint.load(
            model, {key: value for key, value in small_state.items() if "blocks.3" not in key and key != "norm.weight"}
        )
    torch.testing.assert_close(model.head.weight, before)


def test_written_file_is_whole_and_described(small_state, tmp_path):
    tied = {**small_state, "again": small_state["norm.weight"], "view": small_state["head.weight"].T}
    written = checkpoint.write(tmp_path / "new" / "model.safetensors", tied, {"model": "test_vim"})
    torch.testing.assert_close(load_file(tmp_path / "new" / "model.safetensors"), tied)
    digest = hashlib.sha256((tmp_path / "new" / "model.safetensors").read_bytes()).hexdigest()
    assert written == {"model": "test_vim", "file": "model.safetensors", "sha256": digest}
    assert json.loads((tmp_path / "new" / "model.json").read_text()) == written
    assert sorted(each.name for each in (tmp_path / "new").iterdir()) == ["model.json", "model.safetensors"]
    with pytest.raises(ValueError, match=r"ending in .safetensors, got 'model.pth'"):
        checkpoint.write("model.pth", tied, {})


def test_what_cannot_be_described_is_not_written(small_state, tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.write(tmp_path / "model.safetensors", small_state, {"when": object()})
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def _server(content, *, announced=None, chunked=False):
    """Serves the same bytes at every address, under a length that need not be theirs, or as a chunk that never ends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        requests = 0

        def do_GET(self):
            Handler.requests += 1
            self.send_response(200 if content else 404)
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(announced or len(content)))
            self.end_headers()
            self.wfile.write(b"fffff\r\n" + content if chunked else content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", Handler
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache of downloads."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def _create_from(url, **arguments):
    return vssm.create_model("vim_tiny_patch16_224", True, pretrained_cfg_overlay={"url": url}, **arguments)


def test_pretrained_from_a_server(record, official_file, hub):
    content = official_file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    with _server(content) as (address, handler):
        url = f"{address}/resolve/main/{official_file.name}#sha256={digest}"
        model = _create_from(url).eval()
        assert _create_from(url).num_classes == 1000
        assert handler.requests == 1  # the second model came from the cache
    with torch.no_grad():
        record.check("logits", model(record.images))
    assert [each.name for each in hub.iterdir()] == [official_file.name]
    assert "state_dict" not in model.pretrained_cfg


def test_pretrained_adapts_classifier_input_and_features(record, official_file, hub):
    hub.mkdir(parents=True)
    (hub / "vim_t_midclstok_76p1acc.pth").symlink_to(official_file)
    model = vssm.create_model("vim_tiny_patch16_224.in1k", pretrained=True, num_classes=5, in_chans=1)
    torch.testing.assert_close(model.norm.weight.data, record.state_dict["norm_f.weight"])
    patches = record.state_dict["patch_embed.proj.weight"]
    torch.testing.assert_close(model.stem.proj.weight.data, patches.sum(1, keepdim=True))
    assert model.head.out_features == 5

    features = vssm.create_model("vim_tiny_patch16_224", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        for block, each in zip((5, 11, 17, 23), features(record.images), strict=True):
            record.check(f"block{block}", each)
    assert "state_dict" not in features.pretrained_cfg
    assert "state_dict" not in features.model.pretrained_cfg

    with pytest.raises(ValueError, match=r"does not fit Vim: .* unexpected"):
        vssm.create_model("vim_tiny_patch16_224", pretrained=True, depth=2)


def test_truncated_download_leaves_nothing(official_file, hub):
    content = official_file.read_bytes()
    with _server(content[: len(content) // 2], announced=len(content)) as (address, _):
        message = rf"ended after {len(content) // 2} of {len(content)} bytes; nothing was kept"
        with pytest.raises(ConnectionError, match=message):
            _create_from(f"{address}/vim.pth")
    assert not list(hub.iterdir())


def test_download_that_breaks_off_within_a_chunk_leaves_nothing(hub):
    with (
        _server(b"the beginning", chunked=True) as (address, _),
        pytest.raises(ConnectionError, match="IncompleteRead"),
    ):
        checkpoint.download(f"{address}/vim.pth")
    assert not list(hub.iterdir())


def test_downloads_at_the_same_time_do_not_mix(hub):
    content = bytes(range(256)) * 20_000
    with _server(content) as (address, _), concurrent.futures.ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(checkpoint.download, [f"{address}/vim.pth"] * 4))
    assert paths == {hub / "vim.pth"}
    assert (hub / "vim.pth").read_bytes() == content
    assert len(list(hub.iterdir())) == 1


@pytest.mark.parametrize("path", ["vim.pth#sha256=0123456789abcdef", "vim-01234567.pth"])
def test_wrong_hash_leaves_nothing(hub, path):
    with (
        _server(b"something else") as (address, _),
        pytest.raises(ValueError, match=r"has SHA-256 .*, expected 01234567"),
    ):
        checkpoint.download(f"{address}/{path}")
    assert not list(hub.iterdir())


def test_right_hash_in_the_name(hub):
    digest = hashlib.sha256(b"content").hexdigest()
    with _server(b"content") as (address, handler):
        path = checkpoint.download(f"{address}/vim-{digest[:8]}.pth")
        assert path.read_bytes() == b"content"
        path.write_bytes(b"damaged on disk")
        assert checkpoint.download(f"{address}/vim-{digest[:8]}.pth").read_bytes() == b"content"
        assert handler.requests == 2


def test_unreachable_files(hub):
    with _server(b"") as (address, _), pytest.raises(ConnectionError, match=r"fetched \(HTTP Error 404"):
        checkpoint.download(f"{address}/vim.pth")
    with pytest.raises(ConnectionError, match=r"could not be fetched .* pass pretrained_cfg_overlay="):
        checkpoint.download(f"{address}/vim.pth")
    with pytest.raises(ValueError, match="test_vim: there are no published weights"):
        vssm.create_model("test_vim", pretrained=True)


def test_own_weights_by_overlay_or_path(small_state, tmp_path):
    checkpoint.write(tmp_path / "own.safetensors", small_state, {})
    file = str(tmp_path / "own.safetensors")
    by_overlay = vssm.create_model(
        "test_vim", pretrained=True, num_classes=3, pretrained_cfg_overlay={"file": file, "num_classes": 3}
    )
    by_path = vssm.create_model("test_vim", num_classes=3, checkpoint_path=file)
    torch.testing.assert_close(dict(by_overlay.state_dict()), dict(small_state))
    torch.testing.assert_close(dict(by_path.state_dict()), dict(small_state))


def test_own_classifier_is_loaded_whatever_was_published(small_state, tmp_path):
    checkpoint.write(tmp_path / "own.safetensors", small_state, {})
    overlay = {"file": str(tmp_path / "own.safetensors")}
    model = vssm.create_model("test_vim", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(dict(model.state_dict()), dict(small_state))
    other = vssm.create_model("test_vim", pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(other.norm.weight, model.norm.weight)
    assert other.head.out_features == 5


@pytest.mark.parametrize("missing", ["head.weight", "norm.weight"])
def test_pretrained_is_never_in_part(small_state, tmp_path, missing):
    path = tmp_path / "part.safetensors"
    checkpoint.write(path, {key: value for key, value in small_state.items() if key != missing}, {})
    overlay = {"file": str(path), "num_classes": 3}
    with pytest.raises(ValueError, match=rf"does not fit Vim: 1 missing \({missing}\)$"):
        vssm.create_model("test_vim", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    overlay["file"] = str(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        vssm.create_model("test_vim", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize(("arguments", "shape"), [({"patch_size": 8}, "3, 8, 8"), ({"in_chans": 5}, "5, 16, 16")])
def test_pretrained_input_layer_that_cannot_be_adapted(tmp_path, arguments, shape):
    state = vssm.create_model("test_vim", in_chans=3 if "patch_size" in arguments else 4).state_dict()
    checkpoint.write(tmp_path / "own.safetensors", state, {})
    overlay = {"file": str(tmp_path / "own.safetensors")}
    with pytest.raises(ValueError, match=rf"1 of another shape \(stem.proj.weight: .* expected \(64, {shape}\)"):
        vssm.create_model("test_vim", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


def test_features_of_own_weights(small_state, tmp_path):
    checkpoint.write(tmp_path / "own.safetensors", small_state, {})
    whole = vssm.create_model("test_vim", num_classes=3, checkpoint_path=tmp_path / "own.safetensors").eval()
    features = vssm.create_model(
        "test_vim", features_only=True, out_indices=(1, 3), checkpoint_path=tmp_path / "own.safetensors"
    ).eval()
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = whole.forward_intermediates(images, indices=(1, 3), intermediates_only=True)
        torch.testing.assert_close(features(images), expected)


def test_own_weights_come_instead_of_the_published(record, official_file, hub):
    with _server(b"") as (address, handler):
        model = _create_from(f"{address}/vim.pth", checkpoint_path=official_file)
        assert handler.requests == 0
    torch.testing.assert_close(model.norm.weight.data, record.state_dict["norm_f.weight"])


def test_convert(record, official_file, tmp_path):
    output = tmp_path / "vim.safetensors"
    written = convert(official_file, "vim_tiny_patch16_224", output=output, url="https://example.org/vim.pth")
    assert written == json.loads((tmp_path / "vim.json").read_text())
    assert written["source"] == {
        "file": official_file.name,
        "url": "https://example.org/vim.pth",
        "sha256": checkpoint.sha256(official_file),
    }
    assert written["sha256"] == checkpoint.sha256(output)
    assert written["keys"].keys() == record.state_dict.keys()
    assert written["keys"]["layers.4.mixer.A_b_log"] == ["blocks.4.mixer.ssm.A_log"]
    assert written["keys"]["layers.4.mixer.A_log"] == ["blocks.4.mixer.ssm.A_log"]
    assert written["keys"]["norm_f.weight"] == ["norm.weight"]
    assert written["dropped"].keys() == {"optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args"}
    reached = {mine for keys in written["keys"].values() for mine in keys}
    model = vssm.create_model("vim_tiny_patch16_224", checkpoint_path=output).eval()
    assert reached == model.state_dict().keys()
    with torch.no_grad():
        record.check("logits", model(record.images))


def test_convert_refuses(official_file, small_state, tmp_path):
    positions = torch.zeros(1, 401, 192)
    larger = checkpoint.read(official_file) | {"pos_embed": positions}
    torch.save(larger, tmp_path / "larger.pth")
    with pytest.raises(ValueError, match=r"pos_embed with 76992 values would become pos_embed with 37824.*--img-size"):
        convert(tmp_path / "larger.pth", "vim_tiny_patch16_224")
    assert not (tmp_path / "larger.safetensors").exists()
    assert convert(tmp_path / "larger.pth", "vim_tiny_patch16_224", img_size=(320, 320))["file"] == "larger.safetensors"

    checkpoint.write(tmp_path / "own.safetensors", small_state, {})
    with pytest.raises(ValueError, match="would overwrite the source"):
        convert(tmp_path / "own.safetensors", "test_vim")
    with pytest.raises(ValueError, match="'resnet18' is no model of vssm"):
        convert(official_file, "resnet18")


def test_convert_command(small_state, tmp_path, capsys):
    torch.save({"model": small_state, "epoch": 1}, tmp_path / "run.pth")
    assert main(["convert", str(tmp_path / "run.pth"), "--model", "test_vim"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vssm convert: ")
    assert "--num-classes 3" in error
    assert error.count("\n") == 1
    assert main(["convert", str(tmp_path / "run.pth"), "--model", "test_vim", "--num-classes", "3"]) == 0
    assert "left out epoch: not in the entry 'model'" in capsys.readouterr().out
    torch.testing.assert_close(checkpoint.read(tmp_path / "run.safetensors"), dict(small_state))
    assert main(["convert", str(tmp_path / "missing.pth"), "--model", "test_vim"]) == 1
    assert "no file" in capsys.readouterr().err


def test_convert_follows_its_own_advice(small_state, tmp_path, capsys):
    torch.save({"model": small_state, "when": types.SimpleNamespace(epoch=1)}, tmp_path / "run.pth")
    arguments = ["convert", str(tmp_path / "run.pth"), "--model", "test_vim", "--num-classes", "3"]
    assert main(arguments) == 1
    assert "needs types.SimpleNamespace" in capsys.readouterr().err
    assert main([*arguments, "--trust-pickle"]) == 0
