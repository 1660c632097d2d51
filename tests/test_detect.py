"""``vssm detect`` and ``vssm segment``: what is found is told, written and drawn where it is."""

import json
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vssm import detection
from vssm.cli import main
from vssm.cli._options import check_none_left_out
from vssm.data.scenes import DigitScenes, run_lengths
from vssm.engine.detect import Detector, Found, detect
from vssm.engine.segment import Segmentor, segment
from vssm.engine.views import image_files, named_pictures, views
from vssm.yolo import MambaYoloDetector


@pytest.fixture
def folder(tmp_path):
    """A folder with a scene, and a folder in it with another of the same name."""
    scenes = DigitScenes("val", 2, size=(64, 96))
    for index, place in enumerate((tmp_path / "images", tmp_path / "images" / "more")):
        place.mkdir()
        Image.fromarray(scenes.scene(index).image).save(place / "scene.png")
    return tmp_path / "images"


def _knowing_detector():
    """Finds what is in the scenes, since it knows them, and at the end something doubtful in a corner."""
    scenes = DigitScenes("val", 2, size=(64, 96))
    by_pixels = {scenes.scene(index).image.tobytes(): scenes.scene(index) for index in range(2)}

    def find(image):
        scene = by_pixels[np.asarray(image).tobytes()]
        corner = np.zeros((1, *scene.masks.shape[1:]), dtype=bool)
        corner[:, :3, :3] = True
        scores = [*np.linspace(0.9, 0.6, len(scene.labels)), 0.2]
        return Found(
            torch.from_numpy(np.concatenate([scene.boxes, [[0, 0, 3, 3]]])).float(),
            torch.tensor(scores),
            torch.from_numpy(np.append(scene.labels, 0)),
            torch.from_numpy(np.concatenate([scene.masks, corner])),
        )

    return Detector(find, tuple(map(str, range(10)))), scenes


def test_objects_are_told_and_drawn_where_they_are(folder, tmp_path):
    detector, scenes = _knowing_detector()
    records = detect(detector, [folder], threshold=0.5, pictures=tmp_path / "out")
    assert [record["picture"] for record in records] == [
        str(tmp_path / "out" / name) for name in ("scene.png", "scene-2.png")
    ]
    by_image = {str(folder / "scene.png"): 0, str(folder / "more" / "scene.png"): 1}
    for record in records:
        scene = scenes.scene(by_image[record["image"]])
        assert (record["height"], record["width"]) == (64, 96)
        assert [each["class"] for each in record["objects"]] == [str(label) for label in scene.labels]
        assert [each["box"] for each in record["objects"]] == scene.boxes.tolist()
        assert [each["mask"]["counts"] for each in record["objects"]] == [run_lengths(mask) for mask in scene.masks]
        with Image.open(record["picture"]) as file:
            assert file.size == (7 * 96, 7 * 64)  # small images are enlarged
            before = scene.image.repeat(7, 0).repeat(7, 1)
            changed = (np.asarray(file) != before).any(-1)
        assert changed[3::7, 3::7][scene.masks.any(0)].mean() > 0.9
        for x0, y0, x1, y1 in 7 * scene.boxes:
            assert changed[y0:y1, x0].all()
            assert changed[y0, x0:x1].all()
        near = np.zeros_like(changed)
        for x0, y0, x1, y1 in 7 * scene.boxes:
            near[max(y0 - 20, 0) : max(y1, 20), x0 : max(x1, x0 + 70)] = True  # with the text above the box
        assert not changed[~near].any()


def test_a_detector_of_torchvision_from_its_file(folder, tmp_path, capsys):
    detector = detection.maskrcnn("test_vmamba", 4, min_size=64)
    torch.save({"model": detector.state_dict()}, tmp_path / "detector.pth")
    options = ["--detector", "maskrcnn", "--model", "test_vmamba", "--checkpoint", str(tmp_path / "detector.pth")]
    file = str(folder / "scene.png")
    results = tmp_path / "found.json"
    arguments = [*options, "--class-names", "a", "b", "c", "--min-size", "64", "--threshold", "0"]
    assert main(["detect", file, *arguments, "--results", str(results)]) == 0
    (record,) = json.loads(results.read_text())
    image = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1) / 255
    with torch.no_grad():
        (expected,) = detector.eval()([image])
    assert len(expected["scores"]) > 0
    assert [each["class"] for each in record["objects"]] == ["abc"[label - 1] for label in expected["labels"]]
    found = torch.tensor([each["box"] for each in record["objects"]])
    torch.testing.assert_close(found, expected["boxes"])
    assert f"{len(found)} objects" in capsys.readouterr().out

    assert main(["detect", file, *options, "--class-names", "a"]) == 1
    assert "does not fit MaskRCNN" in capsys.readouterr().err
    assert main(["detect", file, *options]) == 2
    assert "expected --recipe, for mmdetection, or --detector, --model, --class-names" in capsys.readouterr().err


def test_mamba_yolo_from_its_file(folder, tmp_path):
    """Of an image twice as large as the detector is to see, which is padded to whole cells of 32 pixels."""
    detector = MambaYoloDetector("test_mambayolo", 3).eval()
    torch.save(detector.state_dict(), tmp_path / "detector.pth")
    scene = DigitScenes("val", 1, size=(80, 152)).scene(0)
    Image.fromarray(scene.image).resize((304, 160), Image.Resampling.NEAREST).save(tmp_path / "scene.png")
    command = ["detect", str(tmp_path / "scene.png"), "--detector", "mambayolo", "--model", "test_mambayolo"]
    options = ["--class-names", "a", "b", "c", "--img-size", "152", "--threshold", "0"]
    files = ["--checkpoint", str(tmp_path / "detector.pth"), "--results", str(tmp_path / "found.json")]
    assert main([*command, *options, *files]) == 0
    (record,) = json.loads((tmp_path / "found.json").read_text())
    with Image.open(tmp_path / "scene.png") as file:
        small = np.asarray(file.resize((152, 80), Image.Resampling.BILINEAR))
    padded = torch.full((1, 3, 96, 160), 114 / 255)
    padded[0, :, :80, :152] = torch.from_numpy(small.copy()).permute(2, 0, 1) / 255
    (expected,) = detector.detect(padded)
    assert len(expected["scores"]) > 0
    assert [each["class"] for each in record["objects"]] == ["abc"[label] for label in expected["labels"]]
    boxes = (2 * expected["boxes"]).minimum(torch.tensor([304, 160, 304, 160]))
    torch.testing.assert_close(torch.tensor([each["box"] for each in record["objects"]]), boxes)


def test_classes_of_pixels_are_told_and_drawn(folder, tmp_path):
    def classify(image):
        indices = np.zeros((image.height, image.width), dtype=int)
        indices[:16] = 1
        return indices

    segmentor = Segmentor(classify, ("ground", "sky"), np.array([[0, 0, 0], [0, 0, 255]], dtype=np.uint8))
    (record,) = segment(segmentor, [folder / "scene.png"], pictures=tmp_path / "out")
    assert record["shares"] == {"ground": 0.75, "sky": 0.25}
    assert list(record["shares"]) == ["ground", "sky"]
    with Image.open(tmp_path / "out" / "classes" / "scene.png") as file:
        np.testing.assert_array_equal(np.asarray(file), classify(file))
    with Image.open(tmp_path / "out" / "scene.png") as file, Image.open(folder / "scene.png") as original:
        before = np.asarray(original, dtype=int)
        colours = segmentor.colours[classify(original)]
        assert np.abs(np.asarray(file, dtype=int) - (before + colours) / 2).max() <= 1


def test_images_that_cannot_be_read_are_left_out(folder, tmp_path, caplog):
    (folder / "more" / "scene.png").write_bytes(b"")
    detector, _ = _knowing_detector()
    (record,) = detect(detector, [folder])
    assert record["image"] == str(folder / "scene.png")
    assert caplog.messages == [f"left out: {folder / 'more' / 'scene.png'}: not a readable image (it is empty)"]
    with pytest.raises(ValueError, match="1 of 2 images cannot be read and were left out"):
        check_none_left_out(read=1, images=2)


def test_frames_of_a_video(tmp_path):
    cv2 = pytest.importorskip("cv2")
    colours = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 20)]
    video = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for red, green, blue in colours:
        video.write(np.full((48, 64, 3), (blue, green, red), dtype=np.uint8))
    video.release()
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")

    seen = []
    detector = Detector(lambda image: seen.append(image) or Found(*torch.zeros(3, 0, 4).unbind()), ("any",))
    records = detect(detector, [tmp_path / "clip.avi", tmp_path / "photo.png"], pictures=tmp_path / "out", every=3)
    assert [(record["image"], record.get("frame"), record.get("seconds")) for record in records] == [
        (str(tmp_path / "clip.avi"), 0, 0.0),
        (str(tmp_path / "clip.avi"), 3, 0.6),
        (str(tmp_path / "photo.png"), None, None),
    ]
    for image, colour in zip(seen, (colours[0], colours[3]), strict=False):
        assert image.size == (64, 48)
        assert np.abs(np.asarray(image, dtype=int) - colour).max() < 12  # MJPG rounds
    pictures = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert pictures == ["clip/000000.png", "clip/000003.png", "photo.png"]


def test_a_damaged_video_is_left_out(folder, tmp_path, caplog):
    pytest.importorskip("cv2")
    (tmp_path / "clip.mp4").write_bytes(b"nothing")
    detector, _ = _knowing_detector()
    assert len(detect(detector, [tmp_path / "clip.mp4", folder])) == 2
    assert caplog.messages == [f"left out: {tmp_path / 'clip.mp4'}: not a readable video"]


def test_videos_without_opencv_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r'pip install "vssm\[video\]"'):
        list(views([tmp_path / "clip.mp4"]))


def test_names_of_pictures_and_missing_files(tmp_path, capsys):
    files = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.jpg"]
    assert [picture.name for _, picture in named_pictures(files, tmp_path)] == ["x.png", "x-2.png"]
    with pytest.raises(ValueError, match="no images in this folder"):
        image_files([tmp_path])
    assert main(["segment", "x.png", "--recipe", str(tmp_path / "no.py"), "--checkpoint", "no.pth"]) == 1
    assert capsys.readouterr().err == f"vssm segment: {tmp_path / 'no.py'}: no such file\n"


class _Config(dict):
    """What mmengine makes of a config: a dictionary with attributes."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__

    @classmethod
    def fromfile(cls, path):
        return cls({name: value for name, value in runpy.run_path(path).items() if not name.startswith("__")})


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Gives the text of a config to a framework that takes anything; what it opened, and weights beside it."""
    configs = []

    def open_model(config, weights, **_):
        configs.append(config)
        raise ValueError("no such model")

    for framework, opening in (("mmdet", "init_detector"), ("mmseg", "init_model")):
        monkeypatch.setitem(sys.modules, framework, SimpleNamespace())
        monkeypatch.setitem(sys.modules, f"{framework}.apis", SimpleNamespace(**{opening: open_model}))
    monkeypatch.setitem(sys.modules, "vssm.openmmlab", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mmengine", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mmengine.config", SimpleNamespace(Config=_Config))
    (tmp_path / "weights.pth").touch()

    def opened(command, text):
        configs.clear()
        (tmp_path / "recipe.py").write_text(text)
        options = ["--recipe", str(tmp_path / "recipe.py"), "--checkpoint", str(tmp_path / "weights.pth")]
        assert main([command, "x.png", *options]) == 1
        return configs[0] if configs else None

    return opened


_STEPS = [{"type": "LoadImageFromFile"}, {"type": "PackInputs"}]


@pytest.mark.parametrize("command", ["detect", "segment"])
@pytest.mark.parametrize(
    "text",
    [
        f"test_pipeline = {_STEPS}",
        f"test_pipeline = {_STEPS}; test_dataloader = None",
        f"test_pipeline = {_STEPS}; test_dataloader = dict(dataset=dict(type='Photographs'))",
        f"test_dataloader = dict(dataset=dict(pipeline={_STEPS}))",
        f"test_dataloader = dict(dataset=dict(type='Repeat', dataset=dict(pipeline={_STEPS})))",
        f"test_dataloader = dict(dataset=dict(datasets=[dict(pipeline={_STEPS}), dict(pipeline=[])]))",
    ],
)
def test_steps_are_found_where_a_config_has_them(opened, command, text):
    config = opened(command, text)
    assert config.test_pipeline == _STEPS
    dataset = config.test_dataloader["dataset"]
    while "pipeline" not in dataset:
        dataset = dataset["dataset"] if "dataset" in dataset else dataset["datasets"][0]
    assert dataset["pipeline"] == _STEPS
    config.test_pipeline[0]["type"] = "LoadImageFromNDArray"
    assert dataset["pipeline"] == _STEPS


def test_each_framework_keeps_the_steps_it_would_take(opened):
    config = opened("segment", "test_pipeline = [1]; test_dataloader = dict(dataset=dict(pipeline=[2]))")
    assert (config.test_pipeline, config.test_dataloader["dataset"]["pipeline"]) == ([1], [2])


@pytest.mark.parametrize("command", ["detect", "segment"])
@pytest.mark.parametrize("text", ["", "test_dataloader = dict(dataset=dict(type='Photographs')); test_pipeline = []"])
def test_a_config_without_steps_is_one_line(opened, command, text, capsys, tmp_path):
    assert opened(command, text) is None
    line = capsys.readouterr().err
    expected = f"{tmp_path / 'recipe.py'}: expected test_pipeline or test_dataloader.dataset.pipeline, the steps from a"
    assert line.startswith(f"vssm {command}: {expected}")
    assert line.count("\n") == 1


def test_without_the_extra_a_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vssm.openmmlab", None)
    for name in ("recipe.py", "weights.pth"):
        (tmp_path / name).touch()
    arguments = ["--recipe", str(tmp_path / "recipe.py"), "--checkpoint", str(tmp_path / "weights.pth")]
    assert main(["segment", "x.png", *arguments]) == 1
    line = capsys.readouterr().err
    assert line.startswith("vssm segment: mmseg cannot be used")
    assert line.endswith('pip install "vssm[mm]"\n')
