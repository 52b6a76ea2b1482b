"""The verbs on runs: train one, score one; the folder of one is in `physml.runs`."""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import xarray as xr

from physml import saving
from physml.convert.named import load
from physml.data import XarrayDataset, fit_normalizer
from physml.data.sidecar import totals
from physml.errors import ConfigError
from physml.evaluate import RolloutScores, check_evaluation, evaluate_stepper, save_scores
from physml.experiment import Evaluation, Experiment, load_experiment, to_dict
from physml.files import exclusive
from physml.layers.lora import adapted, add_lora, parameters, trained_share
from physml.metrics.table import file_of
from physml.objectives.scoring import check_objective
from physml.objectives.suits import check_leads, check_variance
from physml.parallel.mesh import Layout, on_first_process
from physml.progress import Silent
from physml.report import report
from physml.runs import Run, claimed, describe
from physml.saving import LoadReport, build_stepper
from physml.steppers import Members
from physml.steppers.describe import parameter_count
from physml.steppers.floors import floors_beside
from physml.training import fit, fit_members, spread_members

log = logging.getLogger("physml")


def train(
    source: Experiment | str | Path,
    overrides: Iterable[str] = (),
    *,
    name: str | None = None,
    folder: str | Path = "runs",
    resume: str = "never",
    overwrite: bool = False,
    progress: Any = None,
    tracker: Any = None,
    splits: dict[str, Any] | None = None,
    scored: bool = True,
) -> Run:
    """Trains, scores on the test split and writes a report.

    Args:
        source: an experiment, or a .py or .yaml file that holds one.
        overrides: assignments such as "model.width=32".
        name: folder of the run; the experiment's own name if not given.
        folder: where runs are kept.
        resume: "auto" continues the newest complete checkpoint of the same run, "never" refuses an existing run.
        overwrite: replace an existing run.
        progress: receives the state of the training, see `physml.progress.Progress`.
        tracker: receives the logged numbers, see `physml.training.tracking`.
        splits: the experiment's data, where they are open already.
        scored: whether to score and report; False leaves that to the caller.

    Raises ConfigError, DataError or SpecError for input that does not fit, DataError while another process trains into
    the same folder, DivergedError when the loss is not finite, Interrupted after SIGTERM or SIGINT (the state is saved;
    resume with `resume="auto"`).
    """
    if resume not in ("never", "auto"):
        raise ConfigError(
            f"resume is {resume!r}, but 'auto' or 'never' was expected. To begin from the weights of another run, set "
            "start_from."
        )
    experiment = load_experiment(source, overrides)
    if name:
        experiment = dataclasses.replace(experiment, name=name)
    path, progress = Path(folder) / experiment.name, progress or Silent()
    experiment, source, layout = prepare(experiment)
    seeds = experiment.seeds
    splits = experiment.data.open(progress) if splits is None else splits
    check_splits(splits)
    with layout.use(), contextlib.ExitStack() as held:
        stepper, loaded = first_stepper(_of_seed(experiment, 0), splits["train"], _member(source, 0))
        validate = validation_of(experiment, stepper, splits, layout)
        if scored:
            check_scoring(experiment, stepper, splits)
        if parameter_count(stepper):
            check_values(splits, ("valid", "test") if scored else ("valid",))
        if seeds and not parameter_count(stepper):
            raise ConfigError("seeds asks for an ensemble, but the stepper has no network: all would be the same.")

        def begin():
            held.enter_context(exclusive(path, wait=False))
            held.enter_context(claimed(path, experiment, resume, overwrite))
            describe(path, experiment, stepper, loaded)

        on_first_process(begin)
        trained: dict[str, Any] = {}  # what the saved model says of its training
        if parameter_count(stepper):
            progress.stage("training")
            arguments = (splits, experiment.objective, experiment.training, layout, path)
            options = {"validate": validate, "progress": progress, "resume": resume}
            options |= {"tracker": tracker, "settings": to_dict(experiment)}
            if seeds:
                others = [
                    first_stepper(_of_seed(experiment, i), splits["train"], _member(source, i), stepper.normalizer)[0]
                    for i in range(1, len(seeds))
                ]
                result = fit_members([stepper, *others], *arguments, seeds=seeds, **options)
                trained = {"seeds": result.seeds, "diverged": {str(s): n for s, n in result.diverged.items()}}
            else:
                result, trained = fit(stepper, *arguments, seed=experiment.seed, **options), {"seed": experiment.seed}
            stepper, trained = result.stepper, {**trained, "step": result.step}
        run = Run(path)
        if jax.process_index() == 0:
            saving.save(stepper, path / "model", overwrite=True, extra={"run": experiment.name, **trained})
            if scored and "test" in splits:
                progress.message("Scoring on the test split ...")
                score(run, splits, stepper)
                report([path], path / "report.html")
    return run


def prepare(experiment: Experiment) -> tuple[Experiment, Any, Layout]:
    """What is known before any data are opened: the complete experiment, what it starts from, its devices.

    Raises ConfigError for parts that do not fit each other.
    """
    if experiment.data is None:
        raise ConfigError("The experiment has no data: set `data` to a DataConfig or a SyntheticConfig.")
    layout, seeds = experiment.layout, experiment.seeds
    layout = spread_members(layout, len(seeds)) if seeds else layout
    layout.check_batch(experiment.training.batch)
    source = open_source(experiment)
    experiment = complete(experiment, source)
    check_objective(experiment.objective, "The experiment")
    check_variance(experiment.stepper, experiment.objective)
    if source is None:
        check_leads(experiment.stepper, experiment.objective)
    return experiment, source, layout


def check_splits(splits: dict[str, Any]) -> None:
    """Raises ConfigError where there is nothing to train on."""
    if "train" not in splits:
        raise ConfigError(f"The data have no split 'train', only {', '.join(splits) or 'none'}. Give `data` one.")


def check_values(splits: dict[str, Any], names: Iterable[str]) -> None:
    """Raises DataError where one of these splits holds values that cannot be used. One pass over each, in bounded
    memory; what it gathers is kept beside the data, so that the next training skips it while the files are the same.
    """
    for name in names:
        if name in splits:
            totals(splits[name])


def _of_seed(experiment: Experiment, number: int) -> Experiment:
    """The experiment of one member; itself where it is no ensemble."""
    return dataclasses.replace(experiment, seed=experiment.seeds[number], seeds=()) if experiment.seeds else experiment


def initial_stepper(experiment: Experiment, train_split: XarrayDataset) -> Any:
    """The stepper before training: fitted normalizer, fresh or given weights; without a network a fitted floor."""
    source = open_source(experiment)
    return first_stepper(complete(experiment, source), train_split, _member(source, 0))[0]


def open_source(experiment: Experiment) -> Any:
    """The stepper or bare model that `start_from` names; None where it names none.

    Raises ConfigError for an ensemble where the experiment does not train as many seeds.
    """
    start = experiment.start_from
    source = None if start is None else load(start.path, weights=start.weights or None)
    if isinstance(source, Members) and source.count != len(experiment.seeds):
        raise ConfigError(
            f"start_from={start.path!r} is an ensemble of {source.count}, and the experiment trains "
            f"{len(experiment.seeds) or 1}. Give `seeds` as many numbers, and each member starts from its own; or "
            f"start from one of them: physml.save(physml.load({start.path!r}).member(0), FOLDER)."
        )
    return source


def _member(source: Any, number: int) -> Any:
    """What the member of an ensemble starts from: its own one of an ensemble, or what all start from."""
    return source.member(number) if isinstance(source, Members) else source


def complete(experiment: Experiment, source: Any) -> Experiment:
    """The experiment with model and stepper of `source` where it names no model itself.

    Raises ConfigError where a stepper is named that is not the one of the source, since one of both would be ignored,
    and for `lora` without a source.
    """
    if experiment.lora and source is None:
        raise ConfigError("lora changes trained weights a little, but start_from names none. Set start_from.")
    if source is None or experiment.model is not None:
        return experiment
    model = source if not hasattr(source, "spec") else getattr(source, "model", None)
    if model is None:
        raise ConfigError(f"start_from={experiment.start_from.path!r} has no network: nothing can be taken from it.")
    config = getattr(source, "config", None) if model is not source else experiment.stepper
    if experiment.stepper not in (config, Experiment().stepper):
        raise ConfigError(
            f"The experiment has no model, so model and stepper are those of {experiment.start_from.path}, but its own "
            f"stepper is another one: {experiment.stepper}, not {config}. Name the model too, or leave the stepper out."
        )
    return dataclasses.replace(experiment, model=model.config, stepper=config)


def first_stepper(
    experiment: Experiment, train_split: XarrayDataset, source: Any = None, normalizer: Any = None
) -> tuple[Any, LoadReport | None]:
    """As `initial_stepper`, of a complete experiment, with a report of what was loaded from `source`."""
    spec, start, lora = train_split.spec, experiment.start_from, experiment.lora
    if experiment.stepper.signature(spec) is None:
        if start or lora:
            raise ConfigError(
                f"{type(experiment.stepper).__name__} has no network: start_from and lora cannot go with it."
            )
        config = experiment.stepper
        return config.fit(train_split) if hasattr(config, "fit") else config.build(spec), None
    if experiment.model is None:
        raise ConfigError("The experiment has no model: set `model`, e.g. model=FNOConfig(modes=(16, 16)).")
    intervals = getattr(experiment.stepper, "intervals", ())
    if normalizer is None:
        normalizer = fit_normalizer(train_split, experiment.normalization, intervals=intervals)
    stepper = build_stepper(
        experiment.stepper, experiment.model, spec, normalizer, experiment.constraints, seed=experiment.seed
    )
    if source is None:
        return stepper, None
    loaded = saving.load_into(stepper, source, start.path, strict=start.strict, normalizer=start.normalizer)
    log.info("%s", loaded)
    _check_untrained(experiment, stepper, loaded)
    if lora:
        stepper = add_lora(stepper, lora, experiment.seed)
        log.info("LoRA in %d layers: training changes %s of %s numbers.", len(adapted(stepper)),
                 *(f"{count:,}" for count in trained_share(stepper)))  # fmt: skip
    return stepper, loaded


def _check_untrained(experiment: Experiment, stepper: Any, loaded: LoadReport) -> None:
    """Raises ConfigError where random numbers that the checkpoint did not fill would be frozen."""
    lora, own = experiment.lora, parameters(stepper)
    shapes = {path: f" ({saved} there, {here} here)" for path, saved, here in loaded.reshaped}
    frozen = [
        path + shapes.get(path, "")
        for path in loaded.untrained
        if path in own
        and (
            experiment.training.optimizer.freezes(path)
            or (lora and not (lora.train and re.search(lora.train, path)))
        )
    ]  # fmt: skip
    if frozen:
        advice = "name them in lora.train" if lora else "take them out of the groups whose rate is 0"
        raise ConfigError(
            f"{loaded.source} does not fill {', '.join(frozen[:5])}{' and others' if len(frozen) > 5 else ''}: they "
            f"would stay random, because they are frozen. To train them, {advice}"
            + ("; or leave `model` out to have the one of the source." if shapes else ".")
        )


def validation_of(
    experiment: Experiment, stepper: Any, splits: dict[str, XarrayDataset], layout: Layout
) -> RolloutScores | None:
    """The validation by rollouts that an experiment asks for. Raises ConfigError where it has no data for it."""
    if experiment.validation is None:
        return None
    if splits.get("valid") is None:
        raise ConfigError("The experiment has a validation by rollouts, but its data has no split 'valid'. Add one.")
    return RolloutScores(experiment.validation, stepper, splits["valid"], layout, experiment.seed)


def check_scoring(experiment: Experiment, stepper: Any, splits: dict[str, XarrayDataset]) -> None:
    """Raises ConfigError or DataError where the trained stepper could not be scored on the test split as asked."""
    if "test" not in splits:
        return
    settings = experiment.evaluation
    beside = floors_beside(stepper.history, settings.floors)
    floors = {name: config.build(stepper.spec) for name, config in beside.items()}
    seeds = len(experiment.seeds) or None
    steps = _steps(settings, splits["test"], [stepper, *floors.values()])
    check_evaluation(stepper, splits["test"], steps, floors=floors, seeds=seeds, **_asked(settings))


def _steps(settings: Evaluation, dataset: XarrayDataset, steppers: list[Any]) -> int:
    """Leads to score: those that any start of `dataset` has truth for, where every possible start is asked for."""
    longest = max(dataset.lengths, default=0) - max(stepper.history for stepper in steppers)
    if settings.starts or not 1 <= longest < settings.steps:
        return settings.steps
    log.warning(
        "evaluation.steps is %d, but the trajectories scored on have truth for %d: the rest is left out.",
        settings.steps, longest,
    )  # fmt: skip
    return longest


def _asked(settings: Evaluation) -> dict[str, Any]:
    """Options of `evaluate_stepper`, whose defaults an evaluation has where it says nothing."""
    return {name: getattr(settings, name) or None for name in ("starts", "metrics", "members", "spectrum_leads")}


def check_split(run: Run, splits: Iterable[str], stepper: Any, split: str, settings: Evaluation) -> None:
    """Raises ConfigError where `splits` lacks the one to score on, or the one that floors are fitted to."""
    for needed in (split, *(["train"] if floors_beside(stepper.history, settings.floors) else [])):
        if needed not in splits:
            raise ConfigError(
                f"Scoring {run.folder} on its split {split!r} needs the split {needed!r}, but its data have "
                f"{', '.join(splits) or 'none'}. Choose one of these, or give `data` that split."
            )


def score(
    run: Run,
    splits: dict[str, XarrayDataset] | None = None,
    stepper: Any = None,
    split: str = "test",
    evaluation: Evaluation | None = None,
) -> xr.Dataset:
    """Scores a run and its floors on one split; writes scores.nc, scores.json and sample.nc into the run folder, for
    another split than test scores-SPLIT.nc, scores-SPLIT.json and sample-SPLIT.nc.

    The stepper is the one of the run, and scored as its experiment says on its own data, where no other are given.

    Raises ConfigError for a split that the data lack.
    """
    settings = evaluation or run.experiment.evaluation
    stepper = run.stepper if stepper is None else stepper
    splits = run.experiment.data.open() if splits is None else splits
    check_split(run, splits, stepper, split, settings)
    beside = floors_beside(stepper.history, settings.floors)
    floors = {name: config.fit(splits["train"]) for name, config in beside.items()}
    scores = evaluate_stepper(
        stepper,
        splits[split],
        _steps(settings, splits[split], [stepper, *floors.values()]),
        batch=settings.batch,
        floors=floors,
        key=jax.random.key(run.experiment.seed),
        sample=run.folder / file_of("sample.nc", split),
        name=run.experiment.name,
        **_asked(settings),
    )
    scores.attrs["split"] = split
    save_scores(scores, run.folder)
    return scores
