"""Measure a recipe's clips: ``causvid evaluate --config=digits --output=report.json``.

Writes the report as JSON and, beside it, as Markdown tables (``.md``) and a contact sheet (``.png``).
``--student_only`` leaves the teacher out; its weights are not needed then. ``--train_judge`` trains the classifier
instead, on handwriting that neither the generators nor the real test clips show, and writes it to ``--judge``.
"""

import dataclasses
import json

from causvid_jax.cli import common
from causvid_jax.cli.options import config_option, option
from causvid_jax.config import ConfigError, Recipe, require


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags; from ``samples`` on those of :class:`causvid_jax.evaluation.report.Plan`."""

    config: Recipe = config_option()
    output: str | None = option(None, "The report to write, a .json file; .md and .png go beside it.")
    workdir: str | None = option(None, "Where the recipe was trained; default: the weights of the package.")
    student: str | None = option(None, "Student weights to measure instead of the recipe's, a .safetensors file.")
    teacher: str | None = option(None, "Teacher weights to measure instead of the recipe's.")
    student_only: bool = option(False, "Leave the teacher out, and all that is measured against it.")
    train_judge: bool = option(False, "Train the classifier and write it to --judge.")
    judge: str | None = option(None, "The classifier's weights; default: those of the package.")
    samples: int = option(64, "Clips per row.")
    long_samples: int = option(0, "Streams of many times the trained length; 0: as --samples.")
    switch_samples: int = option(0, "Streams with a prompt switch; 0: as --samples.")
    reference: int = option(256, "Real clips that Frechet distances are measured to.")
    batch: int = option(16, "Clips sampled at once.")
    long_factor: int = option(10, "Length of the long streams, in trained lengths.")
    repeats: int = option(3, "Timed runs of each sampler.")
    seed: int = option(0, "Of prompts, real clips and noise.")

    def __post_init__(self) -> None:
        require(
            not (self.teacher and self.student_only),
            f"--teacher={self.teacher} and --student_only are both given; leave one out",
        )


def train_judge(options: Options) -> None:
    """Train and write the judge, and say how well it reads every split of the handwriting."""
    from causvid_jax.evaluation import classifier as judging
    from causvid_jax.evaluation import train_classifier
    from causvid_jax.progress import Progress

    recipe = options.config
    path = common.check_output(options.judge or str(judging.DEFAULT_PATH), (".safetensors",), "judge")
    progress = Progress("judge", train_classifier.STEPS)
    trained = train_classifier.train(
        recipe.data, recipe.video, log=lambda step, loss: progress.update(step, lambda: {"loss": loss})
    )
    progress.close()
    judging.save(path, trained)
    trained = judging.load(recipe.data, path)
    for split in ("test", "train", "judge"):
        scores = train_classifier.accuracy(trained, recipe.data, recipe.video, split)
        print(f"{split} handwriting: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))


def evaluate(options: Options) -> None:
    """Measure, then write the report, its tables and the contact sheet."""
    output = common.check_output(options.output, (".json",))
    import jax
    from absl import logging

    from causvid_jax.checkpoints import load, workdir
    from causvid_jax.evaluation import classifier as judging
    from causvid_jax.evaluation import contact_sheet, report
    from causvid_jax.sampling import batch
    from causvid_jax.text import encoder

    recipe = options.config
    networks = [("student", "distill", options.student)]
    if not options.student_only:
        networks.append(("teacher", "teacher", options.teacher))
    plan = report.Plan(**{field.name: getattr(options, field.name) for field in dataclasses.fields(report.Plan)})
    trained = judging.load(recipe.data, options.judge or judging.DEFAULT_PATH)
    params, recipe = workdir.load_decoders(recipe, options.workdir)
    for role, stage, given in networks:
        try:
            opened = workdir.open_stage(recipe, stage, options.workdir, given)
        except ConfigError as missing:
            advice = "; --student_only needs none" if role == "teacher" else ""
            raise ConfigError(f"{missing}{advice}") from None
        params[role], _ = load(opened)
        logging.info("%s: %s", role, opened)
    made = batch.make_samplers(
        jax.tree.map(jax.numpy.asarray, params),
        recipe,
        prompt_encoder=encoder.open_encoder(recipe, options.workdir),
    )
    result = report.evaluate(recipe, trained, made, plan)
    output.write_text(json.dumps(result.report, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(contact_sheet.markdown(result.report), encoding="utf-8")
    contact_sheet.contact_sheet(result.clips).save(output.with_suffix(".png"), optimize=True)
    print(contact_sheet.markdown(result.report))


def main(options: Options) -> None:
    """Train the classifier, or measure."""
    common.enable_compilation_cache()
    if options.train_judge:
        train_judge(options)
    else:
        common.log_start(options.config)
        evaluate(options)
