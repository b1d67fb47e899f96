"""`masks`: real architectures, random weights, in the published formats; the two libraries against each other."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.pipelines.annotating import batch, drawn, photo, run
from tests.pipelines.annotators.devices import gpu
from x2i.base.errors import X2IError
from x2i.pipelines.annotators._segment_anything import Published, Transformers, build, prepare
from x2i.pipelines.annotators.base import Batch
from x2i.pipelines.annotators.masks import Masks, MasksConfig, stability

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
coco = pytest.importorskip("pycocotools.mask")

#: From the authors' parameter names to transformers'.
RENAMES = [
    (r"^image_encoder", "vision_encoder"),
    (r"patch_embed\.proj", "patch_embed.projection"),
    (r"blocks", "layers"),
    (r"neck\.0", "neck.conv1"),
    (r"neck\.1", "neck.layer_norm1"),
    (r"neck\.2", "neck.conv2"),
    (r"neck\.3", "neck.layer_norm2"),
    (r"\.norm", ".layer_norm"),
    (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    (r"point_embeddings", "point_embed"),
    (r"mask_downscaling\.0", "mask_embed.conv1"),
    (r"mask_downscaling\.1", "mask_embed.layer_norm1"),
    (r"mask_downscaling\.3", "mask_embed.conv2"),
    (r"mask_downscaling\.4", "mask_embed.layer_norm2"),
    (r"mask_downscaling\.6", "mask_embed.conv3"),
    (r"output_upscaling\.0", "upscale_conv1"),
    (r"output_upscaling\.1", "upscale_layer_norm"),
    (r"output_upscaling\.3", "upscale_conv2"),
    (r"((?:mlps\.\d|iou_prediction_head)\.)layers\.0", r"\1proj_in"),
    (r"((?:mlps\.\d|iou_prediction_head)\.)layers\.1", r"\1layers.0"),
    (r"((?:mlps\.\d|iou_prediction_head)\.)layers\.2", r"\1proj_out"),
]

BOXES = [[0.3, 0.1, 0.7, 0.6], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.52, 0.9]]


def lively(model: Any) -> Any:
    """No parameter at zero, where it could not be told apart; masks that are neither empty nor full."""
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape) * 0.1
        for mlp in model.mask_decoder.output_hypernetworks_mlps:
            last = getattr(mlp, "proj_out", None) or mlp.layers[-1]
            last.weight *= 30
    return model.eval()


@pytest.fixture(scope="module")
def authors(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the authors' SAM, tiny: 64 pixels, 2 blocks of which the second sees all."""
    pytest.importorskip("segment_anything")
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    torch.manual_seed(0)
    model = Sam(
        ImageEncoderViT(
            depth=2, embed_dim=32, img_size=128, mlp_ratio=2, num_heads=2, patch_size=16, use_rel_pos=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), global_attn_indexes=(1,), window_size=3, out_chans=32,
        ),
        PromptEncoder(embed_dim=32, image_embedding_size=(8, 8), input_image_size=(128, 128), mask_in_chans=16),
        MaskDecoder(
            transformer_dim=32, transformer=TwoWayTransformer(depth=2, embedding_dim=32, num_heads=8, mlp_dim=64),
            iou_head_depth=3, iou_head_hidden_dim=32,
        ),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("authors") / "sam_vit_t.pth"
    torch.save(lively(model).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def hub(authors: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same weights in a folder as the hub has them for transformers."""
    model = transformers.SamModel(
        transformers.SamConfig(
            vision_config=transformers.SamVisionConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=128, mlp_ratio=2.0,
                global_attn_indexes=[1], window_size=3, output_channels=32, num_pos_feats=16,
            ),
            prompt_encoder_config=transformers.SamPromptEncoderConfig(hidden_size=32, image_size=128),
            mask_decoder_config=transformers.SamMaskDecoderConfig(hidden_size=32, mlp_dim=64, iou_head_hidden_dim=32),
        )
    )  # fmt: skip
    state = {}
    for name, value in torch.load(authors, weights_only=True).items():
        for old, new in RENAMES:
            name = re.sub(old, new, name)
        state[name] = value
    state["shared_image_embedding.positional_embedding"] = state["prompt_encoder.shared_embedding.positional_embedding"]
    wrong = model.load_state_dict(state, strict=False)
    assert not wrong.missing_keys and not wrong.unexpected_keys
    folder = tmp_path_factory.mktemp("hub")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sam2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny SAM 2 in the hub's format."""
    torch.manual_seed(0)
    config = transformers.Sam2Config(
        vision_config=transformers.Sam2VisionConfig(
            backbone_config=transformers.Sam2HieraDetConfig(
                hidden_size=8, num_attention_heads=1, image_size=[128, 128], blocks_per_stage=[1, 1, 2, 1],
                embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 2],
                window_size_per_stage=[4, 2, 4, 2], global_attention_blocks=[3],
            ),
            backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=32,
            backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        ),
        prompt_encoder_config=transformers.Sam2PromptEncoderConfig(hidden_size=32, image_size=128),
        mask_decoder_config=transformers.Sam2MaskDecoderConfig(
            hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32
        ),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sam2")
    lively(transformers.Sam2Model(config)).save_pretrained(folder)
    return str(folder)


def asking(*boxes: list[list[float]] | None) -> dict[str, Any]:
    return {"grounding.boxes": pa.array(boxes, pa.list_(pa.list_(pa.float32(), 4)))}


def picture(name: str) -> np.ndarray:
    return next(i.pixels for i in batch([photo(name)]) if i.pixels is not None)


@pytest.mark.parametrize("multimask", [False, True])
def test_both_libraries_agree(authors: str, hub: str, multimask: bool) -> None:
    theirs, ours = Published(authors), Transformers(hub)
    assert (theirs.side, theirs.square) == (ours.side, ours.square) == (128, False)
    image = torch.from_numpy(prepare(picture("chelsea"), 128, False))[None]
    boxes = torch.tensor(BOXES) * 128

    def both() -> tuple[float, float]:
        with torch.inference_mode():
            found = [m.decode(m.embed(image)[0], boxes, multimask) for m in (theirs, ours) if m.model.eval()]
        (logits, quality), (expected_logits, expected_quality) = found
        assert logits.shape == (3, 3 if multimask else 1, 32, 32) and logits.std() > 0.5 and quality.std() > 0.01
        return float((logits - expected_logits).abs().max()), float((quality - expected_quality).abs().max())

    differences = both()
    for module in ours.model.mask_decoder.transformer.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5  # as the authors have it; transformers has 1e-6, and that is all the difference
    same = both()
    assert differences[0] < 2e-3 and differences[1] < 1e-4
    assert same[0] < 5e-5 and same[1] < 1e-6


def test_masks_are_those_of_the_authors_predictor(authors: str) -> None:
    from segment_anything import SamPredictor

    made = Masks(MasksConfig(backend="segment_anything", weights=authors, multimask=True))
    (row,) = run(made, batch([photo("chelsea")], columns=asking(BOXES))).to_pylist()
    pixels = picture("chelsea")
    height, width = pixels.shape[:2]
    predictor = SamPredictor(made._backend.model)
    predictor.set_image(pixels)
    for index, box in enumerate(BOXES):
        masks, quality, _ = predictor.predict(box=np.array(box) * [width, height, width, height])
        best = quality.argmax()
        mask = coco.decode(row["masks"][index])
        assert row["masks"][index]["size"] == [height, width] == list(mask.shape)
        assert (mask == masks[best]).mean() > 0.999 and 0 < mask.mean() < 1
        assert row["predicted_iou"][index] == pytest.approx(float(quality[best]), abs=1e-3)
        assert row["area"][index] == pytest.approx(mask.mean(), abs=1e-6)
        ys, xs = np.nonzero(mask)
        tight = [xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height]
        np.testing.assert_allclose(row["boxes"][index], tight, atol=1e-6)
    assert row["box_index"] == [0, 1, 2] and all(0 <= s <= 1 for s in row["stability"])


def test_masks_are_those_of_transformers_processors(hub: str, sam2: str) -> None:
    pixels = picture("chelsea")
    height, width = pixels.shape[:2]
    boxes = [[[x * s for x, s in zip(b, (width, height, width, height), strict=True)] for b in BOXES]]
    square = {"height": 128, "width": 128}
    sam_images = transformers.SamImageProcessor(size={"longest_edge": 128}, pad_size=square)
    for folder, processor in (
        (hub, transformers.SamProcessor(sam_images)),
        (sam2, transformers.Sam2Processor(transformers.Sam2ImageProcessor(size=square))),
    ):
        made = Masks(MasksConfig(weights=folder))
        (row,) = run(made, batch([photo("chelsea")], columns=asking(BOXES))).to_pylist()
        inputs = processor(images=pixels, input_boxes=boxes, return_tensors="pt")
        sizes = [inputs.pop("original_sizes")]
        if "reshaped_input_sizes" in inputs:
            sizes.append(inputs.pop("reshaped_input_sizes"))
        with torch.inference_mode():
            out = made._backend.model(**{k: v.float() for k, v in inputs.items()}, multimask_output=False)
        (masks,) = processor.image_processor.post_process_masks(out.pred_masks, *sizes)
        for index, code in enumerate(row["masks"]):
            assert (coco.decode(code) == masks[index, 0].numpy()).mean() > 0.995
        np.testing.assert_allclose(row["predicted_iou"], out.iou_scores[0, :, 0], atol=5e-3)


@pytest.mark.parametrize("kind", ["segment_anything", "sam", "sam2"])
def test_a_batch_gives_what_its_rows_give(kind: str, authors: str, hub: str, sam2: str) -> None:
    weights = {"segment_anything": authors, "sam": hub, "sam2": sam2}[kind]
    made = Masks(
        MasksConfig(backend=kind if kind == "segment_anything" else "transformers", weights=weights, boxes_per_call=2)
    )
    files = [photo(n) for n in ("astronaut", "coffee", "chelsea", "camera")]
    asked = [BOXES, None, BOXES[:1], []]
    table = run(made, batch(files, columns=asking(*asked)))
    for row, boxes in enumerate(asked):
        alone = made(batch(files[row : row + 1], columns=asking(boxes))).to_pylist()[0]
        together = table.slice(row, 1).to_pylist()[0]
        assert together["box_index"] == alone["box_index"] == list(range(len(boxes or [])))
        for a, b in zip(together["masks"], alone["masks"], strict=True):
            assert (coco.decode(a) == coco.decode(b)).mean() > 0.9999
        np.testing.assert_allclose(together["predicted_iou"], alone["predicted_iou"], atol=1e-5)
        np.testing.assert_allclose(together["stability"], alone["stability"], atol=1e-3)


def test_the_video_checkpoints_that_are_published_load_as_image_models(sam2: str, tmp_path: Path) -> None:
    shutil.copytree(sam2, tmp_path / "video")  # facebook/sam2.1-hiera-* name this type, and hold more weights
    config = json.loads((tmp_path / "video" / "config.json").read_text())
    (tmp_path / "video" / "config.json").write_text(json.dumps({**config, "model_type": "sam2_video"}))
    tables = [
        run(Masks(MasksConfig(weights=str(f))), batch([photo("coffee")], columns=asking(BOXES)))
        for f in (sam2, tmp_path / "video")
    ]
    assert tables[0].equals(tables[1])


def test_masks_of_large_pictures_are_limited(hub: str) -> None:
    made = Masks(MasksConfig(weights=hub, side=100))
    (row,) = run(made, batch([photo("chelsea")], columns=asking(BOXES))).to_pylist()  # 300 x 451
    assert all(c["size"] == [67, 100] and coco.decode(c).shape == (67, 100) for c in row["masks"])
    full = Masks(MasksConfig(weights=hub, side=None))
    (whole,) = run(full, batch([photo("chelsea")], columns=asking(BOXES))).to_pylist()
    assert all(c["size"] == [300, 451] for c in whole["masks"])
    np.testing.assert_allclose(row["area"], whole["area"], atol=0.02)


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_extreme_pictures_and_empty_batches(kind: str, hub: str, sam2: str) -> None:
    made = Masks(MasksConfig(weights=hub if kind == "sam" else sam2))
    shapes = [(1, 1), (1, 5000), (5000, 1), (7, 3)]
    files = [drawn(np.full((*s, 3), 128, np.uint8)) for s in shapes]
    table = run(made, batch(files, columns=asking(*[BOXES] * 4)))
    sizes = [r["masks"][0]["size"] for r in table.to_pylist()]
    assert sizes == [[1, 1], [1, 1024], [1024, 1], [7, 3]]
    assert made(Batch([], pa.table(asking()))).num_rows == 0
    half = Masks(MasksConfig(weights=hub if kind == "sam" else sam2, precision="bf16"))
    assert len(run(half, batch([photo("coffee")], columns=asking(BOXES)))["masks"].to_pylist()[0]) == 3


def test_automatic_mode_is_the_authors_generator(authors: str) -> None:
    from segment_anything import SamAutomaticMaskGenerator

    keys = {"points_per_side": 4, "min_predicted_iou": -9.0, "min_stability": 0.3, "nms": 1.0}
    made = Masks(MasksConfig(backend="segment_anything", mode="automatic", weights=authors, **keys))
    assert made.reads == ()
    thin = drawn(np.zeros((1, 5000, 3), np.uint8))
    rows = run(made, batch([photo("coffee"), thin, drawn(np.zeros((1, 1, 3), np.uint8))])).to_pylist()
    found = SamAutomaticMaskGenerator(
        made._backend.model, points_per_side=4, pred_iou_thresh=-9.0, stability_score_thresh=0.3, box_nms_thresh=1.0
    ).generate(picture("coffee"))
    assert len(found) == len(rows[0]["masks"]) > 3
    for code, box, share, mask in zip(rows[0]["masks"], rows[0]["boxes"], rows[0]["area"], found, strict=True):
        assert (coco.decode(code) == mask["segmentation"]).all() and share == pytest.approx(mask["segmentation"].mean())
        assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
    assert set(rows[0]["box_index"]) == {None} and rows[1]["masks"] == []
    strict = Masks(
        MasksConfig(
            backend="segment_anything", mode="automatic", weights=authors, **{**keys, "min_predicted_iou": 99.0}
        )
    )
    assert run(strict, batch([photo("coffee")]))["masks"].to_pylist() == [[]]


def test_the_published_sizes_are_read_from_the_checkpoint() -> None:
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        for name, blocks in (("vit_b", 12), ("vit_l", 24), ("vit_h", 32)):
            expected = sam_model_registry[name]()
            built = build(expected.state_dict())
            assert str(built) == str(expected) and len(built.image_encoder.blocks) == blocks
            for mine, theirs in zip(built.image_encoder.blocks, expected.image_encoder.blocks, strict=True):
                assert (mine.window_size, mine.attn.num_heads) == (theirs.window_size, theirs.attn.num_heads)


def test_stability_is_the_iou_of_a_stricter_and_a_laxer_mask() -> None:
    logits = torch.tensor([[[5.0, 5.0, 0.5, -9.0]], [[-9.0, -9.0, -9.0, -9.0]]])
    np.testing.assert_allclose(stability(logits), [2 / 3, 0])


def test_faults_are_named(hub: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="automatic needs backend: segment_anything"):
        MasksConfig(mode="automatic")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(X2IError, match="does not hold Sam"):
        Masks(MasksConfig(backend="segment_anything", weights=str(tmp_path / "other.pth"))).setup()
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(X2IError, match="a model of type bert"):
        Masks(MasksConfig(weights=str(tmp_path / "bert"))).setup()
    made = Masks(MasksConfig(weights=hub, boxes="other.boxes"))
    assert made.reads == ("other.boxes",)
    with pytest.raises(X2IError, match=r"lacks the column other\.boxes"):
        run(made, batch([photo("coffee")], columns=asking(BOXES)))


def test_defaults_name_weights_with_size_and_licence() -> None:
    for config in (MasksConfig(), MasksConfig(backend="segment_anything")):
        (weights,) = Masks(config).weights()
        assert weights.licence == "Apache-2.0" and weights.size and weights.spec == config.weights


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_automatic_mode_in_half_precision(precision: str, authors: str) -> None:
    keys = {"points_per_side": 4, "min_predicted_iou": -9.0, "min_stability": 0.3, "nms": 1.0, "precision": precision}
    made = Masks(MasksConfig(backend="segment_anything", mode="automatic", weights=authors, **keys))
    (row,) = run(made, batch([photo("coffee")])).to_pylist()
    assert len(row["masks"]) > 3 and np.isfinite(row["predicted_iou"]).all()


@pytest.mark.parametrize("kind", ["segment_anything", "sam", "sam2"])
def test_on_a_gpu_no_tensor_stays_behind(kind: str, authors: str, hub: str, sam2: str) -> None:
    backend = "segment_anything" if kind == "segment_anything" else "transformers"
    made = Masks(MasksConfig(backend=backend, weights={"sam": hub, "sam2": sam2}.get(kind, authors)))
    made.setup()
    with gpu(made._runtime, made._backend.model):
        assert made(batch([photo("astronaut"), photo("coffee")], columns=asking(BOXES, BOXES))).num_rows == 2
