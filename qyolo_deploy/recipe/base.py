"""What all sections of a recipe are made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Bits = Annotated[int, Field(ge=2, le=8)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
