"""Judge a recipe's clips: ``python -m launch.evaluate --config=configs/digits.py --output=report.json``.

Writes the report as JSON, the same as Markdown tables (``.md``) and a contact sheet (``.png``) beside it.
``--student_only`` leaves the teacher out, whose weights need not be at hand then.
``--train_judge`` trains the judge instead, on handwriting that neither the generators nor the real test clips show,
and writes it to ``--judge``.
"""

import dataclasses
import json

import jax
from absl import flags, logging

from causvid_jax.checkpoints import load, workdir
from causvid_jax.cli import common
from causvid_jax.config import ConfigError, Recipe, require
from causvid_jax.evaluation import classifier as judging
from causvid_jax.evaluation import contact_sheet, report, train_classifier
from causvid_jax.sampling import batch
from causvid_jax.text import encoder
from causvid_jax.training.progress import Progress

_CONFIG = common.define_config_flag()
_OUTPUT = flags.DEFINE_string("output", None, "The report to write, a .json file; .md and .png go beside it.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the recipe was trained; default: the weights of the package.")
_STUDENT = flags.DEFINE_string(
    "student", None, "Student weights to judge instead of the recipe's, a .safetensors file."
)
_TEACHER = flags.DEFINE_string("teacher", None, "Teacher weights to judge instead of the recipe's.")
_STUDENT_ONLY = flags.DEFINE_bool(
    "student_only", False, "Leave the teacher out, and all that is measured against it; it takes most of the time."
)
_TRAIN_JUDGE = flags.DEFINE_bool("train_judge", False, "Train the judge and write it to --judge.")
_JUDGE = flags.DEFINE_string("judge", str(judging.DEFAULT_PATH), "The judge's weights.")
_PLAN = {
    field.name: flags.DEFINE_integer(field.name, getattr(report.Plan(), field.name), text)
    for field, text in zip(
        dataclasses.fields(report.Plan),
        (
            "Clips per row.",
            "Streams of many times the trained length; 0: as --samples.",
            "Streams with a prompt switch; 0: as --samples.",
            "Real clips that Frechet distances are measured to.",
            "Clips sampled at once.",
            "Length of the long streams, in trained lengths.",
            "Timed runs of each sampler.",
            "Of prompts, real clips and noise.",
        ),
        strict=True,
    )
}


def train_judge(recipe: Recipe) -> None:
    """Train and write the judge, and say how well it reads every split of the handwriting."""
    path = common.check_output(_JUDGE.value, (".safetensors",), "judge")
    progress = Progress("judge", train_classifier.STEPS)
    trained = train_classifier.train(
        recipe.data, recipe.video, log=lambda step, loss: progress.update(step, {"loss": loss})
    )
    progress.close()
    judging.save(path, trained)
    trained = judging.load(recipe.data, path)
    for split in ("test", "train", "judge"):
        scores = train_classifier.accuracy(trained, recipe.data, recipe.video, split)
        print(f"{split} handwriting: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))


def evaluate(recipe: Recipe) -> None:
    """Measure, then write the report, its tables and the contact sheet."""
    output = common.check_output(_OUTPUT.value, (".json",))
    networks = [("student", "distill", _STUDENT.value)]
    if _STUDENT_ONLY.value:
        require(not _TEACHER.value, f"--teacher={_TEACHER.value} and --student_only are both given; leave one out")
    else:
        networks.append(("teacher", "teacher", _TEACHER.value))
    plan = report.Plan(**{name: holder.value for name, holder in _PLAN.items()})
    trained = judging.load(recipe.data, _JUDGE.value)
    params, recipe = workdir.load_decoders(recipe, _WORKDIR.value)
    for role, stage, given in networks:
        try:
            weights = workdir.open_stage(recipe, stage, _WORKDIR.value, given)
        except ConfigError as missing:
            advice = "; --student_only needs none" if role == "teacher" else ""
            raise ConfigError(f"{missing}{advice}") from None
        params[role], _ = load(weights)
        logging.info("%s: %s", role, weights)
    made = batch.make_samplers(
        jax.tree.map(jax.numpy.asarray, params),
        recipe,
        prompt_encoder=encoder.open_encoder(recipe, _WORKDIR.value),
    )
    result = report.evaluate(recipe, trained, made, plan)
    output.write_text(json.dumps(result.report, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(contact_sheet.markdown(result.report), encoding="utf-8")
    contact_sheet.contact_sheet(result.clips).save(output.with_suffix(".png"), optimize=True)
    print(contact_sheet.markdown(result.report))


def main() -> None:
    """Check the flags, then train the judge or judge."""
    recipe = common.load_recipe(_CONFIG)
    common.enable_compilation_cache()
    if _TRAIN_JUDGE.value:
        train_judge(recipe)
    else:
        common.log_start(recipe)
        evaluate(recipe)
