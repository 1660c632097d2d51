"""A study of token reduction: what trained models know on fewer tokens, and again after training on so many."""

import itertools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vssm import checkpoint
from vssm.data.images import DecodedImages
from vssm.data.loaders import eval_loader
from vssm.engine.classifier import Classifier, ModelSpec, load, read_description
from vssm.engine.compare import WEIGHTS, difference_within_runs
from vssm.engine.evaluate import evaluate, open_for
from vssm.engine.info import count_operations, count_reduced
from vssm.engine.jobs import Job, run_jobs
from vssm.engine.memory import halving
from vssm.engine.prune import describe_reduction
from vssm.engine.recipe import DENSE
from vssm.engine.records import read_results, write_results
from vssm.engine.tallies import Answers
from vssm.files import atomic_path
from vssm.pruning import Schedule, write_schedule

_TRAIN = (sys.executable, "-m", "vssm.cli", "train")
_FINISHED = "record.json"  # the last file that a run writes
_LOG = "log.csv"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        data_dir: The data set, as `vssm.data.open_dataset` takes it; the embedded digits when None.
        dense: Weights of trained models that differ in their seeds alone, with the descriptions beside them.
        folder: Keeps what has been done, from which a later call goes on.
        recipe: File of options of ``vssm train``, with which models are trained further.
        epochs: Of that training; 0 for none.
        schedules: Ways to reduce tokens, which differ in policy, alignment, convolutions and share alone.
        device: Where to compute.
        batch_size: Images per step of evaluations; halved until a step fits into memory.
        amp_dtype: Half precision of evaluations; float32 when None.
    """

    data_dir: Path | None
    dense: tuple[Path, ...]
    folder: Path
    recipe: Path
    epochs: int
    schedules: tuple[Schedule, ...]
    device: torch.device
    batch_size: int = 250
    amp_dtype: torch.dtype | None = None

    @property
    def numbers(self) -> range:
        """Numbers of the dense models, from 1; each is the seed of what is trained from it."""
        return range(1, len(self.dense) + 1)

    @property
    def data_name(self) -> str:
        """What to call the data set."""
        return "embedded digits" if self.data_dir is None else self.data_dir.name

    def claim(self) -> None:
        """Keeps the folder for this study.

        Raises:
            ValueError: It holds another one.
        """
        facts = {
            "data": self.data_name,
            "dense": [checkpoint.sha256(path) for path in self.dense],
            "recipe": self.recipe.read_text(encoding="utf-8"),
            "epochs": self.epochs,
            "after": list(self.schedules[0].after),
            "amp_dtype": str(self.amp_dtype),
        }
        file = self.folder / "study.json"
        (known,) = read_results(file) if file.is_file() else [facts]
        for name, value in facts.items():
            if known.get(name) != value:
                raise ValueError(f"{self.folder}: holds a study of another {name}; name a new folder with --output")
        write_results(file, [facts])


@dataclass(frozen=True)
class Variant:
    """A way to reduce tokens, or not to.

    Args:
        schedule: How; None for all tokens.
        about: What records say of it.
    """

    schedule: Schedule | None
    about: dict[str, Any]

    @property
    def name(self) -> str:
        """Such as ``top_decay_0.8`` or ``top_decay-compact_0.8``; what else a schedule says is the same in a study."""
        return "dense" if self.schedule is None else _name(self.schedule)

    @property
    def unaligned(self) -> str | None:
        """Name of the variant that knows nothing of the tokens that are gone; None for that one and for all tokens."""
        if self.schedule is None or self.schedule.align == "none":
            return None
        return _name(self.schedule.with_options(align="none", conv=None))


def _name(schedule: Schedule) -> str:
    way = "-".join(filter(None, (schedule.align, schedule.conv)))
    return f"{schedule.policy}_{way}_{schedule.keep}"


def weights_of(run: Path) -> Path:
    """The weights of a run: those in a folder of ``vssm train``, or a file itself.

    Raises:
        FileNotFoundError: There are none.
    """
    path = run / WEIGHTS if run.is_dir() else run
    if not path.is_file():
        raise FileNotFoundError(f"{run}: expected a folder with {WEIGHTS}, or a checkpoint with its description")
    return path


def variants_of(study: Study) -> list[Variant]:
    """All tokens, and the study's schedules that suit the model; of others the log says why they do not.

    Raises:
        ValueError: None of them does.
    """
    classifier = load(study.dense[0])
    config = classifier.config
    image = torch.zeros(1, config.channels, config.height, config.width)
    dense = count_operations(classifier.model, image)
    variants = [Variant(None, {"policy": None, "gflops": dense / 1e9, "over_dense": 1.0})]
    for schedule in study.schedules:
        try:
            counted = count_reduced(classifier.model, image, schedule, dense=dense)
        except ValueError as error:
            _logger.warning("left out %s with %s and %s: %s", schedule.policy, schedule.align, schedule.keep, error)
        else:
            variants.append(Variant(schedule, describe_reduction(schedule, counted)))
    if len(variants) == 1:
        raise ValueError(f"study: none of {len(study.schedules)} schedules suits {classifier.spec.model}")
    return variants


class Evaluations:
    """Which held-out images models get right; each is evaluated once, and images are decoded once.

    Args:
        study: What is compared.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._images: DecodedImages | None = None
        self._opened: tuple[Path, Classifier] | None = None

    def hits(self, variant: Variant, number: int, *, trained: bool) -> np.ndarray | None:
        """Whether a model is right on each image, (images,).

        Args:
            variant: The tokens that it has.
            number: Of the dense model.
            trained: Whether it has been trained further; then the result is None as long as it is not.
        """
        name = run_name(variant, number)
        file = self._study.folder / "hits" / f"{name}-{'trained' if trained else 'as_is'}.npy"
        if file.is_file():
            return np.load(file)
        run = self._study.folder / "runs" / name
        if trained and not (run / _FINISHED).is_file():
            return None
        found = self._evaluate(run / WEIGHTS if trained else self._study.dense[number - 1], variant.schedule)
        with atomic_path(file) as temporary:
            np.save(temporary, found)
        return found

    def all_as_they_are(self, variants: Sequence[Variant]) -> None:
        """Evaluates every dense model on the tokens of every variant."""
        pairs = list(itertools.product(self._study.numbers, variants))
        for number, variant in tqdm(pairs, desc="evaluating", disable=not sys.stderr.isatty()):
            self.hits(variant, number, trained=False)

    def _evaluate(self, weights: Path, schedule: Schedule | None) -> np.ndarray:
        study, classifier = self._study, self._open(weights)
        images, answers = self._images_for(classifier), Answers()

        def work(size: int) -> None:
            loader = eval_loader(images, classifier.config, batch_size=size, device=study.device)
            evaluate(
                classifier.model,
                loader,
                source=images.source,
                device=study.device,
                amp_dtype=study.amp_dtype,
                tallies=[answers],
            )

        with nullcontext() if schedule is None else schedule.reducer(classifier.model):
            halving(work, study.batch_size)
        targets, found = answers.in_order()
        return (found == targets).numpy()

    def _open(self, weights: Path) -> Classifier:
        if self._opened is None or self._opened[0] != weights:
            self._opened = (weights, load(weights))
            self._opened[1].model.to(self._study.device)
        return self._opened[1]

    def _images_for(self, classifier: Classifier) -> DecodedImages:
        images = self._images or DecodedImages(open_for(classifier, self._study.data_dir))
        if classifier.data_classes not in (None, images.classes):
            raise ValueError("study: expected the same classes in the same order in all runs, got others")
        self._images = images
        return images


def run_name(variant: Variant, number: int) -> str:
    """What the run that trains a dense model on a variant's tokens is called."""
    return f"{variant.name}-{number}"


def unfinished(study: Study, variants: Sequence[Variant]) -> dict[str, tuple[Variant, int]]:
    """Names of the runs that are still to be done, with variant and number of the dense model."""
    return {
        name: (variant, number)
        for number in study.numbers  # first all variants of one, which can be compared
        for variant in variants
        if study.epochs and not (study.folder / "runs" / (name := run_name(variant, number)) / _FINISHED).is_file()
    }


def train_on(
    study: Study,
    variants: Sequence[Variant],
    *,
    at_once: int,
    workers: int,
    stop: Callable[[], bool] = lambda: False,
    ended: Callable[[Variant, int], object] = lambda variant, number: None,
) -> dict[str, str]:
    """Trains every dense model further on the tokens of every variant, several at the same time.

    Runs that are finished are not repeated, and those that have begun go on.

    Args:
        study: What is compared.
        variants: From `variants_of`.
        at_once: Number of runs at the same time; they share the device.
        workers: Processes that read images, for each of them.
        stop: Ends them when it is true, with their states written.
        ended: Called with variant and number after each run.

    Returns:
        By the names of runs that have failed, why.
    """
    todo = unfinished(study, variants)
    jobs = [_job(study, variant, number, workers=workers) for variant, number in todo.values()]
    return run_jobs(jobs, at_once=at_once, stop=stop, ended=lambda job: ended(*todo[job.name]))


def _job(study: Study, variant: Variant, number: int, *, workers: int) -> Job:
    name = run_name(variant, number)
    run = study.folder / "runs" / name
    return Job(
        name,
        [*_TRAIN, *_options(study, variant, number, workers=workers)],
        log=study.folder / "logs" / f"{name}.txt",
        steps=study.epochs,
        done=lambda: len(read_results(run / _LOG)) if (run / _LOG).is_file() else 0,
    )


def _options(study: Study, variant: Variant, number: int, *, workers: int) -> list[str]:
    """Arguments of ``vssm train``."""
    weights = study.dense[number - 1]
    options: dict[str, Any] = {
        "config": study.recipe,
        "output": study.folder / "runs" / run_name(variant, number),
        "resume": "auto",
        "initial-checkpoint": weights,
        "distill-teacher": DENSE,
        "epochs": study.epochs,
        "seed": number,
        "device": study.device,
        "workers": workers,
        "keep": 1,
        **_input_of(weights),
    }
    if variant.schedule is not None:
        options["prune"] = study.folder / "schedules" / f"{variant.name}.yaml"
        write_schedule(options["prune"], variant.schedule)
    data = [] if study.data_dir is None else [str(study.data_dir)]
    given = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    return data + [text for name, values in given.items() for text in (f"--{name}", *map(str, values))]


def _input_of(weights: Path) -> dict[str, Any]:
    """Options that build the model of a checkpoint, and give it the same input."""
    described = read_description(weights)
    assert described is not None, "the model has been loaded by it"
    spec = ModelSpec.from_dict(described["spec"])
    options = {name.replace("_", "-"): value for name, value in spec.as_dict().items()}
    for name in ("pretrained", "drop-path"):
        del options[name]
    options["model-kwargs"] = [f"{name}={value!r}" for name, value in spec.model_kwargs.items()]
    if spec.img_size is not None:
        options["img-size"] = "x".join(map(str, spec.img_size))
    return {name: value for name, value in options.items() if value not in (None, [])}


def records_of(study: Study, variants: Sequence[Variant], evaluations: Evaluations) -> list[dict[str, Any]]:
    """What is known so far: one record per variant, before and after training, the dense models first.

    Returns:
        Records with ``policy`` (None for all tokens) and what else `describe_reduction` says, ``epochs`` of training on
        these tokens, ``seeds``, ``images``, ``top1`` in percent, the mean over seeds, and ``top1_of_seeds``; in points
        ``difference`` to the dense models as they are, and ``over_none`` to the same policy and share with
        ``align="none"``, both with the ends of their paired 95 % intervals (``_low``, ``_high``) over images and seeds.
    """
    found: dict[tuple[str, bool], dict[int, np.ndarray]] = {}
    for trained, variant in itertools.product((False, True) if study.epochs else (False,), variants):
        hits = {number: evaluations.hits(variant, number, trained=trained) for number in study.numbers}
        found[variant.name, trained] = {number: each for number, each in hits.items() if each is not None}
    dense = found["dense", False]
    records = []
    for (name, trained), hits in found.items():
        variant = next(each for each in variants if each.name == name)
        if hits:
            record = {**variant.about, "epochs": study.epochs if trained else 0, **_accuracy(hits)}
            if hits is not dense:
                record |= _gain("difference", hits, dense)
            if (plain := variant.unaligned) is not None:
                record |= _gain("over_none", hits, found.get((plain, trained), {}))
            records.append(record)
    return records


def _accuracy(hits: Mapping[int, np.ndarray]) -> dict[str, Any]:
    stacked = np.stack([*hits.values()])
    return {
        "seeds": [*hits],
        "images": stacked.shape[1],
        "top1": 100 * float(stacked.mean()),
        "top1_of_seeds": [100 * float(run.mean()) for run in stacked],
    }


def _gain(name: str, hits: Mapping[int, np.ndarray], others: Mapping[int, np.ndarray]) -> dict[str, float]:
    """How much better some runs are than others of the same seeds; nothing where there are none of the same."""
    both = [number for number in hits if number in others]
    if not both:
        return {}
    first, second = (np.stack([each[number] for number in both]) for each in (hits, others))
    points, low, high = difference_within_runs(first, second)
    return {name: points, f"{name}_low": low, f"{name}_high": high}
