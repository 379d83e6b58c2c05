"""The codes of engines beside the integer reference: each is the nearest one, or lies at a tie."""

import numpy as np

from helpers.integer_reference import distance
from qyolo_deploy.stages.tensors_openvino import OpenVinoTensors

# Four roundings to float32, of numbers that are below 256.
TIE = 4 * 255 * 2.0**-24


def openvino_run(path, reference):
    """A function from images to the codes that OpenVINO computes; what only passes values on may not be seen.

    Args:
        path: IR, or an ONNX file that OpenVINO reads as it is.
        reference: Of the QDQ graph that it is made from.
    """
    source = OpenVinoTensors("openvino", path)
    watch = source.watch([name for name in source.names if name in reference.rounded])

    def run(images):
        codes = {}
        for name, values in watch(images).items():
            scale, zero_point, _, _ = reference.grid(name)
            exact = values / scale + zero_point
            codes[name] = np.rint(exact).astype(np.int32)
            assert np.abs(exact - codes[name]).max() < 1e-3  # what comes out lies on the grid
        return codes

    return run


def assert_explained(reference, codes, images):
    """Every code is the nearest one or lies at a tie, and until the first such tie all are those of the reference.

    Returns:
        The codes that the reference computes from the images alone.
    """
    own, agrees = reference.all_codes(images), True
    for name in [name for name in reference.rounded if name in codes]:
        positions = reference.positions(name, dict(codes), images)
        assert distance(codes[name], positions).max() <= TIE, name
        agrees = agrees and (np.rint(positions) == codes[name]).all()
        if agrees:
            np.testing.assert_array_equal(codes[name], own[name], err_msg=name)
    return own
