"""Trains a small tokenizer of V3's structure and writes what tokenizers must encode to.

    pip install tokenizers==0.23.3 && python tools/templates/make_tokenizer.py [TOKENIZER_JSON OUT]

Writes crates/text/testdata/v3-like-tokenizer.json: a byte-level BPE of some 900 tokens trained on the sentences below, with the
pre-tokenizer expressions, the decoder and the added-token flags of DeepSeek-V3's tokenizer. Writes
crates/text/testdata/tokens.json: the ids of the strings below by that tokenizer and by tiny-r1's. With arguments it
writes the ids by any other tokenizer, to compare with by hand.
"""

import json
import pathlib
import sys

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

assert tokenizers.__version__ == "0.23.3", tokenizers.__version__

DATA = pathlib.Path(__file__).resolve().parents[2] / "crates/text/testdata"

SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
NOT_SPECIAL = (
    ["<｜place▁holder▁no▁0｜>", "<｜place▁holder▁no▁1｜>", "<think>", "</think>", "<｜fim▁hole｜>", "<｜fim▁begin｜>"]
    + ["<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>", "<|EOT|>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"]
    + ["<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"]
    + ["<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁sep｜>"]
)
EXPRESSIONS = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]

CORPUS = [
    "The model reads a prompt, thinks step by step and answers. The answer is 42, because 6 times 7 is 42.",
    "A tokenizer cuts text into tokens; a token is a word, a part of a word, a number or a mark.",
    "def main(argv):\n    for i, item in enumerate(argv):\n        if item is not None:\n            print(i, item)\n",
    "fn main() {\n    let values: Vec<u32> = (0..10).collect();\n    println!(\"{values:?}\");\n}\n",
    "语言模型先思考，然后回答。今天天气很好，我们去公园散步。数字是一二三四五。",
    "日本語の文章もあります。カタカナとひらがなと漢字。",
    "Größe, Straße, café, naïve, œuvre, señor, Łódź, Привет мир, Γειά σου Κόσμε, שלום עולם, مرحبا بالعالم.",
    "🙂 🙂🙂 👍 👩‍👩‍👧 🇩🇪 ❤️ → ∑ ∞ ½ ² ① ㎏",
    "{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\", \"unit\": \"celsius\"}}",
    "SELECT name, count(*) FROM users WHERE age >= 18 GROUP BY name ORDER BY 2 DESC;",
    "https://example.org/path?query=1&other=two#fragment user@example.org",
    "    indented\n\t\ttabs\n\n\nblank lines   and   spaces  \r\nwindows line\r\n",
    "It's the dog's bone; they'll see, we've been, I'm here, don't you'd can't.",
]

STRINGS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n \n ",
    "\t\t\tx",
    "x   ",
    "   x",
    "a  b   c    d",
    "\r\n\r\n",
    "a\r\nb\rc\n",
    "Hello, world!",
    "hello",
    " hello",
    "HELLO hello HeLLo",
    "It's they'll we've I'm don't 'tis",
    "The quick brown fox jumps over the lazy dog.",
    "0",
    "12",
    "123",
    "1234",
    "1234567890",
    "3.14159 -1e-5 0x1F 1,000,000",
    "a1b2c3",
    "①②③ ½ ² Ⅻ ٣٤٥ १२३",
    "你好，世界",
    "今天天气怎么样？我想去北京。",
    "中文English混合text文本",
    "日本語テキスト、ひらがなカタカナ",
    "한국어 텍스트",
    "Привет, как дела?",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Größe Straße café naïve",
    "e\u0301 a\u0308 o\u0302\u0301",
    "🙂",
    "🙂🙂🙂",
    "👩‍👩‍👧 🇩🇪 ❤️ 👍🏽",
    "x🙂y",
    "\u200b\u200d\ufeff\u00a0\u2003\u3000",
    "\x00\x01\x1b[0m\x7f",
    "\ufdd0\ufffd\U0010ffff",
    "def f(x):\n    return x ** 2  # square\n",
    "fn main() {\n\tprintln!(\"{}\", 1 + 1);\n}\n",
    "<html><body class=\"a\">&amp;</body></html>",
    "{\"a\": [1, 2.5, null, true], \"b\": \"\\u00e9\\n\"}",
    "https://example.org/a/b?c=d&e=f#g",
    "C:\\Windows\\System32\\*.dll",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~",
    "!!!???...---===***",
    "$x^2 + \\frac{a}{b} = \\sqrt{c}$",
    "snake_case camelCase PascalCase kebab-case SCREAMING_SNAKE",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ab" * 30,
    " " * 50 + "x" + "\n" * 20,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "- [ ] todo\n- [x] done\n\n> quote\n\n```rust\nlet x = 1;\n```\n",
    "<think>",
    "</think>",
    "<think>\nwhy\n</think>\n\nbecause",
    "<｜User｜>Hi<｜Assistant｜><think>\n",
    "<｜begin▁of▁sentence｜>You are terse.<｜User｜>x<｜Assistant｜>y<｜end▁of▁sentence｜>",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "<|EOT|><｜▁pad▁｜><｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>",
    "a <think> b </think> c",
    "<think",
    "<<think>>",
    "< think >",
    "<|User|> <｜User> <｜user｜>",
    "x<｜User｜><｜User｜>\n\n<｜User｜> y",
]


def train():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    splits = [pre_tokenizers.Split(Regex(e), "isolated") for e in EXPRESSIONS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, normalized=False, special=True) for t in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=1200, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens([AddedToken(t, normalized=True, special=t == "<|EOT|>") for t in NOT_SPECIAL])
    return tokenizer


def ids(tokenizer):
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in STRINGS]


def write(path, data):
    lines = ",\n".join(f" {json.dumps(k, ensure_ascii=False)}: {json.dumps(v, ensure_ascii=False)}" for k, v in data.items())
    pathlib.Path(path).write_text("{\n" + lines + "\n}\n", encoding="utf-8")


if len(sys.argv) == 3:
    write(sys.argv[2], {"strings": STRINGS, "ids": ids(Tokenizer.from_file(sys.argv[1]))})
else:
    v3_like = train()
    v3_like.save(str(DATA / "v3-like-tokenizer.json"), pretty=False)
    config = {"bos_token": {"__type": "AddedToken", "content": SPECIAL[0]}, "eos_token": {"content": SPECIAL[1]}}
    write(DATA / "v3-like-tokenizer_config.json", {**config, "add_bos_token": True})
    tiny = Tokenizer.from_file(str(DATA / "tiny-r1-tokenizer.json"))
    generator = "tools/templates/make_tokenizer.py, tokenizers " + tokenizers.__version__
    write(DATA / "tokens.json", {"generator": generator, "strings": STRINGS, "v3-like": ids(v3_like), "tiny-r1": ids(tiny)})
