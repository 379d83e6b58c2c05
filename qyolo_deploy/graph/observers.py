"""Start values for scales and offsets of a whole model."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qyolo_deploy.graph.fake_quantize import Quantizer
from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.graph.ranges import Sample, grid_of, observe, search_range

OUTPUT_SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3)


@torch.no_grad()
def calibrate(
    model: PreparedModel,
    batches: Iterable[Tensor],
    progress: Callable[[], None] | None = None,
    observer: str = "mse",
) -> None:
    """Sets every scale and offset: weights from themselves, activations from what the float network computes.

    Args:
        model: From `prepare`.
        batches: float32 `[N, 3, H, W]` in 0..1, from the training split.
        progress: Called after each batch.
        observer: See `observe`; weights are always searched for the least squared error.
    """
    model.eval()
    samples = _observe(model, batches, progress)
    # Below -8 SiLU is flat: a range that reaches as far down as its input does wastes most of the grid.
    silu_inputs = model.placement.inner & set(model.convs())
    gates = {name for name in model.placement.inner if name.endswith(".sigmoid")}
    for group, quantizer in model.quantizers().items():
        if group in gates:
            _span_sigmoid(quantizer)
            continue
        seen_as = F.silu if group in silu_inputs else None
        if not quantizer.spec.signed and not quantizer.offset.requires_grad:
            samples[group].cut_below_zero()
        _set(quantizer, *observe(observer, samples[group], quantizer.spec, seen_as))
    for conv in model.convs().values():
        if conv.quantizer is not None:
            _calibrate_weight(conv.weight, conv.quantizer)


@torch.no_grad()
def refine_outputs(
    model: PreparedModel,
    images: Tensor,
    decode: Callable[[Sequence[Tensor]], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Shrinks the ranges of the raw head maps as far as detections gain by it.

    A head map mixes box offsets with scores whose logits reach far below anything that is ever detected; the least
    squared error spends the grid on those.

    Args:
        model: Calibrated.
        images: float32 `[N, 3, H, W]` in 0..1, from the training split.
        decode: Raw head maps to detections.
        loss: How much detections (first) differ from those of the exact maps (second).
    """
    model.set_activations(False)
    model.set_weights(False)
    maps = model(images)
    exact = decode(maps)
    model.set_activations(True)
    model.set_weights(True)
    for index, quantizer in enumerate(model.output_quantizers()):
        if quantizer is None:
            continue
        # Zero belongs to every grid, also where all scores of a level lie below it.
        low, high = maps[index].amin().clamp_max(0), maps[index].amax().clamp_min(0)
        shrunk = [1.0, 1.0]  # shares of the low and of the high end
        for end in (0, 1):
            losses = {}
            for share in OUTPUT_SHARES:
                shrunk[end] = share
                _set(quantizer, *grid_of(low * shrunk[0], high * shrunk[1], quantizer.spec))
                rounded = quantizer(maps[index])
                losses[share] = loss(decode((*maps[:index], rounded, *maps[index + 1 :])), exact).item()
            shrunk[end] = min(losses, key=losses.__getitem__)
        _set(quantizer, *grid_of(low * shrunk[0], high * shrunk[1], quantizer.spec))


def _observe(model: PreparedModel, batches: Iterable[Tensor], progress: Callable[[], None] | None) -> dict[str, Sample]:
    samples = {group: Sample() for group in model.quantizers()}
    generator = torch.Generator().manual_seed(0)

    def hook_of(group: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: samples[group].add(inputs[0], generator)

    handles = [quantizer.register_forward_pre_hook(hook_of(group)) for group, quantizer in model.quantizers().items()]
    model.set_activations(False)
    model.set_weights(False)
    try:
        for images in batches:
            model(images)
            if progress is not None:
                progress()
    finally:
        for handle in handles:
            handle.remove()
        model.set_activations(True)
        model.set_weights(True)
    return samples


@torch.no_grad()
def _span_sigmoid(quantizer: Quantizer) -> None:
    """The whole of 0..1 (but for the last step), for good: a runtime that fuses SiLU clips none of the sigmoid.

    In steps of a power of two, so that the sigmoid of 0 is a level and not a tie that each runtime breaks otherwise.
    """
    _set(quantizer, torch.tensor([2.0**-quantizer.spec.bits]), torch.zeros(1))
    quantizer.scale.requires_grad_(False)
    quantizer.offset.requires_grad_(False)


@torch.no_grad()
def _calibrate_weight(weight: Tensor, quantizer: Quantizer) -> None:
    rows = weight.flatten()[None] if quantizer.spec.granularity == "per_tensor" else weight.flatten(1)
    limit = rows.abs().amax(1)
    _set(quantizer, *search_range(rows, -limit, limit, quantizer.spec))


@torch.no_grad()
def _set(quantizer: Quantizer, scale: Tensor, offset: Tensor) -> None:
    quantizer.scale.copy_(scale.reshape(quantizer.scale.shape))
    quantizer.offset.copy_(offset.reshape(quantizer.scale.shape))
