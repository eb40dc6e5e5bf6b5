import json
import shutil

import pytest

from causvid_jax.config import ConfigError, DataConfig
from causvid_jax.data import captions
from causvid_jax.data.captions import Video
from tests.refusals import refused


def test_prompts_come_one_per_line_or_as_jsonl(tmp_path):
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("\ufeffa cat \n\n  a dog\r\na cat\n", encoding="utf-8")
    objects.write_text('"a cat"\n\n{"prompt": "a dog", "id": 3}\n"a cat"\n')
    assert captions.read_prompts(lines) == captions.read_prompts(objects) == ["a cat", "a dog", "a cat"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", " \n", "holds no prompt"),
        ("p.txt", "a red\0 3\n", r"line 1 has the character '\\x00'; accepted: text without control characters"),
        ("p.jsonl", '"a"\n{"words": "b"}\n', "line 2: accepted: a JSON string or"),
        ("p.jsonl", '"a\n', "line 1 is no JSON"),
        ("p.jsonl", '{"prompt": "a red 3", "prompt": "a blue 7"}', "an object names 'prompt' twice"),
        ("p.json", "[" * 100_000, "line 1 is no JSON"),
        ("p.json", '["a red 3", "\\ud800"]', r"line 2 has the character '\\ud800'"),
        ("p.csv", "prompt,seed\na cat, sitting,1\n", "line 2 has 3 fields and the header 2; a text with ',' or quotes"),
        ("p.csv", 'prompt\na dog\n"a cat\n', "line 3 is not a table row: unexpected end of data"),
        ("p.csv", "prompt\n" + "x" * 140_000, "line 2 is not a table row: field larger than field limit"),
        ("p.csv", "words\na\n", r"has the columns \['words'\]; it needs prompt or prompt_en"),
        ("p.csv", "prompt,prompt\na,b\n", r"has the columns \['prompt', 'prompt'\]; a column may be named"),
        ("c.txt", "", "is of no accepted kind; accepted: .csv, .tsv, .json"),
        ("c.csv", "name,caption\nx,y\n", r"has the columns \['name', 'caption'\]; it needs file or file_name"),
        ("c.csv", "file,caption\na.mp4,x\na.mp4,y\n", "line 3: 'a.mp4' is named twice"),
        ("c.csv", "file,caption\n", "names no video"),
        ("c.json", '{"a.mp4": "x", "a.mp4": "y"}', "an object names 'a.mp4' twice"),
        ("c.jsonl", '{"file": "a.mp4", "caption": 3}', "the caption is 3, no text"),
        ("c.jsonl", '["a.mp4"]', "line 1: no file is named"),
        ("c.jsonl", '{"file": "a\\u0000.mp4", "caption": "x"}', r"line 1 has the character '\\x00'"),
    ],
)
def test_lists_of_prompts_and_of_captions_that_cannot_be_read_name_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    read = captions.read_captions if name.startswith("c") else captions.read_prompts
    refused(f"{name}.*{message}", read, tmp_path / name)


def test_prompt_files_that_are_missing_or_no_text(tmp_path):
    refused("prompt file .*none.txt does not exist", captions.read_prompts, tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    refused(r"latin.txt is not UTF-8 text \(byte 3\)", captions.read_prompts, tmp_path / "latin.txt")


def test_an_unusual_line_separator_ends_no_line(tmp_path):
    for name, content in (("a.txt", "one\u2028two\n"), ("a.jsonl", '"one\u2028two"')):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert captions.read_prompts(tmp_path / name) == ["one\u2028two"]


def test_captions_come_as_csv_or_jsonl(tmp_path):
    table, objects = tmp_path / "c.csv", tmp_path / "c.jsonl"
    table.write_text('id,file,caption\n1,b/x.mp4,"one, two\nthree"\n2,a.webm,\n')
    rows = [{"file": "b/x.mp4", "caption": "one, two\nthree"}, {"file": "a.webm"}]
    objects.write_text("\n".join(map(json.dumps, rows)))
    expected = {"b/x.mp4": "one, two\nthree", "a.webm": ""}
    assert captions.read_captions(table) == captions.read_captions(objects) == expected


def test_videos_are_found_by_suffix_and_captioned_by_their_sidecars_or_the_file(tmp_path):
    for name in ("b.MP4", "sub/a.webm", "readme.md", "frame.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"123")
    (tmp_path / "sub" / "a.txt").write_text("a\ncat\n")
    assert captions.list_videos(tmp_path) == [Video("b.MP4", "", 3), Video("sub/a.webm", "a cat", 3)]
    (tmp_path / "others").mkdir()
    for name in ("a.wmv", "b.gif", "c.flv", "d.MTS", "e.3gp", "f.ogv"):
        (tmp_path / "others" / name).touch()
    assert len(captions.list_videos(tmp_path / "others")) == 6
    shutil.rmtree(tmp_path / "others")
    (tmp_path / "c.csv").write_text("file,caption\n./b.MP4,a dog\nz.mp4,gone\n")
    assert captions.list_videos(tmp_path, tmp_path / "c.csv") == [
        Video("b.MP4", "a dog", 3),
        Video("sub/a.webm", "", 3),
        Video("z.mp4", "gone", -1),
    ]
    with pytest.raises(ConfigError, match="holds no video; accepted: files .3gp"):
        (tmp_path / "empty").mkdir()
        captions.list_videos(tmp_path / "empty")
    refused("none does not exist", captions.list_videos, tmp_path / "none")


def test_a_digest_tells_lists_apart():
    assert captions.digest(["ab", "c"]) == captions.digest(["ab", "c"]) != captions.digest(["a", "bc"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "films"}, "data.name is 'films'; accepted: 'moving_digits', 'videos'"),
        ({"mixture": (("a", 0.0),)}, "data.mixture\\[0\\]\\[1\\] is 0.0; accepted: above 0"),
        ({"mixture": (("a", 1.0), ("a", 2.0))}, "names a dataset twice: a, a"),
    ],
)
def test_impossible_data_is_refused(fields, message):
    refused(message, DataConfig, **fields)


PAIR = ["a cat, sitting", "a dog"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.json", json.dumps(PAIR)),
        ("info.json", json.dumps([{"prompt_en": p, "dimension": ["scene"]} for p in PAIR], indent=2)),
        ("object.JSON", json.dumps({"prompts": PAIR})),
        ("lines.json", "\n".join(json.dumps({"prompt": p}) for p in PAIR)),
        ("UPPER.JSONL", "\n".join(json.dumps(p) for p in PAIR)),
        ("unnamed", json.dumps(PAIR)),
        ("table.csv", 'prompt,seed\n"a cat, sitting",1\na dog,2\n'),
        ("table.TSV", "seed\tprompt\n1\ta cat, sitting\n2\ta dog\n"),
        ("list.txt", "a cat, sitting\r\n\n a dog \n"),
    ],
)
def test_prompts_are_read_by_content_and_suffix(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert captions.read_prompts(tmp_path / name) == PAIR


def test_names_in_another_spelling_are_the_files_on_disk(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("caf\u00e9.mp4", "sub/b.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "c.json").write_text(json.dumps({"cafe\u0301.mp4": "one", "sub\\b.mp4": "two", "./c.mp4": "three"}))
    listed = captions.list_videos(tmp_path, tmp_path / "c.json")
    expected = [("c.mp4", "three"), ("caf\u00e9.mp4", "one"), ("sub/b.mp4", "two")]
    assert [(video.file, video.caption, video.size) for video in listed] == [(*pair, 1) for pair in expected]


@pytest.mark.parametrize("name", ["../out.mp4", "/etc/passwd", "link.mp4"])
def test_videos_outside_of_the_folder_are_refused(tmp_path, name):
    (tmp_path / "videos").mkdir()
    (tmp_path / "out.mp4").write_bytes(b"x")
    (tmp_path / "videos" / "link.mp4").symlink_to(tmp_path / "out.mp4")
    (tmp_path / "c.json").write_text(json.dumps({name: "a"}))
    refused("is outside of the video folder", captions.list_videos, tmp_path / "videos", tmp_path / "c.json")
