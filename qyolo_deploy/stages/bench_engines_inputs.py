"""What the engines of `qyolo bench engines` look at, and how they are called."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import letterbox, to_tensor
from qyolo_deploy.engines.base import Runner

Images = npt.NDArray[np.float32]
_BLOCK = 32  # pixels of a patch of one colour in the example image
_ROUNDS_OF_CALLS = 4
"""How often each part of an engine in the mode `throughput` is called for one time that is taken."""


def example_image(imgsz: int, image: Path | None, batch: int = 1) -> Images:
    """Float32 `[batch, 3, imgsz, imgsz]` in 0..1: an image several times, or patches of random colours with noise."""
    if image is not None:
        return to_tensor(letterbox(read_image(image), imgsz, rect=False)[0]).repeat(batch, axis=0)
    rng = np.random.default_rng(0)
    patches = rng.random((batch, 3, imgsz // _BLOCK, imgsz // _BLOCK), np.float32)
    noise = rng.random((batch, 3, imgsz, imgsz), np.float32)
    return np.asarray(0.8 * patches.repeat(_BLOCK, 2).repeat(_BLOCK, 3) + 0.2 * noise, np.float32)


def calls_at_a_time(runners: Sequence[Runner]) -> int:
    """Inferences that are timed together: the same number for all engines, enough to keep the widest one busy."""
    widest = max((runner.parallel for runner in runners), default=1)
    return widest * _ROUNDS_OF_CALLS if widest > 1 else 1


def make_call(runner: Runner, example: Images, count: int) -> Callable[[], object]:
    """A function that runs an engine so often, as many times at once as it takes."""
    if count == 1:
        return lambda: runner(example)
    pool = ThreadPoolExecutor(runner.parallel)

    def run() -> None:
        for _ in pool.map(lambda _: runner(example).shape, range(count)):
            pass

    return run
