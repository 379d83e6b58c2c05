"""Training in two processes of torchrun against training in one."""

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

RUNNER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qyolo_deploy")
WORDS = ("--set", "train.batch=4", "--set", "train.epochs=2", "--until", "train", "--json")


@pytest.fixture(scope="module")
def alone(tiny_build, qyolo, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    outcome = qyolo(*tiny_build.arguments(), *WORDS, "--out", out)
    assert outcome.code == 0, outcome.stderr
    return out / "quickstart" / "train"


@pytest.fixture(scope="module")
def together(tiny_build, qyolo, tmp_path_factory):
    out = tmp_path_factory.mktemp("together")
    done = subprocess.run(
        [*RUNNER, *map(str, tiny_build.arguments()), *WORDS, "--out", str(out)],
        env=qyolo.environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("{")]) == 1  # one process talks
    return out / "quickstart" / "train"


@pytest.mark.parametrize("state", ["raw", "ema"])
def test_two_processes_train_the_model_of_one(alone, together, state):
    """Not to the last bit: sums are taken in another order, which flips a rounding here and there.

    Measured against how far training moved the weights.
    """
    one, two = (load_file(folder / f"{state}.safetensors") for folder in (alone, together))
    assert set(one) == set(two)
    start = {f"graph.{name}": value for name, value in load_file(alone.parent / "float" / "model.safetensors").items()}
    names = [name for name in one if name in start and name.endswith("conv.weight")]
    assert len(names) > 40

    def distance(left, right):
        return np.sqrt(sum(float(np.square(left[name] - right[name]).sum()) for name in names))

    assert distance(one, start) > 0.1
    assert distance(one, two) < 0.05 * distance(one, start)


def test_a_batch_that_the_processes_cannot_share_is_refused(tiny_build, qyolo, tmp_path):
    done = subprocess.run(
        [*RUNNER, *map(str, tiny_build.arguments("train.batch=3")), "--until", "train", "--out", str(tmp_path)],
        env=qyolo.environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode != 0
    assert "batch is 3, expected a multiple of the 2 processes" in done.stderr
