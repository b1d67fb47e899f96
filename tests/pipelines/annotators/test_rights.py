"""`rights` on real photographs that carry marks as their writers leave them, and on damage."""

from __future__ import annotations

import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import corpora
from tests.pipelines.annotating import photo, run
from tests.pipelines.annotators.marked import (
    FILES,
    avif_with,
    iim,
    jpeg_with,
    packet,
    saved,
    store,
    webp_with,
    with_chunk,
    with_segment,
)
from x2i.corpus.corpus import Corpus
from x2i.pipelines.annotators._licences import spdx
from x2i.pipelines.annotators._marks import blocks, exif_texts
from x2i.pipelines.annotators._xmp import properties
from x2i.pipelines.annotators.base import Batch, Item
from x2i.pipelines.annotators.rights import Rights, RightsConfig


def rights(data: bytes, meta: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    batch = Batch([Item("0" * 64, None, data, meta=json.dumps(meta or {}))])
    return dict(run(Rights(RightsConfig(**config)), batch).to_pylist()[0])


XMP = packet(
    'plus:DataMining="http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-AIMLTRAINING" photoshop:Credit="The Agency" '
    'xmpRights:WebStatement="https://example.org/terms" '
    'plus:ModelReleaseStatus="http://ns.useplus.org/ldf/vocab/MR-LMR" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"',
    '<dc:rights><rdf:Alt><rdf:li xml:lang="de">© A. Muster</rdf:li><rdf:li xml:lang="x-default">© A. Sample</rdf:li></rdf:Alt></dc:rights>'
    "<dc:creator><rdf:Seq><rdf:li>A. Sample</rdf:li><rdf:li>B. Other</rdf:li></rdf:Seq></dc:creator>"
    '<cc:license rdf:resource="https://creativecommons.org/licenses/by-nc/4.0/"/>',
)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_xmp_is_read_from_every_kind_of_file(kind: str) -> None:
    if kind == "PNG":
        body = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP
        data = with_chunk(saved("PNG"), b"iTXt", body)
    elif kind == "TIFF":
        data = saved("TIFF", tiffinfo={700: XMP})
    else:
        data = saved(kind, xmp=XMP)
    assert rights(data) == {
        "licence": "CC-BY-NC-4.0",
        "licence_from": "xmp",
        "copyright": "© A. Sample",
        "creator": "A. Sample; B. Other",
        "credit": "The Agency",
        "terms": None,
        "terms_url": "https://example.org/terms",
        "data_mining": "DMI-PROHIBITED-AIMLTRAINING",
        "source_type": "digitalCapture",
        "ai_generated": False,
        "c2pa": False,
        "noai": None,
        "consent": None,
        "model_release": "MR-LMR",
        "opt_out": True,
        "opt_out_reason": "data_mining: DMI-PROHIBITED-AIMLTRAINING",
    }


def test_a_file_that_says_nothing_has_nulls() -> None:
    found = rights(saved("JPEG"))
    assert found.pop("c2pa") is False
    assert set(found.values()) == {None}


def test_exif_is_read_in_utf8_and_windows_tags() -> None:
    exif = Image.Exif()
    exif[0x8298] = "© Zoë, CC BY-SA 3.0".encode()
    exif[0x9C9D] = "Zoë".encode("utf-16-le") + b"\0\0"
    for data in (saved("JPEG", exif=exif), saved("WEBP", exif=exif), saved("PNG", exif=exif)):
        found = rights(data)
        assert (found["copyright"], found["creator"]) == ("© Zoë, CC BY-SA 3.0", "Zoë")
        assert (found["licence"], found["licence_from"]) == ("CC-BY-SA-3.0", "exif")
        assert found["opt_out"] is None
    exif[0x8298] = "Photographer\0Editor"
    assert rights(saved("JPEG", exif=exif))["copyright"] == "Photographer Editor"


def test_pngs_own_keywords_are_read() -> None:
    plain = with_chunk(with_chunk(saved("PNG"), b"tEXt", "Copyright\0© Zoë".encode("latin-1")), b"tEXt", b"Author\0Ada")
    packed = with_chunk(saved("PNG"), b"zTXt", b"Copyright\0\0" + zlib.compress("© Zoë".encode("latin-1")))
    assert (rights(plain)["copyright"], rights(plain)["creator"]) == ("© Zoë", "Ada")
    assert rights(packed)["copyright"] == "© Zoë"


@pytest.mark.parametrize(("charset", "text"), [(b"", "© Zoë"), (b"\x1b%G", "© 山田")])
def test_iptc_is_read_from_photoshops_resources(charset: bytes, text: str) -> None:
    coded = text.encode("utf-8" if charset else "latin-1")
    sets = iim((1, 90, charset), (2, 80, b"One"), (2, 80, b"Two"), (2, 110, b"Wire"), (2, 116, coded))
    sets += struct.pack(">BBBHI", 0x1C, 2, 120, 0x8004, 3) + b"abc"  # a long length, as for large sets
    other = b"8BIM" + struct.pack(">H", 0x03ED) + b"\0\0" + struct.pack(">I", 3) + b"abc\0"
    resource = b"8BIM" + struct.pack(">H", 0x0404) + b"\3abc" + struct.pack(">I", len(sets)) + sets
    data = with_segment(saved("JPEG"), 0xED, b"Photoshop 3.0\0" + other + resource)
    found = rights(data)
    assert (found["copyright"], found["creator"], found["credit"]) == (text, "One; Two", "Wire")


@pytest.mark.parametrize("kind", FILES)
def test_content_credentials_tell_of_models_and_of_training(kind: str) -> None:
    action = {
        "action": "c2pa.created",
        "digitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia",
    }
    made = rights(FILES[kind](store("c2pa.actions.v2", {"actions": [action]})))
    assert (made["c2pa"], made["source_type"], made["ai_generated"]) == (True, "trainedAlgorithmicMedia", True)
    assert made["opt_out"] is None
    uses = {"cawg.ai_inference": {"use": "allowed"}, "cawg.ai_generative_training": {"use": "notAllowed"}}
    kept = rights(FILES[kind](store("cawg.training-mining", {"entries": uses})))
    assert (kept["opt_out"], kept["opt_out_reason"]) == (True, "c2pa: cawg.ai_generative_training notAllowed")
    uses = {"c2pa.ai_training": {"use": "allowed"}, "c2pa.data_mining": {"use": "allowed"}}
    assert rights(FILES[kind](store("c2pa.training-mining", {"entries": uses})))["opt_out"] is False


@pytest.mark.parametrize(
    ("said", "value", "opt_out"),
    [
        ('plus:DataMining="DMI-ALLOWED"', "DMI-ALLOWED", False),
        ('plus:DataMining="http://ns.useplus.org/ldf/vocab/DMI-UNSPECIFIED"', "DMI-UNSPECIFIED", None),
        ('plus:DataMining="http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED"', "DMI-PROHIBITED", True),
        (
            'plus:DataMining="DMI-PROHIBITED-EXCEPTSEARCHENGINEINDEXING"',
            "DMI-PROHIBITED-EXCEPTSEARCHENGINEINDEXING",
            True,
        ),
        ('plus:DataMining="DMI-PROHIBITED-SEECONSTRAINT"', "DMI-PROHIBITED-SEECONSTRAINT", True),
        ('tdm:reservation="1"', "tdm-reservation: 1", True),
        ('tdm:reservation="0"', "tdm-reservation: 0", False),
        ('plus:DataMining="DMI-ALLOWED" tdm:reservation="1"', "DMI-ALLOWED", True),  # whatever forbids, goes before
    ],
)
def test_data_mining_by_plus_and_tdmrep(said: str, value: str, opt_out: bool | None) -> None:
    found = rights(saved("JPEG", xmp=packet(said)))
    assert (found["data_mining"], found["opt_out"]) == (value, opt_out)


def test_a_generated_picture_is_told_by_iptc() -> None:
    said = 'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/{}"'
    for kind, generated in (
        ("trainedAlgorithmicMedia", True),
        ("compositeWithTrainedAlgorithmicMedia", True),
        ("algorithmicMedia", False),
    ):
        assert (
            rights(saved("PNG", pnginfo=None) and saved("JPEG", xmp=packet(said.format(kind))))["ai_generated"]
            is generated
        )
    assert rights(saved("JPEG", xmp=packet('Iptc4xmpExt:AISystemUsed="Some Model 3"')))["ai_generated"] is True


def test_what_is_said_of_an_ingredient_is_not_said_of_the_picture() -> None:
    inner = (
        '<xmpMM:Ingredients><rdf:Bag><rdf:li><rdf:Description plus:DataMining="DMI-PROHIBITED"/></rdf:li></rdf:Bag>'
        "</xmpMM:Ingredients>"
    )
    assert rights(saved("JPEG", xmp=packet(elements=inner)))["opt_out"] is None


@pytest.mark.parametrize(
    ("meta", "directives", "noai"),
    [
        ({"x-robots-tag": "noai, noimageai"}, "robots: noai; robots: noimageai", True),
        ({"headers": {"X-Robots-Tag": ["max-snippet:0, NOINDEX"]}}, "robots: noindex", True),
        ({"x-robots-tag": "googlebot: noindex, noai"}, None, False),  # spoken to another
        ({"x-robots-tag": "mybot: noai"}, "robots: noai", True),
        ({"x-robots-tag": "all"}, None, False),
        ({"robots": "nofollow"}, None, False),
    ],
)
def test_robots_directives_in_the_sources_metadata(meta: dict[str, Any], directives: str | None, noai: bool) -> None:
    found = rights(saved("JPEG"), meta, agents=["MyBot"])
    assert (found["noai"], found["opt_out_reason"]) == (noai, directives)
    assert found["opt_out"] is (True if directives else None)


def test_flags_and_people_and_licences_of_the_source() -> None:
    plain = saved("JPEG")
    assert rights(plain, {"opt_out": "yes"})["opt_out_reason"] == "meta: opt_out"
    assert rights(plain, {"opt_out": False})["opt_out"] is None
    assert rights(plain, {"consent": "withdrawn"})["opt_out"] is True
    given = rights(plain, {"consent": True})
    assert (given["consent"], given["opt_out"]) == (True, False)
    assert rights(plain, {"consent": True, "training_consent": "no"})["consent"] is False
    assert rights(plain, {"tdm-reservation": 1})["data_mining"] == "tdm-reservation: 1"
    assert rights(plain, {"spawning": 1}, opt_out_keys=["spawning"])["opt_out"] is True
    flickr = {
        "license": "Attribution-ShareAlike License",
        "license_url": "http://creativecommons.org/licenses/by-sa/2.0/",
        "author": {"name": "Ada"},
    }
    found = rights(plain, flickr)
    assert (found["licence"], found["licence_from"], found["creator"]) == ("CC-BY-SA-2.0", "meta", "Ada")
    assert found["terms_url"] == flickr["license_url"]
    assert rights(plain, {"license": "by-nc", "license_version": "2.5"})["licence"] == "CC-BY-NC-2.5"
    assert rights(plain, {"rights": "Ask the museum"})["licence"] == "Ask the museum"
    img2dataset = {"exif": json.dumps({"Image Copyright": "(c) Ada", "Image Artist": "Ada L."})}
    found = rights(plain, img2dataset)
    assert (found["copyright"], found["creator"]) == ("(c) Ada", "Ada L.")


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("https://creativecommons.org/licenses/by-nc-sa/3.0/de/", "CC-BY-NC-SA-3.0"),
        ("http://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("https://creativecommons.org/publicdomain/mark/1.0/", "CC-PDM-1.0"),
        ("CC0", "CC0-1.0"),
        ("cc-by-4.0", "CC-BY-4.0"),
        ("CC BY-NC-ND 2.0", "CC-BY-NC-ND-2.0"),
        ("CC BY SA", "CC-BY-SA"),
        ("Creative Commons Attribution-NonCommercial-NoDerivs 2.0 Generic", "CC-BY-NC-ND-2.0"),
        ("Attribution 4.0 International", "CC-BY-4.0"),
        ("MIT", None),
        ("cc bystander", None),
        ("All rights reserved", None),
    ],
)
def test_licences_in_all_spellings(said: str, known: str | None) -> None:
    assert spdx(said) == known


def test_xml_with_a_document_type_is_refused() -> None:
    bomb = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'
    assert properties(packet('photoshop:Credit="x"'))
    assert properties(packet('photoshop:Credit="x"', before=bomb)) == {}
    assert properties(packet('photoshop:Credit="x"', before=bomb).decode().encode("utf-16")) == {}
    assert properties(packet(elements="<dc:rights>" * 100 + "</dc:rights>" * 100)) == {}  # too deep


def test_packed_text_unpacks_to_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("x2i.pipelines.annotators._marks.MOST", 1000)
    body = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b" " * 10**7)
    assert len(blocks(with_chunk(saved("PNG"), b"iTXt", body)).xmp) == 1000


def test_long_and_strange_texts_are_cut_to_one_line() -> None:
    exif = Image.Exif()
    exif[0x8298] = "a\nb\x07c " + "x" * 5000
    found = rights(saved("JPEG", exif=exif))["copyright"]
    assert found.startswith("a b c x")
    assert len(found) == 1000


def test_damage_anywhere_costs_only_what_is_damaged() -> None:
    """Every file cut short, and with bytes changed: never an exception, always a row."""
    exif = Image.Exif()
    exif[0x8298] = "(c) Ada"
    manifests = store("cawg.training-mining", {"entries": {"cawg.ai_training": {"use": "notAllowed"}}})[-400:]
    sets = iim((2, 116, b"(c) Ada"))
    resource = b"Photoshop 3.0\x008BIM" + struct.pack(">H", 0x0404) + b"\0\0" + struct.pack(">I", len(sets)) + sets
    whole = [
        with_segment(saved("JPEG", exif=exif, xmp=XMP), 0xED, resource),
        jpeg_with(manifests),
        with_chunk(
            with_chunk(saved("PNG", exif=exif), b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP), b"caBX", manifests
        ),
        webp_with(manifests),
        avif_with(manifests),
        saved("TIFF", tiffinfo={700: XMP, 33432: "(c) Ada"}),
    ]
    rng = random.Random(1)
    damaged = [b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF0000WEBP"]
    for data in whole:
        marks = data[:4000] if data[:2] == b"\xff\xd8" else data
        damaged += [data[: rng.randrange(len(data))] for _ in range(12)]
        for _ in range(40):
            changed = bytearray(data)
            for _ in range(8):
                changed[rng.randrange(len(marks))] = rng.randrange(256)
            damaged.append(bytes(changed))
    batch = Batch([Item("0" * 64, None, d, meta=m) for d in damaged for m in ("{}",)])
    batch += [Item("0" * 64, None, whole[0], meta=m) for m in ("", "[]", "[" * 100_000, '{"exif": "[", "license": []}')]
    table = run(Rights(RightsConfig()), Batch(batch))
    assert table.num_rows == len(damaged) + 4
    assert table["opt_out"].to_pylist()[-4:] == [True] * 4


def test_registry_photographs_and_a_garbage_exif() -> None:
    assert rights(photo("rocket"))["c2pa"] is False
    assert exif_texts(b"Exif\0\0" + bytes(range(200))) == {}
    assert blocks(b"not an image").xmp == b""


def test_who_opts_out_is_not_in_the_corpus_and_the_licence_is_carried_to_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = corpora.write_photos

    def marked(folder: Path) -> None:
        plain(folder)
        for name, said in (
            ("astronaut", 'plus:DataMining="DMI-PROHIBITED"'),
            ("coffee", 'dc:rights="© Ada, CC BY 4.0"'),
        ):
            image = Image.open(folder / f"{name}.png").convert("RGB")
            image.save(folder / f"{name}_marked.jpg", quality=95, xmp=packet(said))
            (folder / f"{name}_marked.txt").write_text(f"The {name}, marked.")
        for name in ("astronaut", "coffee"):
            (folder / f"{name}.png").unlink()
        (folder / "copy.png").unlink()

    monkeypatch.setattr(corpora, "write_photos", marked)
    recipe = corpora.RECIPE.replace("annotators:\n", "annotators:\n  rights:\n").replace(
        "  where:\n", "  where:\n    allowed: not coalesce(rights.opt_out, false)\n"
    )
    built = corpora.build(tmp_path, recipe + "  carry: [rights.licence, rights.opt_out]\n")
    corpus = Corpus(built.corpus)
    rows = {r["location"]: r for r in corpus.selection.to_pylist()}
    assert rows["astronaut_marked.jpg"]["reason"] == "allowed"
    assert rows["coffee_marked.jpg"]["kept"]
    for sample in corpus:
        ours = sample.provenance["location"] == "coffee_marked.jpg"
        carried = {"rights.licence": "CC-BY-4.0" if ours else None, "rights.opt_out": None}
        assert sample.provenance["carried"] == carried


def test_an_empty_batch_gives_an_empty_table() -> None:
    assert run(Rights(RightsConfig()), Batch([])).num_rows == 0
