"""Traces a detector's core into an `fx.GraphModule` in which every operation that matters is a named module."""

import operator
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Any

import torch
from torch import fx, nn

from qyolo_deploy.errors import InputError
from qyolo_deploy.graph.ops import REARRANGING, Add, Concat, Mul, Rearrange, call_name

_SPLITS = {"chunk", "split"}
INPUT = "images"


class _SizedProxy(fx.Proxy):
    """A proxy whose split results have a length, so that the loops of C2f and its successors unroll."""

    def __len__(self) -> int:
        length = _split_length(self.node)
        if length is None:
            return int(super().__len__())
        return length

    def __iter__(self) -> Iterator[fx.Proxy]:
        length = _split_length(self.node)
        return (
            super().__iter__() if length is None else iter([operator.getitem(self, index) for index in range(length)])
        )


def _split_length(node: fx.Node) -> int | None:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name not in _SPLITS or len(node.args) < 2:
        return None
    sections = node.args[1]
    if isinstance(sections, list | tuple):
        return len(sections)
    return sections if name == "chunk" and isinstance(sections, int) else None


class _Tracer(fx.Tracer):
    """Keeps torch.nn modules as leaves and goes through everything else."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _SizedProxy(node, self)


def trace(core: nn.Module) -> fx.GraphModule:
    """Traces a float network in evaluation mode.

    Args:
        core: float32 `[N, 3, H, W]` to a tuple of raw head maps.

    Returns:
        A graph of module calls. Every call has a module of its own, whose path names the tensor it makes:
        convolution and batch normalisation are still two modules, SiLU is a Sigmoid and a Mul.

    Raises:
        InputError: If the network cannot be traced.
    """
    try:
        graph = _Tracer().trace(core)
    except (fx.proxy.TraceError, TypeError) as error:
        raise InputError(f"the architecture cannot be traced: {error}") from error
    traced = fx.GraphModule(core, graph)
    _drop_identities(traced)
    _name_calls(traced)
    _split_silu(traced)
    traced.graph.lint()
    traced.recompile()
    return traced


def _drop_identities(traced: fx.GraphModule) -> None:
    """What does nothing in evaluation mode makes no tensor of its own; no exported graph has it."""
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], nn.Identity | nn.Dropout):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _scope(node: fx.Node) -> str:
    """Path of the module whose forward made the node."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths else ""


def _name_calls(traced: fx.GraphModule) -> None:
    """Gives each call a module of its own; shared ones (SiLU, pools) are replaced by clones named after their place."""
    seen: set[str] = set()
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            node.name = node.target = INPUT
        elif node.op == "call_method" and _is_read_by_conv(node, modules):
            name = _unused(_join(_scope(node), str(node.target)), seen)
            _call(traced, node, name, Rearrange(str(node.target)), node.args)
        elif node.op == "call_function" and (module := _as_module(node)) is not None:
            kind = type(module).__name__.lower()
            _call(traced, node, _unused(f"{_join(_scope(node), kind)}", seen), module, _tensor_args(node))
        elif node.op == "call_module":
            module = modules[node.target]
            if not any(True for _ in module.parameters()):
                place = _place_of(node)
                _call(traced, node, _unused(place, seen), copy(module), node.args)
        seen.add(str(node.target))


def _is_read_by_conv(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a convolution reads what a method rearranges: it quantizes its input, and for that needs its name."""
    name = call_name(node)
    if name not in REARRANGING or name == "contiguous" or node.kwargs:
        return False
    readers = [
        user for reader in node.users for user in (reader.users if call_name(reader) == "contiguous" else [reader])
    ]
    return any(isinstance(modules.get(str(reader.target)), nn.Conv2d) for reader in readers)


def _place_of(node: fx.Node) -> str:
    """Where a leaf is called: its own path, or that of its caller's if it is one instance used all over (SiLU)."""
    target = str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]  # the last entry is the leaf itself
    caller = paths[-2] if len(paths) > 1 else ""
    return target if target.startswith(caller) else _join(caller, target.rsplit(".", 1)[-1])


def _join(scope: str, name: str) -> str:
    return f"{scope}.{name}" if scope else name


def _unused(name: str, seen: set[str]) -> str:
    candidate, count = name, 0
    while candidate in seen:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _as_module(node: fx.Node) -> nn.Module | None:
    makers: dict[Callable[..., Any], Callable[[], nn.Module | None]] = {
        operator.add: lambda: Add() if _two_tensors(node) else None,
        torch.add: lambda: Add() if _two_tensors(node) else None,
        torch.cat: lambda: Concat(_cat_dim(node)),
    }
    maker = makers.get(node.target) if callable(node.target) else None
    return maker() if maker else None


def _two_tensors(node: fx.Node) -> bool:
    return len(node.args) == 2 and all(isinstance(argument, fx.Node) for argument in node.args)


def _cat_dim(node: fx.Node) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim


def _tensor_args(node: fx.Node) -> tuple[Any, ...]:
    first = node.args[0]
    return tuple(first) if isinstance(first, list | tuple) else node.args


def _call(traced: fx.GraphModule, node: fx.Node, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    """Turns a node into the call of a new module."""
    traced.add_submodule(name, module)
    node.op, node.target, node.args, node.kwargs = "call_module", name, args, {}


def _split_silu(traced: fx.GraphModule) -> None:
    """SiLU becomes `x * sigmoid(x)`: ONNX has no SiLU below opset 24, and runtimes quantize the two halves apart."""
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.SiLU):
            continue
        name = str(node.target)
        traced.add_submodule(name, nn.Module())
        traced.add_submodule(f"{name}.sigmoid", nn.Sigmoid())
        with traced.graph.inserting_before(node):
            gate = traced.graph.call_module(f"{name}.sigmoid", (node.args[0],))
        _call(traced, node, f"{name}.mul", Mul(), (node.args[0], gate))
