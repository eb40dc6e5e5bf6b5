"""Quality over the number of denoising steps of the student."""

from causvid_jax.training.experiment import PAPER_SAMPLER, Experiment, Row


def get_experiment() -> Experiment:
    """Return students of one, two and four steps, and the teacher.

    All start from one initial student: that of ODE regression, which has four timesteps with those of fewer steps among
    them, or with ``--config.train_distill.init=consistency`` that of the stage ``consistency``.
    """
    distilled = ("distill",)
    return Experiment(
        title="Denoising steps",
        claim="CausVid, section 4: four steps keep the quality of the many-step teacher.",
        rows=(
            Row("teacher", network="teacher"),
            Row("4 steps", stages=distilled),
            Row("2 steps", stages=distilled, settings={"diffusion.denoising_timesteps": "(1000.0, 500.0)"}),
            Row("1 step", stages=distilled, settings={"diffusion.denoising_timesteps": "(1000.0,)"}),
        ),
        settings=PAPER_SAMPLER,
    )
