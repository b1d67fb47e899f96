"""Whether a caption tells what somebody wears and does: by lists of English words, so that no model is needed.

OmniGen keeps pairs whose captions describe attire and action (arXiv 2409.11340, section 3), by a vision-language model. A word
of each list is a weaker sign: "a man in a red coat runs" passes, "he is dressed for dinner" fails, and "a tie game" is
taken for clothes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from x2i.base.errors import RecipeError

_CLOTHES = """
apron armor armour bandana bathrobe beanie belt beret bikini blazer blouse bonnet boot boots bowtie bra bracelet briefs
cape cap caps cardigan cloak clothes clothing coat coats collar corset costume costumes crown dress dresses dressed
dungarees earrings fedora fleece flipflops garment gloves goggles gown gowns hat hats headband headscarf heels helmet
helmets hijab hoodie jacket jackets jeans jersey jerseys jewelry jewellery jumper jumpsuit kaftan khakis kilt kimono
leggings leotard lingerie mittens necklace necktie outfit outfits overalls pajamas pyjamas pants parka polo poncho raincoat robe
robes sandals sari sarong scarf scarves shawl shirt shirtless shirts shoes shorts skirt skirts slacks slippers sneakers
socks spacesuit stockings suit suits sunglasses suspenders sweater sweaters sweatpants sweatshirt swimsuit swimsuits swimwear tanktop tie
tights toga trousers tshirt tunic turban turtleneck tutu tux tuxedo underwear uniform uniforms veil vest vests
visor waistcoat wear wearing wears wetsuit wig wore
"""
_ACTION = """
accept argue arrive ascend attend balance bat bathe beat bend bike bite blow bounce bow bowl box brush build carry catch
celebrate chase cheer chew clap clean climb clutch compete cook crawl cross crouch cry cut cycle dance dangle deliver
descend dig dive drag draw drink drive eat embrace enter exercise explore face fall fight film fish flip float fly
follow gallop gather gesture give glance glide grab grasp greet grin grind hang hike hit hold hug hurdle jog juggle jump
kayak kick kiss kneel knit laugh lean leap leave lick lie lift listen look march meet mow open paddle paint perform
pet photograph pick pitch play point pose pour pray prepare present pull punch push race raise reach read relax rest
ride rise row run sail salute scream serve shake shoot shop shout sign sing sit skate ski skip slap sled sleep slide
smell smile smoke snowboard speak spin splash spray squat stand stare step stir stoop stretch stroll study surf swim
swing take talk teach tend throw tie toss touch train travel try tug turn twirl type use wade wait walk wash watch
wave weld whisper whistle work wrestle write yawn yell
"""
_IRREGULAR = """
ate bent bit blew bowed caught dove drank drew drove fell flew fought gave held hit hung knelt lay leapt left lying met
ran read rode rose sang sat shook shot slept slid spoke spun stood stuck swam swung taught threw took tying wrote
"""


def _forms(verb: str) -> list[str]:
    """A regular verb's forms: run, runs, running, runned (which is no word, and does no harm)."""
    if verb.endswith("e") and not verb.endswith("ee"):
        return [verb, f"{verb}s", f"{verb[:-1]}ing", f"{verb}d"]
    if re.search(r"[^aeiou]y$", verb):
        return [verb, f"{verb[:-1]}ies", f"{verb}ing", f"{verb[:-1]}ied"]
    tail = "es" if re.search(r"(s|x|z|ch|sh)$", verb) else "s"
    doubled = verb + verb[-1]  # running; "waitting" is no word either
    return [verb, verb + tail, f"{verb}ing", f"{verb}ed", f"{doubled}ing", f"{doubled}ed"]


#: The lists that come with x2i, by name.
LISTS: dict[str, tuple[str, ...]] = {
    "clothes": tuple(_CLOTHES.split()),
    "action": tuple(dict.fromkeys(f for v in _ACTION.split() for f in _forms(v))) + tuple(_IRREGULAR.split()),
}


def pattern(name: str) -> str:
    """A regular expression, in Python's and RE2's syntax, for any word of a list: one of `LISTS`, or a file, a word a line.

    Raises:
        RecipeError: there is no such list, or it is empty.
    """
    words: Sequence[str] = LISTS.get(name, ())
    if not words:
        try:
            lines = Path(name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(LISTS)
            raise RecipeError(
                f"must_say: {name!r} is none of {known}, and no file of words that can be read ({error})"
            ) from None
        words = [w for w in (line.partition("#")[0].strip() for line in lines) if w]
        if not words:
            raise RecipeError(f"must_say: {name}: holds no word; write one a line")
    return rf"(?i)\b(?:{'|'.join(re.escape(w.lower()) for w in words)})\b"
