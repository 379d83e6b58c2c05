"""`qyolo bench train`: its numbers follow from its own raw measurements, and what it refuses."""

import importlib.util
from statistics import median

import pytest
import torch

from qyolo_deploy.errors import InputError, QyoloError
from qyolo_deploy.stages.bench_steps import random_batch
from qyolo_deploy.stages.bench_train import _peer_refusal, bench_table
from qyolo_deploy.stages.bench_trainee import FLOAT, PEER, QAT, BenchSettings, Trainee, started

pytestmark = pytest.mark.slow

SMALL = ("--imgsz", 64, "--batch", 2, "--steps", 1, "--rounds", 2, "--threads", 1)


@pytest.fixture(scope="module")
def measured(qyolo, repository):
    model = repository / "recipes" / "architectures" / "yolov8-pico.yaml"
    outcome = qyolo("bench", "train", "--model", model, *SMALL, "--json")
    assert outcome.code == 0, outcome.stderr
    return outcome


@pytest.fixture(scope="module")
def rows(measured):
    return {row["name"]: row for row in measured.json["rows"]}


def test_every_training_has_its_row(measured, rows):
    assert list(rows) == [FLOAT, QAT, PEER]
    assert measured.json["threads"] == 1
    assert (measured.json["weight_bits"], measured.json["activation_bits"]) == (4, 4)
    for column in ("images/s", "min..max", "peak MB", "qat w4a4"):
        assert column in measured.stdout


def test_the_numbers_are_those_of_the_rounds(rows):
    for row in rows.values():
        if "step_s" not in row:
            continue
        assert len(row["step_s"]) == 2
        assert row["images_per_s"] == pytest.approx(2 / median(row["step_s"]))
        ratios = [own / other for own, other in zip(row["step_s"], rows[FLOAT]["step_s"], strict=True)]
        assert row["ratio"] == {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
        assert 0 < row["memory_before_bytes"] <= row["memory_peak_bytes"]
    assert rows[FLOAT]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def test_the_peer_is_measured_or_its_row_says_why_not(rows):
    if importlib.util.find_spec("modelopt") is None:
        assert 'pip install "qyolo_deploy[bench]"' in rows[PEER]["note"]
    else:
        assert rows[PEER].get("step_s") or rows[PEER]["note"]


def test_the_peer_of_an_anchor_model_does_not_apply():
    assert "does not apply" in _peer_refusal("yolov5")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"imgsz": 100}, "imgsz is 100, expected a multiple of 32"),
        ({"imgsz": 0}, "imgsz is 0, expected a multiple of 32"),
        ({"batch": 0}, "batch is 0, expected at least 1"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"rounds": 1}, "rounds is 1, expected at least 2"),
        ({"threads": 0}, "threads is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"weight_bits": 1}, "weight_bits is 1, expected at least 2"),
        ({"activation_bits": 9}, "activation_bits is 9, expected at most 8"),
    ],
)
def test_numbers_out_of_range_are_refused(change, sentence):
    with pytest.raises(InputError, match=sentence):
        BenchSettings(**change)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--imgsz", 65), "imgsz is 65, expected a multiple of 32"),
        (("--model", "absent.pt"), "The checkpoint absent.pt does not exist."),
    ],
)
def test_the_command_refuses_bad_arguments(qyolo, tmp_path, arguments, sentence):
    outcome = qyolo("bench", "train", *arguments, "--json", cwd=tmp_path)
    assert outcome.code == 2
    assert outcome.json["error"] == sentence
    assert "Traceback" not in outcome.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies_is_reported(monkeypatch):
    monkeypatch.setattr(Trainee, "start", _die)
    with (
        pytest.raises(QyoloError, match="process of the float training ended with exit code -9"),
        started(FLOAT, BenchSettings()),
    ):
        pass


def _die(trainee):
    trainee._process.kill()
    trainee._ask(1)


def test_a_batch_follows_from_its_seed():
    batch, same, other = (random_batch(BenchSettings(imgsz=64, batch=3, seed=seed), 5) for seed in (1, 1, 2))
    assert all(torch.equal(batch[key], same[key]) for key in batch)
    assert not torch.equal(batch["img"], other["img"])
    centres, sizes = batch["bboxes"].split(2, 1)
    assert (centres - sizes / 2).min() >= 0 and (centres + sizes / 2).max() <= 1
    assert batch["cls"].max() < 5 and set(batch["batch_idx"].tolist()) == {0, 1, 2}


def test_a_row_without_numbers_shows_its_reason():
    result = {"weight_bits": 3, "activation_bits": 8, "rows": [{"name": PEER, "note": "because"}]}
    head, rows = bench_table(result)
    assert rows == [[PEER, *["-"] * (len(head) - 2), "because"]]
