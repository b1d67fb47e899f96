"""Texts that say nothing of the picture beside them: rules, each with a name, of which the first that fits is given.

The rules follow what web corpora are cleaned of (the filters of C4, Gopher and CC12M name several), put
into our own words for captions. They are English where they name phrases; the others hold in any script.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

#: Characters that are looked at; the time of some rules grows with the square of it.
_READ = 2000

_CJK = "぀-ヿ㐀-䶿一-鿿豈-﫿"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+(?:['’-][^\W_{_CJK}]+)*")

_ADDRESS = re.compile(
    r"(?:https?://|www\.)\S+|\b[\w.+-]+@[\w-]+\.\w{2,}\b|\b[\w-]+(?:\.[\w-]+)*\.(?:com|net|org|info|co\.uk|de|io|html?|php)(?:/\S*)?",
    re.I,
)
_EXTENSION = r"(?:jpe?g|jpe|jfif|png|gif|webp|bmp|tiff?|heic|avif|svg|psd|pdf|mp4|mov|raw|cr2|nef|arw|dng)"
_FILE = re.compile(rf"[^\s/\\]+(?: [^\s/\\]+){{0,6}}\.{_EXTENSION}", re.I)
#: How cameras, phones and content systems begin the names of their files, and what may follow besides numbers.
_CAMERA = re.compile(
    "img|image|dscf?|dscn|pict?|p|photo|picture|screen|screenshot|scan|mvi|gopr|pxl|wp|sam|cimg|dji|whatsapp|thumb|thumbnail|"
    "untitled|unnamed|download|file|slide|figure|fig|attachment|copy"
)
_FOLLOW = re.compile(r"\d+|img|image|shot|at|am|pm|wa|edit|edited|copy|of|x|scaled|final|cropped|large|small")
_CODE = re.compile(
    r"(?=\S*\d)[0-9a-f]{8,}(?:-[0-9a-f]{4,})*|(?=\S*\d)(?=\S*[_-])[\w-]{16,}|[A-Z]{1,4}[-_]?\d{3,}\w*", re.A
)
_MARKUP = re.compile(
    r"</?[a-z][a-z0-9]*(?:\s[^<>]*)?/?>|&(?:nbsp|amp|quot|lt|gt|#\d+);|\{\{|\}\}|\[/?(?:img|url|caption|gallery|embed|quote)\b[^\]]*\]",
    re.I,
)
_PLACEHOLDER = re.compile(
    r"(?:an? |the |my |no |your |default |blank |featured |main |cover |header |hero |profile |product |post |blog |"
    r"article |alt |missing |sample |small |large |full ?size |loading )*"
    r"(?:images?|photos?|photographs?|pictures?|pics?|thumbnails?|thumbs?|logos?|banners?|icons?|avatars?|backgrounds?|"
    r"untitled|unnamed|null|none|nan|undefined|n/?a|alt(?:ernative)? ?text|alt|placeholder|caption|title|gallery|slides?|"
    r"slideshow|figures?|screenshots?|attachments?|test|spacer|loading|video|advertisement|ad)"
    r"(?: (?:here|not (?:available|found)|(?:un)?available|goes here|coming soon|result|\#?\d+|of \d+|credit))*",
    re.I,
)


def _phrases(*alternatives: str) -> re.Pattern[str]:
    return re.compile(r"\b(?:" + "|".join(alternatives) + r")\b", re.I)


_MACHINE = _phrases(
    r"(?:this )?(?:image|photo|picture) may contain",
    r"may be an? (?:image|meme|cartoon|graphic|closeup|close-up|black-and-white image|illustration|doodle|selfie|screenshot)",
    r"no (?:photo|image|alt(?:ernative)?(?: text)?|automatic alt text|description|caption) (?:description )?(?:is )?(?:available|provided)",
    r"automatically generated (?:alt(?:ernative)? text|description|caption)",
    r"description automatically generated",
    r"alt(?:ernative)? text (?:for|of) (?:this |the )?(?:image|picture)",
)
_STOCK = _phrases(
    r"(?:royalty[- ]free|stock) (?:photos?|photography|pictures?|images?|vectors?|illustrations?|footage|cliparts?)",
    r"(?:premium|free) (?:photo|vector|psd|clip ?art)s?",
    r"shutterstock|istock(?:photo)?|getty ?images?|dreamstime|alamy|123rf|depositphotos|adobe ?stock|fotolia|bigstock|"
    r"vectorstock|freepik|pngtree|pngwing|clipartmax|colourbox|photocase|canstock(?:photo)?|fotosearch|pond5|eyeem",
    r"(?:high[- ]res(?:olution)?|editorial) (?:stock )?(?:photo|picture|image)s?",
    r"(?:hd|4k|desktop|mobile|phone|iphone|android|free) wallpapers?|wallpapers? (?:hd|download|free)",
    r"clip ?art (?:free|download|images?|library)|png (?:transparent|download|clip ?art|image)|transparent png",
)
_CALL = _phrases(
    r"(?:click|tap|press)(?: (?:on|the|this|image|photo|picture|link|thumbnail))* (?:here|to|for)",
    r"(?:click|tap) (?:on )?(?:the )?(?:image|photo|picture|thumbnail)",
    r"(?:view|see|show|open|load) (?:the )?(?:full|larger|large|bigger|original|more)(?:[- ]?(?:size|sized|res(?:olution)?))?"
    r"(?: (?:image|photo|picture|version|details|info|here))?$",
    r"(?:read|learn|find out|discover) more$|(?:continue|keep) reading",
    r"(?:buy|shop|order|book|subscribe|sign up|register|download|donate|enquire|apply) (?:it )?(?:now|today|here|online)",
    r"add to (?:cart|basket|bag|wish ?list|favou?rites)|free (?:shipping|delivery|returns)|in stock|out of stock|sold out",
    r"(?:best|lowest|cheap(?:est)?) prices?|\d+ ?% off|money[- ]back guarantee|promo code|coupon",
    r"(?:follow|like|find|contact) us(?: on)?|share (?:this|on)|pin (?:it|this)|link in (?:my |the )?bio|swipe (?:up|left)",
)
_FURNITURE = _phrases(
    r"all rights reserved|copyright|privacy policy|cookie(?:s)? (?:policy|settings|consent)|(?:use|accept|uses) cookies|"
    r"terms (?:of (?:use|service)|and conditions|& conditions)",
    r"lorem ipsum|dolor sit amet|javascript|your browser|page not found|404 (?:error|not found)|access denied|"
    r"powered by \w+|posted (?:by|on|in)|leave a (?:comment|reply)|comments? (?:are )?(?:closed|off)|skip to (?:main )?content|"
    r"(?:back|return|go) to (?:the )?(?:top|home|homepage)|(?:next|previous) (?:post|page|image|slide|article)|"
    r"image (?:source|credits?|courtesy)|photo (?:credits?|courtesy)|courtesy of",
)
_COPYRIGHT = re.compile(r"[©®]\s*\w|\(c\)\s*\d{4}", re.I)


def words(text: str) -> list[str]:
    """Runs of letters and digits; of Chinese and Japanese, which set no spaces, every character."""
    return _WORD.findall(text)


def alphabetic(text: str) -> float:
    """The share of letters among the characters that are not spaces, 0 to 1."""
    seen = [c for c in text if not c.isspace()]
    return sum(c.isalpha() for c in seen) / len(seen) if seen else 0.0


def _addresses(text: str) -> bool:
    return sum(len(m.group()) for m in _ADDRESS.finditer(text)) > 0.3 * len(text)


def _file_name(text: str) -> bool:
    if _FILE.fullmatch(text) or _CODE.fullmatch(text):
        return True
    tokens = re.findall(r"[^\W\d_]+|\d+", text.casefold())
    if not any(t.isdigit() for t in tokens) or not _CAMERA.fullmatch(tokens[0]):
        return False
    return all(_FOLLOW.fullmatch(t) for t in tokens[1:])


def _hashtags(text: str) -> bool:
    tokens = text.split()
    return sum(t[0] in "#@" for t in tokens) > 0.6 * len(tokens)


def _repeated(text: str) -> bool:
    if re.search(r"(\S)\1{7}", text):
        return True
    said = [w.casefold() for w in words(text)]
    if len(said) < 6:
        return False
    return len(set(said)) < 0.4 * len(said) or Counter(said).most_common(1)[0][1] > 0.5 * len(said)


def _listing(text: str) -> bool:
    """Words set off by separators, as shops and search engines are baited."""
    parts = [p for p in re.split(r"[|,;/•·»>]+", text) if p.strip()]
    return len(parts) >= 8 and len(words(text)) < 2 * len(parts)


#: Name and test, in the order in which they are tried; the text has no spaces at its ends.
RULES: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("empty", lambda t: not any(c.isalnum() for c in t)),
    ("file_name", _file_name),
    ("address", _addresses),
    ("placeholder", lambda t: _PLACEHOLDER.fullmatch(t.strip(" .:-_!\"'()[]#")) is not None),
    ("hashtags", _hashtags),
    ("not_letters", lambda t: alphabetic(t) < 0.5),
    ("markup", lambda t: len(_MARKUP.findall(t)) > 0),
    ("machine_made", lambda t: _MACHINE.search(t) is not None),
    ("stock_site", lambda t: _STOCK.search(t) is not None),
    ("call_to_action", lambda t: _CALL.search(t) is not None),
    ("page_furniture", lambda t: _FURNITURE.search(t) is not None or _COPYRIGHT.search(t) is not None),
    ("repeated", _repeated),
    ("keyword_list", _listing),
)


def boilerplate(text: str) -> str | None:
    """The name of the first rule that marks the text as boilerplate, or None.

    empty, file_name, address, placeholder, hashtags, not_letters, markup, machine_made, stock_site,
    call_to_action, page_furniture, repeated, keyword_list.
    """
    text = text.strip()
    return next((name for name, holds in RULES if holds(text[:_READ])), None)
