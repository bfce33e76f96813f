"""K-FAC: natural-gradient steps with a Kronecker-factored curvature, from per-example gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from adabatch.arguments import MOST_STEPS, checked, require, whole
from adabatch.optim.kfac import averages, curvature, inversion
from adabatch.optim.kfac.averages import WatchedLayer
from adabatch.optim.kfac.capture import Capture, Sample
from adabatch.optim.kfac.checks import check_factors, check_products, check_step, plain_groups, refuse_zeros
from adabatch.optim.kfac.clock import Intervals, StepCounts
from adabatch.optim.kfac.curvature import Fisher, Likelihood
from adabatch.optim.kfac.damping import DampingForm, DampingName, Factor, FactorPair, form_of
from adabatch.optim.kfac.first_order import Others, update_others
from adabatch.optim.kfac.inversion import Exponents, FactorBlock, Inversion
from adabatch.optim.kfac.survey import Survey, split_groups, survey
from adabatch.optim.kfac.whitening import Whitening
from adabatch.optim.mup.guard import check_ratios
from adabatch.optim.placement import Alone, Owner, Reduce, check_in_place
from adabatch.optim.products import check_bfloat16


class KFAC(Optimizer):
    r"""K-FAC with factors from per-example gradients, and a damping that suits every width.

    For the weight of a layer with inputs ``h``, per-example gradients ``delta`` at its output, and the gradient ``G``,
    each step computes

        A = mean of h h^T over examples and positions
        B = mean over examples of the sum of delta delta^T over positions
        D = (B + rho_B)^-e_B  G  (A + rho_A)^-e_A            rho_A = damping tr A,  rho_B = damping tr B
        v <- momentum v + D
        w <- (1 - lr weight_decay) w - lr v

    A bias is a separate block with A = 1: ``(B + rho_B)^-e_B g``. (If it were appended to the weight as another input,
    it would stop learning as the width grows.)

    The loop passes the model's outputs to the optimizer before the backward of the loss:

        outputs = model(x)
        optimizer.observe(outputs)            # another backward to the layers' outputs if factors are due
        loss_fn(outputs, y).backward()
        optimizer.step()

    *Per-example factors.* Cotangents that are summed over the examples are propagated from the outputs back to each
    layer. So B does not depend on the mean in the loss, on accumulation, on a loss scale or on the number of ranks, and
    a step does not depend on how a batch is divided, except for what is drawn. (Computed from the gradient of a mean
    loss, B would fall with the square of the batch size, and the step would grow with it.) Call ``observe`` in each
    micro-batch; the sums are pooled at ``step``.

    *Width.* The learning rate does not change with width, nor does the damping in units of the trace. The readout needs
    care: it must be small at initialization, and not zero (``adabatch.optim.mup`` sets it).

    Args:
        params: parameters or groups of them; parameters of layers that K-FAC does not take need ``others``. Groups may
            have their own ``lr``, ``damping``, ``momentum`` and ``weight_decay``; a width plan makes such groups.
        model: the module that is called with the inputs, with its wrappers. Its layers get hooks.
        lr: step size. With the default damping and batches of 128 on MNIST, and a rate that falls to zero, 0.03 was
            best at widths 256 and 1,024, and 0.06 at 64. A constant rate should be smaller; with larger batches it can
            be larger (``docs/kfac.md``).
        damping: added to the factors, in the unit of ``damping_form``. It interacts with the learning rate: a direction
            whose curvature is far below the damping moves by lr / damping^2 times its gradient.
        damping_form: "trace" (relative to each factor's trace), "absolute" (scaled by the groups' fan ratios),
            "kronecker" (the same on the product of the factors, in their eigenbasis), "split" (the textbook's, by mean
            eigenvalues; for comparison), or a function of a ``FactorPair`` and the group.
        exponents: powers of the inverse output and input factors, (e_B, e_A); (0, 1) is the input side only.
        fisher: "monte-carlo" draws targets from the model's own likelihood, at one additional backward to the layers'
            outputs; "gauss-newton" is exact, at one backward per class; "empirical" uses the true targets, and diverges
            as the residual vanishes, since its step grows with one over the residual.
        likelihood: the likelihood whose negative logarithm is the loss: "categorical" (cross-entropy) or "gaussian"
            (half the squared error). A constant factor in the loss only changes the unit of the learning rate.
        memory: the memory of the factors' exponential average, in observed examples: after that many, old observations
            have a weight of 1/e. The default is the customary 0.95 per step at a batch of 128 (Martens and Grosse
            2015). With 0 only the last step counts; if it has fewer examples than a layer's width, on one process, the
            matrix to decompose has the size of their number.
        refresh: the longest interval between two computations of the inverses, in examples, so that it adapts to the
            batch. Each interval is a quarter longer than the one before it until then. The default is 64 steps at a
            batch of 128, and every step from 8,192 on. A step that observes, and whose batch differs by more than a
            tenth from the one before, also refreshes.
        warmup_refreshes: number of first steps that all refresh, before the intervals grow.
        observed: examples to observe for each computation of the inverses: those of the last steps before it. If one
            step has more, a random share of each micro-batch is observed. ``math.inf`` observes every example.
        bfloat16_products: compute the products in the factors from bfloat16; averages, inverses and directions stay in
            float32. A factor is then off by at most 1.2 % of its trace, and may have eigenvalues of -0.4 % of it, which
            the default damping of 1 % covers: keep the damping above 0.004. Off by default, since it saves 4 % of a
            step where it was measured, and is slower on CPUs without such instructions (``docs/kfac.md``).
        momentum: heavy-ball factor on the preconditioned direction, in [0, 1).
        weight_decay: coefficient of the decoupled decay.
        kl_clip: the largest sum of ``(lr / (1 - momentum))^2 <D, G>`` in a step, about twice the change of the
            predictions in nats by all the steps that a direction is part of; beyond it the directions are scaled down.
            None does not clip, which diverges at small batches. The default kept every run of
            ``benchmarks/kfac_clip.py`` stable, and cost at most two steps of 28 at batches from 128 to 8,192
            (``benchmarks/LOG.md``); 1e-3 is customary, and better if the batch stays below 64. Under the width plan it
            does not depend on width (a clip of the Euclidean norm would).
        others: "adamw" or "sgd" (with ``momentum``) for the parameters that K-FAC does not take; with None such
            parameters are an error.
        others_lr: the learning rate of ``others``.
        exclude: ``fnmatch`` patterns of the names of layers to leave to ``others``.
        seed: the seed of the drawn targets; each rank and each observation draws different ones.
        reduce: sums a tensor over the ranks that see different data, with the same bits on each; None for one process.
            All ranks call it once at each step that observes.
        owner: decides which rank inverts which layer; by default each rank inverts all.
        allow_zero_weights: accept layers whose weight is all zeros.

    Raises:
        ValueError: if an option is out of its range, if K-FAC cannot take a layer and there are no ``others``, if a
            parameter does not belong to the model, if a weight is all zeros, if "kronecker" is used with other
            exponents or without memory, or if ``bfloat16_products`` is used without memory, with float64 parameters, or
            on a device without bfloat16.
        RuntimeError: at ``step``, if a layer with a gradient has not been observed, or if parameters were replaced
            (DeepSpeed flattens them from ZeRO 1 on: use stage 0, DDP or FSDP2).

    Attributes:
        fallbacks: the number of fallbacks in the layers that this rank inverts, by kind: "float64 inverse", "kept
            inverse" (float64 failed too), "no curvature" (a factor has trace zero, so its layer took no step), "not
            finite" (an observation was skipped).

    Limits: Linear, Conv2d (one group) and Embedding (dense gradients), each weight in one layer. The sizes of factors
    are the squares of a layer's fan-in and fan-out. Not capturable: a step that observes waits for the device once if
    there is a ``reduce``, and a step that refreshes waits twice. Under ``torch.compile``, run steps with ``due``
    eagerly (``torch.compiler.set_stance("force_eager")``). Reentrant activation checkpointing hides the layers; use
    ``use_reentrant=False``.

    State: factors and inverses are in the state of the parameters, whole on every rank.

    Source: Martens and Grosse 2015; Grosse and Martens 2016 (convolutions); Eschenhagen et al. 2023 (positions);
    Ishikawa and Karakida 2024 (exponents and damping across widths); Benzing 2022 (input side only); kl-clip: Ba,
    Grosse and Martens 2017.
    """

    preferred_lr_rule: ClassVar[str] = "sqrt"
    """The default rule by which the learning rate follows the batch."""

    needs_whole_gradients: ClassVar[bool] = True
    """Each step reads the whole gradient matrices of layers."""

    @checked
    def __init__(
        self,
        params: ParamsT,
        model: nn.Module,
        *,
        lr: float | Tensor = 0.03,
        damping: float = 0.01,
        damping_form: DampingName | DampingForm = "trace",
        exponents: tuple[float, float] = (1.0, 1.0),
        fisher: Fisher = "monte-carlo",
        likelihood: Likelihood = "categorical",
        memory: float = 2500,
        refresh: float = 8192,
        warmup_refreshes: int = 10,
        observed: float = 1024,
        bfloat16_products: bool = False,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        kl_clip: float | None = 0.03,
        others: Others | None = None,
        others_lr: float = 1e-3,
        exclude: Sequence[str] = (),
        seed: int = 0,
        reduce: Reduce | None = None,
        owner: Owner | None = None,
        allow_zero_weights: bool = False,
    ) -> None:
        if isinstance(lr, Tensor):
            require(lr.numel() == 1, "lr must be a number or a tensor of one element", lr)
        form = form_of(damping_form)
        self._exponents = Exponents(*exponents)
        check_factors(self._exponents, exact=form is None, memory=memory, refresh=refresh, observed=observed)
        check_products(memory=memory, bfloat16=bfloat16_products)
        check_step(
            momentum=momentum,
            kl_clip=kl_clip,
            others=others,
            lr=float(lr),
            damping=damping,
            weight_decay=weight_decay,
            others_lr=others_lr,
        )
        curvature.check(fisher, likelihood)
        self._fisher: Fisher = fisher
        self._likelihood: Likelihood = likelihood
        seed = whole("seed", seed)
        warmup_refreshes = whole("warmup_refreshes", warmup_refreshes, at_most=MOST_STEPS)
        self._intervals = Intervals(refresh, warmup_refreshes, observed)
        self._memory, self._observed, self._kl_clip = memory, observed, kl_clip
        self._seed, self._reduce, self._bfloat16 = seed, reduce, bfloat16_products
        self._owner: Owner = owner or Alone()
        self._clock = StepCounts()
        self.fallbacks: Counter[str] = Counter()

        found = survey(model, exclude)
        super().__init__(
            split_groups(plain_groups(params), found, others=others, others_lr=others_lr),
            {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay},
        )
        if not allow_zero_weights:
            refuse_zeros(found, self.param_groups, reduce)
        self._layers: list[WatchedLayer] = []
        self._blocks: dict[Tensor, FactorBlock] = {}
        modules = dict(self._take_layers(found, exact=form is None))
        # by cost, since inverting is cubic in a layer's width and the slowest rank sets the time
        self._owner.deal({layer.name: layer.cost for layer in self._layers})
        self._inversion = Inversion(form, self._exponents, self.fallbacks)
        self._whitening = Whitening()
        # Rows save work only on one process: the sum over ranks would be of matrices again.
        self._in_rows = memory == 0 and reduce is None
        # Last, so that an argument that is refused leaves no hook on the model.
        self._capture = Capture(model, modules, due=lambda: self.due, in_rows=self._in_rows, bfloat16=self._bfloat16)

    # --- called by the loop -----------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether the next step needs an observation; in other steps ``observe`` does nothing."""
        return self._intervals.observes(self._clock)

    @property
    def reduces(self) -> bool:
        """Whether the factors are summed over all ranks by ``reduce``."""
        return self._reduce is not None

    def check_ranks(self, num_ranks: int) -> None:
        """Checks that the ranks that train one model also share its factors.

        Raises:
            ValueError: if each of several ranks would use the factors of its own examples.
        """
        if num_ranks > 1 and not self.reduces:
            raise ValueError(
                f"each of the {num_ranks} ranks would precondition by the curvature of its own examples, and their "
                f"weights would drift apart: KFAC(model.parameters(), model, **adabatch.across_ranks(model))"
            )

    def observe(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        """Measures the curvature at the model's outputs. Call it once per forward, before the backward.

        Args:
            outputs: the outputs of the model, shape (examples, ..., classes or coordinates), with their graph. The loss
                must be a mean over the first dimension: if it averages over tokens, flatten examples and positions
                first, as for the loss.
            targets: for ``fisher="empirical"``: class numbers, or values in the shape of ``outputs``.

        Raises:
            RuntimeError: if the model has not run with gradients since the last call.
            ValueError: if the outputs have no graph or no examples, or if the targets do not match them.
        """
        if not self.due:
            return
        if outputs.dim() < 2 or not outputs.requires_grad or len(outputs) == 0:
            raise ValueError(
                f"observe takes the model's outputs in their graph, of shape (examples, ..., classes), got shape "
                f"{tuple(outputs.shape)} with requires_grad={outputs.requires_grad}"
            )
        if not self._capture.noted:
            raise RuntimeError(
                "observe found no forward of the model to measure: call the module that was given to KFAC, with "
                "gradients, then observe its outputs once"
            )
        generator = self._generator(outputs.device)
        sent = curvature.cotangents(
            outputs, targets, fisher=self._fisher, likelihood=self._likelihood, generator=generator
        )
        self._capture.observe(outputs, sent, Sample(self._intervals.share(self._clock), generator))
        self._clock.observations += 1

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. A closure is called first, with gradients enabled, and must then call ``observe``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        watched = (p for group in self.param_groups if group.get("method") == "kfac" for p in group["params"])
        check_in_place(watched, self._blocks, "K-FAC")
        check_ratios(self)
        # Read before _average() replaces it.
        before = self._clock.last_batch
        if not self.due:
            self._clock.since_refresh += before
        # summed before the decision: all ranks then see the same number of examples, and refresh in the same step
        elif self._average() and self._intervals.refreshes(self._clock, before):
            self.refresh()
        self._clock.steps += 1
        # all directions before the first parameter moves: kl-clip needs their product with the gradient over all layers
        directions = dict(self._directions())
        for group in self.param_groups:
            if group["method"] == "kfac":
                for p in group["params"]:
                    if p in directions:
                        self._move(p, directions[p], group)
            else:
                update_others(group, self.state)
        return loss

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes the inverses from the present factors. ``step`` calls it when it is due."""
        numbers = averages.traces(self._layers).tolist() if self._layers else []  # host sync
        measured = dict(zip([layer.name for layer in self._layers], numbers, strict=True))
        self._check_observed(measured)
        self._inversion.run(
            (block, self._pair(block, *measured[block.layer.name][:2]))
            for block in self._blocks.values()
            if self._owner.owns(block.layer.name)
        )
        self.fallbacks["not finite"] = sum(int(row[3]) for row in numbers)
        for block in self._blocks.values():
            # On all ranks and in the same order, whoever owns the layer.
            self._owner.share(block.layer.name, inversion.roots_of(block))
        self._whitening = Whitening()
        self._clock.refreshes += 1
        self._clock.since_refresh = 0.0

    def precondition(self, param: Tensor, grad: Tensor) -> Tensor:
        """The gradient preconditioned by the present inverses, in the shape of ``param``.

        ``<grad, precondition(param, grad)>`` is the squared norm of a gradient in the metric of K-FAC. A gradient of a
        parameter that K-FAC does not take is returned unchanged.
        """
        block = self._blocks.get(param)
        return grad if block is None else inversion.precondition(block, grad)

    @property
    def whitens(self) -> bool:
        """Whether there are inverses yet, which ``whiten`` needs."""
        return self._clock.refreshes > 0

    def whiten(self, param: Tensor, grad: Tensor) -> Tensor:
        """A gradient whose Euclidean norm is that of ``grad`` in the metric of K-FAC, ``<grad, precondition(grad)>``.

        It is the square root of the preconditioner applied to ``grad``; zero for a parameter that K-FAC does not take.
        The roots are cached until the next refresh.
        """
        block = self._blocks.get(param)
        return torch.zeros_like(grad) if block is None else self._whitening.of(block, grad)

    def remove(self) -> None:
        """Removes every hook from the model; the optimizer cannot be used afterwards."""
        self._capture.remove()

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """The state in torch's format; the counts are saved beside the factors of each layer."""
        for layer in self._layers:
            # inside the state of a parameter: wrappers that shard or move optimizer states carry nothing else
            layer.state["clock"] = self._clock.tensor()
        return super().state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restores a run exactly: factors, inverses and counts keep the precision in which they were saved."""
        super().load_state_dict(state_dict)
        self._whitening = Whitening()
        # Optimizer.load_state_dict has cast all state to the dtype of its parameter: copied again, uncast.
        saved = state_dict["state"]
        params = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for p, key in zip(params, keys, strict=True):
            for name, value in saved.get(key, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.to(self.state[p][name].device, copy=True)
        holders = {layer.name: p for p, block in self._blocks.items() if (layer := block.layer).holder is p}
        for layer in self._layers:
            layer.state = self.state[holders[layer.name]]
            self._clock = StepCounts.from_tensor(layer.state["clock"])
        for group in self.param_groups:
            for p in group["params"]:
                if p in self._blocks:
                    self._blocks[p].state, self._blocks[p].group = self.state[p], group

    # --- private ----------------------------------------------------------------------------------------------------

    def _take_layers(self, found: Survey, *, exact: bool) -> Iterator[tuple[nn.Module, WatchedLayer]]:
        """Allocates layers that have a parameter in the groups, and blocks for those parameters."""
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        for each in found.layers:
            own = [(key, p) for key, p in each.module.named_parameters(recurse=False) if id(p) in groups]
            if not own:
                continue
            holder = own[0][1]
            if self._bfloat16:
                check_bfloat16(holder.dtype, holder.device, "K-FAC")
            layer = WatchedLayer(each.name, each.kind, each.diagonal_input, each.dims, holder, self.state[holder])
            # float32 even for bfloat16 weights: an average with a small share would round away, and no factorization
            # runs in bfloat16
            dtype = holder.dtype if holder.dtype is torch.float64 else torch.float32
            averages.allocate(layer, dtype=dtype, device=holder.device)
            for key, p in own:
                block = FactorBlock(layer, p, key == "bias", self.state[p], groups[id(p)])
                inversion.allocate(block, self._exponents, exact=exact, dtype=dtype, device=holder.device)
                self._blocks[p] = block
            self._layers.append(layer)
            yield each.module, layer

    def _average(self) -> bool:
        """Adds this step's sums over all ranks to the factors; returns whether there were any."""
        sums = self._capture.take()
        if self._reduce is not None and self._layers:
            sums = averages.unpack(self._reduce(averages.pack(self._layers, sums)), self._layers)
        if sums.num_examples == 0:
            if self._clock.refreshes == 0:  # raises on all ranks alike, since the sums are over all of them
                raise RuntimeError(
                    "K-FAC has not observed anything yet: call optimizer.observe(outputs) after the model's forward "
                    "and before the backward"
                )
            return False
        share = averages.share_of(min(sums.num_examples, self._observed), memory=self._memory)
        for layer in self._layers:
            seen = sums.layers.get(layer.name)
            if seen is None or seen.num_rows == 0 or not (seen.output_rows or seen.output_sum is not None):
                # A layer that no micro-batch of this step has used keeps its averages.
                continue
            if self._in_rows:
                averages.keep_rows(layer, seen, num_examples=sums.num_examples)
            else:
                averages.average_in(layer, seen, num_examples=sums.num_examples, share=share)
        self._clock.since_refresh += sums.num_examples
        self._clock.last_batch = sums.num_examples
        return True

    def _pair(self, block: FactorBlock, input_trace: float, output_trace: float) -> FactorPair:
        layer = block.layer
        if block.is_bias:
            one = Factor(layer.state["output_moment"].new_ones(1), 1.0)
            return FactorPair(one, averages.factor(layer, "output", output_trace))
        return FactorPair(averages.factor(layer, "input", input_trace), averages.factor(layer, "output", output_trace))

    def _directions(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter's preconditioned and clipped gradient, in the layout of the parameter."""
        found: list[tuple[Tensor, Tensor]] = []
        product: Tensor | None = None
        for p, block in self._blocks.items():
            if p.grad is None:
                continue
            name = block.layer.name
            whole = self._owner.gather(name, p.grad)
            direction = None if whole is None else inversion.precondition(block, whole.to(_dtype(block)))
            # Only the owner adds a layer's product: under DDP all ranks have the whole gradient, and the sum over the
            # ranks would count it several times.
            if self._kl_clip is not None and whole is not None and direction is not None and self._owner.owns(name):
                # Momentum adds a direction to later steps too, 1 / (1 - momentum) times in all.
                rate = float(block.group["lr"]) / (1 - block.group["momentum"])
                inner = rate**2 * (direction * whole).sum().double()
                product = inner if product is None else product + inner
            if direction is not None and whole is not None:
                direction = direction.to(whole.dtype)
            found.append((p, self._owner.scatter(name, direction, p.grad)))
        if self._kl_clip is not None and self._blocks:
            device = next(iter(self._blocks)).device
            total = torch.zeros((), dtype=torch.float64, device=device) if product is None else product
            if self._reduce is not None:
                total = self._reduce(total)
            # On the device: to compare the product with the limit on the host would be a sync in every step.
            factor = (self._kl_clip / total.clamp(min=torch.finfo(torch.float64).tiny)).sqrt().clamp(max=1)
            found = [(p, direction * factor.to(direction.dtype)) for p, direction in found]
        yield from found

    def _move(self, p: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
        if group["momentum"]:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            direction = state["momentum_buffer"].mul_(group["momentum"]).add_(direction)
        # A host sync if the rate is a tensor on an accelerator.
        lr = float(group["lr"])
        if group["weight_decay"]:
            p.mul_(1 - lr * group["weight_decay"])
        p.add_(direction, alpha=-lr)

    def _generator(self, device: torch.device) -> torch.Generator:
        """A generator for each rank and observation, which needs no state except a count."""
        generator = torch.Generator(device)
        counted = (self._seed, self._owner.rank, int(self._clock.observations))
        return generator.manual_seed(hash(counted) % 2**63)  # of integers: the same in every run

    def _check_observed(self, measured: Mapping[str, list[float]]) -> None:
        blind = [
            layer.name
            for layer in self._layers
            # A layer that the loss does not reach has nothing to observe.
            if measured[layer.name][2] == 0 and any(p.grad is not None for p in self._params_of(layer))
        ]
        if not blind:
            return
        wrong = {name: int(measured[name][3]) for name in blind if measured[name][3]}
        if wrong:
            raise RuntimeError(
                f"every observation of these layers was not finite: {', '.join(sorted(wrong))}; the model's outputs or "
                f"activations overflow: check the inputs, or lower the learning rate"
            )
        raise RuntimeError(
            f"no curvature was observed in {', '.join(blind)}, which have gradients: observe the outputs that the loss "
            f"is made of, in every forward (reentrant activation checkpointing hides layers: use_reentrant=False)"
        )

    def _params_of(self, layer: WatchedLayer) -> list[Tensor]:
        return [p for p, block in self._blocks.items() if block.layer is layer]


def _dtype(block: FactorBlock) -> torch.dtype:
    dtype: torch.dtype = block.layer.state["output_moment"].dtype
    return dtype
