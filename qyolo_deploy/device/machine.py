"""What an engine runs on here, in the words of the golden vectors."""

import platform

from qyolo_deploy.artifact import cpu_abilities, cpu_model, package_versions
from qyolo_deploy.release.golden import Machine


def describe_machine(runtime: str) -> Machine:
    """This machine and the installed version of a runtime, such as `onnxruntime`."""
    return Machine(
        runtime=runtime,
        version=package_versions([runtime]).get(runtime, ""),
        machine=platform.machine(),
        cpu=cpu_model(),
        abilities=cpu_abilities(),
    )
