"""The manifest of a release: what it is, where it comes from, how to feed and read it, and all its files."""

from collections.abc import Iterable
from typing import Any, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from qyolo_deploy.artifact import canonical_json, sha256_json
from qyolo_deploy.errors import IntegrityError
from qyolo_deploy.strict import RelativePath, Sha256, Strict, validation_message

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.json.sig"
SCHEMA_VERSION: Final = 1


class CreatedWith(Strict):
    """The software that built the release."""

    qyolo_deploy: str
    environment: dict[str, str]


class RecipeRef(Strict):
    """The resolved recipe, one of the release's files."""

    path: RelativePath
    sha256: Sha256


class LineageEntry(Strict):
    """One stage that led here: the digest of each of its inputs, and of the files that it wrote for the next ones."""

    stage: str
    key: str
    inputs: dict[str, str]
    output: Sha256 | None = None


class Calibration(Strict):
    """Images of the training split that set the first scales."""

    images: int = Field(gt=0)
    name: str | None = None
    digest: Sha256 | None = Field(None, description="Of the subset's file; none where the recipe names none")


class ModelCard(Strict):
    """The network; `names` are its classes in the order of the output's score rows."""

    family: str
    architecture: str
    task: str = "detect"
    names: tuple[str, ...] = Field(min_length=1)
    strides: tuple[int, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...] = Field(
        (), description="Widths and heights in pixels for each stride; none where the head has no anchors"
    )
    imgsz: int = Field(gt=0)
    parameters: int | None = None


class Preprocessing(Strict):
    """How an image becomes the engine's input: scaled so that its longer side is `imgsz`, padded, `pixel * scale`."""

    input_name: str = "images"
    letterbox: Literal["rect", "square"] = Field(
        description="As validated: padded to multiples of the largest stride (with half of one more), or to a square"
    )
    enlarge: str = "bilinear"
    shrink: str = "area"
    pad_value: int = 114
    color: Literal["RGB", "BGR"] = "RGB"
    scale: float = 1 / 255
    dtype: str = "float32"
    layout: str = "NCHW"


class Postprocessing(Strict):
    """How the engine's output becomes detections: scores above `conf`, non-maximum suppression within classes.

    An engine with a `raw_head` gives raw maps instead of `output_name`; the keys say what they become first.
    """

    output_name: str = "output0"
    layout: str = "[N, 4 + nc, A]"
    boxes: str = "xywh in pixels of the network input"
    conf: float
    iou: float
    max_det: int
    multi_label: bool


class RawHead(Strict):
    """How the raw maps of an engine become boxes: by anchors, or by distributions over `bins` distances."""

    strides: tuple[int, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...] = ()
    bins: int = 0


class EngineEntry(Strict):
    """One engine; `path` is its file, or the folder that holds its files."""

    view: str
    path: RelativePath
    format: str
    scheme: str
    storage: str | None = None
    precision_hint: str | None = None
    min_runtime_version: str | None = None
    digest: Sha256 | None = Field(None, description="Of the file, or of its folder's files by path as canonical JSON")
    size_bytes: int | None = None
    validated_with: dict[str, str] = Field(default_factory=dict, description="The runtime and its version")
    validated_on: dict[str, Sha256] = Field(default_factory=dict, description="Digest of the data")
    raw_head: RawHead | None = None
    metrics: dict[str, float] = Field(default_factory=dict)


class GateEntry(Strict):
    """One gate of the recipe and what was observed."""

    view: str
    metric: str
    op: str
    bound: float
    relative_to: str | None = None
    mode: str | None = None
    confidence: float | None = None
    observed: float | None = None
    reference: float | None = None
    value: float | None = None
    passed: bool
    reason: str | None = None
    at_confidence: float | None = None
    missed_by: float | None = None


class FileEntry(Strict):
    """One file of the release."""

    path: RelativePath
    sha256: Sha256
    size_bytes: int = Field(ge=0)


class ReleaseInfo(Strict):
    """What the builder of a release knows; the list of files is added when they are copied."""

    name: str
    version: str
    created_with: CreatedWith
    recipe: RecipeRef
    lineage: tuple[LineageEntry, ...]
    model: ModelCard
    datasets: dict[str, Sha256]
    calibration: Calibration | None = None
    preprocessing: Preprocessing
    postprocessing: Postprocessing
    engines: tuple[EngineEntry, ...] = Field(min_length=1)
    gates: tuple[GateEntry, ...]
    licenses: dict[str, str]
    varying: tuple[RelativePath, ...] = Field(
        (), description="Files that another build of the same inputs writes with other bytes: times are in them"
    )


class Manifest(ReleaseInfo):
    """The whole content of `manifest.json`, apart from the digest that it carries of itself."""

    schema_version: Literal[1] = SCHEMA_VERSION
    files: tuple[FileEntry, ...]

    @model_validator(mode="after")
    def _files_are_consistent(self) -> Self:
        check_unique(file.path for file in self.files)
        by_path = {file.path: file for file in self.files}
        for name in (MANIFEST_NAME, SIGNATURE_NAME):
            if name in by_path:
                raise ValueError(f"the list of files holds {name} itself")
        recipe = by_path.get(self.recipe.path)
        if recipe is None or recipe.sha256 != self.recipe.sha256:
            raise ValueError(f"the recipe {self.recipe.path!r} is not among the files with its digest")
        for engine in self.engines:
            inside = engine.path + "/"
            if engine.path not in by_path and not any(path.startswith(inside) for path in by_path):
                raise ValueError(f"the engine {engine.path!r} is not among the files")
        return self


def check_unique(paths: Iterable[str]) -> None:
    """Refuse paths that are the same file on some system, such as one that ignores case.

    Raises:
        ValueError: Two paths are equal, or one is also the folder of another.
    """
    seen: set[str] = set()
    folders: set[str] = set()
    for path in paths:
        folded = path.casefold()
        if folded in seen:
            raise ValueError(f"the path {path!r} is listed twice")
        seen.add(folded)
        parts = folded.split("/")
        folders.update("/".join(parts[:end]) for end in range(1, len(parts)))
    if clash := sorted(seen & folders):
        raise ValueError(f"the path {clash[0]!r} is listed both as a file and as a folder")


def manifest_schema() -> dict[str, Any]:
    """JSON Schema of `manifest.json`."""
    schema = Manifest.model_json_schema()
    digest = {"type": "string", "pattern": "^[0-9a-f]{64}$", "description": "SHA-256 of the rest as canonical JSON"}
    schema["properties"]["digest"] = digest
    for key in ("digest", "schema_version"):
        if key not in schema["required"]:
            schema["required"].append(key)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def manifest_to_text(manifest: Manifest) -> str:
    """Write a manifest as canonical JSON that carries, under `digest`, the SHA-256 of all the rest.

    The digest lets `verify` tell a damaged manifest from a sound one; it is no signature.
    """
    body = manifest.model_dump(mode="json")
    return canonical_json(body | {"digest": sha256_json(body)})


def manifest_from_json(body: dict[str, Any]) -> Manifest:
    """Read the parsed object of `manifest.json`, without its `digest`.

    Raises:
        IntegrityError: A key is missing, surplus or has a wrong value.
    """
    try:
        return Manifest.model_validate_json(canonical_json(body))
    except ValidationError as error:
        raise IntegrityError(f"{MANIFEST_NAME} is not valid: {validation_message(error)}.") from error
