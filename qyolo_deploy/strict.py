"""Pydantic models of files that are passed on: unknown keys, other types and unusable paths are refused."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from qyolo_deploy.artifact import check_relative_path


def _usable(path: str) -> str:
    if reason := check_relative_path(path):
        raise ValueError(f"the path {path!r} is not usable: {reason}")
    return path


RelativePath = Annotated[str, AfterValidator(_usable)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """Base of all their parts."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def validation_message(error: ValidationError) -> str:
    """Tell the first problem of a validation error in one clause, with the key it concerns."""
    first = error.errors(include_url=False, include_context=False)[0]
    text = first["msg"].removeprefix("Value error, ")
    key = ".".join(str(part) for part in first["loc"])
    return f"{key!r}: {text}" if key else text
