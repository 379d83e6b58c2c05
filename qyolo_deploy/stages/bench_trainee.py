"""Trainings in processes of their own, which do steps when `qyolo bench train` asks for them. Needs no torch."""

import contextlib
import importlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from qyolo_deploy.errors import InputError, QyoloError, RuntimeMissingError

FLOAT, QAT, PEER = "float", "qat", "ultralytics quantize=8"
_WARMUP_STEPS = 3  # the first compiles, the second meets gradients and moments of an optimizer that has begun
_EXTRAS = {FLOAT: "build", QAT: "build", PEER: "build,bench"}
_JOIN_S = 20.0


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Args:
        model: Architecture, model YAML or checkpoint (.pt, .safetensors).
        imgsz: Side of the random images in pixels.
        batch: Images of a step.
        steps: Steps of each training in a round.
        rounds: How often each training gets its turn.
        threads: Of torch; None leaves it to torch.
        weight_bits: Of the quantization-aware training.
        activation_bits: Of the quantization-aware training.
        seed: Of weights, images and labels.

    Raises:
        InputError: A number is out of its range.
    """

    model: str = "yolov8n"
    imgsz: int = 256
    batch: int = 16
    steps: int = 5
    rounds: int = 5
    threads: int | None = None
    weight_bits: int = 4
    activation_bits: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.imgsz < 32 or self.imgsz % 32:
            raise InputError(f"imgsz is {self.imgsz}, expected a multiple of 32")
        lowest = {"batch": 1, "steps": 1, "rounds": 2, "threads": 1, "weight_bits": 2, "activation_bits": 2, "seed": 0}
        for name, least in lowest.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"{name} is {value}, expected at least {least}")
        for name in ("weight_bits", "activation_bits"):
            if getattr(self, name) > 8:
                raise InputError(f"{name} is {getattr(self, name)}, expected at most 8")

    @property
    def total_steps(self) -> int:
        """Steps of each training, those that warm up included."""
        return _WARMUP_STEPS + self.rounds * self.steps


class Trainee:
    """One kind of training in a process of its own, which does steps when it is asked to."""

    def __init__(self, kind: str, settings: BenchSettings) -> None:
        self.kind, self._settings = kind, settings
        self.step_s: list[float] = []
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(kind, settings, theirs))
        self._process.start()
        theirs.close()

    def start(self) -> None:
        """Waits until it has built its model, and lets it warm up.

        Raises:
            QyoloError: It could not.
        """
        self.facts: dict[str, Any] = self._receive()
        self._ask(_WARMUP_STEPS)

    def turn(self) -> None:
        """Lets it do a round's steps and keeps the seconds that one took."""
        self.step_s.append(self._ask(self._settings.steps) / self._settings.steps)

    def finish(self) -> None:
        """Ends the training and takes what it has to tell."""
        self.facts |= self._ask(0)
        if skipped := self.facts["skipped_steps"]:
            raise QyoloError(f"{self.kind}: {skipped} steps were skipped, because loss or gradients were not finite")

    def _ask(self, steps: int) -> Any:
        with contextlib.suppress(BrokenPipeError):  # then there is an error to be received, or the end of the file
            self._pipe.send(steps)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(_JOIN_S)
            code = self._process.exitcode
            raise QyoloError(f"the process of the {self.kind} training ended with exit code {code}") from None
        if isinstance(answer, QyoloError):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the process, which sees that nobody listens any more."""
        self._pipe.close()
        self._process.join(_JOIN_S)
        self._process.kill()


def _serve(kind: str, settings: BenchSettings, pipe: Connection) -> None:
    """What a trainee's process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; it takes the pipe along
    os.dup2(2, 1)  # stdout is for the result alone, and libraries like to talk
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            pipe.send(importlib.import_module("qyolo_deploy.stages.bench_steps").run(kind, settings, pipe))
        except QyoloError as error:
            pipe.send(error)
        except ImportError as error:
            pipe.send(RuntimeMissingError(f"{kind} training: {error}", f'pip install "qyolo_deploy[{_EXTRAS[kind]}]"'))


@contextlib.contextmanager
def started(kind: str, settings: BenchSettings) -> Iterator[Trainee]:
    """A training that has warmed up; its process ends with the block.

    Raises:
        QyoloError: It could not begin.
    """
    trainee = Trainee(kind, settings)
    try:
        trainee.start()
        yield trainee
    finally:
        trainee.close()
