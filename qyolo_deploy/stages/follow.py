"""What the other processes of a distributed build do: wait, and take part in training."""

import importlib
from dataclasses import fields
from typing import Any

from qyolo_deploy.console import Reporter
from qyolo_deploy.stages.context import StageContext
from qyolo_deploy.training import distributed


def call_others(stage: str, context: StageContext) -> None:
    """Has every other process join this stage; the first process calls it."""
    if distributed.is_first():
        told = {item.name: getattr(context, item.name) for item in fields(context) if item.name != "reporter"}
        distributed.tell((stage, told))


def dismiss_others() -> None:
    """Ends the other processes' waiting."""
    distributed.tell(None)


def follow() -> None:
    """Joins stages until the first process dismisses this one."""
    message: Any = distributed.tell(None)
    while message is not None:
        stage, told = message
        context = StageContext(**told, reporter=Reporter(quiet=True))
        importlib.import_module(f"qyolo_deploy.stages.{stage}").join(context)
        message = distributed.tell(None)
