import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from qyolo_deploy.errors import InputError
from qyolo_deploy.models.checkpoint import read_checkpoint, write_float_checkpoint
from qyolo_deploy.models.registry import build_detector, load_detector, load_state, with_names
from qyolo_deploy.models.ultralytics import spec_from_config
from qyolo_deploy.models.ultralytics_env import import_ultralytics

NAMES = ("red", "white", "platelet")


def ultralytics_model(name: str = "yolov8n"):
    import_ultralytics()
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(1)
    model = DetectionModel(f"{name}.yaml", nc=3, verbose=False)
    model.names = dict(enumerate(NAMES))
    return model


def save_training(path: Path, model) -> None:
    """Save the dict that ultralytics' trainer saves, with the extras that come along."""
    from ultralytics.utils import IterableSimpleNamespace

    model.args = IterableSimpleNamespace(box=7.5)
    model.criterion = model.init_criterion()
    extras = {
        "train_args": {"save_dir": Path("runs")},
        "best_fitness": np.float64(0.25),
        "scaler": {"scale": 1.0},
    }
    torch.save({"epoch": 3, "model": None, "ema": model.half(), "updates": 9, **extras}, path)


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n"])
def test_training_checkpoint_of_ultralytics_gives_its_model_back(name, tmp_path):
    model = ultralytics_model(name)
    save_training(tmp_path / "best.pt", model)
    model.float().eval()
    detector = load_detector(tmp_path / "best.pt", None, None, 0).eval()
    assert detector.spec.names == NAMES and detector.not_taken == ()
    own = detector.core.state_dict()
    expected = model.state_dict()
    assert set(own) <= set(expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in own.items())
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in own.values())


def test_saved_model_of_ultralytics_is_read(tmp_path):
    import_ultralytics()
    from ultralytics import YOLO

    YOLO("yolov8n.yaml").save(tmp_path / "y.pt")
    checkpoint = read_checkpoint(tmp_path / "y.pt")
    assert len(checkpoint.spec.names) == 80 and checkpoint.spec.strides == (8, 16, 32)
    assert checkpoint.sha256 == hashlib.sha256((tmp_path / "y.pt").read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_own_checkpoint_comes_back_and_is_reproducible(dtype, tmp_path):
    spec = spec_from_config("yolov8n", NAMES)
    state = build_detector(spec).core.state_dict()
    for name in ("a", "b"):
        write_float_checkpoint(tmp_path / f"{name}.safetensors", spec, dict(reversed(state.items())), dtype)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert list(file.metadata()) == ["qyolo"]
    back = read_checkpoint(tmp_path / "a.safetensors")
    assert back.spec == spec and back.state.keys() == state.keys()
    for name, tensor in state.items():
        stored = tensor.half().float() if dtype == "float16" and tensor.is_floating_point() else tensor
        assert back.state[name].dtype == tensor.dtype and torch.equal(back.state[name], stored)


def test_other_classes_keep_the_backbone_and_renew_the_head(tmp_path):
    save_training(tmp_path / "best.pt", ultralytics_model())
    source = read_checkpoint(tmp_path / "best.pt").state
    detector = load_detector(tmp_path / "best.pt", None, ["a", "b"], 5)
    own = detector.core.state_dict()
    assert detector.not_taken and all(name.startswith("model.22.cv3.") for name in detector.not_taken)
    assert own["model.22.cv3.0.2.weight"].shape[0] == 2
    for name in own.keys() - set(detector.not_taken):
        assert torch.equal(own[name], source[name])
    again = load_detector(tmp_path / "best.pt", None, ["a", "b"], 5).core.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in own.items())


def test_architecture_by_name_takes_fitting_weights(tmp_path):
    save_training(tmp_path / "best.pt", ultralytics_model())
    detector = load_detector(tmp_path / "best.pt", "yolov8n", None, 0)
    assert detector.spec.names == NAMES and detector.not_taken == ()
    with pytest.raises(InputError, match=r"'model\.0\.conv\.weight' has the shape \[16, 3, 3, 3\], expected \[32"):
        load_detector(tmp_path / "best.pt", "yolov8s", None, 0)


def test_loading_names_the_first_tensor_that_does_not_fit():
    spec = spec_from_config("yolov8n", NAMES)
    detector, state = build_detector(spec), build_detector(spec).core.state_dict()
    assert load_state(detector, state) == ()
    without = {name: tensor for name, tensor in state.items() if name != "model.1.bn.weight"}
    with pytest.raises(InputError, match=r"'model\.1\.bn\.weight' is missing"):
        load_state(detector, without)
    with pytest.raises(InputError, match=r"'model\.99\.weight'.*too many"):
        load_state(detector, {**state, "model.99.weight": torch.zeros(1)})
    counters = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    assert load_state(detector, counters) == ()
    other = build_detector(with_names(spec, ["one"]))
    with pytest.raises(InputError, match=r"'model\.22\.cv3\.0\.2\.weight' has the shape"):
        load_state(other, state)


def test_global_random_state_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    load_detector(None, "yolov8n", NAMES, 3)
    assert torch.equal(torch.rand(1), expected)


def test_values_beyond_half_precision_are_not_written(tmp_path):
    spec = spec_from_config("yolov8n", NAMES)
    with pytest.raises(InputError, match="float16 cannot hold"):
        write_float_checkpoint(tmp_path / "x.safetensors", spec, {"w": torch.tensor([1e6])}, "float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_full_disk_leaves_nothing_behind(tmp_path):
    spec = spec_from_config("yolov8n", NAMES)
    path = tmp_path / "x.safetensors"
    (tmp_path / f".{path.name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(InputError, match="cannot be written"):
        write_float_checkpoint(path, spec, {"w": torch.zeros(4096)})
    assert not list(tmp_path.iterdir())


def test_neither_weights_nor_architecture_is_refused():
    with pytest.raises(InputError, match="'weights', an 'architecture', or both"):
        load_detector(None, None, NAMES, 0)
