"""`image`: what the file's header says, checked before anything is decoded."""

from collections.abc import Sequence

import pyarrow as pa

from x2i.pipelines.annotators.base import Annotator, Item


class ImageAnnotator(Annotator):
    """Format, size and identity of the file. Width and height are those of the upright picture, in pixels."""

    name = "image"
    needs = "header"
    columns = pa.schema(
        {
            "format": pa.string(),  # Pillow's name: JPEG, PNG, WEBP …
            "width": pa.int32(),
            "height": pa.int32(),
            "mode": pa.string(),  # as stored: RGB, L, CMYK, P, RGBA, I;16 …
            "bits": pa.int16(),  # per channel
            "orientation": pa.int16(),  # EXIF, 1 (upright) to 8
            "frames": pa.int32(),  # more than 1 for animations: the first is used
            "icc": pa.string(),  # description of the colour profile if it is not sRGB
            "bytes": pa.int64(),
            "sha256": pa.string(),
        }
    )

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        rows = [
            {
                "format": i.header.format,
                "width": i.header.width,
                "height": i.header.height,
                "mode": i.header.mode,
                "bits": i.header.bits,
                "orientation": i.header.orientation,
                "frames": i.header.frames,
                "icc": i.header.icc,
                "bytes": len(i.data),
                "sha256": i.image_id,
            }
            for i in batch
        ]
        return pa.Table.from_pylist(rows, schema=self.columns)
