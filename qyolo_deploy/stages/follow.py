"""What the other processes of a distributed build do: wait, and take part in training."""

import importlib
from dataclasses import replace
from typing import Any

from qyolo_deploy.console import Reporter
from qyolo_deploy.stages.context import StageContext
from qyolo_deploy.training import distributed


def call_others(stage: str, context: StageContext) -> None:
    """Has every other process join this stage; the first process calls it."""
    if distributed.is_first():
        distributed.tell((stage, replace(context, reporter=Reporter(quiet=True))))


def dismiss_others() -> None:
    """Ends the other processes' waiting."""
    distributed.tell(None)


def follow() -> None:
    """Joins stages until the first process dismisses this one."""
    message: Any = distributed.tell(None)
    while message is not None:
        stage, context = message
        importlib.import_module(f"qyolo_deploy.stages.{stage}").join(context)
        message = distributed.tell(None)
