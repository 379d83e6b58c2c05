import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qyolo_deploy.errors import InputError
from qyolo_deploy.models.base import ModelSpec
from qyolo_deploy.models.registry import build_detector, load_detector
from qyolo_deploy.models.ultralytics import spec_from_config
from qyolo_deploy.models.ultralytics_env import import_ultralytics

NAMES = ("red", "white", "platelet")


def detector(name: str):
    """A detector with weights and statistics that leave no layer near the identity."""
    torch.manual_seed(0)
    model = build_detector(spec_from_config(name, NAMES)).eval()
    for module in model.core.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def theirs(model):
    """ultralytics' own model with the same weights; of a one-to-one head only that branch is the same."""
    import_ultralytics()
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import DEFAULT_CFG

    reference = DetectionModel(dict(model.spec.config), verbose=False)
    report = reference.load_state_dict(model.core.state_dict(), strict=False)
    assert not report.unexpected_keys
    reference.args = DEFAULT_CFG
    return reference.eval()


def batch(images: torch.Tensor) -> dict[str, torch.Tensor]:
    boxes = [[0.4, 0.5, 0.3, 0.2], [0.7, 0.3, 0.2, 0.5], [0.5, 0.5, 0.8, 0.9]]
    return {
        "img": images,
        "cls": torch.tensor([[0.0], [2.0], [1.0]]),
        "bboxes": torch.tensor(boxes),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
    }


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_output_equals_that_of_ultralytics(name):
    model, images = detector(name), torch.rand(2, 3, 96, 128)
    with torch.no_grad():
        expected = theirs(model)(images)[0]
        got = model(images)
    assert got.shape == (2, 4 + len(NAMES), 12 * 16 + 6 * 8 + 3 * 4)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-4)


def test_one_to_one_head_equals_that_of_ultralytics():
    model, images = detector("yolo26n"), torch.rand(1, 3, 96, 128)
    reference = theirs(model)
    reference.end2end = True
    with torch.no_grad():
        best = reference(images)[0][0]  # [max_det, 6]: x1 y1 x2 y2 score class, best first
        got = model(images)[0]
    scores, classes = got[4:].max(0)
    top = scores.argsort(descending=True)[:10]
    corners = torch.cat((got[:2, top] - got[2:4, top] / 2, got[:2, top] + got[2:4, top] / 2)).T
    torch.testing.assert_close(best[:10, :4], corners, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(best[:10, 4], scores[top])
    assert torch.equal(best[:10, 5], classes[top].float())


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_loss_equals_that_of_ultralytics(name):
    model, images = detector(name), torch.rand(2, 3, 96, 128)
    reference = theirs(model)
    expected, expected_items = reference.loss(batch(images))
    got, items = model.loss(model.core(images), batch(images))
    torch.testing.assert_close(got, expected.sum())
    assert items.keys() == expected_items.keys() and all(value > 0 for value in items.values())
    for key, value in items.items():
        assert value == pytest.approx(float(expected_items[key]), rel=1e-5)
    got.backward()
    assert float(model.core.get_parameter("model.0.conv.weight").grad.abs().sum()) > 0


def test_one_to_one_loss_equals_the_branch_of_ultralytics():
    model, images = detector("yolo26n"), torch.rand(2, 3, 96, 128)
    reference = theirs(model)
    criterion = reference.init_criterion()
    _, expected = criterion(reference(images), batch(images))  # reports the one-to-one branch
    _, items = model.loss(model.core(images), batch(images))
    for key, value in items.items():
        assert value == pytest.approx(float(expected[key]), rel=1e-5)


def test_loss_of_images_without_objects_is_finite():
    model, images = detector("yolov8n"), torch.rand(1, 3, 64, 64)
    empty = {
        "cls": torch.zeros(0, 1),
        "bboxes": torch.zeros(0, 4),
        "batch_idx": torch.zeros(0),
        "img": images,
    }
    loss, items = model.loss(model.core(images), empty)
    assert torch.isfinite(loss) and items["box_loss"] == 0 < items["cls_loss"]


def test_names_and_biases_are_official():
    model = build_detector(spec_from_config("yolov8n", NAMES))
    state = model.core.state_dict()
    assert state["model.22.cv2.0.0.conv.weight"].shape == (64, 64, 3, 3)
    assert state["model.22.cv3.2.2.bias"].shape == (3,)
    prior = np.log(5 / 3 / (640 / 32) ** 2)  # five objects an image of 640 px
    torch.testing.assert_close(state["model.22.cv3.2.2.bias"], torch.full((3,), float(prior)))
    assert model.core.get_submodule("model.0.bn").eps == 1e-3


def test_config_by_path_and_content_is_that_by_name(tmp_path):
    by_name = spec_from_config("yolo11n", NAMES)
    by_content = spec_from_config(by_name.config, NAMES)
    path = tmp_path / "yolo11n.yaml"
    path.write_text(json.dumps(by_name.config))
    assert by_name == by_content == spec_from_config(path, NAMES)
    assert by_name.strides == (8, 16, 32) and by_name.config["nc"] == 3
    assert ModelSpec.from_json(json.loads(json.dumps(by_name.to_json()))) == by_name


def test_four_head_levels_have_four_strides():
    assert spec_from_config("yolov8n-p2", NAMES).strides == (4, 8, 16, 32)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"activation": "__import__('pathlib').Path('ran').touch()"}, "activation"),
        ({"head": [[-1, 1, "torchvision.ops.Conv2dNormActivation", [8]]]}, "torchvision"),
        ({"head": [[-1, 1, "TorchVision", [8, "resnet18", None]]]}, "TorchVision"),
        ({"head": [[-1, 1, "Segment", ["nc", 32, 256]]]}, "Segment"),
        ({"head": [[-1, 1, "Conv", [64, 3]]]}, "not Detect"),
        ({"head": [[-1, 1, "Conv", ["sixty", 3]], [[-1], 1, "Detect", ["nc"]]]}, "cannot build"),
        ({"head": [[-1, 1, "Conv", ["(", 3]], [[-1], 1, "Detect", ["nc"]]]}, "cannot build"),
        ({"head": []}, "'head'"),
        ({"backbone": [["Conv"]]}, "'backbone'"),
        ({"nc": 0}, "'nc'"),
        ({"channels": 1}, "three channels"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {**spec_from_config("yolov8n").config, **change}
    with pytest.raises(InputError, match=sentence):
        spec_from_config(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("yolov8n-seg", "Segment"),
        ("yolo99n", "no architecture 'yolo99n'"),
        ("absent.yaml", "does not exist"),
        ("../../default", "no architecture"),
    ],
)
def test_unknown_architectures_are_refused(name, sentence):
    with pytest.raises(InputError, match=sentence):
        load_detector(None, name, NAMES, 0)


def test_import_leaves_home_network_and_torchvision_alone(tmp_path):
    script = """
        import os, socket, sys, threading
        def no_network(*arguments, **keywords):
            raise SystemExit("the network was asked for")
        socket.getaddrinfo = socket.create_connection = no_network
        socket.socket.connect = no_network
        import numpy, torch
        threads, precision = torch.get_num_threads(), numpy.get_printoptions()
        from qyolo_deploy.models.registry import load_detector
        from qyolo_deploy.models.ultralytics_env import import_ultralytics
        detector = load_detector(None, "yolov8n", ["a"], 0)
        batch = dict(cls=torch.zeros(1, 1), bboxes=torch.full((1, 4), 0.5), batch_idx=torch.zeros(1))
        detector.loss(detector.core(torch.rand(1, 3, 64, 64)), batch)
        import ultralytics.data.utils
        from ultralytics.utils import SETTINGS, USER_CONFIG_DIR, checks, events
        assert not events.events.enabled and not checks.ONLINE and not checks.AUTOINSTALL
        assert not any(SETTINGS[key] for key in ("sync", "clearml", "comet", "dvc", "mlflow", "wandb"))
        ultralytics.data.utils.check_font("Arial.ttf")
        assert "torchvision" not in sys.modules
        assert threading.active_count() == 1
        assert torch.get_num_threads() == threads and "OMP_NUM_THREADS" not in os.environ
        assert numpy.get_printoptions() == precision
        print(USER_CONFIG_DIR)
    """
    home = tmp_path / "home"
    home.mkdir()
    drop = ("OMP_NUM_THREADS", "YOLO_CONFIG_DIR", "PYTEST_CURRENT_TEST", "YOLO_OFFLINE", "YOLO_AUTOINSTALL")
    environment = {key: value for key, value in os.environ.items() if key not in drop}
    environment |= {"HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), "TMPDIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1, "ultralytics wrote to stdout"
    assert not list(home.iterdir())
    assert list(tmp_path.iterdir()) == [home], "the temporary settings folder is left behind"


def test_users_own_settings_folder_is_kept(tmp_path):
    script = "from qyolo_deploy.models.ultralytics_env import import_ultralytics as f; f()"
    script += "; from ultralytics.utils import SETTINGS; print(SETTINGS['sync'])"
    environment = os.environ | {"YOLO_CONFIG_DIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    written = json.loads((tmp_path / "Ultralytics" / "settings.json").read_text())
    assert result.stdout == "False\n" and written["sync"] is True
