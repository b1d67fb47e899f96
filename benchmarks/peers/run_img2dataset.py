"""img2dataset over file:// URLs, from a ready list of URLs and captions. Runs in an environment of its own.

python run_img2dataset.py INDEX.parquet OUT WORKERS
"""

from __future__ import annotations

import os
import sys

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # a dependency asks the network for its newest version when imported


def main(index: str, out: str, workers: int) -> None:
    """Its own defaults but for what makes the work the same."""
    from img2dataset import download

    os.makedirs(out)
    download(
        url_list=index,
        input_format="parquet",
        url_col="url",
        caption_col="caption",
        output_folder=out,
        output_format="webdataset",
        processes_count=workers,
        thread_count=4,  # for a disk; the default of 256 is for a network
        number_sample_per_shard=1000,
        image_size=512,
        resize_mode="keep_ratio",  # the shorter side becomes image_size
        resize_only_if_bigger=True,
        skip_reencode=True,  # pictures that are small enough pass through
        downscale_interpolation="area",
        encode_quality=95,
        encode_format="jpg",
        compute_hash="sha256",
        extract_exif=False,  # the others do not
        retries=0,
        enable_wandb=False,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
