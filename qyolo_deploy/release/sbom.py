"""What a release is made of, as a CycloneDX 1.6 bill of materials: model, engines, data, libraries, licences.

Nothing random or timed is in it: the serial number comes from the digests of the model and the engines.
"""

import importlib.metadata
import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from cyclonedx.factory.license import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.release.manifest import EngineEntry, ReleaseInfo

_MODEL = "model.safetensors"
RUNNING: Final = (
    *("numpy", "onnxruntime", "openvino", "pycocotools", "faster-coco-eval", "opencv-python", "safetensors"),
    *("pydantic", "typer", "rich", "PyYAML"),
)
BUILDING: Final = (
    *("torch", "ultralytics", "onnx", "onnx-ir", "onnxsim", "jinja2", "matplotlib"),
    "cyclonedx-python-lib",
)


def sbom_text(info: ReleaseInfo, files: Mapping[str, Path | bytes]) -> str:
    """The bill of materials of a release that is about to be written.

    Args:
        info: What its manifest says.
        files: Its files by path, the model among them.

    Returns:
        JSON text.
    """
    licenses = LicenseFactory()
    own = [licenses.make_from_string(info.licenses["model"])]
    source = files[_MODEL]
    digest = sha256_file(source) if isinstance(source, Path) else None
    model = Component(
        name=info.name,
        version=info.version,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        description=f"{info.model.architecture}, {len(info.model.names)} classes, {info.model.imgsz} px",
        hashes=_hashes(digest),
        licenses=own,
    )
    engines = [_engine(entry, own) for entry in info.engines]
    data = [_data(split, digest) for split, digest in sorted(info.datasets.items())]
    libraries = _libraries(licenses)
    bom = Bom(components=[*engines, *data, *libraries.values()])
    bom.metadata.component = model
    bom.register_dependency(model, [*engines, *data])
    for entry, component in zip(info.engines, engines, strict=True):
        bom.register_dependency(component, [libraries[n] for n in sorted(set(entry.validated_with) & set(libraries))])
    digests = [digest, *(entry.digest for entry in info.engines)]
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, f"{info.name}/{info.version}/{digests}")
    body: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    del body["metadata"]["timestamp"]
    return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _engine(entry: EngineEntry, licenses: Iterable[Any]) -> Component:
    facts = {"path": entry.path, "scheme": entry.scheme, "storage": entry.storage, "digest": entry.digest}
    return Component(
        name=f"{entry.view} engine",
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=f"engine:{entry.view}",
        hashes=_hashes(entry.digest if entry.format == "onnx" else None),
        licenses=licenses,
        properties=[Property(name=f"qyolo:{key}", value=str(value)) for key, value in facts.items() if value],
    )


def _data(split: str, digest: str) -> Component:
    # The digest is of a listing of images and annotations, so that it is no hash of one file.
    facts = [Property(name="qyolo:digest", value=digest)]
    return Component(name=f"{split} split", type=ComponentType.DATA, bom_ref=f"data:{split}", properties=facts)


def _hashes(digest: str | None) -> list[HashType]:
    return [] if digest is None else [HashType(alg=HashAlgorithm.SHA_256, content=digest)]


def _libraries(licenses: LicenseFactory) -> dict[str, Component]:
    """What the package asks for and is installed here: to run engines required, only to build them excluded."""
    found: dict[str, Component] = {}
    required = dict.fromkeys(RUNNING, ComponentScope.REQUIRED)
    for name, scope in sorted((dict.fromkeys(BUILDING, ComponentScope.EXCLUDED) | required).items()):
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        told = _license(distribution.metadata)
        version = distribution.version
        found[name] = Component(
            name=name,
            version=version,
            type=ComponentType.LIBRARY,
            bom_ref=f"pypi:{name}",
            scope=scope,
            purl=PackageURL("pypi", None, name.lower().replace("_", "-"), version.partition("+")[0]),
            licenses=[licenses.make_from_string(told)] if told else [],
        )
    return found


def _license(metadata: Any) -> str | None:
    """A licence expression, or the name that a package's classifiers or its short field tell."""
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classified = [
        c.rsplit(" :: ", 1)[1] for c in metadata.get_all("Classifier") or () if c.startswith("License :: OSI")
    ]
    if classified:
        return str(classified[0])
    short = str(metadata.get("License") or "").strip()
    return short if short and "\n" not in short and len(short) < 60 else None
