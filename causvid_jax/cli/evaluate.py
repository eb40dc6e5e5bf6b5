"""Measure a recipe's clips: ``causvid evaluate --config=digits --output=report.json``.

Writes the report as JSON and, beside it, as Markdown tables (``.md``) and a contact sheet (``.png``).
``--student_only`` leaves the teacher out; its weights are then not needed. ``--train_classifier`` instead trains the
classifier, on handwriting that neither the generators nor the real test clips show, and writes it to ``--classifier``.
"""

import dataclasses

from causvid_jax.cli import common
from causvid_jax.cli.options import config_option, option, part
from causvid_jax.config import Recipe, require
from causvid_jax.evaluation.plan import Plan


@dataclasses.dataclass(frozen=True)
class Options(Plan):
    """The flags; with those of a :class:`causvid_jax.evaluation.plan.Plan`."""

    config: Recipe = config_option()
    output: str | None = option(None, "The report to write, a .json file; .md and .png have the same name.")
    workdir: str | None = option(None, "Folder of the recipe's training; default: the weights of the package.")
    student: str | None = option(None, "Student weights to measure instead of the recipe's, a .safetensors file.")
    teacher: str | None = option(None, "Teacher weights to measure instead of the recipe's.")
    student_only: bool = option(False, "Leave the teacher out, and all figures relative to the teacher.")
    train_classifier: bool = option(False, "Train the classifier and write it to --classifier.")
    classifier: str | None = option(None, "The classifier's weights; default: those of the package.")

    def __post_init__(self) -> None:
        super().__post_init__()
        data = self.config.data.name
        require(
            data == "moving_digits",
            f"recipe {self.config.name!r} has data.name {data!r}; the report measures moving digits. For other videos "
            "use causvid vbench",
        )
        require(
            not (self.teacher and self.student_only),
            f"--teacher={self.teacher} and --student_only are both given; leave one out",
        )


def main(options: Options) -> None:
    """Train the classifier, or measure."""
    path = None
    if not options.train_classifier:
        output = common.check_output(options.output, (".json",))
    elif options.classifier:
        path = common.check_output(options.classifier, (".safetensors",), "classifier")
    common.enable_compilation_cache()
    from causvid_jax.analysis import bounds
    from causvid_jax.evaluation import classifier as classifiers
    from causvid_jax.evaluation import measure

    if options.train_classifier:
        measure.make_classifier(options.config, path or classifiers.DEFAULT_PATH)
        return
    plan = part(options, Plan)
    bounds.check_evaluation(options.config, plan, teacher=not options.student_only)
    common.log_start(options.config)
    measure.write_report(
        options.config,
        output,
        plan,
        folder=options.workdir,
        classifier=options.classifier,
        student=options.student,
        teacher=options.teacher,
        student_only=options.student_only,
    )
