"""`x2i trace`: where a sample comes from, or why a picture is not in the corpus."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from x2i.base.errors import RecipeError
from x2i.cli.console import console, print_json, table


def trace(
    corpus: Annotated[str, typer.Argument(help="The corpus: a folder or a URL.", show_default=False)],
    key: Annotated[str | None, typer.Argument(help="A sample's key, or its beginning.", show_default=False)] = None,
    image: Annotated[str | None, typer.Option(help="SHA-256 of an image, or its beginning: every row of it.")] = None,
    row: Annotated[str | None, typer.Option(help="A row's location in its source, or its id; kept or not.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the lineage as JSON on stdout.")] = False,
) -> None:
    """Tell a sample's lineage: source file and hash, each annotator's values, the rules that let it in, its bytes.

    Example: x2i trace runs/quickstart/corpus 596aa1e7cb875eb7-fda7cb4e-deblur

    Why a file is not in the corpus: x2i trace runs/quickstart/corpus --row trouble_html.jpg
    """
    if sum(x is not None for x in (key, image, row)) != 1:
        raise RecipeError("x2i trace: give one of KEY, --image SHA256 or --row LOCATION")
    from x2i.corpus import trace as traces

    if key is not None:
        told = traces.trace(corpus, key)
    elif image is not None:
        told = traces.trace_image(corpus, image)
    else:
        told = traces.trace_row(corpus, str(row))
    if as_json:
        print_json(told)
    else:
        show(told)


def show(told: dict[str, Any]) -> None:
    """Print a lineage: the sample, then each row with its verdict, its rules and its values."""
    if "sample" in told:
        console.print(_sample(told["sample"]))
    if "image_id" in told:
        console.print(f"image {told['image_id']}: {len(told['rows'])} rows", highlight=False)
    for row in told["rows"] if "rows" in told else [told["row"]]:
        console.print(_row(row))
        console.print(_rules(row))
        console.print(_annotations(row))
    corpus = _branch(None, f"corpus {told['name']}")
    _leaves(corpus, {"folder": told["corpus"], "digest": told["digest"], "recipe's digest": told["recipe_digest"]})
    console.print(corpus)


def _sample(sample: dict[str, Any]) -> Tree:
    tree = _branch(None, f"sample {sample['key']}")
    fields = ("task_type", "instruction", "parameters", "seed", "untouched", "carried", "problem")
    _leaves(tree, {name: sample[name] for name in fields if sample.get(name) not in (None, {}, [])})
    images = _branch(tree, "images")
    for picture in sample["images"]:
        text = f"{picture['width']}x{picture['height']}, {picture['bytes']:,} bytes at {picture['offset']:,}"
        _leaves(images, {picture["file"]: text})
    for other in sample.get("others", []):
        _leaves(tree, {"made with": f"{other['source']}: {other['location']} ({other['row_id']})"})
    place = _branch(tree, f"{sample['shard']}, {sample['size']:,} bytes at {sample['offset']:,}")
    _leaves(place, {"sha256": sample["sha256"], "take it out": sample["extract"]})
    return tree


def _row(row: dict[str, Any]) -> Tree:
    verdict, origin = row["verdict"], row["origin"]
    tree = _branch(None, f"row {row['row_id']}")
    state = {True: "unchanged since", False: "CHANGED since", None: "not compared"}[origin["unchanged"]]
    file = f"{origin['file']} ({state})" if origin["file"] else "not there any more"
    fields = {
        "source": f"{row['source']} ({origin['kind']}, fingerprint {origin['fingerprint'][:16]})",
        "location": row["location"],
        "file": file,
        "unit": f"{row['unit']}, row {row['index']}",
        "image": row["image_id"] or "none",
        "text": row["text"],
        "meta": row["meta"],
        "inputs": row["inputs"],
    }
    _leaves(tree, {name: value for name, value in fields.items() if value not in (None, {}, [])})
    fell = f"fell at {verdict['stage']}: {verdict['reason']} ({verdict['detail']})"
    judged = _branch(tree, "kept" if verdict["kept"] else fell)
    if verdict["survivor"]:
        _leaves(judged, {"stayed instead": f"{verdict['survivor']['location']} ({verdict['survivor']['row_id']})"})
    for other in row["duplicates"]:
        _leaves(judged, {"fell to it": f"{other['location']}: {other['reason']}, {other['distance']} bits apart"})
    for other in row["same_image"]:
        what = "kept" if other["kept"] else other["reason"]
        _leaves(judged, {"same image": f"{other['source']}: {other['location']} ({what})"})
    for sample in row["samples"]:
        _leaves(judged, {"sample": f"{sample['key']} in {sample['shard']}"})
    for sample in row["in_samples_of_others"]:
        _leaves(judged, {"in a sample of another row": f"{sample['key']} in {sample['shard']}"})
    return tree


def _rules(row: dict[str, Any]) -> Any:
    out = table(f"The rules, and {row['location']}", "stage", "rule", "holds", "condition", "values")
    for rule in row["rules"]:
        holds = {True: "[green]yes[/]", False: "[bold red]no[/]", None: "not asked"}[rule["holds"]]
        out.add_row(rule["stage"], Text(rule["rule"]), holds, Text(rule["condition"]), Text(_pairs(rule["values"])))
    return out


def _annotations(row: dict[str, Any]) -> Any:
    out = table("What was measured, and by what", "annotator", "values", "made by")
    for annotation in row["annotations"]:
        made = [f"version {annotation['version']}, fingerprint {annotation['fingerprint'][:16]}"]
        made += [_pairs(annotation["parameters"])] if annotation["parameters"] else []
        made += [f"weights {spec}, SHA-256 {sha[:16]}" for spec, sha in annotation["weights"].items()]
        made += [annotation["lake_file"] or "no longer in the lake"]
        values = _pairs({k: v for k, v in (annotation["values"] or {}).items() if v is not None}) or "none"
        if annotation["asked"] is False:
            values = f"not asked: where {annotation['where']}\n{_pairs(annotation['because'])}"
        out.add_row(annotation["name"], Text(values), Text("\n".join(made)))
    return out


def _pairs(values: dict[str, Any]) -> str:
    shown = {k: "null" if v is None else f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()}
    return "\n".join(f"{k} = {v}" for k, v in shown.items())


def _branch(tree: Tree | None, title: str) -> Tree:
    text = Text(title, style="bold")
    return Tree(text) if tree is None else tree.add(text)


def _leaves(tree: Tree, values: dict[str, Any]) -> None:
    for name, value in values.items():
        tree.add(Text.assemble((f"{name}: ", "dim"), str(value)))
