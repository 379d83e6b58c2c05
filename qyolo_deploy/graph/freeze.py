"""Ends learning: folds a prepared model into a `QuantizedModel` of integers."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qyolo_deploy.graph.fake_quantize import Quantizer, zero_point_of
from qyolo_deploy.graph.layers import QuantConv
from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.quant.model import QuantizedLayer, QuantizedModel, quantize_bias
from qyolo_deploy.quant.qparams import QParams

# A bias of this many steps still leaves the int32 accumulator room for the products.
_BIAS_ROOM = float(2**30)


def freeze(model: PreparedModel, lineage: Mapping[str, str]) -> QuantizedModel:
    """Folds batch normalisation, gain and shift into per-channel scales and int32 biases.

    The factor behind a convolution is positive by construction, so the integers of the trained weights stay as they
    are: `scale[c] = s_w * gain[c] * gamma[c] / sqrt(var[c] + eps)` (Gupta and Asthana, 2311.05109, section 3).

    Args:
        model: A calibrated or trained model.
        lineage: Digests of what the model was made from.
    """
    activations = {
        name: activation_qparams(model.quantizers()[group]) for name, group in model.placement.groups.items()
    }
    layers, floats = {}, {}
    for name, conv in model.convs().items():
        if conv.quantizer is None:
            weight, bias = _fold_float(conv)
            floats[f"{name}.weight"], floats[f"{name}.bias"] = weight, bias
        else:
            source = model.placement.inputs[name]
            layers[name] = _fold(conv, conv.quantizer, source, activations[source])
    return QuantizedModel(model.spec.to_json(), layers, activations, floats, model.scheme.label, dict(lineage))


def activation_qparams(quantizer: Quantizer) -> QParams:
    """Scale and zero point of an activation quantizer as numpy.

    Codes are unsigned, also of a grid around 0, whose zero point is the middle one: runtimes on CPUs are slow with
    signed activations, and TensorRT's int8 has the same values.
    """
    spec = quantizer.spec
    if spec.signed:
        return QParams.of(replace(spec, signed=False), _numpy(quantizer.scale), -spec.qmin)
    zero_point = zero_point_of(quantizer.scale, quantizer.offset, spec.qmin, spec.qmax)
    return QParams.of(spec, _numpy(quantizer.scale), _numpy(zero_point))


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().cpu().float().numpy()


def fold_affine(conv: QuantConv) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Factor and bias, float64 `[C_out]`, that stand for normalisation, gain and shift behind the convolution."""
    value = {key: tensor.detach().double().cpu().numpy() for key, tensor in conv.state_dict().items()}
    gain = np.exp(value["log_gain"])
    if not conv.has_norm:
        return gain, gain * value["beta"] + value["shift"]
    slope = value["gamma"] / np.sqrt(value["var"] + conv.eps)
    return slope * gain, value["beta"] + (value["shift"] - value["mean"]) * slope


def _fold_float(conv: QuantConv) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    factor, bias = fold_affine(conv)
    weight = conv.weight.detach().double().cpu().numpy() * factor[:, None, None, None]
    return weight.astype(np.float32), bias.astype(np.float32)


def _fold(conv: QuantConv, quantizer: Quantizer, source: str, source_qparams: QParams) -> QuantizedLayer:
    spec = quantizer.spec
    channels = len(conv.weight)
    learned = QParams.of(spec, _numpy(quantizer.scale))
    integers = learned.quantize(_numpy(conv.weight))
    factor, bias = fold_affine(conv)
    scale = np.broadcast_to(learned.scale.astype(np.float64), (channels,)) * factor
    # A dead channel (factor near zero) would need a bias beyond int32: its weights become 0 on a coarser grid.
    floor = np.abs(bias) / (float(source_qparams.scale) * _BIAS_ROOM)
    dead = scale < floor
    coarse = floor * 2
    integers[dead] = np.rint(integers[dead] * (scale[dead] / coarse[dead])[:, None, None, None])
    scale = np.maximum(np.where(dead, coarse, scale), np.finfo(np.float32).tiny).astype(np.float32)
    per_channel = replace(spec, granularity="per_channel", axis=0)
    return QuantizedLayer(
        weight=integers.astype(np.int8),
        qparams=QParams.of(per_channel, scale),
        bias=quantize_bias(bias, np.asarray(source_qparams.scale * scale, np.float32)),
        input=source,
    )
