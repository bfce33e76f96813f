"""Fragments: parts of the model that are averaged at different steps of a round, so that less is sent at a time."""

from __future__ import annotations

from collections.abc import Sequence

from adabatch.arguments import some


def deal(layers: Sequence[str], sizes: Sequence[int], num_fragments: int) -> list[tuple[int, ...]]:
    """Deals parameters into fragments of nearly the same size, and returns the places of each one's parameters.

    The parameters of a layer stay together. Layers are dealt from the largest to the smallest, each to the fragment
    that is smallest so far. Layers of the same size thus go round, and every fragment has some of each depth, as in the
    strided pattern of streaming DiLoCo (Douillard et al. 2025, figure 2). That pattern deals whole transformer blocks
    by their number alone. Here a layer is a module that holds parameters, and they are dealt by size, because
    embeddings would make one fragment much larger than the others.

    Args:
        layers: the layer of each parameter.
        sizes: how many numbers it has, the same on all ranks.
        num_fragments: at least 1.

    Raises:
        ValueError: if there are fewer layers than fragments.
    """
    members: dict[str, list[int]] = {}
    for place, layer in enumerate(layers):
        members.setdefault(layer, []).append(place)
    if len(members) < num_fragments:
        raise ValueError(
            f"fragments must be at most the number of layers that train, {len(members)} ({some(list(members))}), got "
            f"{num_fragments}: the parameters of a layer stay in one fragment"
        )
    fragments: list[list[int]] = [[] for _ in range(num_fragments)]
    filled = [0] * num_fragments
    total = {layer: sum(sizes[place] for place in places) for layer, places in members.items()}
    for layer in sorted(members, key=lambda layer: -total[layer]):  # a stable sort: equal layers keep their order
        # by the number of parameters if sizes are equal, so that none stays empty beside layers of no numbers
        least = min(range(num_fragments), key=lambda index: (filled[index], len(fragments[index]), index))
        fragments[least] += members[layer]
        filled[least] += total[layer]
    return [tuple(sorted(fragment)) for fragment in fragments]


def due(step_in_round: int, local_steps: int, num_fragments: int) -> list[int]:
    """The fragments whose turn comes after a step of a round: evenly spread, the last one at its end.

    In a round of fewer steps than fragments several have the same step.
    """
    # fragment p after ceil((p + 1) local_steps / num_fragments) steps
    return [p for p in range(num_fragments) if -(-(p + 1) * local_steps // num_fragments) == step_in_round]
