"""Train the classifier, and measure trained weights, for ``causvid evaluate`` and ``causvid road``."""

import json
import os
import pathlib

import jax

from causvid_jax.checkpoints import load, workdir
from causvid_jax.config import ConfigError, Recipe, files, require
from causvid_jax.evaluation import classifier as classifiers
from causvid_jax.evaluation import contact_sheet, report, train_classifier
from causvid_jax.evaluation.plan import Plan
from causvid_jax.progress import Progress
from causvid_jax.sampling import batch
from causvid_jax.text import encoder


def make_classifier(recipe: Recipe, path: pathlib.Path, *, steps: int = train_classifier.STEPS) -> None:
    """Train the classifier of ``recipe`` by ``steps`` updates, write it, and print its accuracy on each split."""
    progress = Progress("classifier", steps)

    def log(step: int, loss: float) -> None:
        progress.update(step, lambda: {"loss": loss})

    trained = train_classifier.train(recipe.data, recipe.video, steps=steps, log=log)
    progress.close()
    classifiers.save(path, trained)
    trained = classifiers.load(recipe.data, path)
    for split in ("test", "train", "classifier"):
        scores = train_classifier.accuracy(trained, recipe.data, recipe.video, split)
        print(f"{split} handwriting: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))


def write_report(
    recipe: Recipe,
    output: pathlib.Path,
    plan: Plan,
    *,
    folder: str | os.PathLike | None = None,
    classifier: str | pathlib.Path | None = None,
    student: str | os.PathLike | None = None,
    teacher: str | os.PathLike | None = None,
    student_only: bool = False,
) -> None:
    """Measure, write the report as ``.json``, tables (``.md``) and contact sheet (``.png``), and print the tables.

    Args:
        recipe: of the weights.
        output: the ``.json`` file.
        plan: numbers of clips.
        folder: working directory with the weights; None takes those of the package.
        classifier: weights of the classifier; None takes that of the package.
        student, teacher: weights to measure instead of those of ``folder``.
        student_only: leave the teacher out.

    Raises:
        ConfigError: weights that are missing or do not fit.
    """
    trained = classifiers.load(recipe.data, classifier or classifiers.DEFAULT_PATH)
    params, recipe = workdir.load_decoders(recipe, folder)
    require(
        student_only or not recipe.experts.boundary,
        "the recipe's teacher is two experts (experts.boundary), which a report does not measure; use --student_only",
    )
    networks = [("student", "distill", student)] + ([] if student_only else [("teacher", "teacher", teacher)])
    for role, stage, file in networks:
        try:
            opened = workdir.open_stage(recipe, stage, folder, file)
        except ConfigError as missing:
            advice = "; --student_only needs none" if role == "teacher" else ""
            raise ConfigError(f"{missing}{advice}") from None
        params[role], _ = load(opened)
        print(f"{role}: {opened}")
    samplers = batch.make_samplers(
        jax.tree.map(jax.numpy.asarray, params), recipe, prompt_encoder=encoder.open_encoder(recipe, folder)
    )
    result = report.evaluate(recipe, trained, samplers, plan)
    tables = contact_sheet.markdown(result.report)
    files.write_text(output.with_suffix(".md"), tables)
    with files.atomic(output.with_suffix(".png")) as picture:
        contact_sheet.contact_sheet(result.clips).save(picture, format="PNG", optimize=True)
    files.write_text(output, json.dumps(result.report, indent=1) + "\n")
    print(tables)
