"""Settings of the stages of ``causvid prepare`` that are not in the recipe, as flags. Imports no JAX."""

import dataclasses

from causvid_jax.config import require
from causvid_jax.config.fields import BatchSize, Count, CountOrZero, Few, Many, ManyOrZero, check_bounds
from causvid_jax.config.recipes import option


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of all stages. The help of a setting names the stages that use it; without a name all do.

    Raises:
        ConfigError: a number out of bounds, or only one of ``host_index`` and ``host_count``.
    """

    count: CountOrZero = option(0, "Number of examples; 0: that of the recipe, or all.")
    videos: str = option("", "data, videos: the folder of your videos.")
    captions: str = option("", "data, videos: csv, tsv, json or jsonl; none: a.txt by a.mp4.")
    prompts: str = option("", "prompts, trajectories: the list; none: the recipe's data.prompt_file.")
    name: str = option("latents", "videos: the dataset's folder under WORKDIR/data.")
    clips_per_video: CountOrZero = option(0, "data, videos: maximum clips per video; 0: all.")
    shard_videos: Count = option(64, "data, videos: videos per shard; a crash loses at most one shard.")
    batch: BatchSize = option(1, "videos: clips per device and call of the VAE.")
    workers: Few = option(2, "data, videos: videos decoded at a time.")
    host_index: ManyOrZero | None = option(None, "This machine's number from 0; none: JAX's process index.")
    host_count: Many | None = option(None, "Number of machines that share the stage; none: JAX's process count.")

    def __post_init__(self) -> None:
        check_bounds(self)
        index, count = self.host_index, self.host_count
        if index is None or count is None:
            require(index is count, f"--host_index is {index} and --host_count is {count}; give both or neither")
            return
        require(0 <= index < count, f"--host_index is {index} of --host_count {count}; accepted: 0 to {count - 1}")


DEFAULTS = Options()
