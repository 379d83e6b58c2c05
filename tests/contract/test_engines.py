"""What every engine promises, whatever runtime is behind it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
import torch
import yaml
from helpers.integer_reference import IntegerReference
from helpers.parity import assert_explained, openvino_run

from qyolo_deploy.engines.base import engine_files, open_engine
from qyolo_deploy.engines.openvino import build_openvino
from qyolo_deploy.errors import InputError
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.graph.simulate import simulate

NAMES = ("person", "class: 1", "it's", "ü", "a, b", "5")
METADATA = {"imgsz": [64, 64], "names": dict(enumerate(NAMES))}


@dataclass(frozen=True)
class Kind:
    """How an engine is made.

    Args:
        runtime: Its name.
        suffix: Of the file or folder.
        files: Names below the engine that hold the network, by suffix.
    """

    runtime: str
    suffix: str
    files: tuple[str, ...]


ONNX_RUNTIME = Kind("onnxruntime", ".onnx", (".onnx",))
OPENVINO = Kind("openvino", "_openvino_model", (".xml", ".bin"))


def write_onnx(model, path):
    copied = model.clone()
    copied.metadata_props.update({key: str(value) for key, value in METADATA.items()})
    ir.save(copied, path)


def write_openvino(model, path):
    source = path.parent / "source.onnx"
    ir.save(model, source)
    path.mkdir()
    build_openvino(source, path, "model", METADATA)
    source.unlink()


_COME_AND_GO = """
import os, signal, sys
from pathlib import Path
import numpy as np
from qyolo_deploy.engines.base import open_engine
images = np.zeros((1, 3, 64, 64), np.float32)
first = open_engine(Path(sys.argv[1]))
second = open_engine(Path(sys.argv[1]))
first(images), second(images)
del first
del second
signal.signal(signal.SIGUSR1, lambda *_: print("signal"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.fixture(scope="module", params=[ONNX_RUNTIME, OPENVINO], ids=lambda kind: kind.runtime)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def built(kind, float_model, static_model, quantized, tmp_path_factory):
    """Paths of an engine with open and of one with fixed shapes."""
    folder = tmp_path_factory.mktemp(kind.runtime)
    paths = {}
    for shapes, model in {"open": float_model, "fixed": static_model}.items():
        paths[shapes] = folder / f"{shapes}{kind.suffix}"
        write = write_onnx if kind is ONNX_RUNTIME else write_openvino
        write(insert_qdq(model, quantized), paths[shapes])
    return paths


@pytest.fixture(scope="module")
def engine(built):
    return open_engine(built["open"])


@pytest.fixture(scope="module")
def fixed(built):
    return open_engine(built["fixed"])


@pytest.fixture
def copied(built, tmp_path):
    """An engine of one's own to damage: its path, and its files by suffix."""
    target = tmp_path / built["open"].name
    for file in engine_files(built["open"]):
        place = target / file.relative_to(built["open"]) if built["open"].is_dir() else target
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(file.read_bytes())
    return target, {file.suffix: file for file in engine_files(target)}


def some_images(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=generator).numpy()


def view_of(detector, quantized, images):
    with torch.no_grad():
        return simulate(detector, quantized)(images).numpy()


def errors_of(output, expected):
    """Mean difference of scores, and of boxes as a share of their spread."""
    boxes = np.abs(output[:, :4] - expected[:, :4]).mean() / expected[:, :4].std()
    return np.abs(output[:, 4:] - expected[:, 4:]).mean(), boxes


class TestEngine:
    def test_it_says_what_it_is(self, kind, engine, fixed, built):
        assert engine.runtime == fixed.runtime == kind.runtime
        assert (engine.path, fixed.path) == (built["open"], built["fixed"])
        assert engine.imgsz is None
        assert fixed.imgsz == (64, 64)
        assert engine.names == fixed.names == NAMES
        assert engine.trained_imgsz == fixed.trained_imgsz == 64
        assert engine.precision_hint in (None, "f32")

    @pytest.mark.parametrize("shape", [(1, 3, 64, 64), (2, 3, 64, 96), (3, 3, 160, 32)], ids=str)
    def test_open_shapes(self, engine, shape):
        output = engine(some_images(*shape))
        anchors = sum((shape[2] // stride) * (shape[3] // stride) for stride in (8, 16, 32))
        assert output.dtype == np.float32
        assert output.shape == (shape[0], 4 + len(NAMES), anchors)
        assert np.isfinite(output).all()
        scores = output[:, 4:]
        assert scores.min() >= 0 and scores.max() <= 1

    def test_fixed_shapes(self, engine, fixed):
        images = some_images(1, 3, 64, 64)
        output = fixed(images)
        assert (output.dtype, output.shape) == (np.float32, (1, 10, 84))
        np.testing.assert_allclose(output, engine(images), rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("shape", [(1, 3, 48, 65), (1, 4, 64, 64), (3, 64, 64)], ids=str)
    def test_wrong_shapes_are_refused(self, engine, fixed, shape):
        for runner in (engine, fixed):
            with pytest.raises(InputError, match="cannot run on images of shape") as caught:
                runner(some_images(*shape))
            assert str(runner.path) in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 96, 64)], ids=str)
    def test_other_sizes_than_the_fixed_one_are_refused(self, fixed, shape):
        with pytest.raises(InputError, match="cannot run on images of shape"):
            fixed(some_images(*shape))

    def test_it_goes_on_after_a_refusal(self, engine):
        images = some_images(1, 3, 64, 64)
        before = engine(images)
        with pytest.raises(InputError):
            engine(some_images(1, 3, 40, 40))
        np.testing.assert_array_equal(engine(images), before)

    def test_the_same_images_give_the_same_output(self, engine, built):
        images, others = some_images(2, 3, 64, 96), some_images(2, 3, 64, 96)[::-1]
        first = engine(images)
        kept = first.copy()
        engine(others)
        np.testing.assert_array_equal(first, kept)  # not a view of a buffer that the next call fills
        np.testing.assert_array_equal(engine(images), kept)
        np.testing.assert_array_equal(open_engine(built["open"])(images), kept)

    def test_its_own_outputs_are_those_it_decodes(self, engine):
        images = some_images(1, 3, 64, 64)
        outputs = engine.outputs(images)
        assert list(outputs) == ["output0"] and engine.head is None
        np.testing.assert_array_equal(outputs["output0"], engine(images))

    def test_an_image_gives_the_same_in_any_batch(self, engine):
        images = some_images(3, 3, 64, 64)
        together = engine(images)
        for index in range(3):
            alone = engine(images[index : index + 1])
            np.testing.assert_allclose(alone[0], together[index], rtol=1e-4, atol=1e-3)

    def test_a_single_thread_gives_the_same(self, engine, built):
        images = some_images(1, 3, 64, 96)
        np.testing.assert_allclose(open_engine(built["open"], threads=1)(images), engine(images), rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("shapes", ["open", "fixed"])
    def test_many_threads_at_a_time_get_what_one_gets(self, built, shapes):
        several, alone = open_engine(built[shapes], threads=2, mode="throughput"), open_engine(built[shapes])
        assert alone.parallel == 1 and several.parallel >= 1
        sizes = [(64, 64), (64, 96), (96, 64)] if shapes == "open" else [(64, 64)]
        images = [some_images(1, 3, *size) + index / 100 for index, size in enumerate(sizes * 8)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(several, images))
        for image, output in zip(images, found, strict=True):
            np.testing.assert_allclose(output, alone(image), rtol=1e-4, atol=1e-3)

    def test_views_of_larger_arrays_are_taken_as_they_look(self, engine):
        large = some_images(1, 3, 128, 128)
        np.testing.assert_array_equal(engine(large[:, :, ::2, ::2]), engine(large[:, :, ::2, ::2].copy()))

    def test_it_agrees_with_the_fake_quantized_view(self, kind, engine, built, float_model, quantized, pico, images):
        """ONNX Runtime gives the very codes of the view; OpenVINO scales in another float order, which turns ties."""
        if kind is ONNX_RUNTIME:
            score_error, box_error = errors_of(engine(images.numpy()), view_of(pico, quantized, images))
            assert score_error <= 1e-5
            assert box_error <= 1e-4
            return
        reference = IntegerReference(ir.to_proto(insert_qdq(float_model, quantized)))
        codes = openvino_run(built["open"] / "model.xml", reference)(images.numpy())
        assert len(codes) > 0.75 * len(reference.rounded)
        assert_explained(reference, codes, images.numpy())

    def test_a_missing_engine(self, kind, tmp_path):
        with pytest.raises(InputError, match="no such engine"):
            open_engine(tmp_path / f"nothing{kind.suffix}")

    @pytest.mark.parametrize("kept", [0, 20, 0.5, 0.999])
    def test_a_cut_engine_is_refused(self, kind, copied, kept):
        path, files = copied
        for suffix in kind.files:
            whole = files[suffix].read_bytes()
            files[suffix].write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
            with pytest.raises(InputError, match="cannot load it") as caught:
                open_engine(path)
            assert "\n" not in str(caught.value)
            files[suffix].write_bytes(whole)
        open_engine(path)

    def test_text_is_no_engine(self, kind, copied):
        path, files = copied
        files[kind.files[0]].write_text("hello")
        with pytest.raises(InputError, match="cannot load it"):
            open_engine(path)

    def test_no_engine_without_its_parts(self, kind, copied):
        path, files = copied
        for suffix in reversed(kind.files):
            files[suffix].unlink()
            with pytest.raises(InputError, match=str(path)):
                open_engine(path)

    def test_engines_come_and_go_without_harm_to_signals(self, built, repository):
        """OpenVINO's plugin lends its memory to signal handlers on some processors, and may take it back too early."""
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        command = [sys.executable, "-c", _COME_AND_GO, str(built["fixed"])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stdout) == (0, "signal\n"), done.stderr

    @pytest.mark.parametrize("text", ["[", "names: [a, b]", "names: {0: a, x: b}", "3", "names:\n  - 1: 2\nimgsz: big"])
    def test_odd_metadata_means_no_names(self, kind, copied, text):
        path, files = copied
        if kind is OPENVINO:
            files[".yaml"].write_text(text)
        else:
            model = ir.load(path)
            names = yaml.safe_load(text).get("names") if "names" in text else text
            model.metadata_props.update({"names": str(names), "imgsz": "big"})
            ir.save(model, path)
        runner = open_engine(path)
        assert runner.names == ()
        assert runner.trained_imgsz is None


def test_other_files_are_no_engines(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK")
    with pytest.raises(InputError, match=r"expected an \.onnx, \.engine or \.plan file"):
        open_engine(path)


def test_a_folder_needs_exactly_one_xml(tmp_path):
    with pytest.raises(InputError, match="found 0"):
        open_engine(tmp_path)
    for name in ("a.xml", "b.xml"):
        (tmp_path / name).write_text("<net/>")
    with pytest.raises(InputError, match="found 2"):
        open_engine(tmp_path)


def test_openvino_opens_by_folder_and_by_file_and_takes_a_hint(static_model, tmp_path):
    folder = tmp_path / "m_openvino_model"
    write_openvino(static_model, folder)
    assert sorted(file.name for file in engine_files(folder)) == ["metadata.yaml", "model.bin", "model.xml"]
    images = some_images(1, 3, 64, 64)
    by_file, rounded = open_engine(folder / "model.xml"), open_engine(folder, "bf16")
    assert by_file.names == NAMES
    assert (by_file.precision_hint, rounded.precision_hint) == ("f32", "bf16")
    exact = by_file(images)
    np.testing.assert_array_equal(exact, open_engine(folder)(images))
    assert np.abs(exact[:, 4:] - rounded(images)[:, 4:]).mean() < 0.05


def test_openvino_without_what_is_inside_silu(official, make_prepared, photographs, tmp_path):
    """It computes SiLU in float where the view rounds its input and its sigmoid to 8 bits."""
    detector, quantized, model = official
    inner = make_prepared(detector).placement.inner
    write_openvino(insert_qdq(model, quantized, leave_out=inner), tmp_path / "m_openvino_model")
    engine = open_engine(tmp_path / "m_openvino_model")
    output = np.concatenate([engine(image[None].numpy()) for image in photographs])
    expected = view_of(detector, quantized, photographs)
    score_error, box_error = errors_of(output, expected)
    assert score_error <= 2e-4
    assert box_error <= 0.08
