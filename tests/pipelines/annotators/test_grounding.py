"""`grounding`: real architectures, random weights, in the published formats; the two libraries against each other."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.pipelines.annotating import batch, drawn, photo, run
from tests.pipelines.annotators.devices import gpu
from x2i.base.errors import X2IError
from x2i.pipelines.annotators._groundingdino import Published, Transformers, prepare, size_for
from x2i.pipelines.annotators._phrases import Prompt, owners, prompts
from x2i.pipelines.annotators.base import Batch
from x2i.pipelines.annotators.grounding import Grounding, GroundingConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = [
    "cat",
    "dog",
    "red",
    "a",
    "the",
    "astronaut",
    "space",
    "suit",
    "flag",
    "remote",
    "control",
    "coffee",
    "cup",
    "spoon",
]
#: transformers' model has BERT's ids of [CLS], [SEP], "." and "?" built in.
FIXED = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}

CONFIG = """
modelname = "groundingdino"
backbone = "swin_T_224_1k"
position_embedding = "sine"
pe_temperatureH = pe_temperatureW = 20
return_interm_indices = [1, 2, 3]
backbone_freeze_keywords = None
enc_layers, dec_layers, pre_norm = 2, 2, False
dim_feedforward, hidden_dim, dropout, nheads = 64, 256, 0.0, 4
num_queries, query_dim, num_patterns, num_feature_levels = 30, 4, 0, 4
enc_n_points = dec_n_points = 4
two_stage_type = "standard"
two_stage_bbox_embed_share = two_stage_class_embed_share = False
transformer_activation = "relu"
dec_pred_bbox_embed_share = True
dn_box_noise_scale, dn_label_noise_ratio, dn_labelbook_size = 1.0, 0.5, 2000
dn_label_coef = dn_bbox_coef = 1.0
embed_init_tgt = True
max_text_len = 256
text_encoder_type = "bert-base-uncased"
use_text_enhancer = use_fusion_layer = use_text_cross_attention = sub_sentence_present = True
use_checkpoint = use_transformer_ckpt = True
text_dropout, fusion_dropout, fusion_droppath = 0.0, 0.0, 0.1
"""

#: From the authors' parameter names to transformers', in order; queries, keys and values apart are made first.
RENAMES: list[tuple[str, Any]] = [
    (r"^backbone\.0\.patch_embed\.proj", "model.backbone.conv_encoder.model.swin.embeddings.patch_embeddings.projection"),
    (r"^backbone\.0\.patch_embed", "model.backbone.conv_encoder.model.swin.embeddings"),
    (r"^backbone\.0\.norm(\d)", lambda m: f"model.backbone.conv_encoder.model.hidden_states_norms.stage{int(m[1]) + 1}"),
    (r"^backbone\.0\.layers", "model.backbone.conv_encoder.model.swin.encoder.layers"),
    (r"(blocks\.\d+)\.norm1", r"\1.layernorm_before"),
    (r"(blocks\.\d+)\.norm2", r"\1.layernorm_after"),
    (r"(blocks\.\d+)\.attn\.relative_position_bias_table", r"\1.attention.relative_position_bias.relative_position_bias_table"),
    (r"(blocks\.\d+)\.attn\.(query|key|value)", lambda m: f"{m[1]}.attention.{m[2][0]}_proj"),
    (r"(blocks\.\d+)\.attn\.proj", r"\1.attention.o_proj"),
    (r"^bert\.", "model.text_backbone."),
    (r"^feat_map", "model.text_projection"),
    (r"^input_proj", "model.input_proj_vision"),
    (r"^transformer\.(level_embed|enc_output)", r"model.\1"),
    (r"^transformer\.tgt_embed", "model.query_position_embeddings"),
    (r"^transformer\.enc_out_bbox_embed", "model.encoder_output_bbox_embed"),
    (r"^transformer\.decoder\.ref_point_head", "model.decoder.reference_points_head"),
    (r"^transformer\.decoder\.bbox_embed", "model.decoder.bbox_embed"),
    (r"^transformer\.decoder\.norm", "model.decoder.layer_norm"),
    (r"^transformer\.encoder\.layers\.(\d+)\.norm1", r"model.encoder.layers.\1.deformable_layer.self_attn_layer_norm"),
    (r"^transformer\.encoder\.layers\.(\d+)\.norm2", r"model.encoder.layers.\1.deformable_layer.final_layer_norm"),
    (r"^transformer\.encoder\.layers\.(\d+)\.(linear)?", r"model.encoder.layers.\1.deformable_layer.\2"),
    (r"^transformer\.encoder\.text_layers\.(\d+)\.norm1", r"model.encoder.layers.\1.text_enhancer_layer.layer_norm_before"),
    (r"^transformer\.encoder\.text_layers\.(\d+)\.norm2", r"model.encoder.layers.\1.text_enhancer_layer.layer_norm_after"),
    (r"^transformer\.encoder\.text_layers\.(\d+)", r"model.encoder.layers.\1.text_enhancer_layer"),
    (r"^transformer\.encoder\.fusion_layers\.(\d+)", r"model.encoder.layers.\1.fusion_layer"),
    (r"fusion_layer\.gamma_v", "fusion_layer.vision_param"),
    (r"fusion_layer\.gamma_l", "fusion_layer.text_param"),
    (r"fusion_layer\.(.*?)(^|[._])v([._])", r"fusion_layer.\1\2vision\3"),
    (r"fusion_layer\.(.*?)(^|[._])l([._])", r"fusion_layer.\1\2text\3"),
    (r"fusion_layer\.attn\.v_proj", "fusion_layer.attn.vision_proj"),
    (r"fusion_layer\.attn\.l_proj", "fusion_layer.attn.text_proj"),
    (r"^transformer\.decoder\.layers\.(\d+)\.cross_attn", r"model.decoder.layers.\1.encoder_attn"),
    (r"^transformer\.decoder\.layers\.(\d+)\.ca_text", r"model.decoder.layers.\1.encoder_attn_text"),
    (r"^transformer\.decoder\.layers\.(\d+)\.catext_norm", r"model.decoder.layers.\1.encoder_attn_text_layer_norm"),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm1", r"model.decoder.layers.\1.encoder_attn_layer_norm"),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm2", r"model.decoder.layers.\1.self_attn_layer_norm"),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm3", r"model.decoder.layers.\1.final_layer_norm"),
    (r"^transformer\.decoder\.layers", "model.decoder.layers"),
    (r"(deformable_layer|text_enhancer_layer|decoder\.layers\.\d+)\.linear", r"\1.fc"),
]  # fmt: skip


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    """The authors' state dict under transformers' names."""
    out = {}
    for name, value in state.items():
        joined = re.search(r"\.(qkv\.|in_proj_)(weight|bias)$", name)
        parts = {name: value}
        if joined:
            stem = name[: joined.start()]
            parts = {
                f"{stem}.{p}.{joined[2]}": v for p, v in zip(("query", "key", "value"), value.chunk(3), strict=True)
            }
        for key, part in parts.items():
            for old, new in RENAMES:
                key = re.sub(old, new, key)
            out[key] = part
    return out


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as bert-base-uncased's, tiny."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = [f"[unused{i}]" for i in range(1030)]
    for token, place in FIXED.items():
        vocabulary[place] = token
    vocabulary[200 : 200 + len(WORDS)] = WORDS
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def authors(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint of the authors' implementation, with random weights: keys of the annotator's configuration."""
    pytest.importorskip("groundingdino")
    from groundingdino.models import build_model
    from groundingdino.util.slconfig import SLConfig

    from x2i.pipelines.annotators._groundingdino import _bert, _mended

    folder = tmp_path_factory.mktemp("authors")
    (folder / "tiny.py").write_text(CONFIG)
    torch.manual_seed(0)
    config = SLConfig.fromfile(str(folder / "tiny.py"))
    config.device = "cpu"
    with _mended(*_bert(bert)):
        model = build_model(config)
    with torch.no_grad():
        for name, p in model.named_parameters():  # nothing is left at zero, where it could not be told apart
            p += torch.randn(p.shape) * (0.3 if "norm" not in name and p.dim() == 1 else 0.05)
        model.feat_map.weight *= 0.1  # probabilities that are not all 0 or 1
        model.bbox_embed[0].layers[-1].bias[2:] += 1.5  # and boxes that overlap
        for layer in model.transformer.encoder.text_layers:
            layer.norm2.weight *= 0.05
            layer.norm2.bias *= 0.05
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "tiny.pth")
    return {"weights": str(folder / "tiny.pth"), "architecture": str(folder / "tiny.py"), "bert": str(bert)}


@pytest.fixture(scope="module")
def hub(authors: dict[str, str], bert: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same weights in a folder as the hub has them for transformers."""
    folder = tmp_path_factory.mktemp("hub")
    model = transformers.GroundingDinoForObjectDetection(
        transformers.GroundingDinoConfig(
            backbone_config=transformers.SwinConfig(out_indices=[2, 3, 4]),  # Swin-T
            text_config=transformers.BertConfig.from_pretrained(bert),
            num_queries=30, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, d_model=256,
            encoder_attention_heads=4, decoder_attention_heads=4,
        )
    )  # fmt: skip
    state = torch.load(authors["weights"], weights_only=True)["model"]
    wrong = model.load_state_dict(renamed({k.removeprefix("module."): v for k, v in state.items()}), strict=False)
    assert not [k for k in wrong.missing_keys if "swin.layernorm" not in k]  # which is not used
    assert not [k for k in wrong.unexpected_keys if not re.search(r"relative_position_index|pooler", k)]
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    return str(folder)


#: What a small random model needs: small pictures, and thresholds that let some boxes through.
SMALL: dict[str, Any] = {"side": 64, "longest": 120, "box_threshold": 0.5, "text_threshold": 0.3}


def annotator(**keys: Any) -> Grounding:
    return Grounding(GroundingConfig(**{**SMALL, **keys}))


def images(*names: str) -> list[bytes]:
    return [photo(n) for n in names]


@cache
def _photo(name: str) -> np.ndarray:
    return next(i.pixels for i in batch([photo(name)]) if i.pixels is not None)


def test_both_libraries_agree(authors: dict[str, str], hub: str) -> None:
    theirs, ours = Published(authors["weights"], authors["architecture"], authors["bert"]), Transformers(hub)
    asked = [p.ids for said in (["a red cat", "flag"], ["astronaut"]) for p in prompts(said, ours.tokenizer, 256)]
    pictures = torch.from_numpy(np.stack([prepare(_photo("astronaut"), 96, 160), prepare(_photo("camera"), 96, 160)]))
    for model in (theirs.model, ours.model):
        model.eval()
    with torch.inference_mode():
        (logits, boxes), (expected_logits, expected_boxes) = theirs(pictures, asked), ours(pictures, asked)
    length = max(map(len, asked))
    logits, expected_logits = logits[..., :length], expected_logits[..., :length]
    assert torch.isfinite(logits[0]).all() and logits[0].std() > 0.1 and boxes.std() > 0.05  # there is something to see
    assert torch.equal(torch.isfinite(logits), torch.isfinite(expected_logits))
    seen = torch.isfinite(logits)
    differences = (logits[seen] - expected_logits[seen]).abs().max(), (boxes - expected_boxes).abs().max()
    assert differences[0] < 5e-5 and differences[1] < 5e-6


@pytest.mark.parametrize("backend", ["transformers", "groundingdino"])
def test_a_batch_gives_what_its_rows_give(backend: str, authors: dict[str, str], hub: str) -> None:
    keys = authors if backend == "groundingdino" else {"weights": hub}
    made = annotator(backend=backend, phrases="entities.noun_chunks", **keys)
    files = images("astronaut", "chelsea", "camera", "astronaut")  # two sizes, unequal prompts, one row without
    said: list[list[str] | None] = [["a red cat", "the astronaut", "flag"], ["cat"], ["space suit"], None]
    table = run(made, batch(files, columns={"entities.noun_chunks": pa.array(said, pa.list_(pa.string()))}))
    for row in range(4):
        columns = {"entities.noun_chunks": pa.array(said[row : row + 1], pa.list_(pa.string()))}
        alone = made(batch(files[row : row + 1], columns=columns)).to_pylist()[0]
        together = table.slice(row, 1).to_pylist()[0]
        assert together["phrases"] == alone["phrases"] and together["phrase_index"] == alone["phrase_index"]
        np.testing.assert_allclose(together["scores"], alone["scores"], atol=1e-5)
        np.testing.assert_allclose(np.ravel(together["boxes"]), np.ravel(alone["boxes"]), atol=1e-4)
    rows = table.to_pylist()
    assert rows[3] == {"boxes": [], "phrases": [], "scores": [], "phrase_index": []}
    assert sum(len(r["boxes"]) for r in rows) > 3
    for row, phrases in zip(rows, said, strict=True):
        assert [(phrases or [])[i] for i in row["phrase_index"]] == row["phrases"]
        assert row["scores"] == sorted(row["scores"], reverse=True) and all(s > 0.5 for s in row["scores"])
        for x1, y1, x2, y2 in row["boxes"]:
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


def test_boxes_and_scores_are_those_of_the_published_post_processing(hub: str) -> None:
    processor = transformers.GroundingDinoProcessor(
        transformers.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 120}),
        transformers.AutoTokenizer.from_pretrained(hub),
    )
    made = annotator(weights=hub, phrases=["astronaut"], text_threshold=0.0)
    (row,) = run(made, batch(images("astronaut"))).to_pylist()
    inputs = processor(images=_photo("astronaut"), text="astronaut .", return_tensors="pt")
    with torch.inference_mode():
        output = made._backend.model(**inputs)
    output.logits = output.logits.clone()
    output.logits[..., [0, 2, 3]] = -torch.inf  # the library also counts [CLS], "." and [SEP]; phrases do not own them
    (expected,) = processor.post_process_grounded_object_detection(output, threshold=0.5, text_threshold=0.0)
    order, mine = expected["boxes"][:, 0].argsort(), np.argsort([b[0] for b in row["boxes"]])
    assert len(order) == len(mine) > 3
    np.testing.assert_allclose(np.take(row["scores"], mine), expected["scores"][order], atol=1e-3)
    np.testing.assert_allclose(np.array(row["boxes"])[mine], expected["boxes"][order].clamp(0, 1), atol=1e-3)


def test_too_many_phrases_are_asked_in_parts(hub: str) -> None:
    files, phrases = images("coffee"), ["coffee", "cup", "spoon", "a red cat", "space suit"]
    apart = [run(annotator(weights=hub, phrases=[p]), batch(files)).to_pylist()[0] for p in phrases]
    (split,) = run(annotator(weights=hub, phrases=phrases, max_tokens=6), batch(files)).to_pylist()
    # 6 tokens hold two phrases of one token, or one of three or two: coffee+cup, spoon, a red cat, space suit
    assert set(split["phrase_index"]) <= set(range(5))
    for index in (2, 3, 4):
        mine = [
            (s, b) for s, b, i in zip(split["scores"], split["boxes"], split["phrase_index"], strict=True) if i == index
        ]
        assert len(mine) == len(apart[index]["scores"])
        np.testing.assert_allclose([s for s, _ in mine], apart[index]["scores"], atol=1e-5)
    assert split["scores"] == sorted(split["scores"], reverse=True) and len(split["scores"]) > 0


def test_extreme_pictures_empty_batches_and_odd_phrases(hub: str) -> None:
    made = annotator(weights=hub, phrases=["cat", "", "...", "[SEP] dog?", "Cat", "\u4e00"])
    shapes = [(1, 1), (1, 5000), (5000, 1), (7, 3)]
    table = run(made, batch([drawn(np.full((*s, 3), 128, np.uint8)) for s in shapes]))
    assert all(set(r["phrase_index"]) <= {0, 3, 5} for r in table.to_pylist())  # tokenless and repeated phrases are out
    assert made(Batch([])).num_rows == 0
    assert run(annotator(weights=hub, phrases=[]), batch(images("coffee")))["boxes"].to_pylist() == [[]]


def test_entities_are_structs_and_mixed_precision_runs(hub: str) -> None:
    entities = pa.array([[{"text": "Astronaut", "label": "PERSON"}], []])
    made = annotator(weights=hub, phrases="entities.entities", precision="bf16")
    assert made.reads == ("entities.entities",)
    table = run(made, batch(images("astronaut", "coffee"), columns={"entities.entities": entities}))
    assert set(table["phrases"].to_pylist()[0]) == {"Astronaut"} and table["phrases"].to_pylist()[1] == []
    with pytest.raises(X2IError, match="lacks the column entities.entities"):
        made(batch(images("coffee")))


def test_overlapping_boxes_of_a_phrase_are_suppressed(hub: str) -> None:
    every = run(annotator(weights=hub, phrases=["cat"], box_threshold=0.0, text_threshold=0.0), batch(images("coffee")))
    few = run(
        annotator(weights=hub, phrases=["cat"], box_threshold=0.0, text_threshold=0.0, nms=0.3), batch(images("coffee"))
    )
    kept, given = few["boxes"].to_pylist()[0], every["boxes"].to_pylist()[0]
    assert 0 < len(kept) < len(given) and all(b in given for b in kept) and kept[0] == given[0]


def test_prompts_are_what_the_tokenizer_makes_of_the_published_text(bert: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    (prompt,) = prompts(["A red cat", "remote control."], tokenizer, 256)
    assert prompt.ids == tokenizer("a red cat . remote control .")["input_ids"]
    assert [tokenizer.decode(prompt.ids[a:b]) for a, b in prompt.spans] == ["a red cat", "remote control"]
    split = prompts(["cat dog", "cat", "dog " * 50], tokenizer, 6)
    assert [p.phrases for p in split] == [[0], [1], [2]] and all(len(p.ids) <= 6 for p in split)


def test_a_box_belongs_to_the_phrase_whose_tokens_all_speak() -> None:
    prompt = Prompt([101, 1, 2, 1012, 3, 1012, 102], [(1, 3), (4, 5)], [4, 7])  # "red cat" is 4, "cat" is 7
    p = np.zeros((4, 7), np.float32)
    p[0, [1, 2, 4]] = 0.6, 0.7, 0.5  # both words: red cat
    p[1, [1, 2, 4]] = 0.1, 0.7, 0.6  # not red: cat
    p[2, [1, 2, 4]] = 0.3, 0.3, 0.3  # nothing sure enough
    p[3, 3] = 0.9  # a full stop owns nothing
    queries, phrases, scores = owners(p, prompt, 0.35, 0.25)
    assert queries.tolist() == [0, 1] and phrases.tolist() == [4, 7]
    np.testing.assert_allclose(scores, [0.7, 0.6])


def test_sizes_are_the_published_ones() -> None:
    assert size_for(512, 512, 800, 1333) == (800, 800)
    assert size_for(480, 640, 800, 1333) == (800, 1066)
    assert size_for(400, 1600, 800, 1333) == (333, 1332)
    assert size_for(1, 5000, 800, 1333) == (16, 1333)


def test_faults_are_named(hub: str, authors: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"for fixed phrases write a list: \[cat\]"):
        GroundingConfig(phrases="cat")
    torch.save({"model": {"feat_map.weight": torch.zeros(256, 32)}}, tmp_path / "other.pth")
    with pytest.raises(X2IError, match="does not hold GroundingDINO"):
        annotator(**{**authors, "backend": "groundingdino", "weights": str(tmp_path / "other.pth")}).setup()


def test_defaults_name_weights_with_size_and_licence() -> None:
    (tiny,) = Grounding(GroundingConfig()).weights()
    assert (tiny.spec, tiny.licence) == ("IDEA-Research/grounding-dino-tiny", "Apache-2.0") and tiny.size
    swin, vocabulary = Grounding(GroundingConfig(backend="groundingdino")).weights()
    assert swin.spec.endswith(":groundingdino_swint_ogc.pth") and vocabulary.spec.endswith(":vocab.txt")


def test_on_a_gpu_no_tensor_stays_behind(hub: str) -> None:
    made = annotator(weights=hub, phrases=["a red cat", "flag"])
    made.setup()
    with gpu(made._runtime, made._backend.model):
        assert made(batch(images("astronaut", "coffee"))).num_rows == 2
