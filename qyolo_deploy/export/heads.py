"""The pass that lets a graph end at the raw head maps, for runners that decode candidates alone."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import fx

from qyolo_deploy.engines.heads import METADATA_KEY, head_metadata
from qyolo_deploy.errors import InputError
from qyolo_deploy.graph.simulate import View

HEAD_OUTPUT = "head{}"


def expose_heads(model: ir.Model, view: View) -> ir.Model:
    """Makes the raw head maps the outputs; the model is left as it is.

    Requires that every map is the output of a named module. Ensures that the outputs are `head0`, `head1`, ... in
    the order in which the decode takes them, that the decode is gone, and that the metadata `raw_head` tell what the
    maps mean.

    Args:
        model: From `export_float`.
        view: What it was exported from.

    Raises:
        InputError: If a map is not in the graph.
    """
    exposed = model.clone()
    values = {value.name: value for node in exposed.graph for value in node.outputs}
    outputs = []
    for index, name in enumerate(_map_names(view)):
        if name not in values:
            raise InputError(f"the exported graph has no head map '{name}'")
        # A node of its own, as the map keeps the name by which its quantization is found.
        passed = ir.node("Identity", [values[name]], num_outputs=1)
        outputs.append(passed.outputs[0])
        outputs[-1].name = HEAD_OUTPUT.format(index)
        outputs[-1].type, outputs[-1].shape = values[name].type, values[name].shape
        exposed.graph.append(passed)
    exposed.graph.outputs[:] = outputs
    RemoveUnusedNodesPass()(exposed)
    exposed.metadata_props[METADATA_KEY] = head_metadata(view.decode.describe())  # type: ignore[operator]
    return exposed


def _map_names(view: View) -> list[str]:
    """Names of the modules whose outputs are the raw maps."""
    assert isinstance(view.core, fx.GraphModule)
    (maps,) = view.core.graph.output_node().args
    return [str(node.target) for node in maps]  # type: ignore[union-attr]
