"""XMP (ISO 16684-1): the properties of a packet, read with no document type, no entities, and bounds on everything."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from xml.parsers import expat

#: Longest packet, deepest element and most elements that are read.
MOST, DEPTH, ELEMENTS = 4 * 2**20, 64, 50_000

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"

#: Properties by (namespace, name), each with its values; of texts in several languages the default is the first.
Properties = dict[tuple[str, str], list[str]]


class _Refused(Exception):
    """A packet that is not read any further."""


def properties(packet: bytes) -> Properties:
    """The properties of a packet's subject; {} where it cannot be read.

    Structures are not entered: what a picture says of its ingredients is not said of the picture.
    """
    root = _parse(packet[:MOST])
    out: Properties = {}
    if root is None:
        return out
    for subject in (s for rdf in root.iter(f"{{{RDF}}}RDF") for s in rdf):
        for name, value in subject.attrib.items():
            _add(out, name, [value])
        for child in subject:
            _add(out, child.tag, _values(child))
    return out


def _add(out: Properties, name: str, values: list[str]) -> None:
    namespace, _, local = name.removeprefix("{").rpartition("}")
    values = [v.strip() for v in values if v and v.strip()]
    if values and namespace != RDF:
        out.setdefault((namespace, local), []).extend(values)


def _values(node: ET.Element) -> list[str]:
    """A property's values: a text, a resource, or the items of a bag, a sequence or alternatives."""
    if resource := node.get(f"{{{RDF}}}resource"):
        return [resource]
    items = [i for kind in ("Alt", "Bag", "Seq") for i in node.findall(f"{{{RDF}}}{kind}/{{{RDF}}}li")]
    if items:
        items.sort(key=lambda i: i.get(_LANGUAGE, "x-default") != "x-default")  # stable: others stay in their order
        return [i.get(f"{{{RDF}}}resource") or i.text or "" for i in items]
    return [node.text or ""]


def _parse(packet: bytes) -> ET.Element | None:
    builder = ET.TreeBuilder()
    # with namespaces, names come as `URI}name`, which Element wants as `{URI}name`
    parser = expat.ParserCreate(namespace_separator="}")
    open_, seen = 0, 0

    def begin(name: str, attributes: dict[str, str]) -> None:
        nonlocal open_, seen
        open_, seen = open_ + 1, seen + 1
        if open_ > DEPTH or seen > ELEMENTS:
            raise _Refused
        builder.start(_name(name), {_name(k): v for k, v in attributes.items()})

    def end(name: str) -> None:
        nonlocal open_
        open_ -= 1
        builder.end(_name(name))

    def refuse(*_: object) -> None:
        raise _Refused  # XMP has no document type: whoever brings one wants to declare entities

    parser.StartElementHandler, parser.EndElementHandler = begin, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(packet.strip(b"\0 \t\r\n"), True)
        return builder.close()
    except (expat.ExpatError, _Refused, AssertionError, ValueError, LookupError):
        return None


def _name(name: str) -> str:
    return f"{{{name}" if "}" in name else name
