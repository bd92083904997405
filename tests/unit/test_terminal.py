"""`python -m paligemma` answers in the terminal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import EXAMPLES, ROOT
from random_checkpoints import make_reference, save_reference

import paligemma
from paligemma.__main__ import main

IMAGE = EXAMPLES / "cats.png"


def command(*arguments):
    return [sys.executable, "-m", "paligemma", *map(str, arguments)]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_answer_is_that_of_generate(tiny):
    done = run(IMAGE, "detect cat", "--max-new-tokens", 12, "--device", "cpu", "--dtype", "float32")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == tiny.generate(IMAGE, "detect cat", max_new_tokens=12) + "\n"


def test_settings_reach_the_model(tiny, capsys):
    main([str(IMAGE), "caption en", *"--temperature 1.5 --top-k 50 --top-p 0.9 --seed 3 --device cpu".split()])
    settings = {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "seed": 3}
    assert capsys.readouterr().out == tiny.generate(IMAGE, "caption en", **settings) + "\n"


def test_several_images_and_a_tokenizer_reach_the_model(tmp_path, capsys):
    folder = save_reference(make_reference(std=0.2), tmp_path / "checkpoint")
    tokenizer = (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    images = [str(IMAGE), str(EXAMPLES / "music.png")]
    main([images[0], "--model", str(folder), images[1], "caption en", "--tokenizer", str(tokenizer)])
    expected = paligemma.load(folder, tokenizer=tmp_path).generate(images, "caption en")
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")


def test_tokens_are_printed_as_they_come_until_the_reader_goes_away(tmp_path):
    save_reference(make_reference(std=0.2), tmp_path)
    long_answer = command(IMAGE, "caption en", "--model", tmp_path, "--max-new-tokens", 500)
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(long_answer, cwd=ROOT, env=buffered, **streams) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1, "tokens were still to come"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere.png", "caption en"), "There is no file nowhere.png; please check its path."),
        ((ROOT / "README.md", "caption en"), "README.md is not a picture; please choose"),
        ((IMAGE, " "), "The prompt is empty; please ask something"),
        ((IMAGE, "caption en", "--model", "./nowhere"), "There is no folder ./nowhere; please give a folder"),
        ((IMAGE, "nowhere.png", "caption en"), "There is no file nowhere.png; please check its path."),
        ((IMAGE, "caption en", "--tokenizer", "nowhere"), "nowhere is missing; a checkpoint needs the tokenizer.json"),
        ((IMAGE, "caption en", "--dtype", "float12"), "The dtype float12 is not known; please choose"),
        ((IMAGE, "caption en", "--max-new-tokens", 0), "max_new_tokens is 0; after this prompt please give"),
        ((IMAGE, "caption en", "--temperature", -1), "temperature is -1.0; please give"),
        ((IMAGE, "caption en", "--seed", "x"), "argument --seed: invalid int value: 'x'"),
        ((IMAGE,), "the following arguments are required: PROMPT"),
    ],
)
def test_bad_input_ends_with_a_sentence(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    output = capsys.readouterr()
    assert sentence in (str(ended.value) if ended.value.code != 2 else output.err)
    assert output.out == ""


def test_bad_input_ends_the_program_without_a_traceback():
    done = run("nowhere.png", "caption en")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("There is no file nowhere.png")
