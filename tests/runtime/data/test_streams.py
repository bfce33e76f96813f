"""Streams and loaders of other libraries, through their own state: what docs/data.md promises of each, and what not."""

from __future__ import annotations

import gc
import io
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from adabatch import AdaptiveBatch, LinearRamp, examples

# both are imported by the tests themselves, since datasets takes seconds in each process that collects these
pytestmark = [
    pytest.mark.skipif(
        find_spec("datasets") is None or find_spec("torchdata") is None, reason="streams need the extra data"
    ),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated", "ignore:.*fork"),
]

NUM_EXAMPLES, MICRO, BUFFER = 48, 4, 8


def through(state: Any) -> Any:
    """A state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(make: Callable[[], Any], total: int, *, saved: Any = None, save_at: int = -1) -> tuple[list[int], Any]:
    """Examples in the order in which a growing batch took them; and the state at a boundary between steps.

    ``make`` gives the loader and what holds its state.
    """
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ramp = LinearRamp(8, 16, over=examples(120))
    batches = AdaptiveBatch(model, optimizer, ramp, micro_batch_size=MICRO)
    loader, holder = make()
    if saved is not None:
        batches.load_state_dict(saved["batches"])
        holder.load_state_dict(saved["loader"])
    seen: list[int] = []
    state = None
    for step in batches.steps(loader, until=examples(total)):
        for batch in step:
            numbers = batch["x"] if isinstance(batch, dict) else batch[0]
            seen += numbers.tolist()
            step.backward(model(numbers.float()[:, None]).mean())
        optimizer.step()
        optimizer.zero_grad()
        if batches.consumed.examples == save_at:
            state = through({"batches": batches.state_dict(), "loader": holder.state_dict()})
    return seen, state


def resumed(make: Callable[[], Any], save_at: int, total: int = 144) -> tuple[list[int], list[int]]:
    """What the uninterrupted run takes after the save, and what a resumed one takes."""
    whole, state = run(make, total, save_at=save_at)
    assert state is not None
    rest, _ = run(make, total, saved=state)
    for begin in range(0, total, NUM_EXAMPLES):
        assert sorted(whole[begin : begin + NUM_EXAMPLES]) == list(range(NUM_EXAMPLES))
    return whole[save_at:], rest


class OwnStream(IterableDataset[Any]):
    """A stream that knows its place."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        while self.place < NUM_EXAMPLES:
            self.place += 1
            yield (torch.tensor(self.place - 1),)
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def streamed(*, shuffled: bool = False) -> Any:
    from datasets import Dataset

    stream = Dataset.from_dict({"x": list(range(NUM_EXAMPLES))}).to_iterable_dataset(num_shards=4)
    return (stream.shuffle(seed=1, buffer_size=BUFFER) if shuffled else stream).with_format("torch")


class WithEpoch:
    """The place in a stream and its epoch, which no loader saves; as in docs/data.md."""

    def __init__(self, stream: Any, loader: Any) -> None:
        self.stream, self.loader = stream, loader

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.stream.epoch, "place": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.set_epoch(state["epoch"])
        self.loader.load_state_dict(state["place"])


def of_a_stream(num_workers: int | None = None) -> tuple[Any, Any]:
    stream = streamed()
    if num_workers is None:
        return DataLoader(stream, batch_size=MICRO), WithEpoch(stream, stream)
    loader, _ = stateful_loader(stream, num_workers=num_workers)
    return loader, WithEpoch(stream, loader)


def stateful_loader(dataset: Any, **options: Any) -> tuple[Any, Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(dataset, batch_size=MICRO, **options)
    return loader, loader


def of_numbers(num_workers: int) -> tuple[Any, Any]:
    numbers = TensorDataset(torch.arange(NUM_EXAMPLES))
    return stateful_loader(numbers, num_workers=num_workers, shuffle=True, generator=torch.Generator().manual_seed(3))


LOADERS: dict[str, Callable[[], Any]] = {
    "stateful, map-style": lambda: of_numbers(0),
    "stateful, map-style, 2 workers": lambda: of_numbers(2),
    "stateful, own stream": lambda: stateful_loader(OwnStream()),
    "stateful, own stream, 1 worker": lambda: stateful_loader(OwnStream(), num_workers=1),
    "Hugging Face": of_a_stream,
    "stateful, Hugging Face": lambda: of_a_stream(0),
    "stateful, Hugging Face, 2 workers": lambda: of_a_stream(2),
}


@pytest.mark.parametrize("save_at", [16, 48, 112], ids=["first pass", "end of a pass", "third pass"])
@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_with_a_state_of_its_own_resumes_exactly(name: str, save_at: int) -> None:
    goes_on, rest = resumed(LOADERS[name], save_at)
    exact = len(goes_on)
    if "map-style" in name:
        exact = -save_at % NUM_EXAMPLES  # the pass that was under way; the next are shuffled anew
    elif name == "stateful, Hugging Face, 2 workers" and save_at == 48:
        exact = 48  # of an end of the first pass, the workers remember one epoch less
    assert rest[:exact] == goes_on[:exact]
    assert Counter(rest) == Counter(goes_on)


def webdataset_of(folder: Path) -> Callable[[], Any]:
    web = pytest.importorskip("webdataset", reason="WebDataset is not installed")
    for shard in range(4):
        with web.TarWriter(str(folder / f"{shard}.tar")) as file:
            for number in range(12 * shard, 12 * shard + 12):
                file.write({"__key__": f"{number:03d}", "x.json": number})

    def make() -> tuple[Any, Any]:
        urls = [str(folder / f"{shard}.tar") for shard in range(4)]
        stream = web.WebDataset(urls, shardshuffle=False).decode().to_tuple("x.json").map_tuple(torch.tensor)
        return stateful_loader(stream)

    return make


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stream_without_a_state_is_wound_forward_by_its_loader(tmp_path: Path) -> None:
    goes_on, rest = resumed(webdataset_of(tmp_path), 16)
    assert rest == goes_on
    gc.collect()  # WebDataset leaves its tar files open until then


def test_a_shuffle_buffer_is_not_resumed() -> None:
    """Hugging Face says so in a line of its log: the buffer is filled anew. Some examples are lost, some come twice."""
    whole, state = run(lambda: stateful_loader(streamed(shuffled=True)), 40, save_at=16)
    loader, _ = stateful_loader(streamed(shuffled=True))
    loader.load_state_dict(state["loader"])
    rest = {int(number) for batch in loader for number in batch["x"]}
    lost, twice = set(range(NUM_EXAMPLES)) - set(whole[:16]) - rest, set(whole[:16]) & rest
    assert 0 < len(lost) <= BUFFER
    assert len(twice) <= BUFFER


def test_a_stateful_loader_does_not_resume_with_another_number_of_workers() -> None:
    _, state = run(LOADERS["stateful, map-style, 2 workers"], 40, save_at=16)
    with pytest.raises(AssertionError):
        run(LOADERS["stateful, map-style"], 40, saved=state)


def test_a_stream_is_dealt_to_ranks_by_its_own_library() -> None:
    """Ranks that take a stream each by ``split_dataset_by_node`` see every example once between them."""
    from datasets.distributed import split_dataset_by_node

    parts = [split_dataset_by_node(streamed(), rank=rank, world_size=2) for rank in range(2)]
    seen = [int(number) for part in parts for batch in DataLoader(part, batch_size=MICRO) for number in batch["x"]]
    assert sorted(seen) == list(range(NUM_EXAMPLES))
