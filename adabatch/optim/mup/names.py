"""Names of parameters without those of wrappers: DDP, FSDP2, ``torch.compile`` and checkpoint wrappers."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from adabatch.arguments import checked

INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names of the inner module in ``torch.compile``, activation checkpointing and FSDP1, anywhere in a model."""

AROUND = (*INSIDE, "module")
"""The same for wrappers around a whole model: DDP, DataParallel, AveragedModel, DeepSpeed's engine."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers around the whole of it.

    A wrapper is recognized by its contents: no parameter of its own, and one child with the name of a wrapped module. A
    model whose only part is called ``module`` looks the same, and loses that part of its names with and without a
    wrapper.
    """
    while (inner := _inner(model, AROUND)) is not None:
        model = inner
    return model


@checked
def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name; a module with two names comes twice."""
    yield from _below("", unwrapped(model))


@checked
def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name, each once, under its first name."""
    return {names[0]: parameter for names, parameter in all_names(model)}


def all_names(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Parameter]]:
    """Each parameter with all its names, of which tied weights have more than one."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for prefix, module in named_modules(model):
        # Not by named_parameters(), which keeps the names of wrappers, and leaves out the second name of a tied weight.
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), ([], parameter))[0].append(full_name(prefix, key))
    return [(tuple(names), parameter) for names, parameter in found.values()]


def full_name(prefix: str, key: str) -> str:
    """The full name of ``key`` in a module."""
    return f"{prefix}.{key}" if prefix else key


def _below(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    while (inner := _inner(module, INSIDE)) is not None:
        module = inner
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from _below(full_name(name, key), child)


def _inner(module: nn.Module, names: Collection[str]) -> nn.Module | None:
    """The module inside a wrapper; None for a module that is not a wrapper."""
    children = [(key, child) for key, child in module._modules.items() if child is not None]
    if len(children) != 1 or module._parameters or children[0][0] not in names:
        return None
    return children[0][1]
