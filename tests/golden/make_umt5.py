"""Writes umt5.npz: transformers' UMT5EncoderModel with random weights. Needs the ``parity`` extra.

``python tests/golden/make_umt5.py`` writes the file; ``--check`` draws new weights and inputs and compares the JAX
encoder with transformers there and then, and the whole way from prompt to text rows with diffusers' Wan pipeline. The
file holds inputs and outputs; :func:`random_weights` draws the weights again.
"""

import pathlib
import tempfile
import types

import numpy as np
import script

GOLDEN = pathlib.Path(__file__).with_name("umt5.npz")
SEED = 7
# Attention is wider than the model, as many heads of an odd size; buckets and distance are the published ones.
SIZES = {"vocab_size": 61, "dim": 16, "ffn_dim": 28, "num_heads": 3, "head_dim": 7, "num_layers": 3}
LENGTHS = (170, 41, 1)  # the first reaches beyond the largest told-apart distance, 128
SHORT = (9, 24)
PROMPTS = (
    "A stylish woman walks down a Tokyo street filled with warm glowing neon.",
    "  tabs\tand \n newlines,&nbsp;entities &amp;amp; mojibake: schÃ¶n ",
    "",
    "warm neon",
    "word " * 60,
)


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Every parameter random, by name: kernels keep the variance, scales lie around 1, tables are N(0, 1)."""

    def spread(name, draw):
        if draw.ndim == 1:
            return 1 + 0.2 * draw
        table = any(part in name for part in ("shared", "embed", "bias"))
        return draw if table else draw / np.sqrt(draw.shape[1])

    return script.draw(shapes, seed, spread)


def build(seed: int):
    """(transformers' encoder, its state dict as a file holds it)."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=SIZES["vocab_size"],
        d_model=SIZES["dim"],
        d_kv=SIZES["head_dim"],
        d_ff=SIZES["ffn_dim"],
        num_heads=SIZES["num_heads"],
        num_layers=SIZES["num_layers"],
    )
    model = UMT5EncoderModel(config).eval()
    # named_parameters leaves out the second name of the tied embedding, as a safetensors file does.
    state = random_weights({name: tuple(value.shape) for name, value in model.named_parameters()}, seed)
    tied = state | {"encoder.embed_tokens.weight": state["shared.weight"]}
    script.load(model, tied)
    return model, state


def reference(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(state dict, inputs and output rows) of transformers; rows of padding are left out."""
    import torch
    from transformers.models.umt5.modeling_umt5 import UMT5Attention

    model, state = build(seed)
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, lengths in (("long", LENGTHS), ("short", SHORT)):
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        ids = np.where(mask, rng.integers(1, SIZES["vocab_size"], mask.shape), 0)
        with torch.no_grad():
            out = model(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))).last_hidden_state.numpy()
        arrays |= {f"{name}_ids": ids.astype(np.int32), f"{name}_mask": mask, f"{name}_rows": out[mask]}
    relative = np.arange(-600, 601)
    attention = model.encoder.block[0].layer[0].SelfAttention
    assert isinstance(attention, UMT5Attention)
    buckets = attention._relative_position_bucket(torch.from_numpy(relative)).numpy()
    return state, arrays | {"relative": relative.astype(np.int16), "buckets": buckets.astype(np.uint8)}


def error_of(state: dict[str, np.ndarray], arrays: dict[str, np.ndarray], name: str) -> float:
    """Largest absolute difference of the JAX encoder's rows from the recorded ones; its padded rows must be zero."""
    import functools

    import jax

    from causvid_jax.checkpoints import load
    from causvid_jax.config import UMT5Config
    from causvid_jax.models import umt5

    config = UMT5Config(**SIZES, dtype="float32")
    params = load(state, config=config)[0]
    mask = arrays[f"{name}_mask"]
    rows = np.asarray(jax.jit(functools.partial(umt5.encode, config=config))(params, arrays[f"{name}_ids"], mask))
    assert not rows[~mask].any(), "a padded row is not zero"
    return float(np.abs(rows[mask] - arrays[f"{name}_rows"]).max())


def small_tokenizer(corpus: tuple[str, ...] = PROMPTS, vocab_size: int = 61) -> str:
    """A Unigram ``tokenizer.json`` as google/umt5-xxl publishes one: <pad> is 0, </s> is 1 and ends every sequence."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "</s>", "<s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    # A file may carry settings of its own; the reader must not depend on them.
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(pad_id=3, pad_token="<unk>", length=11)
    return tokenizer.to_str()


def check_pipeline(seed: int) -> None:
    """Prompt to text rows against the text half of diffusers' WanPipeline, at a length that truncates."""
    from diffusers import WanPipeline
    from diffusers.pipelines.wan import pipeline_wan
    from transformers import PreTrainedTokenizerFast

    from causvid_jax.checkpoints import load
    from causvid_jax.config import UMT5Config
    from causvid_jax.config.recipes import load_recipe
    from causvid_jax.text import tokenizer as prompts

    length = 40
    config = UMT5Config(**SIZES, dtype="float32")
    model, state = build(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "tokenizer.json")
        path.write_text(small_tokenizer(), encoding="utf-8")
        tokenizer = prompts.load_tokenizer(path)
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="<pad>", eos_token="</s>")
        pipe = types.SimpleNamespace(tokenizer=theirs, text_encoder=model, _execution_device="cpu")
        texts = [*PROMPTS, load_recipe("wan_1_3b").text.negative_prompt]
        assert [prompts.clean_prompt(t) for t in texts] == [pipeline_wan.prompt_clean(t) for t in texts]
        want = WanPipeline._get_t5_prompt_embeds(pipe, list(texts), max_sequence_length=length).detach().numpy()
        params = load(state, config=config)[0]
        got = prompts.encode_prompts(texts, tokenizer, params, config, length=length)
    counts = [int(np.abs(rows).any(-1).sum()) for rows in want]
    error = np.abs(got - want).max()
    print(f"umt5, from prompts: max |jax - diffusers| = {error:.1e}, rows {counts} of {length} (seed {seed})")
    assert got.shape == want.shape and error <= 1e-4


def check(seed: int) -> None:
    """Compare live: the encoder, the buckets, and prompts through diffusers' pipeline."""
    from causvid_jax.config import UMT5Config
    from causvid_jax.models import umt5

    state, arrays = reference(seed)
    assert np.array_equal(umt5.relative_buckets(arrays["relative"], UMT5Config()), arrays["buckets"])
    for name in ("long", "short"):
        error, std = error_of(state, arrays, name), arrays[f"{name}_rows"].std()
        print(f"umt5, {name}: max |jax - transformers| = {error:.1e}, std {std:.2f} (seed {seed})")
        assert error <= 1e-4
    check_pipeline(seed)


if __name__ == "__main__":
    script.main(__doc__, GOLDEN, lambda: reference(SEED)[1], check)
