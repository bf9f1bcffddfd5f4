"""Tasks from folders: both formats, where files are looked for, and what wrong files are told."""

import json
from pathlib import Path
from typing import Any

import pytest

from ra_lens.errors import BadFile, BadInput
from ra_lens.tasks import Pair, load_task, task_names

PUBLISHED = Path(__file__).parents[3] / "shared" / "tasks"
CAPITALS = [{"input": "France", "output": "Paris"}, {"input": "Japan", "output": "Tokyo"}]
PAIRS = (Pair("France", "Paris"), Pair("Japan", "Tokyo"))
QUESTION = {"template": "The capital of {} is", "samples": CAPITALS}


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("place", ["icl", "abstractive", "extractive", "."])
def test_a_list_of_pairs_is_an_icl_task(tmp_path: Path, place: str) -> None:
    write(tmp_path / place / "capital.json", CAPITALS)
    for name, folder in (("capital", tmp_path), ("icl/capital", str(tmp_path))):
        task = load_task(name, folder)
        assert (task.name, task.kind, task.pairs) == ("capital", "icl", PAIRS)
        assert task.source == str(tmp_path)
        assert task.prompt("Italy", PAIRS[:1]) == "Q: France\nA: Paris\n\nQ: Italy\nA:"
    assert task_names(source=tmp_path) == task_names("icl", tmp_path) == ("capital",)
    assert task_names("natural", tmp_path) == ()


@pytest.mark.parametrize("place", ["natural", "."])
@pytest.mark.parametrize(
    "frame",
    [
        {"template": "The capital of {} is"},
        {"before_subject": "The capital of ", "after_subject": " is"},
        {
            "template": "The capital of {} is",
            "before_subject": "The capital of ",
            "after_subject": " is",
            "licence": "some other entry",
        },
    ],
)
def test_an_object_with_a_template_is_a_natural_task(tmp_path: Path, place: str, frame) -> None:
    write(tmp_path / place / "capital.json", {**frame, "samples": CAPITALS})
    for name in ("capital", "natural/capital"):
        task = load_task(name, tmp_path)
        assert (task.name, task.kind, task.pairs) == ("capital", "natural", PAIRS)
        assert task.prompt("Italy") == "The capital of Italy is"
    assert task_names(source=tmp_path) == task_names("natural", tmp_path) == ("capital",)


def test_of_two_tasks_with_one_name_the_bare_name_is_the_icl_one(tmp_path: Path) -> None:
    write(tmp_path / "icl" / "capital.json", CAPITALS[:1])
    write(tmp_path / "natural" / "capital.json", QUESTION)
    write(tmp_path / "natural" / "alone.json", QUESTION)
    write(tmp_path / "index.json", {"about": "no task"})
    write(tmp_path / "numbers.json", [1, 2])
    write(tmp_path / "icl" / "LICENSE.txt", "free")
    write(tmp_path / "icl" / "._capital.json", "\x00")
    assert task_names(source=tmp_path) == ("capital", "alone", "natural/capital")
    assert load_task("capital", tmp_path).kind == "icl"
    assert load_task("icl/capital", tmp_path).name == "capital"
    natural = load_task("natural/capital", tmp_path)
    assert (natural.name, natural.kind) == ("natural/capital", "natural")
    for name in task_names(source=tmp_path):
        assert load_task(name, tmp_path).name == name


def test_of_several_answers_the_first_counts_and_repeated_inputs_stay(tmp_path: Path) -> None:
    entries = [{"input": ["big", "large"], "output": ["small", "tiny"]}] * 2
    write(tmp_path / "opposite.json", entries)
    assert load_task("opposite", tmp_path).pairs == (Pair("big", "small"),) * 2


def test_letters_of_any_script_survive(tmp_path: Path) -> None:
    path = tmp_path / "french.json"
    text = json.dumps([{"input": "egg", "output": "œuf"}], ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark
    assert load_task("french", tmp_path).pairs == (Pair("egg", "œuf"),)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ('[{"input": "a"', "found text that is not JSON (Expecting ',' delimiter: line 1 column"),
        ("", "found text that is not JSON"),
        ("[" * 200_000, "found JSON that is nested too deeply for a task."),
        ([], "found no pairs; needed is at least one."),
        ({"a": 1}, 'found an object of 1; needed is a list of {"input": …, "output": …}, or an'),
        ("7", "found the value 7; needed is a list of"),
        ([*CAPITALS, "x"], 'entry 2 (counted from 0): found the text "x"; needed is {"input"'),
        (
            [*CAPITALS, {"input": "x", "target": "y"}],
            "entry 2 (counted from 0): found no \"output\" (it has 'input', 'target'); needed is",
        ),
        ([{}], 'entry 0 (counted from 0): found no "input" (it has nothing); needed is a text.'),
        (
            [{"input": "x", "output": 3}],
            'entry 0 (counted from 0): found the value 3 as "output"; needed is a text, or a list',
        ),
        ([{"input": "", "output": "x"}], 'found the text "" as "input"; needed is a text'),
        ([{"input": "x", "output": []}], 'found a list without entries as "output"; needed'),
        ([{"input": "x", "output": [1]}], 'found a list of 1 as "output"; needed is a text'),
        ([{"input": "x", "output": None}], 'found nothing as "output"; needed is a text'),
    ],
)
def test_wrong_lists_are_told_where(tmp_path: Path, data: Any, told: str) -> None:
    for place in ("icl", "."):
        path = write(tmp_path / place / f"wrong{len(place)}.json", data)
        with pytest.raises(BadFile) as info:
            load_task(path.stem, tmp_path)
        assert str(info.value).startswith(f"{path}: ")
        assert told in str(info.value)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (CAPITALS, "found a list of 2; needed for a natural question is an object with"),
        ({"samples": CAPITALS}, 'found no template; needed is "template" or both'),
        (
            {"before_subject": "x", "samples": CAPITALS},
            'found no template; needed is "template" or both',
        ),
        (QUESTION | {"template": 3}, 'found the value 3 as "template"; needed is a text.'),
        (
            QUESTION | {"template": "The capital is"},
            "found the template 'The capital is'; needed is one \"{}\" where the subject goes.",
        ),
        (QUESTION | {"template": "{} and {}"}, "found the template '{} and {}'; needed is one"),
        (
            QUESTION | {"before_subject": "The town of "},
            "but 'The town of ' before the subject and ' is' after it; needed are texts that agree",
        ),
        (QUESTION | {"samples": "x"}, 'found the text "x" as "samples"; needed is a list of'),
        ({"template": "{} is"}, 'found nothing as "samples"; needed is a list of'),
        (
            QUESTION | {"samples": [{"subject": "France", "object": "Paris"}]},
            "samples, entry 0 (counted from 0): found no \"input\" (it has 'subject', 'object')",
        ),
    ],
)
def test_wrong_questions_are_told_where(tmp_path: Path, data: Any, told: str) -> None:
    path = write(tmp_path / "natural" / "wrong.json", data)
    with pytest.raises(BadFile) as info:
        load_task("natural/wrong", tmp_path)
    assert str(info.value).startswith(f"{path}: ")
    assert told in str(info.value)


@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        ("latin-1", r"found text that is not UTF-8 \(byte 0xe9 at place 29\)"),
        ("utf-16", "found text that is not UTF-8 but UTF-16.*iconv -f UTF-16 -t UTF-8"),
        ("utf-16-be", "found a zero byte at place 0, .*may be UTF-16 without a byte order mark"),
    ],
)
def test_a_file_that_is_not_utf8_is_told(tmp_path: Path, encoding: str, told: str) -> None:
    text = '[{"input": "egg", "output": "\xe9"}]'.encode(encoding)
    write(tmp_path / "icl" / "egg.json", "").write_bytes(text)
    with pytest.raises(BadFile, match=rf"egg\.json: {told}"):
        load_task("egg", tmp_path)


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ([*CAPITALS, {"input": "x", "output": "\ud83d"}], r'entry 2 \(counted from 0\): "output"'),
        (QUESTION | {"template": "\ud83d {} is"}, '"template"'),
        (
            QUESTION | {"samples": [{"input": "\ud83d", "output": "x"}]},
            r'samples, entry 0.*"input"',
        ),
    ],
)
def test_half_a_character_in_an_escape_is_told(tmp_path: Path, data: Any, where: str) -> None:
    path = write(tmp_path / ("icl" if isinstance(data, list) else "natural") / "odd.json", data)
    assert "\\ud83d" in path.read_text()  # JSON that is UTF-8
    with pytest.raises(BadFile, match=rf"odd\.json: {where} has half a character, '\\ud83d' at"):
        load_task("odd", tmp_path)


def test_unknown_names_and_folders_are_refused_with_what_there_is(tmp_path: Path) -> None:
    write(tmp_path / "icl" / "country-capital.json", CAPITALS)
    write(tmp_path / "natural" / "country-capital.json", QUESTION)
    write(tmp_path.parent / "outside.json", CAPITALS)
    with pytest.raises(BadInput) as info:
        load_task("Country Capitl", tmp_path)
    assert str(info.value) == (
        f"There is no task 'Country Capitl' in the folder {tmp_path}. Close names: "
        "country-capital, natural/country-capital. It has country-capital, "
        "natural/country-capital."
    )
    outside = f"../{tmp_path.name}/icl/country-capital"
    for name in ("zzz", "", "natural/zzz", "other/country-capital", "../outside", outside):
        with pytest.raises(BadInput, match=r"There is no task .* It has country-capital"):
            load_task(name, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"It has no tasks \(files icl/NAME\.json, natural/NAME"):
        load_task("antonym", tmp_path / "empty")
    for source in (tmp_path / "missing", "built-in"):
        told = "source is 'builtin', 'download', or a folder with the files of tasks."
        with pytest.raises(BadInput) as info:
            load_task("antonym", source)
        assert str(info.value) == f"There is no folder {str(source)!r}. {told}"
        with pytest.raises(BadInput, match="There is no folder"):
            task_names(source=source)


def test_a_folder_is_read_anew_each_time(tmp_path: Path) -> None:
    write(tmp_path / "capital.json", CAPITALS)
    assert len(load_task("capital", tmp_path).pairs) == 2
    write(tmp_path / "capital.json", CAPITALS[:1])
    assert len(load_task("capital", tmp_path).pairs) == 1


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published files in ../shared/tasks")
def test_every_published_file_is_read() -> None:
    names = task_names(source=PUBLISHED)
    assert len(names) == 23
    assert len(task_names("icl", PUBLISHED)) == 17
    assert "natural/country-capital" in names
    assert "landmark-in-country" in task_names("natural", PUBLISHED)
    for name in names:
        task = load_task(name, PUBLISHED)
        assert task.name == name
        data = json.loads(
            (PUBLISHED / task.kind / f"{name.rpartition('/')[2]}.json").read_text(encoding="utf-8")
        )
        if task.kind == "natural":
            assert task.prompt("Sony") == data["template"].replace("{}", "Sony")
            data = data["samples"]
        assert task.pairs == tuple(Pair(one["input"], one["output"]) for one in data)
    # The folder of one kind works as well.
    assert task_names(source=PUBLISHED / "icl") == task_names("icl", PUBLISHED)
    antonym = load_task("antonym", PUBLISHED / "icl")
    assert antonym.pairs == load_task("antonym", PUBLISHED).pairs
    # Where both have a name, ra_lens's own list is another one.
    assert antonym != load_task("antonym")
