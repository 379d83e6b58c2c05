"""`qyolo bench validate`: who takes part, and what it tells. Nothing asserts a time."""

import pytest

from qyolo_deploy.errors import InputError
from qyolo_deploy.stages.bench_validate import BenchValidateSettings

ROWS = ["inference", "inference, several at a time", "qyolo validate"]


def test_all_take_turns_over_the_same_images(qyolo, tiny_build):
    arguments = ("--data", tiny_build.folder / "data", "--images", 3, "--rounds", 2, "--ultralytics", "--json")
    outcome = qyolo("bench", "validate", tiny_build.onnx, *arguments)
    assert outcome.code == 0, outcome.stderr
    result = outcome.json
    assert (result["images"], result["imgsz"], result["rounds"]) == (3, 128, 2)
    assert [row["name"] for row in result["rows"]] == [*ROWS, "ultralytics val"]
    baseline, *others, ultralytics = result["rows"]
    for row in (baseline, *others):
        ratios = [own / other for own, other in zip(row["round_s"], baseline["round_s"], strict=True)]
        assert (row["ratio"]["min"], row["ratio"]["max"]) == pytest.approx((min(ratios), max(ratios)))
    assert len(ultralytics.get("round_s", ())) == 2 or "cannot run here" in ultralytics["note"]
    assert "3 images, 128 px" in outcome.stdout


@pytest.mark.parametrize(("change", "sentence"), [({"rounds": 1}, "rounds is 1"), ({"images": 0}, "images is 0")])
def test_numbers_out_of_range_are_refused(change, sentence):
    with pytest.raises(InputError, match=sentence):
        BenchValidateSettings(**change)
