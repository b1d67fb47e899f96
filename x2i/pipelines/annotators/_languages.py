"""Languages: py3langid's identifier, and the language of text seen in a picture.

py3langid (BSD-3-Clause; Lui and Baldwin 2012, "langid.py: an off-the-shelf language identification tool") has its
model in the package. Of text in a picture, the script decides where it says enough, else py3langid among the script's
likely languages. Lines in pictures are short, in capitals, and have misread letters, so that of 140 languages a rare one
often wins by chance. The choice is therefore narrowed to what is commonly written in the script that was seen.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import Any

from x2i.base.packages import need

#: Scripts (first word of a letter's Unicode name) that leave no choice worth making.
ONE = {
    "HANGUL": "ko",
    "GREEK": "el",
    "HEBREW": "he",
    "THAI": "th",
    "ARMENIAN": "hy",
    "GEORGIAN": "ka",
    "BENGALI": "bn",
    "GUJARATI": "gu",
    "GURMUKHI": "pa",
    "TAMIL": "ta",
    "TELUGU": "te",
    "KANNADA": "kn",
    "MALAYALAM": "ml",
    "SINHALA": "si",
    "KHMER": "km",
    "LAO": "lo",
}
#: Scripts that several languages share, ISO 639-1.
SHARED = {
    "LATIN": "en de fr es it pt nl sv da no fi pl cs sk hu ro tr id vi hr",
    "CYRILLIC": "ru uk bg sr be kk mk",
    "ARABIC": "ar fa ur",
    "DEVANAGARI": "hi mr ne",
}
_KANA = {"HIRAGANA", "KATAKANA"}
_FORMS = {"FULLWIDTH": "LATIN", "HALFWIDTH": "KATAKANA"}


def identifier(annotator: str) -> Any:
    """A `LanguageIdentifier` whose `classify` and `rank` give (ISO 639-1 code, probability).

    Raises:
        X2IError: py3langid is missing.
    """
    langid = need("py3langid.langid", "py3langid", annotator)
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def scripts(text: str) -> Counter[str]:
    """How many letters of each script a text has, e.g. {"LATIN": 12, "CJK": 3}."""
    found = Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    for form, script in _FORMS.items():
        if form in found:
            found[script] += found.pop(form)
    return found


def language(text: str, known: Any, least_letters: int = 12, least_score: float = 0.5) -> str | None:
    """A guess at the language, ISO 639-1, or None where the text is too short or the guess too weak.

    Args:
        known: see `identifier`.
        least_letters: fewest letters that decide between languages of one script; where the script alone
            decides, two are enough.
        least_score: least probability among the languages that come into question.
    """
    found = scripts(text)
    if found.total() < 2:
        return None
    east = found["CJK"] + sum(found[k] for k in _KANA)
    script, count = found.most_common(1)[0]
    if east > count:
        script, count = "CJK", east
    if script in _KANA or script == "CJK":
        kana = east - found["CJK"]
        return "ja" if kana * 10 >= east else "zh"  # Japanese running text is mostly kana; Chinese has none
    if script in ONE:
        return ONE[script]
    if script not in SHARED or count < least_letters:
        return None
    likely = SHARED[script].split()
    scores = {code: score for code, score in known.rank(text.lower()) if code in likely}
    best = max(scores, key=lambda code: scores[code])
    total = sum(scores.values())
    return best if total > 0 and scores[best] / total >= least_score else None
