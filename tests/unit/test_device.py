import pytest
import torch

from qyolo_deploy.errors import InputError
from qyolo_deploy.pipeline import build
from qyolo_deploy.training.device import placed, training_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tells of machines without a GPU")


def test_a_machine_without_a_gpu_trains_on_its_processor():
    assert training_device("auto") == training_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_refused(name):
    with pytest.raises(InputError, match=r"--device cuda:\d: torch .* sees 0 GPUs"):
        training_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "0", "cpu:0,1"])
def test_an_unknown_device_is_refused_before_the_recipe_is_read(name, tmp_path):
    with pytest.raises(InputError, match=f"--device {name}: expected auto, cpu, cuda or cuda:<index>"):
        build(tmp_path / "none.yaml", device=name)


def test_modules_keep_their_parameters_while_they_are_elsewhere():
    """An optimizer holds the parameters, not their names."""
    layer = torch.nn.Linear(2, 2)
    before = list(layer.parameters())
    with placed(torch.device("cpu"), layer):
        assert all(one is two for one, two in zip(before, layer.parameters(), strict=True))
    assert {parameter.device.type for parameter in layer.parameters()} == {"cpu"}
