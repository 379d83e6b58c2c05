import builtins
import io
import json
import os
import pickle
import re
import sys
import types
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from qyolo_deploy.errors import InputError
from qyolo_deploy.models.checkpoint import read_checkpoint
from qyolo_deploy.models.ultralytics_env import import_ultralytics


class Call:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


@pytest.fixture(scope="module")
def tiny():
    """A detection model of ultralytics in a few kilobytes."""
    import_ultralytics()
    from ultralytics.nn.tasks import DetectionModel

    head = [[[0, 1], 1, "Detect", ["nc"]]]
    backbone = [[-1, 1, "Conv", [8, 3, 8]], [-1, 1, "Conv", [8, 3, 2]]]
    return DetectionModel({"nc": 2, "backbone": backbone, "head": head}, verbose=False)


@pytest.fixture
def saved(tiny, tmp_path):
    """Saves the tiny model after a change to what is pickled; the model itself stays as it is."""

    def save(change=lambda model: None, **content) -> Path:
        path = tmp_path / "model.pt"
        buffer = io.BytesIO()
        torch.save(tiny, buffer)
        buffer.seek(0)
        model = torch.load(buffer, weights_only=False)
        change(model)
        torch.save({"model": model, "ema": None, **content}, path)
        return path

    return save


def refusal(path: Path, pattern: str) -> str:
    """Read the file, expect one sentence that names it and matches, and return the sentence."""
    with pytest.raises(InputError, match=pattern) as caught:
        read_checkpoint(path)
    sentence = str(caught.value)
    assert path.name in sentence and "\n" not in sentence and len(sentence) < 400
    return sentence


def test_the_tiny_model_itself_is_read(saved):
    checkpoint = read_checkpoint(saved())
    assert checkpoint.spec.strides == (8, 16) and checkpoint.spec.names == ("0", "1")


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (os.system, r"(posix|nt)\.system"),
        (builtins.eval, r"builtins\.eval"),
        (builtins.exec, r"builtins\.exec"),
        (getattr, r"builtins\.getattr"),
        (torch.hub.load, r"torch\.hub\.load"),
        (torch.load, r"torch\.serialization\.load"),
    ],
)
def test_pickles_that_would_call_something_are_refused_before_anything_runs(function, shown, saved, tmp_path):
    marker = tmp_path / "ran"
    payload = {
        os.system: f"echo > {marker}",
        builtins.eval: f"open({str(marker)!r}, 'w')",
        builtins.exec: f"open({str(marker)!r}, 'w')",
    }.get(function, "x")
    path = saved(train_args=Call(function, payload))
    refusal(path, rf"{shown}.*nothing of it was run")
    assert not marker.exists()
    if payload != "x":  # the payload is live: the ordinary way of loading runs it
        torch.load(path, weights_only=False)
        assert marker.exists()


def test_payload_inside_the_model_is_refused(saved, tmp_path):
    marker = tmp_path / "ran"
    path = saved(lambda model: setattr(model, "names", Call(os.system, f"echo > {marker}")))
    refusal(path, "system")
    assert not marker.exists()


def test_call_of_an_allowed_class_with_arguments_is_refused(saved):
    refusal(saved(extra=Call(nn.Conv2d, 3, 8, 1)), r"torch\.nn\.modules\.conv\.Conv2d with arguments")


def test_state_of_an_allowed_class_must_be_a_dict(saved):
    refusal(saved(extra=Call(nn.SiLU, state=[1, 2])), "not a module's state")


def test_pickled_classes_are_not_imported(saved, tmp_path, monkeypatch):
    package = tmp_path / "models"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "common.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    home = types.ModuleType("models.common")
    home.C3 = type("C3", (nn.Module,), {"__module__": "models.common"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "models", types.ModuleType("models"))
        patch.setitem(sys.modules, "models.common", home)
        path = saved(extra=home.C3())
    monkeypatch.syspath_prepend(tmp_path)
    assert read_checkpoint(path).spec.names == ("0", "1")
    assert not (tmp_path / "imported").exists() and "models" not in sys.modules


def test_classes_that_others_declared_safe_are_not_used(saved, tmp_path):
    class Surprise(nn.Module):
        def __setstate__(self, state):
            (tmp_path / "ran").touch()

    path = saved()
    with torch.serialization.safe_globals([(Surprise, "ultralytics.nn.tasks.DetectionModel"), Surprise]):
        before = torch.serialization.get_safe_globals()
        read_checkpoint(path)
        assert set(torch.serialization.get_safe_globals()) == set(before)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("environment", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None])
def test_protocol_4_pickles_are_refused(environment, tmp_path, monkeypatch):
    if environment:
        monkeypatch.setenv(environment, "1")
    path = tmp_path / "model.pt"
    torch.save({"model": Call(os.system, f"echo > {tmp_path / 'ran'}")}, path, pickle_protocol=4)
    refusal(path, "damaged|system")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "not a checkpoint"),
        (b"PK\x03\x04" + bytes(200), "truncated or damaged"),
    ],
)
def test_files_that_are_no_checkpoints(content, reason, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    refusal(path, reason)


def test_legacy_format_is_named(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    refusal(path, r"before 1\.6")


def test_plain_pickle_is_not_unpickled(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Call(os.system, f"echo > {tmp_path / 'ran'}"), protocol=2))
    refusal(path, r"before 1\.6")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95, 0.999])
def test_truncated_checkpoints(share, saved):
    path = saved()
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refusal(path, "truncated or damaged")


def test_archive_without_a_pickle(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refusal(path, "truncated or damaged")


def test_every_damaged_pickle_ends_in_a_sentence(saved, tmp_path):
    source = saved()
    with zipfile.ZipFile(source) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    main = next(name for name in files if name.endswith("data.pkl"))
    generator = torch.Generator().manual_seed(0)
    outcomes = []
    for _ in range(150):
        data = bytearray(files[main])
        position = int(torch.randint(len(data), (1,), generator=generator))
        data[position] = int(torch.randint(256, (1,), generator=generator))
        path = tmp_path / "damaged.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, bytes(data) if name == main else content)
        try:
            read_checkpoint(path)
            outcomes.append("read")
        except InputError as error:
            assert "\n" not in str(error)
            outcomes.append("refused")
    assert outcomes.count("refused") > 20


def test_torchscript_archive_is_named(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 8, 8)), str(path))
    refusal(path, "TorchScript")


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("seg", "SegmentationModel"),
        ("cls", "ClassificationModel"),
        ("pose", "PoseModel"),
        ("obb", "OBBModel"),
    ],
)
def test_models_of_other_tasks_are_named(task, model, tmp_path):
    import_ultralytics()
    from ultralytics import YOLO

    path = tmp_path / f"yolov8n-{task}.pt"
    YOLO(f"yolov8n-{task}.yaml").save(path)
    refusal(path, rf"holds ultralytics\.nn\.tasks\.{model}, which no supported detection architecture has")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.__dict__.pop("yaml"), "yaml and strides"),
        (lambda m: m.__dict__.pop("stride"), "yaml and strides"),
        (lambda m: m.yaml.update(rows=nn.SiLU()), "not plain data"),
        (lambda m: m.yaml.update(nc=5), "nc=5 but 2 class names"),
        (lambda m: m.__dict__.update(names={0: "a", 5: "b"}), "class names"),
        (lambda m: m.__dict__.update(names=[]), "class names"),
        (lambda m: m._modules.update(model=torch.zeros(1)), "not a module"),
        (lambda m: m.model._modules.update(loop=m), "not laid out like a model"),
        (lambda m: m.model[0].conv._parameters.update(weight="w"), "not a tensor"),
        (lambda m: m.model[0].conv.weight.data.fill_(float("nan")), "not finite"),
        (
            lambda m: m.model[0].bn._buffers.update(running_var=torch.zeros(1).expand(1 << 40)),
            "not stored in full",
        ),
        (lambda m: setattr(m.model[0], "act", nn.ReLU()), "mixes the activations"),
    ],
)
def test_models_with_something_odd(change, reason, saved):
    refusal(saved(change), reason)


def test_state_dict_alone_is_refused(tiny, tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model": tiny.state_dict()}, path)
    refusal(path, "no YOLO detection model")


def test_missing_file_is_named(tmp_path):
    refusal(tmp_path / "absent.pt", "does not exist")
    refusal(tmp_path / "absent.safetensors", "does not exist")


def test_folder_is_named(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    refusal(tmp_path / "folder.pt", "cannot be read")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "does not say"),
        ({"qyolo": "no json"}, "not a safetensors file"),
        ({"qyolo": json.dumps({"kind": "quantized"})}, "does not say"),
        (
            {"qyolo": json.dumps({"kind": "float_checkpoint", "spec": {"family": "yolov5"}})},
            "exactly the keys",
        ),
    ],
)
def test_safetensors_of_others(metadata, reason, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, metadata)
    refusal(path, reason)


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:-5])
    assert re.search("truncated", refusal(path, "safetensors"))
