"""Which module accounts for which parameters, and which modules do not allow per-example gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parametrize

from adabatch.runtime.per_example.rules import BATCH_NORMS, RULES, Rule
from adabatch.runtime.wrappers.fsdp2 import class_of


@dataclass(frozen=True)
class Site:
    """A module that accounts for parameters, by a rule or by replay.

    Args:
        name: the module's name in the model.
        module: the module.
        names: the names, in the module, of the parameters that it accounts for.
        rule: its rule; None for replay.
    """

    name: str
    module: nn.Module
    names: tuple[str, ...]
    rule: Rule | None

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__})"

    def key(self, own: str) -> str:
        """The name in the model of the parameter that is called ``own`` in the module."""
        return f"{self.name}.{own}" if self.name else own


def find_sites(model: nn.Module, rules: Mapping[type[nn.Module], Rule]) -> tuple[Site, ...]:
    """The modules that account for the model's parameters, each listed once even if it appears twice in the model.

    A module accounts for its own parameters and for those in its parameter lists, which are never called. Attention and
    parametrized modules use their children's parameters without calling the children, so they account for those too.

    Args:
        model: the model.
        rules: the user's rules, which take precedence.
    """
    return tuple(_visit(model, "", rules, set()))


def _visit(module: nn.Module, name: str, rules: Mapping[type[nn.Module], Rule], seen: set[nn.Module]) -> Iterator[Site]:
    if module in seen:
        return
    seen.add(module)
    is_whole = isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module)
    names = [own for own, _ in module.named_parameters(recurse=is_whole)]
    children = [] if is_whole else list(module.named_children())
    for own, child in children:
        if isinstance(child, nn.ParameterList | nn.ParameterDict):
            names += [f"{own}.{inner}" for inner, _ in child.named_parameters()]
    if names:
        # A module with further parameters computes something else than its class does.
        known = RULES.get(class_of(module)) if set(names) <= {"weight", "bias"} else None
        yield Site(name, module, tuple(names), rules.get(class_of(module), known))
    for own, child in children:
        if not isinstance(child, nn.ParameterList | nn.ParameterDict):
            yield from _visit(child, f"{name}.{own}" if name else own, rules, seen)


def refuse_coupled(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raises if a module couples examples, or if its replay would draw other random numbers than the step."""
    for name, module in model.named_modules():
        reason = _coupling(module)
        if reason is not None:
            raise ValueError(f"no per-example gradients through {name or 'the model'}: {reason}")
    for site in sites:
        # Frozen parameters need no replay.
        if site.rule is not None or not any(site.module.get_parameter(own).requires_grad for own in site.names):
            continue
        if isinstance(site.module, FSDPModule):
            raise ValueError(
                f"no per-example gradients through {site}: it has no rule, so it would run again, and fully_shard was "
                f"applied to it, which a second run would disturb. Move the parameters {', '.join(site.names)} to a "
                f"module of their own, or pass a rule for it"
            )
        source = _randomness(site.module)
        if source is not None:
            raise ValueError(
                f"no per-example gradients through {site}: it has no rule, so it would run again, and "
                f"{source} in it would draw other random numbers than the step did. Set its probability to "
                f"0, or move the parameters {', '.join(site.names)} to a module of their own"
            )


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _coupling(module: nn.Module) -> str | None:
    """Why an example's gradient would depend on other examples, and what to do; None if it would not."""
    kind = type(module).__name__
    if isinstance(module, BATCH_NORMS) and (module.training or module.running_mean is None):
        return (
            f"{kind} normalises by statistics of the whole batch. Use GroupNorm or LayerNorm, put it in "
            "evaluation mode, or use the norm test from micro-batches"
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq:
        return (
            f"{kind}(scale_grad_by_freq=True) divides by counts over the whole batch. Switch it off, or use "
            "the norm test from micro-batches"
        )
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and not module.batch_first:
        return (
            f"{kind}(batch_first=False) does not have its examples along the first dimension. Build it with "
            "batch_first=True"
        )
    return None


def _randomness(module: nn.Module) -> str | None:
    """The first module in ``module``, including itself, that draws random numbers in its present mode."""
    for name, inner in module.named_modules():
        draws = (
            (isinstance(inner, _DROPOUTS) and inner.p > 0)
            or (isinstance(inner, nn.MultiheadAttention | nn.RNNBase) and inner.dropout > 0)
            or isinstance(inner, nn.RReLU)
        )
        if draws and inner.training:
            return f"{type(inner).__name__} {name}".rstrip()
    return None
