"""``adabatch init``: a commented config for the user's own model file, checked; or a shipped config, written out."""

from __future__ import annotations

import ast
import errno
import importlib
import inspect
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

from adabatch.batch.plan import examples
from adabatch.cli.plain_parser import PlainParser
from adabatch.cli.shipped import about, is_script, named, shipped

DESCRIPTION = """\
Write a commented config for your own model file, and check it: model and data are made, one micro-batch goes forward
and backward, and a few optimizer steps are taken in a temporary folder.

The file needs a torch.nn.Module and a map-style data set of (input, target), each a class that can be made without
arguments (a data set that takes split= is made with "train" and "test"). A loss may stand there too: a Module with
Loss in its name. Without one it is torch.nn.CrossEntropyLoss.

  adabatch init model.py               writes model.yaml
  adabatch init model.py --model Net --data Faces --loss torch.nn.MSELoss
  adabatch init --list                 lists the configs and launch scripts that come with adabatch
  adabatch init --from quickstart      writes quickstart.yaml here; --from launch writes the folder launch/"""

TEMPLATE = Template("""\
# Written by `adabatch init $file`. Run it with
#
#   adabatch train --config $out
#   torchrun --standalone --nproc-per-node=2 -m adabatch train --config $out
#
# from the folder of $file. Any field is also a flag: --limits.max=512. `adabatch train --help-all` lists all fields.
format: 1

# --- what is trained, on what ---------------------------------------------------------------------------------------
model: {class_path: $model}
loss: {class_path: $loss} # a module (outputs, targets) -> mean loss over the examples
optimizer:
  class_path: $optimizer
  init_args: {lr: $lr} # tune this at the smallest batch; the rule below moves it with the batch
train_data:
  class_path: $data$train_arguments
$test_data
# --- how the batch moves --------------------------------------------------------------------------------------------
criterion:
  class_path: adabatch.NormTest
  init_args: {eta: 0.7} # rests where an example is worth eta^2 = 49 % of one in a small batch
micro_batch_size: $micro # examples in one forward and backward on one rank
max_micro_batch_size: $max_micro # it grows up to here before steps accumulate: a size that surely fits into memory
limits: {min: $min, max: $max} # of the global batch, over all ranks
lr_rule: gain # how the learning rate follows the batch: none, linear, sqrt, gain, sqrt_gain

# --- how long -------------------------------------------------------------------------------------------------------
total: {count: $total, unit: examples} # $passes passes over $count examples
shape: {class_path: adabatch.lr.cosine}
warmup: 0.1 # a share of the total; the batch does not grow before its end

# --- where it goes; without this line, a new folder in runs/ each time ------------------------------------------------
out: runs/$name
""")

PASSES = 10
# The second step starts from weights that an update has changed: a rate that is far too high shows there.
STEPS_OF_TRIAL = 2


class ModelFile(NamedTuple):
    """The contents of a model file.

    Args:
        model, data: class paths.
        loss: of the file, or None.
        splits: whether the data set takes ``split=``.
        num_examples: of the training data.
    """

    model: str
    data: str
    loss: str | None
    splits: bool
    num_examples: int


def run_init(arguments: Sequence[str]) -> int:
    """Runs the command with the arguments after its name; its exit status.

    Raises:
        ValueError: if the file lacks what a config needs, or does not work as written.
        FileExistsError: if a file that would be written exists already.
        ImportError: if the check needs the extra "cli".
        SystemExit: with status 2, if there is a mistake on the command line.
    """
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.list:
        width = max(map(len, shipped()))
        print("\n".join(f"{path:<{width}}  {about(file)}".rstrip() for path, file in shipped().items()))
        return 0
    if asked.origin is not None:
        if asked.file is not None:
            parser.error("give a model file or --from, not both")
        _write_shipped(asked.origin, asked.out, force=asked.force)
        return 0
    if asked.file is None:
        parser.error("give your model file, such as `adabatch init model.py`, or --list, or --from NAME")
    out = asked.out or Path(asked.file.stem + ".yaml")
    # before the model file is run, which may take long
    _may_write(out, force=asked.force)
    found = look(asked.file, model=asked.model, data=asked.data, loss=asked.loss)
    text = starter_config(found, asked.file, out, loss=asked.loss, optimizer=asked.optimizer)
    if asked.check:
        for line in check_config(text):
            print(line)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}: adabatch train --config {out}")
    return 0


def look(file: Path, *, model: str | None = None, data: str | None = None, loss: str | None = None) -> ModelFile:
    """Imports a model file, which runs it, and finds what a config needs.

    Args:
        file: a Python file in the working folder or below.
        model, data: which class, if the file has several.
        loss: a class of the file, or a path such as torch.nn.MSELoss, which is not checked here.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not below the working folder, cannot be imported, or has no class or several.
    """
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file: name the Python file that has your model", str(file))
    try:
        inner = file.resolve().relative_to(Path.cwd().resolve())
    except ValueError:
        raise ValueError(
            f"{file} is not below the working folder, so that a config could not name its classes: "
            f"cd {file.resolve().parent} first"
        ) from None
    name = ".".join(inner.with_suffix("").parts)
    if file.suffix != ".py" or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{file} cannot be imported: its name must be letters, digits and _, and end in .py")
    module = _imported(name, file)
    losses = [each for each in _classes(module, nn.Module) if "Loss" in each.__name__]
    models = [each for each in _classes(module, nn.Module) if each not in losses]
    chosen = _one(models, model, file, "a torch.nn.Module", "--model")
    examples_of = _one(_classes(module, Dataset), data, file, "a map-style torch.utils.data.Dataset", "--data")
    own = None
    if loss is None or "." not in loss:
        own = _one(losses, loss, file, "a loss", "--loss") if losses or loss else None
    splits = "split" in inspect.signature(examples_of).parameters
    for each in filter(None, (chosen, examples_of, own)):
        _check_arguments(each, file, but={"split"} if each is examples_of else set())
    # made here and not only in the check, because the limits follow its length
    made = examples_of(split="train") if splits else examples_of()
    if not hasattr(made, "__len__"):
        raise ValueError(f"{examples_of.__name__} in {file} has no length: give it __len__ and __getitem__")
    path = None if own is None else f"{name}.{own.__name__}"
    return ModelFile(f"{name}.{chosen.__name__}", f"{name}.{examples_of.__name__}", path, splits, len(made))


def starter_config(found: ModelFile, file: Path, out: Path, *, loss: str | None, optimizer: str) -> str:
    """The config, with comments.

    Args:
        found: the contents of the model file.
        file: the model file.
        out: the path of the config.
        loss: class path of a loss that is not in the file.
        optimizer: its class path.

    Raises:
        ValueError: if there are too few examples.
    """
    if found.num_examples < 32:
        raise ValueError(f"{found.data} has {found.num_examples} examples, and a batch that can grow needs at least 32")
    # at least eight steps per pass, even at the largest batch
    most = min(1024, 2 ** int(math.log2(found.num_examples / 8)))
    # two of them fit into the largest batch, whatever the size of the data set
    micro = min(8, most // 2)
    arguments = "\n  init_args: {split: %s}"
    test = (
        f"test_data: # evaluated at the end of the run, and as often as evaluate_every says\n"
        f"  class_path: {found.data}{arguments % 'test'}\n"
        f"evaluate_every: {{count: {found.num_examples}, unit: examples}}\n"
    )
    return TEMPLATE.substitute(
        file=file,
        out=out,
        name=file.stem,
        model=found.model,
        loss=found.loss or loss or "torch.nn.CrossEntropyLoss",
        optimizer=optimizer,
        # with a point: YAML takes 1e-3 for a text
        lr="1.0e-3" if "Adam" in optimizer else "1.0e-2",
        data=found.data,
        train_arguments=arguments % "train" if found.splits else "",
        test_data=test
        if found.splits
        else "# test_data: {class_path: ...} # the same to be evaluated at the end; evaluate_every for more\n",
        micro=micro,
        max_micro=max(micro, min(128, most // 2)),
        # two micro-batches, whose spread can be measured on a single process
        min=2 * micro,
        max=most,
        total=PASSES * found.num_examples,
        passes=PASSES,
        count=f"{found.num_examples:,}",
    )


def check_config(text: str) -> Iterator[str]:
    """Builds the job of a config and runs a few steps in a temporary folder; prints the results line by line.

    Raises:
        ValueError: if an object cannot be made, or a step cannot be run; names the part.
        ImportError: if the extra "cli" is not installed.
    """
    try:
        # imported here, because --no-check works without the extra
        from adabatch.cli.commands import job_in
    except ImportError as error:
        raise ImportError(
            f"the check needs `pip install adabatch[cli]` ({error}); --no-check writes the config without it"
        ) from error
    from dataclasses import replace

    from adabatch.cli.display import Display
    from adabatch.cli.job import Checkpointing, run
    from adabatch.runtime.launch.world import World

    # tried elsewhere: neither the config nor the files of the trial stay if it fails
    with TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        config.write_text(text, encoding="utf-8")
        job = job_in(config)
        parameters = sum(each.numel() for each in job.model.parameters())
        yield f"model      {type(job.model).__name__}, {parameters:,} parameters"
        with _named("an example of the training data, train_data[0]"):
            first: Any = job.train_data[0]
            inputs, target = first
        yield f"data       {len(job.train_data):,} examples; input {_kind(inputs)}, target {_kind(target)}"  # type: ignore[arg-type]
        world = World.from_environment()
        if world.size != 1:
            raise ValueError("adabatch init runs in one process: start it without a launcher")
        with _named(f"the forward of {type(job.model).__name__}, the loss, or the backward"):
            batch = [job.train_data[index] for index in range(2)]
            stacked, targets = (torch.stack([torch.as_tensor(each[part]) for each in batch]) for part in (0, 1))
            outputs = job.model(stacked)
            loss = job.loss(outputs, targets)
            if loss.dim() != 0:
                raise ValueError(f"the loss has the shape {tuple(loss.shape)}: return the mean over the examples")
            loss.backward()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"the loss of the first examples is {value}: check the scale of inputs and weights")
        yield f"loss       {value:.4g} on two examples; outputs {_kind(outputs)}"
        smallest = job.limits.min if job.limits is not None and isinstance(job.limits.min, int) else 1
        trial = replace(
            # built again, because the backward above has left gradients, and the forward may have changed buffers
            job_in(config),
            out=Path(folder, "run"),
            test_data=None,
            evaluate_every=None,
            total=examples(STEPS_OF_TRIAL * smallest),
            checkpoint=Checkpointing(resume=False),
        )
        result = run(trial, world, display=Display(0, quiet=True), label="trial")
        yield f"dry run    {result.steps} steps of {smallest} examples, in {result.seconds:.2f} s"


def _imported(name: str, file: Path) -> Any:
    if name.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{file} has the name of a module of Python itself: give it another one")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # any error of the user's file
        raise ValueError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    where = getattr(module, "__file__", None)
    if where is None or Path(where).resolve() != file.resolve():
        raise ValueError(f"{name} is imported from {where}, not from {file}: give the file another name")
    return module


def _classes(module: Any, base: type[Any]) -> list[type[Any]]:
    """The classes that a module itself defines, in their order."""
    # from the source, since the module's namespace also holds the classes that it imports
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    made = [getattr(module, name, None) for name in names]
    return [each for each in made if isinstance(each, type) and issubclass(each, base)]


def _one(classes: Sequence[type[Any]], name: str | None, file: Path, what: str, flag: str) -> type[Any]:
    names = [each.__name__ for each in classes]
    if name is not None:
        if name not in names:
            raise ValueError(f"{file} has no {what.partition(' ')[2]} {name}: it has {', '.join(names) or 'none'}")
        return classes[names.index(name)]
    if not classes:
        raise ValueError(f"{file} has no class that is {what}: define one there")
    if len(classes) > 1:
        # The last class is often the whole model, made of those before it, but a wrong guess would go unnoticed.
        raise ValueError(
            f"{file} has several classes that are {what}: say which with {flag}, one of {', '.join(names)}"
        )
    return classes[0]


def _check_arguments(kind: type[Any], file: Path, *, but: set[str]) -> None:
    needed = [
        each.name
        for each in inspect.signature(kind).parameters.values()
        if each.default is each.empty
        and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        and each.name not in but
    ]
    if needed:
        raise ValueError(
            f"{kind.__name__} in {file} needs {', '.join(needed)}: give each a default, which init_args of the config "
            f"can change"
        )


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # any error of the user's code
        raise ValueError(f"{what} failed: {type(error).__name__}: {error}") from error


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def _may_write(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise FileExistsError(
            errno.EEXIST, "is there already: choose another place with --out, or pass --force", str(path)
        )


def _write_shipped(name: str, out: Path | None, *, force: bool) -> None:
    chosen = named(name)
    if len(chosen) > 1:
        targets = {(out or Path(name)) / path.partition("/")[2]: file for path, file in chosen.items()}
    else:
        ((path, file),) = chosen.items()
        targets = {out or Path(path.partition("/")[2]): file}
    # all of them before the first is written, so that a refusal leaves nothing half done
    for target in targets:
        _may_write(target, force=force)
    for target, file in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
        if is_script(target.name):
            os.chmod(target, 0o755)
        print(f"wrote {target}")


def _parser() -> PlainParser:
    parser = PlainParser(prog="adabatch init", description=DESCRIPTION)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="your Python file, in the working folder")
    parser.add_argument("--out", type=Path, metavar="PATH", help="where to write (FILE with .yaml)")
    parser.add_argument("--model", metavar="CLASS", help="which class of the file is the model, if it has several")
    parser.add_argument("--data", metavar="CLASS", help="which class of the file is the data set, if it has several")
    parser.add_argument("--loss", metavar="CLASS", help="a class of the file, or a path such as torch.nn.MSELoss")
    parser.add_argument(
        "--optimizer", metavar="PATH", default="torch.optim.AdamW", help="class path (torch.optim.AdamW)"
    )
    parser.add_argument("--no-check", dest="check", action="store_false", help="write it without trying it")
    parser.add_argument("--force", action="store_true", help="write over what is there")
    parser.add_argument("--list", action="store_true", help="list the configs and launch scripts that are shipped")
    parser.add_argument("--from", dest="origin", metavar="NAME", help="write out one of them, or a folder of them")
    return parser
