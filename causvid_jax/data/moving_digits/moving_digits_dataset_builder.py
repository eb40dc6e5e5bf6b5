"""The ``moving_digits`` dataset as a TensorFlow Datasets builder (ArrayRecord files, no TensorFlow)."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from causvid_jax.config import DataConfig, VideoConfig
from causvid_jax.data import digits

SPLITS = ("train", "test")


@dataclasses.dataclass(eq=False, repr=False)
class MovingDigitsConfig(tfds.core.BuilderConfig):
    """Settings that determine every clip: ``data`` (digits and their motion) and ``video`` (pixel geometry)."""

    data: DataConfig = DataConfig()
    video: VideoConfig = VideoConfig(height=32, width=32)

    def __repr__(self) -> str:
        return self.name

    @classmethod
    def of(cls, data: DataConfig, video: VideoConfig) -> "MovingDigitsConfig":
        """Return the builder configuration of a recipe. Its name contains a digest of every field that changes a pixel.

        The number of clips is not in the name, since clip i is the same in a small and in a large dataset.
        """
        fixed = dataclasses.replace(data, train_clips=0, test_clips=0)
        fields = dataclasses.asdict(fixed)
        for name in ("mixture", "prompt_file"):  # they do not change a pixel
            del fields[name]
        if fixed.validation_fraction == 0:
            del fields["validation_fraction"]
        if fixed.handwriting == "mnist":  # so that folders made before there were other kinds keep their name
            del fields["handwriting"]
        values = [fields, video.height, video.width, video.frames]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
        return cls(name=f"{video.frames}x{video.height}x{video.width}_{digest}", data=data, video=video)


def clip(data: DataConfig, video: VideoConfig, split: str, index: int) -> dict:
    """Return clip ``index`` of ``split``: ``{"video" uint8 [T, H, W, 3], "caption", "held_out"}``.

    It depends on (data.seed, split, index) and not on the number of clips. Test clips show ``test`` handwriting. Those
    of even index have a held-out caption (if ``held_out_fraction`` is positive), all others a training caption.
    """
    rng = np.random.default_rng([data.seed, 2 + SPLITS.index(split), index])
    pool = "test" if split == "test" and index % 2 == 0 and data.held_out_fraction > 0 else "train"
    choices = digits.captions(data, pool)
    caption = choices[rng.integers(len(choices))]
    pixels, caption = digits.sample_clip(rng, split, data, video, caption)
    return {"video": pixels, "caption": caption, "held_out": pool == "test"}


class Builder(tfds.core.GeneratorBasedBuilder):
    """Moving digits: ``video`` uint8 [T, H, W, 3], ``caption``, ``held_out`` (no training clip has this caption).

    Example:
        ``Builder(data_dir=d, config=MovingDigitsConfig.of(data, video)).as_data_source("train")[0]["video"]``
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [MovingDigitsConfig(name="default")]

    def __init__(self, *, file_format: str = "array_record", **kwargs: Any) -> None:
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        video = self.builder_config.video
        shape = (video.frames, video.height, video.width, 3)
        return self.dataset_info_from_configs(
            description="Handwritten digits, coloured, moving over a torus; captions such as 'a red 3 moving left'.",
            features=tfds.features.FeaturesDict(
                {
                    "video": tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="zlib"),
                    "caption": tfds.features.Text(),
                    "held_out": tfds.features.Scalar(dtype=np.bool_),
                }
            ),
            # Record i is clip i.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        data = self.builder_config.data
        return {split: self._generate_examples(split, getattr(data, f"{split}_clips")) for split in SPLITS}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(count):
            yield index, clip(self.builder_config.data, self.builder_config.video, split, index)
