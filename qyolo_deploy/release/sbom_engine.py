"""Adding an engine to a bill of materials that is there already, where the library that made it is not."""

import json
import uuid
from typing import Any, Final

from qyolo_deploy.errors import IntegrityError
from qyolo_deploy.release.manifest import EngineEntry

SBOM_NAME: Final = "sbom.cdx.json"
_FACTS = ("path", "scheme", "storage", "digest")


def with_engine(text: str, entry: EngineEntry) -> str:
    """A CycloneDX text with one more engine, or with another one of that view.

    Args:
        text: What `sbom_text` made.
        entry: The engine's in the manifest; its licence is the model's.

    Raises:
        IntegrityError: The text is no bill of materials of ours.
    """
    reference = f"engine:{entry.view}"
    facts = {key: getattr(entry, key) for key in _FACTS}
    component: dict[str, Any] = {
        "bom-ref": reference,
        "name": f"{entry.view} engine",
        "properties": [{"name": f"qyolo:{key}", "value": str(value)} for key, value in sorted(facts.items()) if value],
        "type": "machine-learning-model",
    }
    try:
        body: dict[str, Any] = json.loads(text)
        component["licenses"] = body["metadata"]["component"]["licenses"]
        others = [one for one in body["components"] if one.get("bom-ref") != reference]
        body["components"] = [*others, component]
        body["dependencies"] = [one for one in body["dependencies"] if one["ref"] != reference] + [{"ref": reference}]
        model = next(one for one in body["dependencies"] if one["ref"] == "model")
        model["dependsOn"] = sorted({*model.get("dependsOn", ()), reference})
        earlier = uuid.UUID(body["serialNumber"].removeprefix("urn:uuid:"))
    except (ValueError, KeyError, TypeError, StopIteration, AttributeError) as error:
        raise IntegrityError(f"{SBOM_NAME} is no bill of materials of a release.") from error
    body["serialNumber"] = uuid.uuid5(earlier, str(entry.digest)).urn
    return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
